"""The study's claims, each with its test on this run: tables in, verdicts out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from attnres.depth.places import place_kind
from attnres.statistics.cells import SLICE
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.dissociation import which_predicts
from attnres.statistics.inference import adjust_p
from attnres.statistics.motifs import motif_verdicts
from attnres.tables.names import STUDY_MOTIFS
from attnres.tables.roles import TRAINED, UNIFORM, Roles

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
    roles: Roles,
) -> list[Claim]:
    """One row per claim: `claim`, `verdict` ("reproduced", "not reproduced", "inconclusive" or "not tested"),
    `evidence`, `test`, `against`: {model without trained routing: verdict}, and `recurs`: {control with: verdict}.

    A claim is about the trained model. Against a baseline it is reproduced if it holds in the trained model and the
    comparison with that baseline supports it, not reproduced if either is shown to fail, and otherwise inconclusive.
    In a control whose routing was trained too it is the claim about that control, which the trained model does not
    enter: that it recurs there is no evidence against it.
    """
    # The study masked; other interventions and the controls have cells of their own.
    cells, contrasts = (
        table[(table["intervention"] == "mask") & (table["band"].map(place_kind) == "band")]
        for table in (cells, contrasts)
    )
    return [
        *_schedule_claims(checks),
        *_motif_claims(cells, contrasts, motifs, roles, config),
        _training_claim(contrasts, motifs, roles),
        *_dissociation_claims(dissociation, roles),
        _mass_is_not_effect(dissociation, spearman, roles),
        _mass_without_role(cells, roles),
        _norm_claim(spearman, roles, config),
    ]


def baseline_disagreements(contrasts: pd.DataFrame, roles: Roles) -> dict[str, Any]:
    """Cells whose decided verdict differs between baselines: `cells` {cell: {baseline: verdict}} and `statement`."""
    contrasts = contrasts[contrasts["baseline"].isin(roles.baselines)]
    decided = contrasts[contrasts["verdict"] != INCONCLUSIVE]
    found = {
        str(cell): dict(zip(rows["baseline"], rows["verdict"], strict=True))
        for cell, rows in decided.groupby("cell", sort=False)
        if rows["verdict"].nunique() > 1
    }
    total = contrasts["cell"].nunique()
    statement = (
        f"the baselines disagree on {len(found)} of {total} cells; what training added is read from a baseline that "
        f"shares the source convention ({', '.join(roles.shared) or 'none here'})"
        if found
        else f"the baselines do not contradict each other on any of {total} cells"
    )
    return {"cells": found, "statement": statement}


def _claim(
    claim: str,
    verdict: str,
    evidence: str,
    test: str,
    against: Mapping[str, str],
    recurs: Mapping[str, str] | None = None,
) -> Claim:
    told = {"claim": claim, "verdict": verdict, "evidence": evidence, "test": test}
    return told | {"against": dict(against), "recurs": dict(recurs or {})}


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


def _of_study(motifs: pd.DataFrame, model: str, config: StatisticsConfig) -> pd.DataFrame:
    """The study's motifs in one model by slice, with `p_study` and the claim's `told` verdict.

    They are a family of their own for Holm, because they were named before any result.
    """
    table = motifs[motifs["model"] == model].set_index(SLICE)
    table = table.loc[[motif[1:] for motif in STUDY_MOTIFS if motif[1:] in table.index]].assign(p_study=np.nan)
    tested = table.index[table["p"].notna()]
    if len(tested):
        table.loc[tested, "p_study"] = adjust_p(table.loc[tested, "p"], len(STUDY_MOTIFS))
    told_as = {"motif": REPRODUCED, "no motif": NOT_REPRODUCED}
    verdicts = motif_verdicts(table, table["p_study"], config.alpha)
    return table.assign(told=[told_as.get(verdict, INCONCLUSIVE) for verdict in verdicts])


def _motif_claims(
    cells: pd.DataFrame, contrasts: pd.DataFrame, motifs: pd.DataFrame, roles: Roles, config: StatisticsConfig
) -> list[Claim]:
    trained = cells[cells["model"] == TRAINED].set_index(SLICE)
    table = _of_study(motifs, TRAINED, config)
    elsewhere = {name: _of_study(motifs, name, config)["told"] for name in roles.trained_too}
    compared = {(row.cell, row.baseline): row.verdict for row in contrasts.itertuples()}
    larger = {"trained larger": REPRODUCED, "inconclusive": INCONCLUSIVE, None: NOT_TESTED}
    baselines = (*roles.baselines, *roles.nulls)
    test = (
        "causal; exceeds the family's other cells and its matched control (one-sided sign flips by document, Holm over "
        f"the study's {len(STUDY_MOTIFS)} motifs); against a baseline: its effect is larger than there"
    )
    rows = []
    for told, *where in STUDY_MOTIFS:
        claim, key = f"motif: {told}", (where[0], where[1], where[2])
        recurs = {name: verdicts.get(key, NOT_TESTED) for name, verdicts in elsewhere.items()}
        if key not in trained.index or key not in table.index:
            reason = f"excluded: {trained.loc[key, 'reason']}" if key in trained.index else "not part of this grid"
            rows.append(_claim(claim, NOT_TESTED, reason, test, dict.fromkeys(baselines, NOT_TESTED), recurs))
            continue
        cell, motif = trained.loc[key], table.loc[key]
        against = {
            name: _both(motif["told"], larger.get(compared.get((cell["cell"], name)), NOT_REPRODUCED))
            for name in baselines
        }
        matched = f"no matched control, and no motif without one: {motif['matched']}"
        if motif["matched"] == "run":
            matched = f"over its matched control {motif['matched_diff']:+.4f} (p {motif['matched_p']:.3g})"
        evidence = (
            f"{cell['verdict']}, dNLL {cell['dnll']:+.4f} [{cell['dnll_lo']:+.4f}, {cell['dnll_hi']:+.4f}]; over the "
            f"family's {motif['others']} other cells {motif['elsewhere_diff']:+.4f} (p {motif['elsewhere_p']:.3g}); "
            f"{matched}; Holm p {motif['p_study']:.3g}; against {UNIFORM}: effect {motif['effect_learned']}, "
            f"mass {motif['mass_learned']}"
        )
        rows.append(
            _claim(claim, motif["told"], evidence, test, against, recurs)
            | {
                "cell": cell["cell"],
                "effect_learned": motif["effect_learned"],
                "mass_learned": motif["mass_learned"],
                "matched": motif["matched"],
            }
        )
    return rows


def _motifs(found: list[str], uncontrolled: list[str]) -> str:
    return f"{len(found)} motif{'' if len(found) == 1 else 's'} (and {len(uncontrolled)} without a matched control)"


def _training_claim(contrasts: pd.DataFrame, motifs: pd.DataFrame, roles: Roles) -> Claim:
    """Structured routing emerges only when routing was trained: motifs here, larger than in a baseline, none there."""

    def cells(model: str, verdict: str) -> list[str]:
        return list(motifs.loc[(motifs["model"] == model) & (motifs["verdict"] == verdict), "cell"])

    mine, uncontrolled = cells(TRAINED, "motif"), cells(TRAINED, "uncontrolled")
    undecided = bool(uncontrolled or cells(TRAINED, "inconclusive"))
    ours = REPRODUCED if mine else INCONCLUSIVE if undecided else NOT_REPRODUCED
    against, told = {}, []
    for name in (*roles.baselines, *roles.nulls):
        found, possible = cells(name, "motif"), cells(name, "uncontrolled")
        rows = contrasts[(contrasts["baseline"] == name) & contrasts["cell"].isin(mine)]
        larger = list(rows.loc[rows["verdict"] == "trained larger", "cell"])
        if found:
            comparison = NOT_REPRODUCED
        elif rows.empty and mine:
            comparison = NOT_TESTED
        elif possible:
            comparison = INCONCLUSIVE
        elif larger:
            comparison = REPRODUCED
        else:
            decided = (rows["verdict"] != INCONCLUSIVE).all()
            comparison = NOT_REPRODUCED if decided and len(rows) else INCONCLUSIVE
        told.append(f"{name}: {_motifs(found, possible)}, and a smaller effect in {len(larger)} of the trained model's")
        against[name] = _both(ours, comparison)
    recurs = {}
    for name in roles.trained_too:
        again = [cell for cell in cells(name, "motif") if cell in mine]
        recurs[name] = NOT_TESTED if not mine else REPRODUCED if again else INCONCLUSIVE
        told.append(f"{name}, whose routing was trained too, has {len(again)} of the trained model's")
    verdicts = [against[name] for name in roles.shared]
    if ours != REPRODUCED:
        verdict = ours
    elif not verdicts:
        verdict = INCONCLUSIVE
        told.append("no model without trained routing shares the source convention")
    elif NOT_REPRODUCED in verdicts:
        verdict = NOT_REPRODUCED
    else:
        verdict = REPRODUCED if all(v == REPRODUCED for v in verdicts) else INCONCLUSIVE
    decided = {against[name] for name in roles.baselines} & {REPRODUCED, NOT_REPRODUCED}
    evidence = ("the baselines disagree; " if len(decided) > 1 else "") + "; ".join(
        [f"trained: {_motifs(mine, uncontrolled)} ({', '.join(mine) or 'none'})", *told]
    )
    test = (
        "motifs over the whole grid (Holm) in the trained model; none in a model without trained routing, and a larger "
        f"effect than there; decided by those that share the source convention ({', '.join(roles.shared) or 'none'})"
    )
    return _claim("structured routing emerges only when routing was trained", verdict, evidence, test, against, recurs)


_DISSOCIATION = {"dissociated": REPRODUCED, "coincide": NOT_REPRODUCED}


def _unlike(ours: str, theirs: str) -> str:
    """A finding of the trained model that a baseline must not show as well."""
    if theirs == NOT_TESTED:
        return NOT_TESTED
    comparison = {REPRODUCED: NOT_REPRODUCED, NOT_REPRODUCED: REPRODUCED}.get(theirs, INCONCLUSIVE)
    return _both(ours, comparison)


def _compared(roles: Roles, ours: str, found: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """`against` and `recurs` of a finding, from the verdict on it in each model."""
    against = {name: _unlike(ours, found.get(name, NOT_TESTED)) for name in (*roles.baselines, *roles.nulls)}
    return against, {name: found.get(name, NOT_TESTED) for name in roles.trained_too}


def _dissociated(dissociation: pd.DataFrame) -> dict[str, dict[str, str]]:
    """model -> sublayer -> verdict."""
    return {
        str(model): {row.sublayer: _DISSOCIATION.get(row.verdict, INCONCLUSIVE) for row in rows.itertuples()}
        for model, rows in dissociation.groupby("model", sort=False)
    }


def _dissociation_claims(dissociation: pd.DataFrame, roles: Roles) -> list[Claim]:
    verdicts = _dissociated(dissociation)
    rows = []
    for _, row in dissociation[dissociation["model"] == TRAINED].iterrows():
        reason = f"{row['reason']}; " if row["reason"] else ""
        predicted = f"; effect is predicted by {row['predicted_by']}" if row["predicted_by"] else ""
        pair = f"largest mass {row['mass_cell']}, largest effect {row['effect_cell']}"
        found = {model: of_model.get(row["sublayer"], NOT_TESTED) for model, of_model in verdicts.items()}
        ours = found[TRAINED]
        rows.append(
            _claim(
                f"{row['sublayer']}: the slice of largest mass is not the slice of largest effect",
                ours,
                f"{reason}{pair}{predicted}",
                "picked on the pilot split; both differences on the confirmatory split (intersection-union, Holm over "
                "the sublayers); against a baseline: it does not show the same",
                *_compared(roles, ours, found),
            )
        )
    return rows


def _mass_is_not_effect(dissociation: pd.DataFrame, spearman: pd.DataFrame, roles: Roles) -> Claim:
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
        *_compared(roles, overall(mine), {model: overall(found) for model, found in verdicts.items()}),
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


def _mass_without_role(cells: pd.DataFrame, roles: Roles) -> Claim:
    verdict, evidence = _idle_families(cells, TRAINED)
    return _claim(
        "one source family carries appreciable mass and has no detectable role",
        verdict,
        evidence,
        "mass above |F|/S (lower confidence bound) and equivalence to zero (TOST and KL) in all of the family's cells; "
        "against a baseline: it does not show the same",
        *_compared(roles, verdict, {str(model): _idle_families(cells, model)[0] for model in cells["model"].unique()}),
    )


def _norm_claim(spearman: pd.DataFrame, roles: Roles, config: StatisticsConfig) -> Claim:
    """The question behind "mass is not effect": would a measure that knows vector lengths have told?"""

    def in_model(model: str) -> tuple[str, str]:
        found = which_predicts(spearman, config.alpha, model)
        return NOT_REPRODUCED if found["better"] else REPRODUCED if found["worse"] else INCONCLUSIVE, found["statement"]

    return _claim(
        "mass is not just norm: a norm-aware measure predicts effect no better than mass does",
        *in_model(TRAINED),
        "difference of rank correlations with effect, norm-aware share and displacement against mass (bootstrap over "
        "documents, Holm over the two); not reproduced if one of them predicts better",
        {},
        {name: in_model(name)[0] for name in roles.trained_too},
    )
