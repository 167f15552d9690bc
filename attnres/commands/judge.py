"""`python -m attnres.commands.judge TABLE --margin M`: the probe's statistics for anybody's table; prints the report.

A row of TABLE (.csv or .parquet) is an effect of a component in a unit: a head ablated in a prompt, a module in a
document, a checkpoint against another in a sample. `docs/judge.md` has examples.
"""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from attnres.commands.door import parsed_command
from attnres.errors import ConfigError
from attnres.statistics.config import StatisticsConfig

# Role of a column -> what stands in it.
_COLUMNS = {
    "unit": "what is resampled: the document or prompt (default: unit, document)",
    "component": "what was edited or compared; several columns name it together (default: component, cell)",
    "group": "family of tests, which has a Holm of its own (default: group, if it is there)",
    "effect": "the effect, e.g. edited less clean loss (default: effect, dnll)",
    "second": "a second metric, which is shown to be below or above its margin (default: second, kl, if there)",
    "control": "effect of the component's control in the same row (default: control, if it is there)",
}
_SEVERAL = ("unit", "component", "group")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    default = StatisticsConfig()
    parser = ArgumentParser(
        prog="python -m attnres.commands.judge",
        description="Verdicts on the components of a table: equivalence, Holm, power. A row is a component in a unit.",
    )
    parser.add_argument("table", type=Path, help="a .csv or .parquet file")
    for role, meaning in _COLUMNS.items():
        several = {"nargs": "+"} if role in _SEVERAL else {"nargs": 1}
        parser.add_argument(f"--{role}", metavar="COLUMN", default=(), help=meaning, **several)
    parser.add_argument(
        "--margin", type=float, required=True, help="an effect within it is negligible; the table's unit"
    )
    parser.add_argument("--second-margin", type=float, help="of the second metric (default: --margin)")
    parser.add_argument("--family-size", type=int, help="tests planned in each group (default: those in the table)")
    for name, meaning in (("alpha", "level"), ("power", "at which documents_needed and detectable are computed")):
        parser.add_argument(f"--{name}", type=float, default=getattr(default, name), help=meaning)
    for name, meaning in (("sign_flips", "random flips"), ("bootstrap", "resamples"), ("seed", "of both")):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(default, name), help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of cells.csv and the report (default: <table>-judged)")
    return parsed_command(parser, _judge, arguments)


def _judge(given: Namespace) -> None:
    out = given.out or given.table.with_name(f"{given.table.stem}-judged")
    try:
        config = StatisticsConfig(
            **{name: getattr(given, name) for name in ("margin", "alpha", "power", "sign_flips", "bootstrap", "seed")}
        )
        for name in ("second_margin", "family_size"):
            if getattr(given, name) is not None and not 0 < getattr(given, name) < float("inf"):
                raise ConfigError(f"statistics.{name}={getattr(given, name)}: expected a positive number")
        from attnres.report.any_table import write_any_table
        from attnres.statistics.any_table import component_table
        from attnres.tables.foreign import read_foreign

        table = read_foreign(given.table, {role: getattr(given, role) for role in _COLUMNS})
        cells = component_table(table, config, given.second_margin, given.family_size)
    except ConfigError as error:
        # The statistics name their keys as a configuration does; here they are flags.
        flag = re.sub(r"statistics\.(\w+)", lambda found: f"--{found[1].replace('_', '-')}", str(error))
        raise ConfigError(flag) from error
    sys.stdout.write(f"{write_any_table(out, table, cells, config, given.second_margin)}\n")


if __name__ == "__main__":
    sys.exit(main())
