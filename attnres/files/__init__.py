"""What is written to disk and read from it: whole files, run folders, where a result came from."""
