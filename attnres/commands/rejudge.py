"""`python -m attnres.commands.rejudge`: judge what a probe measured, without its models.

Without `--out` it compares, and ends with 5 where a recomputed table differs from the folder's by a byte. With `--out`
it judges anew; with several folders it judges the members of a swept grid as one.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from attnres.commands.door import parsed_command
from attnres.config import agreeing
from attnres.errors import ConfigError, NumericsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(
        prog="python -m attnres.commands.rejudge", description="Judge what a probe measured, without its models."
    )
    parser.add_argument("folders", type=Path, nargs="+", help="a folder that probe.py wrote, or the members of a grid")
    parser.add_argument("--out", type=Path, help="where the probe judged anew, or the combined one, is written")
    return parsed_command(parser, _rejudge, arguments)


def _rejudge(given: Namespace) -> int:
    if given.out is None and len(given.folders) > 1:
        raise ConfigError("--out: expected a folder for the combined probe, received none")
    # Checks cost little; statistics and the report, whose libraries take seconds to load, come after them.
    from attnres.tables.folder import read_measured

    if given.out is None:
        measured = read_measured(given.folders[0])
        from attnres.statistics.rejudge import recompute

        _, differing = recompute(measured)
        sys.stdout.write(f"differ: {', '.join(differing)}\n" if differing else "all tables are reproduced exactly\n")
        return NumericsError.code if differing else 0

    from attnres.interventions.config import GridConfig
    from attnres.report.report import write_report
    from attnres.statistics.rejudge import combine, judge_anew

    if len(given.folders) > 1:
        combine(given.folders, given.out, partial(agreeing, GridConfig))
    else:
        judge_anew(read_measured(given.folders[0], older=True), given.out)
    sys.stdout.write(f"{write_report(given.out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
