"""Tables as a probe measures them, with effects and masses that are known, and the folder that it leaves."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from attnres.depth.places import BANDS, FAMILIES, SUBLAYERS
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.judgement import findings, judge
from attnres.tables import columns
from attnres.tables.folder import windows_digest
from tests.tables.fake_folder import write_probe

QUICK = StatisticsConfig(sign_flips=999, bootstrap=100)
WHOLE = replace(QUICK, grid_cells=24)
EXCLUDED = ("older", "attn", "early")
SLICES = [(f, s, b) for b in BANDS for s in SUBLAYERS for f in FAMILIES]


def measured(
    effect=None,
    mass=None,
    models=("attnres", "uniform"),
    controls=(),
    kept=(),
    documents=24,
    pilot=8,
    noise=0.02,
    seed=0,
):
    """Effects, mass and eligibility: `effect[model, slice]` is a mean dNLL (0 elsewhere), `mass[...]` a mean mass.

    `controls` are slices whose `matched` control is there too, with effect `effect[model, slice, "matched"]`;
    `kept` are those whose `keep` is, likewise.
    """
    effect, mass = effect or {}, mass or {}
    rng = np.random.default_rng(seed)
    number = np.arange(documents + pilot)
    windows = {"document": number, "window": number * 10, "split": np.where(number < pilot, "pilot", "confirm")}
    effects, masses, eligibility = [], [], []
    for model in models:
        for kind, slices in (("mask", SLICES), ("matched", controls), ("keep", kept)):
            for piece in slices:
                where = dict(zip(("family", "sublayer", "band"), piece, strict=True)) | {"model": model}
                cell = {"cell": "{}:{}@{}.{}".format(kind, *piece), "intervention": kind}
                eligible = piece != EXCLUDED
                eligibility.append(
                    where
                    | cell
                    | {"eligible": eligible, "reason": "" if eligible else "empty", "eligible_reads": 2 * eligible}
                    | {"reads": 2, "mean_sources": 10 / 3 if eligible else 0.0}
                )
                if not eligible:
                    continue
                mean = effect.get((model, piece) if kind == "mask" else (model, piece, kind), 0.0)
                dnll = mean + noise * rng.normal(size=len(number))
                effects.append(pd.DataFrame(where | cell | windows | {"dnll": dnll, "kl": np.abs(dnll), "flips": 0.0}))
                if kind == "mask":
                    weight = mass.get((model, piece), 0.25) + 0.001 * rng.normal(size=len(number)) * (
                        model != "uniform"
                    )
                    shares = {"mass": weight, "uniform_share": 0.25, "norm_share": weight, "displacement": weight**2}
                    masses.append(pd.DataFrame(where | windows | shares))
    return pd.concat(effects, ignore_index=True), pd.concat(masses, ignore_index=True), pd.DataFrame(eligibility)


def model_rows(names, **trainable):
    """What a summary says of models; `trainable` is what was trained in a control, by name."""
    return [
        {"name": name, "convention": "cumulative" if name == "recency" else "block_sum"}
        | ({"training": {"trainable": trainable[name]}} if name in trainable else {})
        for name in names
    ]


def write_folder(folder: Path, effects, mass, eligibility, config=WHOLE, families=FAMILIES, **changed) -> Path:
    """The folder that a probe of these families leaves, without its report."""
    effects = effects[effects["family"].isin(families)]
    eligibility = eligibility[eligibility["family"].isin(families)].reset_index(drop=True)
    drawn = mass.drop_duplicates("window").groupby("split")[["window", "document"]]
    digests = {split: windows_digest(*(rows[name].tolist() for name in rows)) for split, rows in drawn}
    registered = {
        "written": "2026-01-01T00:00:00+00:00",
        "cells": list(dict.fromkeys(eligibility["cell"])),
        "exclusions": eligibility.loc[~eligibility["eligible"], ["model", "cell", "reason"]].to_dict("records"),
        "eligibility": eligibility.to_dict("records"),
        "statistics": asdict(config),
        "probe": {"families": list(families), "length": 64, "seed": 0, "batch_size": 4},
        "splits": {"sha256": digests},
        "hashes": {"data": "abc", "checkpoint": "def"},
        "models": [{"name": name} for name in mass["model"].unique()],
    } | changed
    models = model_rows(mass["model"].unique())
    judged = judge(effects, mass, eligibility, config, models)
    routing = {"model": "attnres", "read": 1, "layer": 0, "sublayer": "mlp", "source": [0, 1], "num_sources": 2}
    shares = {"weight": 0.5, "analytic": 0.5, "role": ["embedding", "current"], "holds": ["emb", "o0"]}
    frames = {
        columns.EFFECTS: effects, columns.MASS: mass, columns.ELIGIBILITY: eligibility,
        columns.ROUTING: pd.DataFrame(routing | shares),
    }  # fmt: skip
    summary = {
        "title": "t", "command": "python probe.py", "checks": [], "grid": {"candidate_cells": 24, "run_cells": 6},
        "models": models, "statistics": asdict(config), "provenance": {}, "recency": {}, "plan_notes": [],
    }  # fmt: skip
    summary |= findings(judged, [], config, models, pd.DataFrame())
    write_probe(folder, frames, json.loads(json.dumps(registered)), summary)
    judged.write(folder)
    return folder
