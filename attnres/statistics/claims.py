"""The study's claims, each with its test on this run: tables in, verdicts out."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attnres.statistics.claim_rows import Claim, claim_row, compared
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import at_bands
from attnres.statistics.judged import Judged
from attnres.statistics.motif_claims import motif_claims, training_claim
from attnres.statistics.rank_correlation import ALL, which_predicts
from attnres.tables.names import MASK, ClaimVerdict, ContrastVerdict, DissociationVerdict, Measure, Verdict
from attnres.tables.roles import TRAINED, Roles

_DISSOCIATION = {
    DissociationVerdict.DISSOCIATED: ClaimVerdict.REPRODUCED,
    DissociationVerdict.COINCIDE: ClaimVerdict.NOT_REPRODUCED,
    DissociationVerdict.INCONCLUSIVE: ClaimVerdict.INCONCLUSIVE,
}


def study_claims(
    judged: Judged, checks: Sequence[Mapping[str, Any]], config: StatisticsConfig, roles: Roles
) -> list[Claim]:
    """One row per claim: `claim`, `verdict` ("reproduced", "not reproduced", "inconclusive" or "not tested"),
    `evidence`, `test`, `against`: {model without trained routing: verdict}, and `recurs`: {control with: verdict}.

    A claim is about the trained model. Against a baseline it is reproduced if it holds in the trained model and the
    comparison with that baseline supports it, not reproduced if either is shown to fail, and otherwise inconclusive.
    In a control whose routing was trained too it is the claim about that control, which the trained model does not
    enter: that it recurs there is no evidence against it.

    Raises:
        ValueError: a verdict of the tables is none.
    """
    # The study masked; other interventions and the controls have cells of their own.
    cells, contrasts = (at_bands(table, MASK) for table in (judged.cells, judged.contrasts))
    return [
        *_schedule_claims(checks),
        *motif_claims(cells, contrasts, judged.motifs, roles, config),
        training_claim(contrasts, judged.motifs, roles),
        *_dissociation_claims(judged.dissociation, roles),
        _mass_is_not_effect(judged.dissociation, judged.spearman, roles),
        _mass_without_role(cells, roles),
        _norm_claim(judged.spearman, roles, config),
    ]


def baseline_disagreements(contrasts: pd.DataFrame, roles: Roles) -> dict[str, Any]:
    """Cells whose decided verdict differs between baselines: `cells` {cell: {baseline: verdict}} and `statement`."""
    contrasts = contrasts[contrasts["baseline"].isin(roles.baselines)]
    decided = contrasts[contrasts["verdict"] != ContrastVerdict.INCONCLUSIVE]
    cells = {
        str(cell): dict(zip(rows["baseline"], rows["verdict"], strict=True))
        for cell, rows in decided.groupby("cell", sort=False)
        if rows["verdict"].nunique() > 1
    }
    total = contrasts["cell"].nunique()
    statement = (
        f"the baselines disagree on {len(cells)} of {total} cells; what training added is read from a baseline that "
        f"shares the source convention ({', '.join(roles.shared) or 'none here'})"
        if cells
        else f"the baselines do not contradict each other on any of {total} cells"
    )
    return {"cells": cells, "statement": statement}


def _schedule_claims(checks: Sequence[Mapping[str, Any]]) -> list[Claim]:
    rows = []
    for check in checks:
        if check["name"] == "content-independent, on schedule":
            verdict = ClaimVerdict.REPRODUCED if check["passed"] else ClaimVerdict.NOT_REPRODUCED
            rows.append(
                claim_row(
                    claim=f"the {check['model']}-wrapped baseline routes by its analytic schedule, "
                    "whatever the content",
                    verdict=verdict,
                    evidence=f"largest deviation {check['value']:.1e}",
                    test=f"max |a - a*| <= {check['limit']:.0e} over reads, positions, sources",
                    against={check["model"]: verdict},
                    recurs={},
                )
            )
    return rows


def _dissociated(dissociation: pd.DataFrame) -> dict[str, dict[str, ClaimVerdict]]:
    """model -> sublayer -> verdict."""
    return {
        str(model): {row.sublayer: _DISSOCIATION[DissociationVerdict(row.verdict)] for row in rows.itertuples()}
        for model, rows in dissociation.groupby("model", sort=False)
    }


def _dissociation_claims(dissociation: pd.DataFrame, roles: Roles) -> list[Claim]:
    verdicts = _dissociated(dissociation)
    rows = []
    for _, row in dissociation[dissociation["model"] == TRAINED].iterrows():
        reason = f"{row['reason']}; " if row["reason"] else ""
        predicted = f"; effect is predicted by {row['predicted_by']}" if row["predicted_by"] else ""
        pair = f"largest mass {row['mass_cell']}, largest effect {row['effect_cell']}"
        by_model = {
            model: of_model.get(row["sublayer"], ClaimVerdict.NOT_TESTED) for model, of_model in verdicts.items()
        }
        rows.append(
            claim_row(
                claim=f"{row['sublayer']}: the slice of largest mass is not the slice of largest effect",
                verdict=by_model[TRAINED],
                evidence=f"{reason}{pair}{predicted}",
                test="picked on the pilot split; both differences on the confirmatory split (intersection-union, Holm "
                "over the sublayers); against a baseline: it does not show the same",
                **compared(roles, by_model[TRAINED], by_model),
            )
        )
    return rows


def _mass_is_not_effect(dissociation: pd.DataFrame, spearman: pd.DataFrame, roles: Roles) -> Claim:
    """The study: in both sublayers."""

    def overall(by_sublayer: Mapping[str, ClaimVerdict]) -> ClaimVerdict:
        if not by_sublayer:
            return ClaimVerdict.NOT_TESTED
        words = set(by_sublayer.values())
        return words.pop() if len(words) == 1 else ClaimVerdict.INCONCLUSIVE

    verdicts = _dissociated(dissociation)
    mine = verdicts.get(TRAINED, {})
    of_mass = (spearman["model"] == TRAINED) & (spearman["metric"] == Measure.MASS) & (spearman["sublayer"] == ALL)
    evidence = [f"{sublayer}: {verdict}" for sublayer, verdict in mine.items()]
    for row in spearman[of_mass].itertuples():
        evidence.append(f"rank correlation of effect with mass {row.rho:+.2f} [{row.rho_lo:+.2f}, {row.rho_hi:+.2f}]")
    return claim_row(
        claim="mass is not effect: in both sublayers the largest mass is not the largest effect",
        verdict=overall(mine),
        evidence="; ".join(evidence),
        test="the dissociation of every sublayer type; against a baseline: it does not show the same",
        **compared(roles, overall(mine), {model: overall(of_model) for model, of_model in verdicts.items()}),
    )


def _idle_families(cells: pd.DataFrame, model: str) -> tuple[ClaimVerdict, str]:
    """Verdict and evidence: a family with appreciable mass somewhere, and negligible wherever it can be judged."""
    judged = cells[(cells["model"] == model) & (cells["verdict"] != Verdict.EXCLUDED)]
    if judged.empty:
        return ClaimVerdict.NOT_TESTED, "no cell could be judged"
    idle, possible = [], []
    for family, rows in judged.groupby("family"):
        verdicts = {Verdict(word) for word in rows["verdict"]}
        if not rows["appreciable"].astype(bool).any():
            continue
        if verdicts == {Verdict.NEGLIGIBLE}:
            idle.append(str(family))
        elif Verdict.CAUSAL not in verdicts:
            possible.append(str(family))
    nulls = judged[(judged["verdict"] == Verdict.NEGLIGIBLE) & judged["appreciable"].astype(bool)]
    evidence = f"families: {', '.join(idle) or 'none'}; single cells: {', '.join(nulls['cell']) or 'none'}"
    if possible and not idle:
        evidence += f"; undecided: {', '.join(possible)}"
    undecided = ClaimVerdict.INCONCLUSIVE if possible else ClaimVerdict.NOT_REPRODUCED
    return ClaimVerdict.REPRODUCED if idle else undecided, evidence


def _mass_without_role(cells: pd.DataFrame, roles: Roles) -> Claim:
    verdict, evidence = _idle_families(cells, TRAINED)
    by_model = {str(model): _idle_families(cells, model)[0] for model in cells["model"].unique()}
    return claim_row(
        claim="one source family carries appreciable mass and has no detectable role",
        verdict=verdict,
        evidence=evidence,
        test="mass above |F|/S (lower confidence bound) and equivalence to zero (TOST and KL) in all of the family's "
        "cells; against a baseline: it does not show the same",
        **compared(roles, verdict, by_model),
    )


def _norm_claim(spearman: pd.DataFrame, roles: Roles, config: StatisticsConfig) -> Claim:
    """The question behind "mass is not effect": would a measure that knows vector lengths have told?"""

    def in_model(model: str) -> tuple[ClaimVerdict, str]:
        predicts = which_predicts(spearman, config.alpha, model)
        undecided = ClaimVerdict.REPRODUCED if predicts["worse"] else ClaimVerdict.INCONCLUSIVE
        return ClaimVerdict.NOT_REPRODUCED if predicts["better"] else undecided, predicts["statement"]

    verdict, evidence = in_model(TRAINED)
    return claim_row(
        claim="mass is not just norm: a norm-aware measure predicts effect no better than mass does",
        verdict=verdict,
        evidence=evidence,
        test="difference of rank correlations with effect, norm-aware share and displacement against mass (bootstrap "
        "over documents, Holm over the two); not reproduced if one of them predicts better",
        against={},
        recurs={name: in_model(name)[0] for name in roles.trained_too},
    )
