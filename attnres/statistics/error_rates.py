"""Error rates and power of the probe's statistics, measured by simulation with the probe's own functions.

    python -m attnres.commands.error_rates          a few seconds: a sketch
    python -m attnres.commands.error_rates --full   enough replicates for the bounds; tens of minutes on one core

Each scenario draws tables of documents x cells whose truth is known, in nats/token, and counts how often the tests
that the report's verdicts rest on say something. Error rates must have a 99% binomial upper bound (Clopper-Pearson,
one-sided) of at most 0.06 at level .05, and power a lower bound of at least 0.9; scenarios of kind "shown" bound
nothing: they show a limit, or what would go wrong otherwise. Intervals (BCa) take no part in verdicts, and are left
out but for their own coverage. Seeds are fixed: the same command gives the same numbers.
"""

import json
import multiprocessing
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from attnres.config import to_plain
from attnres.files.whole_files import write_json, write_text
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.simulation import (
    CELLS,
    DISTRIBUTIONS,
    Draw,
    NoEffect,
    Outcome,
    detection,
    dissociation,
    family_wise,
    interval_misses,
    motif,
    negligible_at_margin,
    ranking,
    stopped_interval_misses,
    student_family_wise,
)

Kind = Literal["error", "power", "shown"]

ERROR_LIMIT, POWER_LIMIT, CONFIDENCE = 0.06, 0.9, 0.99
_SEED = 2026
_DEFAULTS = StatisticsConfig()
_SKETCH = 40
_NORMAL, _HEAVY, _SKEWED, _LEFT = DISTRIBUTIONS


@dataclass(frozen=True)
class Scenario:
    """One thing to measure.

    Attributes:
        name: what is counted, and under which truth.
        kind: "error" and "power" are held against a bound, "shown" is not.
        distribution: of values over documents; a key of `DISTRIBUTIONS`.
        draw: (rng, replicates, config) -> one outcome per replicate.
        replicates: in the full run.
        chunk: replicates drawn at a time; their flips are shared, the next chunk has others.
    """

    name: str
    kind: Kind
    distribution: str
    documents: int
    draw: Outcome
    replicates: int
    chunk: int = 100


@dataclass(frozen=True)
class Rate:
    """A rate that was measured: `low` and `high` are one-sided 99% bounds; `met` is None where nothing is asked."""

    scenario: str
    kind: Kind
    distribution: str
    documents: int
    replicates: int
    count: int
    rate: float
    low: float
    high: float
    met: bool | None
    seconds: float


def measure(scenario: Scenario, replicates: int, config: StatisticsConfig = _DEFAULTS) -> Rate:
    """Count a scenario's outcome over replicates."""
    begun, count, done = time.perf_counter(), 0, 0
    key = zlib.crc32(f"{scenario.name}, {scenario.distribution}".encode())
    while done < replicates:
        size = min(scenario.chunk, replicates - done)
        rng = np.random.default_rng([_SEED, key, scenario.documents, done])
        outcomes = scenario.draw(rng, size, replace(config, seed=done))
        assert outcomes.shape == (size,)
        count += int(outcomes.sum())
        done += size
    low = stats.binomtest(count, replicates, alternative="greater").proportion_ci(CONFIDENCE, "exact").low
    high = stats.binomtest(count, replicates, alternative="less").proportion_ci(CONFIDENCE, "exact").high
    met = {"error": high <= ERROR_LIMIT, "power": low >= POWER_LIMIT, "shown": None}[scenario.kind]
    return Rate(
        scenario=scenario.name,
        kind=scenario.kind,
        distribution=scenario.distribution,
        documents=scenario.documents,
        replicates=replicates,
        count=count,
        rate=count / replicates,
        low=float(low),
        high=float(high),
        met=None if met is None else bool(met),
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True)
class Plan:
    """Scenarios that differ in distribution and documents alone; see `Scenario`."""

    name: str
    kind: Kind
    outcome: Callable[[Draw, int], Outcome]
    distributions: Sequence[str]
    documents: Sequence[int]
    replicates: int
    chunk: int

    def scenarios(self) -> list[Scenario]:
        """One for each distribution and number of documents."""
        return [
            Scenario(
                name=self.name,
                kind=self.kind,
                distribution=distribution,
                documents=documents,
                draw=self.outcome(DISTRIBUTIONS[distribution], documents),
                replicates=self.replicates,
                chunk=self.chunk,
            )
            for distribution in self.distributions
            for documents in self.documents
        ]


def _plan(outcome: Callable[..., Outcome], kind: Kind, name: str, **how: Any) -> Plan:
    """A `Plan`; what is not said of it is an error rate of normal values from 96 documents."""
    usual: dict[str, Any] = {"distributions": (_NORMAL,), "documents": (96,), "replicates": 6_000, "chunk": 50}
    return Plan(name=name, kind=kind, outcome=outcome, **(usual | how))


def scenarios() -> list[Scenario]:
    """Everything that is measured, in the order of the table."""
    none = f"any of {CELLS} cells is causal, none has an effect"
    several = f"{none}; 8 windows a document share half of their variance"
    kl = f"any of {CELLS} cells is causal, KL at the margin"
    detected = f"an effect of d = 0.2 in one of {CELLS} cells is causal"
    apart = "a sublayer type is dissociated"
    metric = "a measure predicts effect better or worse than mass"

    def alike(**truth: Any) -> Callable[..., Outcome]:
        return partial(family_wise, truth=NoEffect(**truth))

    three, four, both = (_NORMAL, _HEAVY, _SKEWED), (_NORMAL, _HEAVY, _SKEWED, _LEFT), (96, 512)
    plans = [
        _plan(family_wise, "error", none, distributions=three, documents=(512,)),
        _plan(family_wise, "error", none, distributions=three, replicates=10_000),
        _plan(student_family_wise, "shown", f"{none}; Student's t instead",
              distributions=(_SKEWED,), documents=both, replicates=2_000),
        _plan(alike(shared=0.5), "error", f"{none}; cells share half of their variance"),
        _plan(alike(shared=0.5, windows=8), "error", several, distributions=(_NORMAL, _HEAVY), documents=(60,)),
        _plan(alike(shared=0.5, windows=8, unit="window"), "shown", f"{several}; windows taken as units",
              documents=(60,), replicates=500, chunk=25),
        _plan(alike(kl_at_margin=True, varies=False), "error", f"{kl}, dNLL zero",
              distributions=(_SKEWED,), documents=both, chunk=100),
        _plan(alike(kl_at_margin=True), "shown", f"{kl} and dNLL without effect: both tests at their limit",
              distributions=(_SKEWED,), replicates=4_000),
        _plan(detection, "power", detected, documents=(512,), replicates=2_000),
        _plan(detection, "shown", detected,
              distributions=(_HEAVY, _SKEWED, _LEFT), documents=(512,), replicates=1_000),
        _plan(negligible_at_margin, "error", "negligible, dNLL at the margin",
              distributions=four, documents=both, replicates=20_000, chunk=1000),
        _plan(partial(negligible_at_margin, where="kl"), "error", "negligible, KL at the margin",
              distributions=(_NORMAL, _SKEWED), documents=both, replicates=20_000, chunk=1000),
        _plan(dissociation, "error", f"{apart}, effects alike",
              distributions=(_NORMAL, _SKEWED), documents=(512,), chunk=100),
        _plan(partial(dissociation, effect=0.3), "power", f"{apart}, effects differ by d = 0.3",
              documents=(512,), replicates=1_000, chunk=100),
        _plan(partial(motif, where="alike"), "error", "any motif, cells as elsewhere in their family",
              distributions=(_NORMAL, _SKEWED), documents=both, replicates=20_000),
        _plan(partial(motif, where="controlled"), "error", "any motif, a control does as much",
              distributions=(_NORMAL, _SKEWED), documents=both),
        _plan(partial(motif, where="planted"), "power", "a motif of d = 0.2 is found",
              documents=(512,), replicates=1_000),
        _plan(ranking, "error", f"{metric}, all alike", documents=both, chunk=100),
        _plan(partial(ranking, noise=2.0), "shown", f"{metric}, all alike, mass known twice as well",
              documents=(512,), replicates=2_000, chunk=100),
        _plan(partial(ranking, better=True), "shown", f"{metric}, the others know the ranks",
              documents=(512,), replicates=500, chunk=100),
        _plan(interval_misses, "shown", "a 95% BCa interval misses",
              distributions=three, documents=both, replicates=1_000, chunk=500),
        *_in_looks(),
    ]  # fmt: skip
    return [scenario for plan in plans for scenario in plan.scenarios()]


def _in_looks() -> list[Plan]:
    """The same under looks at 32, 64, 128, 256 and 512 documents."""
    looks = "; looks at 32 to 512 documents"
    seen: dict[str, Any] = {"looks": (32, 64, 128, 256, 512)}
    none = f"any of {CELLS} cells is causal, none has an effect{looks}"
    kl = f"any of {CELLS} cells is causal, KL at the margin, dNLL zero{looks}"
    whole: dict[str, Any] = {"documents": (512,), "chunk": 50}

    def alike(**truth: Any) -> Callable[..., Outcome]:
        return partial(family_wise, truth=NoEffect(**truth), **seen)

    return [
        _plan(alike(), "error", none, distributions=(_NORMAL, _HEAVY, _SKEWED), **whole),
        _plan(alike(shared=0.5), "error", f"{none}; cells share half of their variance", **whole),
        _plan(alike(shared=0.5, windows=8), "error", f"{none}; 8 windows a document share half of their variance",
              **whole | {"replicates": 2_000, "chunk": 10}),
        _plan(alike(kl_at_margin=True, varies=False), "error", kl, distributions=(_SKEWED,), **whole),
        _plan(partial(detection, **seen), "power", f"an effect of d = 0.2 in one of {CELLS} cells is causal{looks}",
              **whole | {"replicates": 4_000}),
        _plan(partial(negligible_at_margin, **seen), "error", f"negligible, dNLL at the margin{looks}",
              distributions=(_NORMAL, _HEAVY, _SKEWED, _LEFT), **whole | {"replicates": 20_000, "chunk": 500}),
        _plan(partial(negligible_at_margin, where="kl", **seen), "error", f"negligible, KL at the margin{looks}",
              distributions=(_NORMAL, _SKEWED), **whole | {"replicates": 20_000, "chunk": 500}),
        *(
            _plan(partial(stopped_interval_misses, effect=effect, **seen), "error",
                  f"the interval of a stopped cell misses, d = {effect}{looks}",
                  distributions=(_NORMAL, _SKEWED), **whole | {"replicates": 6_000, "chunk": 500})
            for effect in (0.2, 0.5)
        ),
    ]  # fmt: skip


def table(rates: Sequence[Rate]) -> str:
    """The rates as a Markdown table."""
    asked = {"error": f"error, at most {ERROR_LIMIT}", "power": f"power, at least {POWER_LIMIT}", "shown": "shown"}
    lines = [
        "| what | values | documents | replicates | rate | 99% bounds | asked | met |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    for rate in rates:
        met = {True: "yes", False: "NO", None: ""}[rate.met]
        lines.append(
            f"| {rate.scenario} | {rate.distribution} | {rate.documents} | {rate.replicates} | {rate.rate:.4f} "
            f"| {rate.low:.4f} to {rate.high:.4f} | {asked[rate.kind]} | {met} |"
        )
    return "\n".join(lines) + "\n"


def _measure(place: int, replicates: int) -> Rate:
    return measure(scenarios()[place], replicates)


def run(folder: Path, full: bool, jobs: int = 1, progress: Callable[[Rate], None] = lambda rate: None) -> list[Rate]:
    """Measure every scenario that `folder/power.json` has not yet, and write JSON and Markdown.

    Args:
        folder: written after every scenario, so that a run that was stopped goes on.
        full: all replicates; otherwise a fortieth of them.
        jobs: processes; what they find does not depend on how many there are.
    """
    path = folder / "power.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = [Rate(**row) for row in json.loads(path.read_text())["rates"]] if path.is_file() else []
    kept = {(rate.scenario, rate.distribution, rate.documents, rate.replicates): rate for rate in known}
    rates: dict[int, Rate] = {}
    missing: list[tuple[int, int]] = []
    for place, scenario in enumerate(scenarios()):
        replicates = scenario.replicates if full else max(scenario.replicates // _SKETCH, 50)
        rate = kept.get((scenario.name, scenario.distribution, scenario.documents, replicates))
        if rate is None:
            missing.append((place, replicates))
        else:
            rates[place] = rate

    def in_order() -> list[Rate]:
        return [rate for _, rate in sorted(rates.items())]

    def write() -> None:
        how = {"seed": _SEED, "full": full, "statistics": to_plain(_DEFAULTS)}
        write_json(path, how | {"rates": [asdict(rate) for rate in in_order()]})
        write_text(folder / "power.md", table(in_order()))

    def keep(place: int, rate: Rate) -> None:
        rates[place] = rate
        progress(rate)
        write()

    if jobs == 1:
        for place, replicates in missing:
            keep(place, _measure(place, replicates))
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(_measure, place, replicates): place for place, replicates in missing}
            for done in as_completed(waiting):
                keep(waiting[done], done.result())
    write()
    return in_order()
