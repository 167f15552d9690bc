"""`python -m tests.faults [--long]`: breaks a tiny project in every way that is promised to be harmless.

The short form plays the scenarios marked so; the long form all of them, random kills, random flips, hostile files
against every entry point, and two-process runs. The outcome is a table, `summary.json` and `README.md` in `--out`.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before torch is imported: a process that forks has one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.faults import flips, hostile, hostile_checkpoints, hostile_inputs, kills, special
from tests.faults.runner import Outcome, play
from tests.faults.scenarios import SCENARIOS
from tests.faults.table import write_table
from tests.faults.world import Base, warm_up

PARTS = ("scenarios", "hostile", "special", "flips", "kills", "probe-kills", "real-kills")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--long", action="store_true", help="everything, about an hour on two busy cores")
    parser.add_argument("--kills", type=int, help="random SIGKILLs, a fifth of them into probes (long: 200)")
    parser.add_argument("--real-kills", type=int, help="of these, with the real command line (long: 20)")
    parser.add_argument("--flips", type=int, help="random flips and truncations (long: 1000, short: 100)")
    parser.add_argument("--only", help="scenarios and hostile files whose name has a match for this expression")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by comma")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills and flips")
    parser.add_argument("--out", type=Path, help="folder for the table")
    parser.add_argument("--work", type=Path, help="folder to break things in; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=arguments.work) as work:
        return _run(arguments, Path(work).resolve())


def _run(arguments: argparse.Namespace, work: Path) -> int:
    long, parts, only = arguments.long, arguments.parts.split(","), arguments.only
    outcomes: list[Outcome] = []

    def wanted(name: str, short: bool) -> bool:
        return re.search(only, name) is not None if only is not None else long or short

    def add(play_one: Callable[[], Outcome | list[Outcome]]) -> None:
        found = play_one()
        for outcome in found if isinstance(found, list) else [found]:
            outcomes.append(outcome)
            state = "ok  " if outcome.ok else "FAIL"
            print(f"{state} {outcome.seconds:6.1f} s  {outcome.part}: {outcome.name}  {outcome.wrong}", flush=True)
            if arguments.out:
                write_table(arguments.out, outcomes, _command(), work)

    warm_up()
    base = Base(work / "base")
    if "scenarios" in parts:
        for scenario in SCENARIOS:
            if wanted(scenario.name, scenario.short):
                add(lambda scenario=scenario: play(base, scenario))
    if "hostile" in parts:
        for case in (*hostile_checkpoints.CASES, *hostile_inputs.CASES):
            if wanted(f"{case.entry}: {case.payload}", case.short):
                add(lambda case=case: hostile.play(base, case))
    if "special" in parts:
        for name, (short, action) in special.ACTIONS.items():
            if wanted(name, short):
                add(lambda action=action, name=name: action(base, name))
    number = arguments.flips if arguments.flips is not None else 1000 if long else 100
    if "flips" in parts and only is None and number:
        add(lambda: flips.play(base, number, arguments.seed))
        add(lambda: flips.no_false_alarm(base, 100 if long else 10))
    number = arguments.kills if arguments.kills is not None else 200 if long else 0
    real = arguments.real_kills if arguments.real_kills is not None else number // 10
    probes = number // 5
    for part, count, action in (
        ("kills", number - probes - real, kills.training),
        ("probe-kills", probes, kills.probing),
        ("real-kills", real, kills.real),
    ):
        if part in parts and only is None and count:
            add(partial(action, base, count, arguments.seed))
    failed = [outcome for outcome in outcomes if not outcome.ok]
    print(f"{len(outcomes)} played, {len(failed)} not as promised, Python {platform.python_version()}")
    return 1 if failed or not outcomes else 0


def _command() -> str:
    return " ".join(["python -m tests.faults", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
