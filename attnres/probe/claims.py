"""The study's claims, each with its test on this run: tables in, verdicts out."""

from typing import Any

import numpy as np
import pandas as pd

from attnres.probe.inference import StatisticsConfig, adjust_p, sign_flip_p
from attnres.probe.statistics import document_means

# The motifs that the study reports: (what it says, family, sublayer, band).
MOTIFS = (
    ("embedding through early MLPs", "embedding", "mlp", "early"),
    ("current state through early attention", "current", "attn", "early"),
    ("current state through early MLPs", "current", "mlp", "early"),
    ("older history through late attention", "older", "attn", "late"),
)
TRAINED = "attnres"


def study_claims(
    effects: pd.DataFrame,
    cells: pd.DataFrame,
    contrasts: pd.DataFrame,
    dissociation: pd.DataFrame,
    checks: list[dict[str, Any]],
    config: StatisticsConfig,
) -> list[dict[str, str]]:
    """One row per claim: `claim`, `verdict` ("reproduced", "not reproduced", "inconclusive" or "not tested"),
    `evidence`, `test`.
    """
    # The study masked; other interventions and the controls have cells of their own.
    cells = cells[cells["intervention"] == "mask"]
    return [
        *_schedule_claims(checks),
        *_motif_claims(effects, cells, contrasts, config),
        *_dissociation_claims(dissociation),
        _mass_without_role(cells),
    ]


def _row(claim: str, verdict: str, evidence: str, test: str) -> dict[str, str]:
    return {"claim": claim, "verdict": verdict, "evidence": evidence, "test": test}


def _schedule_claims(checks: list[dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for check in checks:
        if check["name"] == "content-independent, on schedule":
            rows.append(
                _row(
                    f"the {check['model']}-wrapped baseline routes by its analytic schedule, whatever the content",
                    "reproduced" if check["passed"] else "not reproduced",
                    f"largest deviation {check['value']:.1e}",
                    f"max |a - a*| <= {check['limit']:.0e} over reads, positions, sources",
                )
            )
    return rows


def _motif_claims(
    effects: pd.DataFrame, cells: pd.DataFrame, contrasts: pd.DataFrame, config: StatisticsConfig
) -> list[dict[str, str]]:
    """A motif is causal and larger than the same family elsewhere; "learned" needs the uniform contrast as well."""
    trained = cells[cells["model"] == TRAINED].set_index(["family", "sublayer", "band"])
    comparisons = {key: _exceeds_elsewhere(effects, cells, key, config) for key in (motif[1:] for motif in MOTIFS)}
    tested = [key for key, (_, p) in comparisons.items() if not np.isnan(p)]
    adjusted = (
        dict(zip(tested, adjust_p([comparisons[key][1] for key in tested], len(MOTIFS)), strict=True)) if tested else {}
    )
    rows = []
    for told, *where in MOTIFS:
        key = (where[0], where[1], where[2])
        claim = f"motif: {told}"
        test = (
            "causal; exceeds the family's other cells (sign-flip by document, Holm over the motifs); "
            "contrast with each baseline"
        )
        if key not in trained.index:
            rows.append(_row(claim, "not tested", "not part of this grid", test))
            continue
        cell = trained.loc[key]
        if cell["verdict"] == "excluded":
            rows.append(_row(claim, "not tested", f"excluded: {cell['reason']}", test))
            continue
        difference, _ = comparisons[key]
        p_elsewhere = adjusted.get(key, float("nan"))
        localised = difference > 0 and p_elsewhere <= config.alpha
        causal = cell["verdict"] == "causal" and cell["dnll"] > 0
        against = {
            row["baseline"]: row["verdict"] for _, row in contrasts[contrasts["cell"] == cell["cell"]].iterrows()
        }
        if causal and localised:
            learned = against.get("uniform") == "trained larger"
            verdict = "reproduced"
            origin = (
                "learned: exceeds the uniform wrap too"
                if learned
                else "not shown to be learned against the uniform wrap"
            )
        else:
            verdict = "inconclusive" if cell["verdict"] == "inconclusive" else "not reproduced"
            origin = "no motif" if verdict == "not reproduced" else "undecided"
        baselines = ", ".join(f"{name}: {what}" for name, what in against.items()) or "no baseline has this cell"
        evidence = (
            f"{cell['verdict']}, dNLL {cell['dnll']:+.4f} [{cell['dnll_lo']:+.4f}, {cell['dnll_hi']:+.4f}]; over the "
            f"family's other cells {difference:+.4f} (p {p_elsewhere:.3g}); {origin}; {baselines}; "
            "matched control not run"
        )
        rows.append(_row(claim, verdict, evidence, test))
    return rows


def _exceeds_elsewhere(
    effects: pd.DataFrame, cells: pd.DataFrame, key: tuple[str, str, str], config: StatisticsConfig
) -> tuple[float, float]:
    """Effect of a cell less the mean of its family's other eligible cells, by document: mean and sign-flip p."""
    mine = cells[(cells["model"] == TRAINED) & (cells["family"] == key[0]) & (cells["verdict"] != "excluded")]
    here = mine[(mine["sublayer"] == key[1]) & (mine["band"] == key[2])]
    others = mine.drop(here.index)
    if here.empty or others.empty:
        return float("nan"), float("nan")
    means, _ = document_means(effects[effects["model"] == TRAINED], ["cell"], ["dnll"], "confirm")
    dnll = means["dnll"]
    difference = (dnll[here["cell"].iloc[0]] - dnll[list(others["cell"])].mean(axis=1)).to_numpy()[:, None]
    return float(difference.mean()), float(sign_flip_p(difference, config.sign_flips, config.seed)[0])


def _dissociation_claims(dissociation: pd.DataFrame) -> list[dict[str, str]]:
    names = {"dissociated": "reproduced", "coincide": "not reproduced"}
    rows = []
    for _, row in dissociation[dissociation["model"] == TRAINED].iterrows():
        reason = f"{row['reason']}; " if row["reason"] else ""
        predicted = f"; effect is predicted by {row['predicted_by']}" if row["predicted_by"] else ""
        pair = f"largest mass {row['mass_cell']}, largest effect {row['effect_cell']}"
        rows.append(
            _row(
                f"{row['sublayer']}: the slice of largest mass is not the slice of largest effect",
                names.get(row["verdict"], "inconclusive"),
                f"{reason}{pair}{predicted}",
                "picked on the pilot split; both differences on the confirmatory split (intersection-union, Holm)",
            )
        )
    return rows


def _mass_without_role(cells: pd.DataFrame) -> dict[str, str]:
    """A family with appreciable mass somewhere and a null verdict everywhere it can be judged."""
    trained = cells[(cells["model"] == TRAINED) & (cells["verdict"] != "excluded")]
    found, possible = [], []
    for family, rows in trained.groupby("family"):
        if not rows["appreciable"].astype(bool).any():
            continue
        if (rows["verdict"] == "null").all():
            found.append(str(family))
        elif (rows["verdict"] != "causal").all():
            possible.append(str(family))
    nulls = trained[(trained["verdict"] == "null") & trained["appreciable"].astype(bool)]
    evidence = f"families: {', '.join(found) or 'none'}; single cells: {', '.join(nulls['cell']) or 'none'}"
    verdict = "reproduced" if found else "inconclusive" if possible else "not reproduced"
    if possible and not found:
        evidence += f"; undecided: {', '.join(possible)}"
    return _row(
        "one source family carries appreciable mass and has no detectable role",
        verdict,
        evidence,
        "mass above |F|/S (lower confidence bound) and equivalence to zero (TOST and KL) in all of the family's cells",
    )
