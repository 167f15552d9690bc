"""`python -m attnres.commands.error_rates`: how often the probe's tests are wrong, by simulation; prints the table."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from attnres.commands.door import parsed_command
from attnres.errors import NumericsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 5 where a bound is not met."""
    parser = ArgumentParser(
        prog="python -m attnres.commands.error_rates",
        description="Error rates and power of the probe's statistics, measured by simulation.",
    )
    parser.add_argument("--full", action="store_true", help="enough replicates for the bounds")
    parser.add_argument("--out", type=Path, default=Path("runs/power"), help="folder of power.json and power.md")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    return parsed_command(parser, _error_rates, arguments)


def _error_rates(given: Namespace) -> int:
    from attnres.statistics.error_rates import Rate, run, table

    def show(rate: Rate) -> None:
        sys.stderr.write(
            f"{rate.rate:.4f} in {rate.seconds:.0f} s: {rate.scenario}, {rate.distribution}, {rate.documents}\n"
        )

    rates = run(given.out, given.full, given.jobs, show)
    sys.stdout.write(table(rates))
    # A sketch has too few replicates to show that a bound is met.
    return NumericsError.code if given.full and any(rate.met is False for rate in rates) else 0


if __name__ == "__main__":
    sys.exit(main())
