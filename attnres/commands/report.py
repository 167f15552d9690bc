"""`python -m attnres.commands.report`: draw the report of a probe again, or one over several; prints its path."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from attnres.commands.door import parsed_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(
        prog="python -m attnres.commands.report", description="Redraw a probe's report, or compare several probes."
    )
    parser.add_argument("folders", type=Path, nargs="+", help="a folder that probe.py wrote; several are compared")
    parser.add_argument(
        "--out", type=Path, help="where the report goes (default: DIR, or comparison-* beside the first)"
    )
    return parsed_command(parser, _report, arguments)


def _report(given: Namespace) -> None:
    from attnres.report.comparison import default_folder, write_comparison
    from attnres.report.report import write_report

    if len(given.folders) == 1:
        path = write_report(given.folders[0], given.out)
    else:
        path = write_comparison(given.folders, given.out or default_folder(given.folders))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    sys.exit(main())
