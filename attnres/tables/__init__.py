"""The tables of a probe: their columns, names and folder."""
