"""The folder of a probe that never ran: `write_probe` writes any, `write_fake` one of three models and all verdicts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from attnres.files import formats
from attnres.files.whole_files import write_json
from attnres.tables import columns
from attnres.tables.columns import Table
from attnres.tables.folder import PREREGISTRATION, SUMMARY, registered_as, write_table

LAYERS, BLOCK = 12, 3
FAMILIES = ("embedding", "older", "recent", "current")
BANDS = {"early": range(0, 4), "mid": range(4, 8), "late": range(8, 12)}
MARGIN, BIAS = 0.005, 10.0
MODELS = {"attnres": "block_sum", "recency": "cumulative", "uniform": "block_sum"}
PILOT, CONFIRM = 24, 64


def _motif(model, cell, verdict, elsewhere, over_control, matched):
    rows = {"elsewhere": elsewhere, "matched": over_control}
    bounds = {f"{k}_diff{end}": v for k, v in rows.items() for end in ("", "_lo", "_hi")}
    row = {"model": model, "cell": cell, "verdict": verdict, "matched": matched, "p_holm": 0.0023}
    return bounds | row | {"effect_learned": "learned" if model == "attnres" else "", "mass_learned": ""}


def num_sources(convention: str) -> list[int]:
    """Sources of each read: block_sum has no state at a block's first read, cumulative always has one."""
    counts, blocks, state = [], 0, False
    for layer in range(LAYERS):
        for _ in range(2):
            counts.append(1 + blocks + (1 if convention == "cumulative" or state else 0))
            state = True
        if (layer + 1) % BLOCK == 0:
            blocks, state = blocks + 1, False
    return [*counts, 1 + blocks] if convention == "block_sum" else counts


def role(source: int, count: int) -> str:
    if source == 0:
        return "embedding"
    return "current" if source == count - 1 else "recent" if source == count - 2 else "older"


def routing_table(seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    for model, convention in MODELS.items():
        for read, count in enumerate(num_sources(convention)):
            final = read == 2 * LAYERS
            sublayer = "final" if final else ("attn", "mlp")[read % 2]
            if model == "attnres":
                weights = rng.dirichlet(np.r_[2.5, np.ones(max(count - 2, 0)), 3.0][:count])
                analytic = [np.nan] * count
            elif model == "recency":
                weights = np.r_[np.ones(count - 1), np.exp(BIAS)] / (np.exp(BIAS) + count - 1)
                analytic = list(weights)
                weights = weights + rng.normal(0, 4e-8, count)
            else:
                weights, analytic = np.full(count, 1 / count), [1 / count] * count
            for source in range(count):
                rows.append(
                    {
                        "model": model,
                        "read": read,
                        "layer": read // 2,
                        "sublayer": sublayer,
                        "source": source,
                        "num_sources": count,
                        "weight": weights[source],
                        "analytic": analytic[source],
                        "role": role(source, count),
                    }
                )
    return pd.DataFrame(rows)


def eligible_reads(convention: str, family: str, sublayer: str, band: str) -> tuple[int, float]:
    counts = num_sources(convention)
    seen = [counts[2 * layer + (sublayer == "mlp")] for layer in BANDS[band]]
    floor = {"embedding": 2, "current": 2, "recent": 3, "older": 4}[family]
    return sum(c >= floor for c in seen), float(np.mean(seen))


def cells_table(seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed + 1), []
    for model, convention in MODELS.items():
        for sublayer in ("attn", "mlp"):
            for band in BANDS:
                for family in FAMILIES:
                    reads, mean = eligible_reads(convention, family, sublayer, band)
                    row = {
                        "model": model,
                        "cell": f"mask:{family}@{sublayer}.{band}",
                        "intervention": "mask",
                        "family": family,
                        "sublayer": sublayer,
                        "band": band,
                        "eligible": reads >= 2,
                        "reason": "" if reads >= 2 else f"the family exists in {reads} of 4 reads; half are needed",
                        "eligible_reads": reads,
                        "mean_sources": mean,
                        "documents": CONFIRM,
                        "windows": CONFIRM,
                    }
                    rows.append(row | (_statistics(rng, model, family, band, mean) if reads >= 2 else EXCLUDED))
    return pd.DataFrame(rows)


EXCLUDED = {"appreciable": False, "verdict": "excluded"}


def _statistics(rng: np.random.Generator, model: str, family: str, band: str, mean: float) -> dict:
    strength = {"embedding": 0.03, "older": 0.004, "recent": 0.012, "current": 0.6}[family]
    if model == "recency":
        strength = 4.0 if family == "current" else 2e-5
    if model == "attnres" and (family, band) == ("embedding", "early"):
        strength = 0.9
    effect = strength * float(np.exp(rng.normal(0, 0.7))) * (1 if rng.random() > 0.12 else -1)
    spread = abs(effect) * 0.15 + 6e-4
    lo, hi = effect - 2 * spread, effect + 2 * spread
    negligible, causal = max(abs(lo), abs(hi)) < MARGIN, lo * hi > 0
    verdict = "negligible" if negligible else "causal" if causal else "inconclusive"
    mass = float(np.clip(rng.normal(1 / mean, 0.1), 0.02, 0.9))
    p = 1e-4 if causal else 0.31
    return {
        "mass": mass,
        "mass_lo": mass - 0.01,
        "mass_hi": mass + 0.01,
        "uniform_share": 1 / mean,
        "uniform_excess": mass - 1 / mean,
        "appreciable": mass - 0.01 > 1 / mean,
        "norm_share": float(np.clip(mass + rng.normal(0, 0.12), -0.1, 1.1)),
        "displacement": mass**2,
        "dnll": effect,
        "dnll_lo": lo,
        "dnll_hi": hi,
        "p": p,
        "p_holm": min(1.0, 24 * p),
        "tost_p": 0.001 if negligible else 0.7,
        "kl": abs(effect) * 1.1,
        "kl_lo": abs(effect),
        "kl_hi": abs(effect) * 1.2,
        "kl_upper_p": 0.01,
        "kl_lower_p": 0.2,
        "kl_lower_holm": 0.4,
        "flips": min(0.9, abs(effect)),
        "verdict": verdict,
        "documents_needed": 480.0 if verdict == "inconclusive" else np.nan,
    }


def contrasts_table(cells: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for baseline in ("recency", "uniform"):
        both = cells[cells["model"] == "attnres"].merge(
            cells[cells["model"] == baseline], on="cell", suffixes=("", "_b")
        )
        for r in both[both["eligible"] & both["eligible_b"]].to_dict("records"):
            diff, half = r["dnll"] - r["dnll_b"], 0.1 * abs(r["dnll"]) + 1e-3
            inside = abs(diff) + half < MARGIN
            larger = "trained larger" if diff > 0 else "baseline larger"
            verdict = "equivalent" if inside else larger if abs(diff) > half else "inconclusive"
            rows.append(
                {k: r[k] for k in ("cell", "family", "sublayer", "band", "documents")}
                | {
                    "baseline": baseline,
                    "diff": diff,
                    "diff_lo": diff - half,
                    "diff_hi": diff + half,
                    "p": 0.0001,
                    "p_holm": 0.0014,
                    "trained_dnll": r["dnll"],
                    "baseline_dnll": r["dnll_b"],
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


def window_tables(cells: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(seed + 2)
    base = cells[cells["eligible"]][["model", "cell", "intervention", "family", "sublayer", "band", "dnll", "mass"]]
    windows = pd.DataFrame(
        {
            "window": np.arange(PILOT + CONFIRM),
            "document": np.arange(PILOT + CONFIRM),
            "split": ["pilot"] * PILOT + ["confirm"] * CONFIRM,
        }
    )
    full = base.merge(windows, how="cross")
    noise = rng.normal(0, 1, len(full))
    effects = full.drop(columns=["dnll", "mass"]).assign(
        dnll=full["dnll"] * (1 + 0.2 * noise), kl=full["dnll"].abs(), flips=0.01
    )
    mass = full.drop(columns=["cell", "intervention", "dnll"]).assign(
        mass=full["mass"] + 0.02 * noise, uniform_share=0.3, norm_share=full["mass"], displacement=0.1
    )
    return effects, mass


def summary_table() -> dict:
    models = [
        {
            "name": name,
            "path": f"runs/small-1a2b3c4d/{name}",
            "kind": "trained" if name == "attnres" else "wrap",
            "parameters": 3_145_728,
            "convention": convention,
            "routing_trained": name == "attnres",
            "layers": LAYERS,
            "blocks": 4,
            "step": 1200,
            "tokens": 6_000_000,
            "val_loss": 3.42,
            "clean_nll": 3.51,
            "verified": True,
        }
        for name, convention in MODELS.items()
    ]
    checks = [
        {
            "name": "schedule",
            "model": m,
            "passed": True,
            "value": 3e-8,
            "limit": 1e-6,
            "detail": "largest |weight − schedule| over reads and tokens",
        }
        for m in ("recency", "uniform")
    ]
    checks += [
        {"name": "noop", "model": m, "passed": True, "value": 0.0, "limit": 0.0, "detail": "bitwise equal"}
        for m in MODELS
    ]
    claims = [
        {
            "claim": "The largest mass slice is not the largest effect slice (attention)",
            "verdict": "reproduced",
            "evidence": "embedding early has the mass, current mid the effect",
            "test": "both orderings, confirm split",
        },
        {
            "claim": "One family carries appreciable mass and no effect",
            "verdict": "inconclusive",
            "evidence": "older late MLP: mass 0.31, ΔNLL +0.0041",
            "test": "TOST and KL upper bound at 0.005 nat",
        },
        {
            "claim": "Structured routing emerges only with training",
            "verdict": "not reproduced",
            "evidence": "uniform wrap shows the same cells",
            "test": "paired contrast, Holm",
        },
    ]
    dissociation = [
        {"sublayer": s, "largest_mass": "current early", "largest_effect": e, "verdict": v, "detail": d}
        for s, e, v, d in (
            ("attn", "current mid", "dissociated", "both orderings hold, p = 0.0004"),
            ("mlp", "current early", "coincide", "the same cell on the pilot split"),
        )
    ]
    return {
        "title": "AttnRes probe: attnres_small",
        "created": "2026-07-01T12:00:00+00:00",
        "models": models,
        "motifs": [
            _motif("attnres", "mask:embedding@mlp.early", "motif", 0.2, 0.15, "run"),
            _motif("attnres", "mask:older@attn.late", "no motif", -0.01, None, "not run"),
            _motif("uniform", "mask:current@mlp.early", "uncontrolled", 0.3, None, "not run"),
            _motif("uniform", "mask:recent@mlp.early", "no motif", -0.1, None, "not run"),
        ],
        "permuted_labels": {"permutations": 40, "cells": 23, "found": 1, "rate": 0.025},
        "command": "python probe.py ckpt=runs/small-1a2b3c4d/checkpoints/step_00001200",
        "checks": checks,
        "grid": {
            "candidate_cells": 24,
            "run_cells": 24,
            "complete": True,
            "families": list(FAMILIES),
            "note": "",
        },
        "statistics": {
            "margin": MARGIN,
            "alpha": 0.05,
            "sign_flips": 9999,
            "bootstrap": 9999,
            "seed": 0,
            "documents": {"pilot": PILOT, "confirm": CONFIRM},
            "windows": {"pilot": PILOT, "confirm": CONFIRM},
        },
        "claims": claims,
        "dissociation": dissociation,
        "recency": {"bias": BIAS, "kl_to_vanilla": 0.00042},
        "provenance": {
            "git": "0123abc",
            "torch": "2.13.0",
            "python": "3.11.7",
            "hardware": {"cpu": 2, "gpu": None},
        },
        "plan_notes": ["12 layers in 4 blocks: 3 layers to a block."],
    }


def write_probe(folder: Path, frames: Mapping[Table, pd.DataFrame], registered: dict, summary: dict) -> Path:
    """Writes tables, preregistration and summary as a probe does, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, frame in frames.items():
        write_table(folder, table, frame)
    write_json(folder / PREREGISTRATION, registered)
    registration = {"preregistration": registered_as(folder / PREREGISTRATION)}
    write_json(folder / SUMMARY, {formats.KEY: formats.PROBE_VERSION} | summary | registration)
    return folder


def write_fake(folder: Path, seed: int = 0) -> Path:
    """Writes everything that a probe leaves for its report, and returns the folder."""
    cells = cells_table(seed)
    effects, mass = window_tables(cells, seed)
    frames = {
        columns.CELLS: cells,
        columns.CONTRASTS: contrasts_table(cells),
        columns.ROUTING: routing_table(seed),
        columns.EFFECTS: effects,
        columns.MASS: mass,
    }
    bands = {band: [layers.start, layers.stop] for band, layers in BANDS.items()}
    registered = {"families": list(FAMILIES), "bands": bands, "margin": MARGIN}
    return write_probe(folder, frames, registered, summary_table())
