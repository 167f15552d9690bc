"""What a probe writes beside its report: the preregistration, the tables, and the summary with its claims."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.config import to_plain
from attnres.data import ProbeWindows
from attnres.probe.checks import Check
from attnres.probe.claims import TRAINED, study_claims
from attnres.probe.config import GridConfig
from attnres.probe.dissociation import dissociation_table, spearman_table
from attnres.probe.inference import StatisticsConfig
from attnres.probe.locate import Located
from attnres.probe.runner import Split, Subject, Tables
from attnres.probe.statistics import cell_table, contrast_table
from attnres.probe.subjects import Further
from attnres.provenance import write_json, write_text

__all__ = ["TRAINED", "Setting", "preregistration", "register", "write_tables"]


@dataclass(frozen=True)
class Setting:
    """Everything about a probe that is fixed before its first result.

    Attributes:
        grid: which cells, on which windows.
        statistics: with `grid_cells` filled in.
        subjects: the models.
        located: where the trained model and the baseline came from.
        windows: per split.
        checks: all passed.
        provenance: see `attnres.provenance.collect`.
        further: where those of the models came from that are neither the trained one nor its wrapped baseline.
    """

    grid: GridConfig
    statistics: StatisticsConfig
    subjects: Sequence[Subject]
    located: tuple[Located, Located]
    windows: Mapping[Split, ProbeWindows]
    checks: Sequence[Check]
    provenance: Mapping[str, Any]
    further: Sequence[Further] = ()

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and windows per split."""
        return {
            "documents": {split: len(set(drawn.document_ids.tolist())) for split, drawn in self.windows.items()},
            "windows": {split: len(drawn) for split, drawn in self.windows.items()},
        }


def preregistration(setting: Setting, cells: Sequence[str]) -> dict[str, Any]:
    """What is fixed before any result is seen."""
    return {
        "written": _now(),
        "cells": list(cells),
        "candidate_cells": setting.statistics.grid_cells,
        "primary_metric": "dnll (nats/token), edited - clean on the same path",
        "other_metrics": ["kl (clean || edited), nats/token", "top-1 flips"],
        "unit": "document",
        "statistics": to_plain(setting.statistics),
        "probe": to_plain(setting.grid),
        "splits": setting.counts,
        "hashes": setting.provenance["hashes"],
        "seeds": setting.provenance["seeds"],
    }


def register(path: Path, registered: dict[str, Any]) -> None:
    """Write a preregistration; one that says the same stays, with the time at which it was written."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    if {**earlier, "written": ""} != {**json.loads(json.dumps(registered)), "written": ""}:
        write_json(path, registered)


def write_tables(
    folder: Path, setting: Setting, tables: Tables, eligibility: pd.DataFrame, run_cells: int
) -> pd.DataFrame:
    """Judge the cells, write every table and `summary.json`, and return the table of cells."""
    grid, statistics = setting.grid, setting.statistics
    cells = cell_table(tables.effects, tables.mass, eligibility, statistics)
    contrasts = contrast_table(tables.effects, eligibility, statistics, TRAINED, mass=tables.mass)
    dissociation = dissociation_table(tables.effects, tables.mass, eligibility, statistics)
    tables.effects.to_parquet(folder / "effects.parquet", index=False)
    tables.effects.to_csv(folder / "effects.csv", index=False)
    tables.mass.to_parquet(folder / "mass.parquet", index=False)
    for name, frame in (
        ("cells", cells),
        ("contrasts", contrasts),
        ("routing", tables.routing),
        ("dissociation", dissociation),
    ):
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    clean_nll = tables.clean.groupby("model")["nll"].mean().to_dict()
    checks = [check.as_dict() for check in setting.checks]
    candidates = statistics.grid_cells or 0
    summary = {
        "title": f"Does the routing of {setting.located[0].run} tell the truth?",
        "created": _now(),
        "command": setting.provenance["command"],
        "models": [_describe(subject, setting, clean_nll) for subject in setting.subjects],
        "checks": checks,
        "grid": {
            "candidate_cells": candidates,
            "run_cells": run_cells,
            "complete": run_cells >= candidates,
            "families": list(grid.families),
            "sublayers": list(grid.sublayers),
            "bands": list(grid.bands),
            "interventions": list(grid.interventions),
            "controls": grid.controls,
            "places": grid.places,
            "note": "",
        },
        "statistics": to_plain(statistics) | setting.counts | {"window_length": grid.length},
        "claims": study_claims(tables.effects, cells, contrasts, dissociation, checks, statistics),
        "dissociation": _dissociation_rows(dissociation),
        "spearman": _records(spearman_table(tables.effects, tables.mass, eligibility, statistics)),
        "recency": {
            "bias": grid.recency_bias,
            "kl_to_vanilla": next(
                (c.value for c in setting.checks if c.name == "distance to the unwrapped model"), None
            ),
        },
        "provenance": setting.provenance,
        "plan_notes": _plan_notes(setting.subjects),
    }
    write_json(folder / "summary.json", summary)
    return cells


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe(subject: Subject, setting: Setting, clean_nll: Mapping[str, float]) -> dict[str, Any]:
    where = setting.located[0 if subject.schedule is None else 1]
    kind = "trained AttnRes" if subject.schedule is None else f"vanilla Qwen3, {subject.schedule} wrap"
    for one in setting.further:
        if one.subject.name == subject.name:
            where, kind = one.located, one.kind
    return {
        "name": subject.name,
        "path": str(where.folder),
        "run": where.run,
        "experiment": where.training.get("name"),
        "seed": where.training.get("seed"),
        "training": where.training.get("config"),
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "convention": subject.plan.convention,
        "layers": subject.plan.num_layers,
        "blocks": subject.plan.num_real_blocks,
        "step": where.training.get("step"),
        "tokens": where.training.get("tokens"),
        "val_loss": where.training.get("val_loss"),
        "clean_nll": clean_nll[subject.name],
        "verified": where.verified,
        "finished": where.finished,
    }


def _plan_notes(subjects: Iterable[Subject]) -> list[str]:
    """Where the number of blocks surprises."""
    plans = [(subject.name, subject.plan) for subject in subjects]
    return [
        f"{name}: {plan.num_layers} layers in {plan.num_blocks} blocks, of {plan.layers_per_block} layers each, "
        f"make {plan.num_real_blocks} real blocks"
        for name, plan in plans
        if plan.num_real_blocks != plan.num_blocks
    ]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain containers, NaN as None."""
    return json.loads(frame.to_json(orient="records"))


def _dissociation_rows(dissociation: pd.DataFrame) -> list[dict[str, Any]]:
    rows = _records(dissociation[dissociation["model"] == TRAINED])
    for row in rows:
        row |= {"largest_mass": row["mass_cell"], "largest_effect": row["effect_cell"], "detail": row["reason"] or ""}
    return rows
