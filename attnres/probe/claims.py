"""The study's claims, each with its test on this run: tables in, verdicts out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from attnres.probe.dissociation import which_predicts
from attnres.probe.inference import StatisticsConfig, adjust_p
from attnres.probe.motifs import motif_verdicts
from attnres.probe.statistics import SLICE, place_kind

# The motifs that the study reports: (what it says, family, sublayer, band).
MOTIFS = (
    ("embedding through early MLPs", "embedding", "mlp", "early"),
    ("current state through early attention", "current", "attn", "early"),
    ("current state through early MLPs", "current", "mlp", "early"),
    ("older history through late attention", "older", "attn", "late"),
)
TRAINED = "attnres"
# The baseline that shares the source convention of a model trained here.
SHARED = "uniform"
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_TESTED = "reproduced", "not reproduced", "inconclusive", "not tested"
Claim = dict[str, Any]


def study_claims(
    cells: pd.DataFrame,
    contrasts: pd.DataFrame,
    dissociation: pd.DataFrame,
    motifs: pd.DataFrame,
    spearman: pd.DataFrame,
    checks: list[dict[str, Any]],
    config: StatisticsConfig,
) -> list[Claim]:
    """One row per claim: `claim`, `verdict` ("reproduced", "not reproduced", "inconclusive" or "not tested"),
    `evidence`, `test`, and `against`: {baseline: verdict}, for every other model in the tables.

    A claim is about the trained model; against a baseline it is reproduced if it holds in the trained model and the
    comparison with that baseline supports it, not reproduced if either is shown to fail, and otherwise inconclusive.
    """
    # The study masked; other interventions and the controls have cells of their own.
    cells, contrasts = (
        table[(table["intervention"] == "mask") & (table["band"].map(place_kind) == "band")]
        for table in (cells, contrasts)
    )
    baselines = [str(model) for model in cells["model"].unique() if model != TRAINED]
    return [
        *_schedule_claims(checks),
        *_motif_claims(cells, contrasts, motifs, baselines, config),
        _training_claim(contrasts, motifs, baselines),
        *_dissociation_claims(dissociation, baselines),
        _mass_is_not_effect(dissociation, spearman, baselines),
        _mass_without_role(cells, baselines),
        _norm_claim(spearman, config),
    ]


def baseline_disagreements(contrasts: pd.DataFrame) -> dict[str, Any]:
    """Cells whose decided verdict differs between baselines: `cells` {cell: {baseline: verdict}} and `statement`."""
    decided = contrasts[contrasts["verdict"] != INCONCLUSIVE]
    found = {
        str(cell): dict(zip(rows["baseline"], rows["verdict"], strict=True))
        for cell, rows in decided.groupby("cell", sort=False)
        if rows["verdict"].nunique() > 1
    }
    total = contrasts["cell"].nunique()
    statement = (
        f"the baselines disagree on {len(found)} of {total} cells; what training added is read from a baseline that "
        f"shares the source convention ({SHARED})"
        if found
        else f"the baselines do not contradict each other on any of {total} cells"
    )
    return {"cells": found, "statement": statement}


def has_trained_routing(model: str) -> bool:
    """Whether a control is one in which routing was trained: those of the same base or from scratch, but uniform."""
    return model.startswith(("same_base", "scratch")) and "uniform" not in model


def _claim(claim: str, verdict: str, evidence: str, test: str, against: Mapping[str, str]) -> Claim:
    return {"claim": claim, "verdict": verdict, "evidence": evidence, "test": test, "against": dict(against)}


def _both(ours: str, comparison: str) -> str:
    """The verdict against a baseline, from that on the trained model and that on the comparison."""
    if NOT_TESTED in (ours, comparison):
        return NOT_TESTED
    if NOT_REPRODUCED in (ours, comparison):
        return NOT_REPRODUCED
    return REPRODUCED if ours == comparison == REPRODUCED else INCONCLUSIVE


def _schedule_claims(checks: list[dict[str, Any]]) -> list[Claim]:
    rows = []
    for check in checks:
        if check["name"] == "content-independent, on schedule":
            verdict = REPRODUCED if check["passed"] else NOT_REPRODUCED
            rows.append(
                _claim(
                    f"the {check['model']}-wrapped baseline routes by its analytic schedule, whatever the content",
                    verdict,
                    f"largest deviation {check['value']:.1e}",
                    f"max |a - a*| <= {check['limit']:.0e} over reads, positions, sources",
                    {check["model"]: verdict},
                )
            )
    return rows


def _motif_claims(
    cells: pd.DataFrame, contrasts: pd.DataFrame, motifs: pd.DataFrame, baselines: list[str], config: StatisticsConfig
) -> list[Claim]:
    """The study's motifs, a family of their own for Holm because they were named before any result."""
    trained = cells[cells["model"] == TRAINED].set_index(SLICE)
    table = motifs[motifs["model"] == TRAINED].set_index(SLICE)
    table = table.loc[[motif[1:] for motif in MOTIFS if motif[1:] in table.index]]
    tested = table.index[table["p"].notna()]
    adjusted = pd.Series(np.nan, index=table.index)
    if len(tested):
        adjusted[tested] = adjust_p(table.loc[tested, "p"], len(MOTIFS))
    verdicts = dict(zip(table.index, motif_verdicts(table, adjusted, config.alpha), strict=True))
    compared = {(row.cell, row.baseline): row.verdict for row in contrasts.itertuples()}
    told_as = {"motif": REPRODUCED, "no motif": NOT_REPRODUCED, "inconclusive": INCONCLUSIVE}
    larger = {"trained larger": REPRODUCED, "inconclusive": INCONCLUSIVE, None: NOT_TESTED}
    test = (
        "causal; exceeds the family's other cells and its matched control (one-sided sign flips by document, Holm over "
        f"the study's {len(MOTIFS)} motifs); against a baseline: its effect is larger than there"
    )
    rows = []
    for told, *where in MOTIFS:
        claim, key = f"motif: {told}", (where[0], where[1], where[2])
        if key not in trained.index or key not in table.index:
            reason = f"excluded: {trained.loc[key, 'reason']}" if key in trained.index else "not part of this grid"
            rows.append(_claim(claim, NOT_TESTED, reason, test, dict.fromkeys(baselines, NOT_TESTED)))
            continue
        cell, motif, verdict = trained.loc[key], table.loc[key], told_as[verdicts[key]]
        against = {
            name: _both(verdict, larger.get(compared.get((cell["cell"], name)), NOT_REPRODUCED)) for name in baselines
        }
        matched = f"matched control {motif['matched']}"
        if motif["matched"] == "run":
            matched = f"over its matched control {motif['matched_diff']:+.4f} (p {motif['matched_p']:.3g})"
        evidence = (
            f"{cell['verdict']}, dNLL {cell['dnll']:+.4f} [{cell['dnll_lo']:+.4f}, {cell['dnll_hi']:+.4f}]; over the "
            f"family's {motif['others']} other cells {motif['elsewhere_diff']:+.4f} (p {motif['elsewhere_p']:.3g}); "
            f"{matched}; Holm p {adjusted[key]:.3g}; against {SHARED}: effect {motif['effect_learned']}, "
            f"mass {motif['mass_learned']}"
        )
        rows.append(
            _claim(claim, verdict, evidence, test, against)
            | {
                "cell": cell["cell"],
                "effect_learned": motif["effect_learned"],
                "mass_learned": motif["mass_learned"],
                "matched": motif["matched"],
            }
        )
    return rows


def _training_claim(contrasts: pd.DataFrame, motifs: pd.DataFrame, baselines: list[str]) -> Claim:
    """Structured routing emerges only when routing was trained: motifs here, larger than in a baseline, none there."""
    found = {
        model: list(motifs.loc[(motifs["model"] == model) & (motifs["verdict"] == "motif"), "cell"])
        for model in (TRAINED, *baselines)
    }
    undecided = bool(((motifs["model"] == TRAINED) & (motifs["verdict"] == "inconclusive")).any())
    mine = found[TRAINED]
    ours = REPRODUCED if mine else INCONCLUSIVE if undecided else NOT_REPRODUCED
    against, told = {}, []
    for name in baselines:
        rows = contrasts[(contrasts["baseline"] == name) & contrasts["cell"].isin(mine)]
        larger = list(rows.loc[rows["verdict"] == "trained larger", "cell"])
        if has_trained_routing(name):
            shared = [cell for cell in found[name] if cell in mine]
            comparison = REPRODUCED if shared else INCONCLUSIVE
            told.append(f"{name}, whose routing was trained too, has {len(shared)} of these motifs")
        else:
            if found[name]:
                comparison = NOT_REPRODUCED
            elif rows.empty and mine:
                comparison = NOT_TESTED
            elif larger:
                comparison = REPRODUCED
            else:
                decided = (rows["verdict"] != INCONCLUSIVE).all()
                comparison = NOT_REPRODUCED if decided and len(rows) else INCONCLUSIVE
            told.append(
                f"{name} has {len(found[name])} motifs of its own and a smaller effect in {len(larger)} of these"
            )
        against[name] = _both(ours, comparison)
    decisive = [name for name in baselines if name == SHARED or name.startswith("same_base")]
    verdicts = [against[name] for name in decisive]
    if ours != REPRODUCED:
        verdict = ours
    elif not verdicts:
        verdict = INCONCLUSIVE
        told.append(f"no baseline shares the source convention (none is {SHARED} or of the same base)")
    elif NOT_REPRODUCED in verdicts:
        verdict = NOT_REPRODUCED
    else:
        verdict = REPRODUCED if all(v == REPRODUCED for v in verdicts) else INCONCLUSIVE
    disagree = len({v for v in against.values() if v in (REPRODUCED, NOT_REPRODUCED)}) > 1
    evidence = ("the baselines disagree; " if disagree else "") + "; ".join(
        [f"{len(mine)} motifs in the trained model ({', '.join(mine) or 'none'})", *told]
    )
    test = (
        "motifs over the whole grid (Holm) in the trained model; none in a baseline without trained routing, and a "
        f"larger effect than there; decided by the baselines that share the source convention ({SHARED}, same_base*)"
    )
    return _claim("structured routing emerges only when routing was trained", verdict, evidence, test, against)


_DISSOCIATION = {"dissociated": REPRODUCED, "coincide": NOT_REPRODUCED}


def _unlike(ours: str, theirs: str) -> str:
    """A finding of the trained model that a baseline must not show as well."""
    if theirs == NOT_TESTED:
        return NOT_TESTED
    comparison = {REPRODUCED: NOT_REPRODUCED, NOT_REPRODUCED: REPRODUCED}.get(theirs, INCONCLUSIVE)
    return _both(ours, comparison)


def _dissociated(dissociation: pd.DataFrame) -> dict[str, dict[str, str]]:
    """model -> sublayer -> verdict."""
    return {
        str(model): {row.sublayer: _DISSOCIATION.get(row.verdict, INCONCLUSIVE) for row in rows.itertuples()}
        for model, rows in dissociation.groupby("model", sort=False)
    }


def _dissociation_claims(dissociation: pd.DataFrame, baselines: list[str]) -> list[Claim]:
    verdicts = _dissociated(dissociation)
    rows = []
    for _, row in dissociation[dissociation["model"] == TRAINED].iterrows():
        reason = f"{row['reason']}; " if row["reason"] else ""
        predicted = f"; effect is predicted by {row['predicted_by']}" if row["predicted_by"] else ""
        pair = f"largest mass {row['mass_cell']}, largest effect {row['effect_cell']}"
        ours = verdicts[TRAINED][row["sublayer"]]
        rows.append(
            _claim(
                f"{row['sublayer']}: the slice of largest mass is not the slice of largest effect",
                ours,
                f"{reason}{pair}{predicted}",
                "picked on the pilot split; both differences on the confirmatory split (intersection-union, Holm over "
                "the sublayers); against a baseline: it does not show the same",
                {name: _unlike(ours, verdicts.get(name, {}).get(row["sublayer"], NOT_TESTED)) for name in baselines},
            )
        )
    return rows


def _mass_is_not_effect(dissociation: pd.DataFrame, spearman: pd.DataFrame, baselines: list[str]) -> Claim:
    """The study: in both sublayers."""

    def overall(found: Mapping[str, str]) -> str:
        if not found:
            return NOT_TESTED
        return next(iter(found.values())) if len(set(found.values())) == 1 else INCONCLUSIVE

    verdicts = _dissociated(dissociation)
    mine = verdicts.get(TRAINED, {})
    rho = spearman[(spearman["model"] == TRAINED) & (spearman["metric"] == "mass") & (spearman["sublayer"] == "all")]
    told = [f"{sublayer}: {verdict}" for sublayer, verdict in mine.items()]
    for row in rho.itertuples():
        told.append(f"rank correlation of effect with mass {row.rho:+.2f} [{row.rho_lo:+.2f}, {row.rho_hi:+.2f}]")
    return _claim(
        "mass is not effect: in both sublayers the largest mass is not the largest effect",
        overall(mine),
        "; ".join(told),
        "the dissociation of every sublayer type; against a baseline: it does not show the same",
        {name: _unlike(overall(mine), overall(verdicts.get(name, {}))) for name in baselines},
    )


def _idle_families(cells: pd.DataFrame, model: str) -> tuple[str, str]:
    """Verdict and evidence: a family with appreciable mass somewhere, and null wherever it can be judged."""
    judged = cells[(cells["model"] == model) & (cells["verdict"] != "excluded")]
    if judged.empty:
        return NOT_TESTED, "no cell could be judged"
    found, possible = [], []
    for family, rows in judged.groupby("family"):
        if not rows["appreciable"].astype(bool).any():
            continue
        if (rows["verdict"] == "null").all():
            found.append(str(family))
        elif (rows["verdict"] != "causal").all():
            possible.append(str(family))
    nulls = judged[(judged["verdict"] == "null") & judged["appreciable"].astype(bool)]
    evidence = f"families: {', '.join(found) or 'none'}; single cells: {', '.join(nulls['cell']) or 'none'}"
    if possible and not found:
        evidence += f"; undecided: {', '.join(possible)}"
    return REPRODUCED if found else INCONCLUSIVE if possible else NOT_REPRODUCED, evidence


def _mass_without_role(cells: pd.DataFrame, baselines: list[str]) -> Claim:
    verdict, evidence = _idle_families(cells, TRAINED)
    return _claim(
        "one source family carries appreciable mass and has no detectable role",
        verdict,
        evidence,
        "mass above |F|/S (lower confidence bound) and equivalence to zero (TOST and KL) in all of the family's cells; "
        "against a baseline: it does not show the same",
        {name: _unlike(verdict, _idle_families(cells, name)[0]) for name in baselines},
    )


def _norm_claim(spearman: pd.DataFrame, config: StatisticsConfig) -> Claim:
    """The question behind "mass is not effect": would a measure that knows vector lengths have told?"""
    found = which_predicts(spearman, config.alpha)
    verdict = NOT_REPRODUCED if found["better"] else REPRODUCED if found["worse"] else INCONCLUSIVE
    return _claim(
        "mass is not just norm: a norm-aware measure predicts effect no better than mass does",
        verdict,
        found["statement"],
        "difference of rank correlations with effect, norm-aware share and displacement against mass (bootstrap over "
        "documents, Holm over the two); not reproduced if one of them predicts better",
        {},
    )
