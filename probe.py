"""Probe the depth routing of a checkpoint against its vanilla baseline: `python probe.py --help`."""

from attnres.cli import probe

if __name__ == "__main__":
    probe()
