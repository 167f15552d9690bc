"""Who sees what: reads, sources, families, bands. Pure Python."""
