"""Plays a scenario: fault, then the state of the folder, then what the same command does without the fault."""

import time
from dataclasses import asdict, dataclass

from attnres.files.run_folder import list_steps
from tests.faults.scenarios import Scenario
from tests.faults.world import Base, World, check, readable, same_probe, same_run


@dataclass(frozen=True)
class Outcome:
    """A line of the table; `wrong` is empty if everything was as promised."""

    part: str
    row: str
    name: str
    expected: str
    found: str
    wrong: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"ok": self.ok}


def play(base: Base, scenario: Scenario) -> Outcome:
    """Runs one scenario in a world of its own."""
    began = time.monotonic()
    world = base.world("scenario", scenario.start)
    if scenario.damage:
        scenario.damage(world)
    trained = next(world.runs.glob("attnres-*"), "")
    more = [word.format(folder=world.folder, trained=trained) for word in scenario.more]
    child = world.run(scenario.command, *more, fault=scenario.fault, environment=scenario.environment)
    output = child.output.strip()
    wrong = [] if child.code == scenario.code else [f"exit code {child.code}: {output[-600:]}"]
    wrong += [f"did not say {text!r}: {output[-600:]}" for text in scenario.says if text not in output]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if child.code > 0 and len(errors) != 1:
        wrong.append(f"{len(errors)} lines name the cause")
    if "Traceback" in output:
        wrong.append("a traceback without debug=true")
    if scenario.steps is not None and (steps := tuple(list_steps(world.trained))) != scenario.steps:
        wrong.append(f"steps left: {steps}, expected {scenario.steps}")
    if not scenario.damage and (message := check(lambda: readable(world), world)):
        wrong.append(f"after the fault: {message}")
    if not wrong:
        wrong += _afterwards(base, world, scenario, more, child.code)
    found = f"{child.code}, then {scenario.then}" if not wrong else str(child.code)
    expected = f"{scenario.code}, then {scenario.then}"
    return Outcome("scenario", scenario.row, scenario.name, expected, found, "; ".join(wrong), time.monotonic() - began)


def _afterwards(base: Base, world: World, scenario: Scenario, more: list[str], code: int) -> list[str]:
    if scenario.then == "nothing":
        return []
    if scenario.then == "again":
        again = world.run(scenario.command, *more, environment=scenario.environment).code
        return [] if again == code else [f"the second time, exit code {again}"]
    if code != 0:
        child = world.run(scenario.command, *more)
        if child.code != 0:
            return [f"the next run ended with {child.code}: {child.output.strip()[-600:]}"]
    compare = same_run if scenario.then == "same run" else same_probe
    message = check(lambda: (readable(world), compare(world, base.whole)), world)
    return [f"afterwards: {message}"] if message else []
