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
    Outcome,
    detection,
    dissociation,
    family_wise,
    interval_misses,
    motif,
    null_at_margin,
    ranking,
    student_family_wise,
)

Kind = Literal["error", "power", "shown"]

ERROR_LIMIT, POWER_LIMIT, CONFIDENCE = 0.06, 0.9, 0.99
_SEED = 2026
_DEFAULTS = StatisticsConfig()
_SKETCH = 40


@dataclass(frozen=True)
class Scenario:
    """One thing to measure.

    Attributes:
        name: what is counted, and under which truth.
        kind: "error" and "power" are held against a bound, "shown" is not.
        distribution: of values over documents; a key of `DISTRIBUTIONS`.
        documents: how many.
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
        *(scenario.name, scenario.kind, scenario.distribution, scenario.documents, replicates, count),
        *(count / replicates, float(low), float(high), None if met is None else bool(met)),
        time.perf_counter() - begun,
    )


def scenarios() -> list[Scenario]:
    """Everything that is measured, in the order of the table."""
    normal, heavy, skewed, left = DISTRIBUTIONS
    none = f"any of {CELLS} cells is causal, none has an effect"
    several = f"{none}; 8 windows a document share half of their variance"
    kl = f"any of {CELLS} cells is causal, KL at the margin"
    quiet = partial(family_wise, kl_at_margin=True)
    correlated, by_window = partial(family_wise, shared=0.5), partial(family_wise, shared=0.5, windows=8)
    naive = partial(by_window, unit="window")
    detected = f"an effect of d = 0.2 in one of {CELLS} cells is causal"
    kl_limit = partial(null_at_margin, where="kl")
    differing = partial(dissociation, effect=0.3)
    apart = "a sublayer type is dissociated"
    alike, controlled, planted = (partial(motif, where=where) for where in ("alike", "controlled", "planted"))
    metric = "a measure predicts effect better or worse than mass"
    uneven = partial(ranking, noise=2.0)
    # What, kind, distributions, documents, outcome from (distribution, documents), replicates, and how many at a time.
    plan: list[tuple[str, Kind, Sequence[str], Sequence[int], Callable[[Draw, int], Outcome], int, int]] = [
        (none, "error", (normal, heavy, skewed), (512,), family_wise, 6_000, 50),
        (none, "error", (normal, heavy, skewed), (96,), family_wise, 10_000, 50),
        (f"{none}; Student's t instead", "shown", (skewed,), (96, 512), student_family_wise, 2_000, 50),
        (f"{none}; cells share half of their variance", "error", (normal,), (96,), correlated, 6_000, 50),
        (several, "error", (normal, heavy), (60,), by_window, 6_000, 50),
        (f"{several}; windows taken as units", "shown", (normal,), (60,), naive, 500, 25),
        (f"{kl}, dNLL zero", "error", (skewed,), (96, 512), partial(quiet, varies=False), 6_000, 100),
        (f"{kl} and dNLL without effect: both tests at their limit", "shown", (skewed,), (96,), quiet, 4_000, 50),
        (detected, "power", (normal,), (512,), detection, 2_000, 50),
        (detected, "shown", (heavy, skewed, left), (512,), detection, 1_000, 50),
        ("null, dNLL at the margin", "error", (normal, heavy, skewed, left), (96, 512), null_at_margin, 20_000, 1000),
        ("null, KL at the margin", "error", (normal, skewed), (96, 512), kl_limit, 20_000, 1000),
        (f"{apart}, effects alike", "error", (normal, skewed), (512,), dissociation, 6_000, 100),
        (f"{apart}, effects differ by d = 0.3", "power", (normal,), (512,), differing, 1_000, 100),
        ("any motif, cells as elsewhere in their family", "error", (normal, skewed), (96, 512), alike, 20_000, 50),
        ("any motif, a control does as much", "error", (normal, skewed), (96, 512), controlled, 6_000, 50),
        ("a motif of d = 0.2 is found", "power", (normal,), (512,), planted, 1_000, 50),
        (f"{metric}, all alike", "error", (normal,), (96, 512), ranking, 6_000, 100),
        (f"{metric}, all alike, mass known twice as well", "shown", (normal,), (512,), uneven, 2_000, 100),
        (f"{metric}, the others know the ranks", "shown", (normal,), (512,), partial(ranking, better=True), 500, 100),
        ("a 95% BCa interval misses", "shown", (normal, heavy, skewed), (96, 512), interval_misses, 1_000, 500),
    ]  # fmt: skip
    return [
        Scenario(
            name, kind, distribution, documents, outcome(DISTRIBUTIONS[distribution], documents), replicates, chunk
        )
        for name, kind, distributions, counts, outcome, replicates, chunk in plan
        for distribution in distributions
        for documents in counts
    ]


def table(rates: Sequence[Rate]) -> str:
    """The rates as a Markdown table."""
    told = {"error": f"error, at most {ERROR_LIMIT}", "power": f"power, at least {POWER_LIMIT}", "shown": "shown"}
    lines = [
        "| what | values | documents | replicates | rate | 99% bounds | asked | met |",
        "|---|---|---:|---:|---:|---|---|---|",
    ]
    for rate in rates:
        met = {True: "yes", False: "NO", None: ""}[rate.met]
        lines.append(
            f"| {rate.scenario} | {rate.distribution} | {rate.documents} | {rate.replicates} | {rate.rate:.4f} "
            f"| {rate.low:.4f} to {rate.high:.4f} | {told[rate.kind]} | {met} |"
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
        progress: called with every new rate.
    """
    path = folder / "power.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = [Rate(**row) for row in json.loads(path.read_text())["rates"]] if path.is_file() else []
    kept = {(rate.scenario, rate.distribution, rate.documents, rate.replicates): rate for rate in known}
    found: dict[int, Rate] = {}
    missing: list[tuple[int, int]] = []
    for place, scenario in enumerate(scenarios()):
        replicates = scenario.replicates if full else max(scenario.replicates // _SKETCH, 50)
        rate = kept.get((scenario.name, scenario.distribution, scenario.documents, replicates))
        if rate is None:
            missing.append((place, replicates))
        else:
            found[place] = rate

    def write() -> None:
        setting: dict[str, Any] = {"seed": _SEED, "full": full, "statistics": to_plain(_DEFAULTS)}
        write_json(path, setting | {"rates": [asdict(rate) for _, rate in sorted(found.items())]})
        write_text(folder / "power.md", table([rate for _, rate in sorted(found.items())]))

    if jobs == 1:
        for place, replicates in missing:
            found[place] = _measure(place, replicates)
            progress(found[place])
            write()
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(_measure, place, replicates): place for place, replicates in missing}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                progress(done.result())
                write()
    write()
    return [rate for _, rate in sorted(found.items())]
