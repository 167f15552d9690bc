"""What a probe writes beside its report: the preregistration, the tables, and the summary with its claims."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.config import to_plain
from attnres.data import ProbeWindows
from attnres.depth.families import BANDS, band_layers
from attnres.files.whole_files import whole_file, write_json, write_text
from attnres.interventions.ids import Spec, parse
from attnres.probe.baseline import Located
from attnres.probe.checks import Check
from attnres.probe.config import GridConfig
from attnres.probe.nulls import NULLS
from attnres.probe.passes import Subject
from attnres.probe.runner import Split, Tables
from attnres.probe.subjects import Further
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.judgement import findings, judge
from attnres.tables.folder import registered_as, windows_digest
from attnres.tables.roles import TRAINED

__all__ = ["TRAINED", "Setting", "preregistration", "register", "write_tables"]

log = logging.getLogger(__name__)


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
        provenance: see `attnres.files.provenance.collect`.
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

    def origin(self, subject: Subject) -> tuple[Located, str]:
        """Where a model's weights came from, and what it is, in words."""
        for one in self.further:
            if one.subject.name == subject.name:
                return one.located, one.kind
        trained_at, baseline_at = self.located
        if subject.schedule is None:
            return trained_at, "trained AttnRes"
        return baseline_at, f"vanilla Qwen3, {subject.schedule} wrap"

    def routing_trained(self, subject: Subject) -> bool:
        """Whether a model's routing was trained, as the run that its weights came from says."""
        training = self.origin(subject)[0].training.get("config") or {}
        return subject.schedule is None and subject.name not in NULLS and training.get("trainable") != "body"


def preregistration(setting: Setting, cells: Sequence[str]) -> dict[str, Any]:
    """What is fixed before any result is seen."""
    statistics = setting.statistics
    candidates = pd.DataFrame([_candidate(subject, parse(cell)) for subject in setting.subjects for cell in cells])
    excluded = candidates[~candidates["eligible"]]
    return {
        "written": _now(),
        "cells": list(cells),
        "candidate_cells": statistics.grid_cells,
        "interventions": sorted(candidates["intervention"].unique()),
        "families": sorted(candidates["family"].unique()),
        "sublayers": sorted(candidates["sublayer"].unique()),
        "bands": _band_layers(setting.subjects),
        "models": [
            {
                "name": subject.name,
                "convention": subject.plan.convention,
                "schedule": subject.schedule,
                "layers": subject.plan.num_layers,
                "routing_trained": setting.routing_trained(subject),
            }
            for subject in setting.subjects
        ],
        "exclusions": [{"model": row.model, "cell": row.cell, "reason": row.reason} for row in excluded.itertuples()],
        "eligibility": candidates.to_dict("records"),
        "primary_metric": "dnll (nats/token), edited - clean on the same path",
        "other_metrics": ["kl (clean || edited), nats/token", "top-1 flips"],
        "margins": {"dnll": statistics.margin, "kl": statistics.margin, "unit": "nats/token"},
        "unit": "document",
        "tests": TESTS,
        "statistics": to_plain(statistics),
        "probe": to_plain(setting.grid),
        "splits": setting.counts | {"sha256": {split: _drawn(drawn) for split, drawn in setting.windows.items()}},
        "hashes": setting.provenance["hashes"],
        "seeds": setting.provenance["seeds"],
    }


# What is tested, and over which family of tests each is corrected.
TESTS = {
    "cell": "dNLL: two-sided sign flips over documents, and TOST at the margin; KL: one-sided tests at the margin; "
    "verdicts in the order excluded, null, causal, inconclusive",
    "cell family": "Holm within a model and an intervention over its cells at bands; Benjamini-Hochberg within a "
    "model, an intervention and a kind of place over maps of layers, blocks or reads",
    "contrast": "trained less baseline on the same windows, dNLL and mass apart; families as for cells, of the cells "
    "eligible in both, for each baseline separately",
    "motif": "causal; exceeds its family's other cells and its matched control (one-sided sign flips, the larger p), "
    "and none without a control; Holm over the grid, and over the study's four motifs",
    "dissociation": "cells picked on the pilot split; mass and effect both ordered on the confirmatory split "
    "(one-sided sign flips, the larger p); Holm over the sublayer types",
    "what predicts effect": "Spearman over cells of the mask, bootstrap over documents; differences from mass, Holm "
    "over norm-aware share and displacement",
    "seeds": "each is shown; no p over seeds with fewer than six",
}


def _candidate(subject: Subject, spec: Spec) -> dict[str, Any]:
    """A candidate cell as the architecture alone decides on it; what the pilot split excludes comes later."""
    cell = spec.cell(subject.plan)
    return {
        "model": subject.name,
        "cell": spec.id,
        "intervention": spec.what,
        "family": cell.family,
        "sublayer": cell.sublayer,
        "band": cell.band,
        "eligible": cell.eligible,
        "reason": cell.reason,
        "eligible_reads": len(cell.reads),
        "reads": cell.candidates,
        "mean_sources": cell.mean_sources,
    }


def _band_layers(subjects: Sequence[Subject]) -> dict[str, list[int]]:
    """The layers of each band: [first, one past the last]; the models of a probe are equally deep."""
    layers = subjects[0].plan.num_layers
    return {band: [found.start, found.stop] for band in BANDS for found in [band_layers(band, layers)]}


def _drawn(windows: ProbeWindows) -> str:
    """sha256 of which windows of which documents were drawn, in order."""
    return windows_digest(windows.window_ids.tolist(), windows.document_ids.tolist())


# What a preregistration says of the moment at which it was written.
_OF_ITS_TIME = ("written", "amends", "earlier_looks")


def register(path: Path, registered: dict[str, Any]) -> dict[str, Any]:
    """Write a preregistration, and return the one that holds.

    One that says the same stays, with the time at which it was written. Where an earlier one says something else it is
    kept beside it under its hash, and the new one names it as amended.
    """
    plain = json.loads(json.dumps(registered))
    earlier: dict[str, Any] = {}
    if path.is_file():
        text = path.read_bytes()
        try:
            earlier = dict(json.loads(text))
        except ValueError:
            log.warning("%s cannot be read: written anew", path)
        if earlier:
            kept, said = ({k: v for k, v in one.items() if k not in _OF_ITS_TIME} for one in (earlier, plain))
            if kept == said:
                return earlier
            digest = hashlib.sha256(text).hexdigest()
            write_text(path.with_name(f"{path.stem}-{digest[:8]}.json"), text.decode())
            plain["amends"] = {"sha256": digest, "written": earlier.get("written")}
            log.warning("%s: what was preregistered at %s is amended", path, earlier.get("written"))
    write_json(path, plain)
    return plain


def write_tables(
    folder: Path, setting: Setting, tables: Tables, eligibility: pd.DataFrame, run_cells: int
) -> pd.DataFrame:
    """Judge the cells, write every table and `summary.json`, and return the table of cells."""
    grid, statistics = setting.grid, setting.statistics
    clean_nll = tables.clean.groupby("model")["nll"].mean().to_dict()
    models = [_describe(subject, setting, clean_nll) for subject in setting.subjects]
    judged = judge(tables.effects, tables.mass, eligibility, statistics, models)
    measured = {"effects": tables.effects, "mass": tables.mass}
    if len(tables.attribution):
        measured["attribution"] = tables.attribution
    for name, frame in measured.items():
        with whole_file(folder / f"{name}.parquet") as part:
            frame.to_parquet(part, index=False)
    with whole_file(folder / "effects.csv") as part:
        tables.effects.to_csv(part, index=False)
    judged.write(folder)
    for name, frame in (("routing", tables.routing), ("eligibility", eligibility)):
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    checks = [check.as_dict() for check in setting.checks]
    candidates = statistics.grid_cells or 0
    summary = {
        "title": f"Does the routing of {setting.located[0].run} tell the truth?",
        "created": _now(),
        "command": setting.provenance["command"],
        "models": models,
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
        "recency": {
            "bias": grid.recency_bias,
            "kl_to_vanilla": next(
                (c.value for c in setting.checks if c.name == "distance to the unwrapped model"), None
            ),
        },
        "provenance": setting.provenance,
        "plan_notes": _plan_notes(setting.subjects),
        "preregistration": registered_as(folder / "preregistration.json"),
    } | findings(judged, checks, statistics, models, tables.attribution)
    write_json(folder / "summary.json", summary)
    return judged.cells


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe(subject: Subject, setting: Setting, clean_nll: Mapping[str, float]) -> dict[str, Any]:
    where, kind = setting.origin(subject)
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
        "routing_trained": setting.routing_trained(subject),
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
