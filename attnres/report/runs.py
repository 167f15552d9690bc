"""Several probes read for one report: what each run is, how they belong together, and in what they differ.

Tables in, plain values out; nothing is drawn here and no run is refused in silence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.errors import ConfigError
from attnres.report import words
from attnres.report.tables import Tables, read_tables
from attnres.tables import columns
from attnres.tables.folder import read_table

_ABSENT = "–"
_EFFECT_COLUMNS = ("model", "window", "document", "split", "cell", "intervention", *columns.SLICE, "dnll", "look")


@dataclass(frozen=True)
class Run:
    """One probe of a comparison.

    Attributes:
        label: short and unlike any other run's.
        run, experiment, seed, step: of the trained model, as far as its summary tells.
    """

    label: str
    folder: Path
    tables: Tables
    run: str
    experiment: str
    seed: str
    step: float | None

    @property
    def described(self) -> Mapping[str, Any]:
        """The trained model's entry in the summary."""
        return _described(self.tables)

    @property
    def cells(self) -> pd.DataFrame:
        """The trained model's cells under the main intervention, with the run's label, seed and step."""
        mine = self.tables.primary[self.tables.primary["model"] == self.tables.trained]
        return mine.assign(run=self.label, step=self.step, seed=self.seed)

    @property
    def windows(self) -> frozenset[tuple[Any, ...]]:
        """The (split, window, document) on which the trained model was probed.

        Where there are several looks, those of the first, with the numbers of documents that decide the others.
        """
        effects = self.tables.effects
        mine = effects[effects["model"] == self.tables.trained]
        looks: list[tuple[Any, ...]] = []
        if "look" in mine:
            mine = mine[mine["look"] == 1]
            looks = [("looks", *(self.tables.summary["statistics"].get("looks") or ()))]
        return frozenset([*zip(mine["split"], mine["window"], mine["document"], strict=True), *looks])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads every folder.

    Raises:
        ConfigError: a folder does not exist, or is named twice.
        DataError: a table is missing or unreadable.
    """
    if len({Path(f).resolve() for f in folders}) != len(folders):
        raise ConfigError("a folder is named twice: name each probe once")
    read = [(Path(folder), read_tables(Path(folder))) for folder in folders]
    facts = [_facts(folder, tables) for folder, tables in read]
    return [
        Run(label=label, folder=folder, tables=tables, **fact)
        for label, (folder, tables), fact in zip(_labels(facts, folders), read, facts, strict=True)
    ]


def read_effects(run: Run) -> pd.DataFrame:
    """The trained model's effect on every window, under the run's label as `model`.

    Raises:
        DataError: the table lacks a column.
    """
    effects = read_table(run.folder, columns.EFFECTS, only=_EFFECT_COLUMNS)
    mine = effects[(effects["model"] == run.tables.trained) & effects["cell"].isin(run.cells["cell"])]
    return mine.assign(model=run.label)


def _described(tables: Tables) -> Mapping[str, Any]:
    return next((m for m in tables.summary["models"] if m.get("name") == tables.trained), {})


def _facts(folder: Path, tables: Tables) -> dict[str, Any]:
    model = _described(tables)
    run = str(model.get("run") or folder.name)
    step = model.get("step")
    return {
        "run": run,
        "experiment": str(model.get("experiment") or run.rpartition("-")[0] or run),
        "seed": _ABSENT if model.get("seed") is None else str(model["seed"]),
        "step": float(step) if isinstance(step, int | float) and not isinstance(step, bool) else None,
    }


def _labels(facts: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> list[str]:
    """What tells the runs apart: experiment, seed, step; then the folder, then a number."""
    varied = [key for key in ("experiment", "seed", "step") if len({fact[key] for fact in facts}) > 1]
    labels = []
    for fact in facts:
        label = [words.visible(fact["experiment"])[:36]] if "experiment" in varied or not varied else []
        label += [f"seed {fact['seed']}"[:24]] if "seed" in varied else []
        if "step" in varied:
            label.append("no step" if fact["step"] is None else f"step {fact['step']:g}")
        labels.append(words.visible(" ".join(label)))
    named = [
        f"{label} ({words.visible(Path(folder).name)[-24:]})" if labels.count(label) > 1 else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    return [f"{label} #{k + 1}" if named.count(label) > 1 else label for k, label in enumerate(named)]


def trainings(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that are steps of one training, by step; only where there is more than one step."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.step is not None:
            groups.setdefault(run.run, []).append(run)
    by_step = [sorted(group, key=lambda r: r.step or 0.0) for group in groups.values()]
    return [group for group in by_step if len({r.step for r in group}) > 1]


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one experiment at one step that differ in their seed."""
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.step), []).append(run)
    return [group for group in groups.values() if len({r.seed for r in group}) == len(group) > 1]


def differences(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], int]:
    """Every setting that is not the same in all runs, as (dotted name, value per run); and how many are the same."""
    flat = [_flatten(_recorded(run)) for run in runs]
    names = list(dict.fromkeys(name for table in flat for name in table))
    rows = [(name, [table.get(name, _ABSENT) for table in flat]) for name in names]
    varied = [(name, values) for name, values in rows if len(set(values)) > 1]
    return varied, len(rows) - len(varied)


def _recorded(run: Run) -> dict[str, Any]:
    """What a run says of how it was trained and probed."""
    model, summary = dict(run.described), run.tables.summary
    training = model.pop("training", None)
    provenance = summary["provenance"]
    baselines = [m for m in summary["models"] if m.get("name") != run.tables.trained]
    return {
        "trained": {k: v for k, v in model.items() if k not in ("name", "path", "clean_nll")},
        "training": training,
        "baselines": {str(m.get("name")): {k: m.get(k) for k in ("convention", "step", "seed")} for m in baselines},
        "probe": run.tables.preregistration.get("probe"),
        "statistics": summary["statistics"],
        **{name: provenance.get(name) for name in ("hashes", "versions", "git", "hardware")},
    }


def _flatten(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {
            k: v for key, item in value.items() for k, v in _flatten(item, f"{name}.{key}" if name else key).items()
        }
    return {name: _ABSENT if value is None else value if isinstance(value, str) else json.dumps(value, default=str)}


def cautions(runs: Sequence[Run]) -> list[str]:
    """What a reader of the comparison must know first."""
    texts = []
    for what, values, remedy in (
        ("the same text", [_hash(r, "data") for r in runs], "effects are of different documents"),
        ("the same tokenizer", [_hash(r, "tokenizer") for r in runs], "nats/token are not of the same tokens"),
        ("the same windows", [r.windows for r in runs], "nothing below is paired by document"),
        ("one equivalence margin", [r.tables.margin for r in runs], "verdicts are not by the same rule"),
        ("one source convention", [r.described.get("convention") for r in runs], "families name different sources"),
        ("one main intervention", [r.tables.intervention for r in runs], "effects are of different edits"),
    ):
        if len(set(values)) > 1:
            texts.append(f"The runs do not share {what}: {remedy}.")
    listed = [set(r.cells["cell"]) for r in runs]
    common = set.intersection(*listed)
    if any(cells != common for cells in listed):
        count = len(set.union(*listed))
        texts.append(f"The runs do not hold the same cells: {len(common)} of {count} are in all of them.")
    for run in runs:
        texts += [f"{run.label}: {text}" for text in words.warnings(run.tables)]
    return texts


def _hash(run: Run, name: str) -> Any:
    hashes = run.tables.summary["provenance"].get("hashes")
    return hashes.get(name) if isinstance(hashes, Mapping) else None
