"""What a row of the study's claims is, and how the verdicts of two models make one."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from attnres.tables.names import ClaimVerdict
from attnres.tables.roles import Roles

Claim = dict[str, Any]
# A verdict on the same claim by model.
Verdicts = Mapping[str, ClaimVerdict]
_OPPOSITE = {
    ClaimVerdict.REPRODUCED: ClaimVerdict.NOT_REPRODUCED,
    ClaimVerdict.NOT_REPRODUCED: ClaimVerdict.REPRODUCED,
    ClaimVerdict.INCONCLUSIVE: ClaimVerdict.INCONCLUSIVE,
    ClaimVerdict.NOT_TESTED: ClaimVerdict.NOT_TESTED,
}


def claim_row(
    *, claim: str, verdict: ClaimVerdict, evidence: str, test: str, against: Verdicts, recurs: Verdicts
) -> Claim:
    """One claim as `summary.json` holds it.

    Args:
        verdict: on the trained model.
        against: verdict against each model without trained routing.
        recurs: verdict on each control whose routing was trained too.
    """
    row = {"claim": claim, "verdict": verdict.value, "evidence": evidence, "test": test}
    sides = {"against": against, "recurs": recurs}
    return row | {name: {model: word.value for model, word in side.items()} for name, side in sides.items()}


def both(ours: ClaimVerdict, comparison: ClaimVerdict) -> ClaimVerdict:
    """The verdict against a baseline, from that on the trained model and that on the comparison."""
    for word in (ClaimVerdict.NOT_TESTED, ClaimVerdict.NOT_REPRODUCED):
        if word in (ours, comparison):
            return word
    return ClaimVerdict.REPRODUCED if ours == comparison == ClaimVerdict.REPRODUCED else ClaimVerdict.INCONCLUSIVE


def compared(roles: Roles, ours: ClaimVerdict, verdicts: Verdicts) -> dict[str, Verdicts]:
    """`against` and `recurs` of a claim that a baseline must not show as well, from the verdict on it in each model."""
    theirs = defaultdict(lambda: ClaimVerdict.NOT_TESTED, verdicts)
    against = {name: both(ours, _OPPOSITE[theirs[name]]) for name in (*roles.baselines, *roles.nulls)}
    return {"against": against, "recurs": {name: theirs[name] for name in roles.trained_too}}
