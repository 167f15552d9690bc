"""Probe the depth routing of a checkpoint against its vanilla baseline: `python probe.py --help`."""

from attnres.commands.probe import main

if __name__ == "__main__":
    main()
