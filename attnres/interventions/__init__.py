"""What is done to a read: ids, edits, donors, and the grid of cells."""
