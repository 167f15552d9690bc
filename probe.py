"""Probe the depth routing of a checkpoint against its vanilla baseline: `python probe.py --help`."""

from attnres.commands.hydra_door import probe

if __name__ == "__main__":
    probe()
