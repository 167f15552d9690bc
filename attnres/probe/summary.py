"""What a probe writes of what it measured: the tables, and the part of `summary.json` that is not judged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres.depth.plan import DepthPlan
from attnres.files import formats
from attnres.probe.checks import DISTANCE
from attnres.probe.preregistration import Fixed, now
from attnres.probe.runner import Measured
from attnres.probe.subjects import Subject
from attnres.probe.token_viewer import write_viewer
from attnres.tables import columns
from attnres.tables.folder import PREREGISTRATION, registered_as, write_table
from attnres.tables.names import Split


def write_measured(folder: Path, fixed: Fixed, measured: Measured) -> None:
    """Writes every table that was measured and what the token viewer shows, each file whole or not at all."""
    tables = {
        columns.EFFECTS: measured.effects,
        columns.EFFECTS_AS_TEXT: measured.effects,
        columns.MASS: measured.mass,
        columns.ELIGIBILITY: measured.eligibility,
        columns.ROUTING: measured.routing,
    }
    if len(measured.attribution):
        tables[columns.ATTRIBUTION] = measured.attribution
    for table, frame in tables.items():
        write_table(folder, table, frame)
    text = fixed.subjects.text
    write_viewer(folder, fixed.subjects.trained, text.windows[Split.CONFIRM], text.corpus)


def summarise(folder: Path, fixed: Fixed, measured: Measured) -> dict[str, Any]:
    """What a probe is and was measured on, as plain containers.

    Args:
        folder: of the probe, which holds its preregistration.
        fixed: before the first result.
        measured: the tables.
    """
    config, statistics, models = fixed.config, fixed.statistics, fixed.subjects.models
    run_cells, whole = len(fixed.grid.specs), statistics["grid_cells"]
    clean_nll = measured.clean.groupby("model")["nll"].mean().to_dict()
    trained_at = fixed.subjects.trained.located
    assert trained_at is not None
    return {
        formats.KEY: formats.PROBE_VERSION,
        "title": f"Does the routing of {trained_at.run} tell the truth?",
        "created": now(),
        "command": fixed.provenance["command"],
        "models": [_describe(subject, clean_nll) for subject in models],
        "checks": [check.as_dict() for check in fixed.checks],
        "grid": {
            "candidate_cells": whole,
            "run_cells": run_cells,
            "complete": run_cells >= whole,
            "families": list(config.families),
            "sublayers": list(config.sublayers),
            "bands": list(config.bands),
            "interventions": list(config.interventions),
            "controls": config.controls,
            "places": config.places,
            "note": "",
        },
        "statistics": dict(statistics) | fixed.subjects.text.counts | {"window_length": config.length},
        "recency": {
            "bias": config.recency_bias,
            "kl_to_vanilla": next((check.value for check in fixed.checks if check.name == DISTANCE), None),
        },
        "provenance": fixed.provenance,
        "plan_notes": _plan_notes(fixed.subjects.plans),
        "preregistration": registered_as(folder / PREREGISTRATION),
    }


def _describe(subject: Subject, clean_nll: Mapping[str, float]) -> dict[str, Any]:
    located, plan = subject.located, subject.plan
    assert located is not None
    return {
        "name": subject.name,
        "path": str(located.folder),
        "run": located.run,
        "experiment": located.training.get("name"),
        "seed": located.training.get("seed"),
        "training": located.training.get("config"),
        "kind": subject.kind,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "convention": plan.convention,
        "routing_trained": subject.routing_trained,
        "layers": plan.num_layers,
        "blocks": plan.num_real_blocks,
        "step": located.training.get("step"),
        "tokens": located.training.get("tokens"),
        "val_loss": located.training.get("val_loss"),
        "clean_nll": clean_nll[subject.name],
        "verified": located.verified,
        "finished": located.finished,
    }


def _plan_notes(plans: Mapping[str, DepthPlan]) -> list[str]:
    """Where the number of blocks surprises."""
    return [
        f"{name}: {plan.num_layers} layers in {plan.num_blocks} blocks, of {plan.layers_per_block} layers each, "
        f"make {plan.num_real_blocks} real blocks"
        for name, plan in plans.items()
        if plan.num_real_blocks != plan.num_blocks
    ]
