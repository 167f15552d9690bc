"""Signals, ranks and memory of processes."""
