"""The study's claims on motifs: each motif that it names, and that motifs emerge only where routing was trained."""

import numpy as np
import pandas as pd

from attnres.statistics.claim_rows import Claim, both, claim_row
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import adjust_p
from attnres.statistics.verdicts import RUN, motif_verdicts
from attnres.tables.columns import SLICE
from attnres.tables.names import STUDY_MOTIFS, ClaimVerdict, ContrastVerdict, MotifVerdict
from attnres.tables.roles import TRAINED, UNIFORM, Roles

_OF_MOTIF = {
    MotifVerdict.MOTIF: ClaimVerdict.REPRODUCED,
    MotifVerdict.NO_MOTIF: ClaimVerdict.NOT_REPRODUCED,
    MotifVerdict.UNCONTROLLED: ClaimVerdict.INCONCLUSIVE,
    MotifVerdict.INCONCLUSIVE: ClaimVerdict.INCONCLUSIVE,
}
# Its effect is larger than in the baseline.
_LARGER = {
    ContrastVerdict.TRAINED_LARGER: ClaimVerdict.REPRODUCED,
    ContrastVerdict.INCONCLUSIVE: ClaimVerdict.INCONCLUSIVE,
    ContrastVerdict.EQUIVALENT: ClaimVerdict.NOT_REPRODUCED,
    ContrastVerdict.BASELINE_LARGER: ClaimVerdict.NOT_REPRODUCED,
}


def _of_study(motifs: pd.DataFrame, model: str, config: StatisticsConfig) -> pd.DataFrame:
    """The study's motifs in one model by slice, with `p_study` and `claimed`, the verdict on the claim.

    They are a family of their own for Holm, because they were named before any result.
    """
    table = motifs[motifs["model"] == model].set_index(SLICE)
    table = table.loc[[motif[1:] for motif in STUDY_MOTIFS if motif[1:] in table.index]].assign(p_study=np.nan)
    tested = table.index[table["p"].notna()]
    if len(tested):
        table.loc[tested, "p_study"] = adjust_p(table.loc[tested, "p"], len(STUDY_MOTIFS))
    verdicts = motif_verdicts(table, table["p_study"], config.alpha)
    return table.assign(claimed=[_OF_MOTIF[MotifVerdict(word)].value for word in verdicts])


def motif_claims(
    cells: pd.DataFrame, contrasts: pd.DataFrame, motifs: pd.DataFrame, roles: Roles, config: StatisticsConfig
) -> list[Claim]:
    """A row for each motif of the study; `cells` and `contrasts` are of masks at bands."""
    trained = cells[cells["model"] == TRAINED].set_index(SLICE)
    table = _of_study(motifs, TRAINED, config)
    elsewhere = {name: _of_study(motifs, name, config)["claimed"] for name in roles.trained_too}
    verdicts = {(row.cell, row.baseline): _LARGER[ContrastVerdict(row.verdict)] for row in contrasts.itertuples()}
    baselines = (*roles.baselines, *roles.nulls)
    test = (
        "causal; exceeds the family's other cells and its matched control (one-sided sign flips by document, Holm over "
        f"the study's {len(STUDY_MOTIFS)} motifs); against a baseline: its effect is larger than there"
    )
    rows = []
    for name, *where in STUDY_MOTIFS:
        claim, key = f"motif: {name}", tuple(where)
        recurs = {model: ClaimVerdict(words.get(key, ClaimVerdict.NOT_TESTED)) for model, words in elsewhere.items()}
        if key not in trained.index or key not in table.index:
            reason = f"excluded: {trained.loc[key, 'reason']}" if key in trained.index else "not part of this grid"
            untested = ClaimVerdict.NOT_TESTED
            against = dict.fromkeys(baselines, untested)
            rows.append(
                claim_row(claim=claim, verdict=untested, evidence=reason, test=test, against=against, recurs=recurs)
            )
            continue
        cell, motif = trained.loc[key], table.loc[key]
        verdict = ClaimVerdict(motif["claimed"])
        against = {
            model: both(verdict, verdicts.get((cell["cell"], model), ClaimVerdict.NOT_TESTED)) for model in baselines
        }
        matched = f"no matched control, and no motif without one: {motif['matched']}"
        if motif["matched"] == RUN:
            matched = f"over its matched control {motif['matched_diff']:+.4f} (p {motif['matched_p']:.3g})"
        evidence = (
            f"{cell['verdict']}, dNLL {cell['dnll']:+.4f} [{cell['dnll_lo']:+.4f}, {cell['dnll_hi']:+.4f}]; over the "
            f"family's {motif['others']} other cells {motif['elsewhere_diff']:+.4f} (p {motif['elsewhere_p']:.3g}); "
            f"{matched}; Holm p {motif['p_study']:.3g}; against {UNIFORM}: effect {motif['effect_learned']}, "
            f"mass {motif['mass_learned']}"
        )
        row = claim_row(claim=claim, verdict=verdict, evidence=evidence, test=test, against=against, recurs=recurs)
        copied = {column: motif[column] for column in ("effect_learned", "mass_learned", "matched")}
        rows.append(row | {"cell": cell["cell"]} | copied)
    return rows


def _counted(controlled: list[str], uncontrolled: list[str]) -> str:
    plural = "" if len(controlled) == 1 else "s"
    return f"{len(controlled)} motif{plural} (and {len(uncontrolled)} without a matched control)"


def training_claim(contrasts: pd.DataFrame, motifs: pd.DataFrame, roles: Roles) -> Claim:
    """Structured routing emerges only when routing was trained: motifs here, larger than in a baseline, none there."""

    def cells(model: str, verdict: MotifVerdict) -> list[str]:
        return list(motifs.loc[(motifs["model"] == model) & (motifs["verdict"] == verdict), "cell"])

    mine, uncontrolled = cells(TRAINED, MotifVerdict.MOTIF), cells(TRAINED, MotifVerdict.UNCONTROLLED)
    undecided = bool(uncontrolled or cells(TRAINED, MotifVerdict.INCONCLUSIVE))
    otherwise = ClaimVerdict.INCONCLUSIVE if undecided else ClaimVerdict.NOT_REPRODUCED
    ours = ClaimVerdict.REPRODUCED if mine else otherwise
    evidence = [f"trained: {_counted(mine, uncontrolled)} ({', '.join(mine) or 'none'})"]
    against, recurs = {}, {}
    for name in (*roles.baselines, *roles.nulls):
        theirs, possible = cells(name, MotifVerdict.MOTIF), cells(name, MotifVerdict.UNCONTROLLED)
        rows = contrasts[(contrasts["baseline"] == name) & contrasts["cell"].isin(mine)]
        larger = (rows["verdict"] == ContrastVerdict.TRAINED_LARGER).sum()
        if theirs:
            comparison = ClaimVerdict.NOT_REPRODUCED
        elif rows.empty and mine:
            comparison = ClaimVerdict.NOT_TESTED
        elif possible:
            comparison = ClaimVerdict.INCONCLUSIVE
        elif larger:
            comparison = ClaimVerdict.REPRODUCED
        else:
            decided = len(rows) > 0 and (rows["verdict"] != ContrastVerdict.INCONCLUSIVE).all()
            comparison = ClaimVerdict.NOT_REPRODUCED if decided else ClaimVerdict.INCONCLUSIVE
        evidence.append(
            f"{name}: {_counted(theirs, possible)}, and a smaller effect in {larger} of the trained model's"
        )
        against[name] = both(ours, comparison)
    for name in roles.trained_too:
        again = sum(cell in mine for cell in cells(name, MotifVerdict.MOTIF))
        shown = ClaimVerdict.REPRODUCED if again else ClaimVerdict.INCONCLUSIVE
        recurs[name] = shown if mine else ClaimVerdict.NOT_TESTED
        evidence.append(f"{name}, whose routing was trained too, has {again} of the trained model's")
    verdict = ours
    if ours == ClaimVerdict.REPRODUCED:
        verdict = _decided({against[name] for name in roles.shared})
        if not roles.shared:
            evidence.append("no model without trained routing shares the source convention")
    disagree = {ClaimVerdict.REPRODUCED, ClaimVerdict.NOT_REPRODUCED} <= {against[name] for name in roles.baselines}
    test = (
        "motifs over the whole grid (Holm) in the trained model; none in a model without trained routing, and a larger "
        f"effect than there; decided by those that share the source convention ({', '.join(roles.shared) or 'none'})"
    )
    return claim_row(
        claim="structured routing emerges only when routing was trained",
        verdict=verdict,
        evidence=("the baselines disagree; " if disagree else "") + "; ".join(evidence),
        test=test,
        against=against,
        recurs=recurs,
    )


def _decided(shared: set[ClaimVerdict]) -> ClaimVerdict:
    """The verdict from those against the baselines that share the source convention."""
    if ClaimVerdict.NOT_REPRODUCED in shared:
        return ClaimVerdict.NOT_REPRODUCED
    return ClaimVerdict.REPRODUCED if shared == {ClaimVerdict.REPRODUCED} else ClaimVerdict.INCONCLUSIVE
