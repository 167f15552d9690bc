"""Every word that stands in a table of a probe and that code compares: each is written here once.

A `StrEnum` member is its word (`Verdict.CAUSAL == "causal"`), so that tables hold plain strings; `Verdict(word)` raises
ValueError for a word that is none.
"""

from enum import StrEnum


class Split(StrEnum):
    """Which documents: the pilot picks, the confirmatory split tests."""

    PILOT = "pilot"
    CONFIRM = "confirm"


class Model(StrEnum):
    """Names of models that a probe gives itself; controls have names of the user's."""

    TRAINED = "attnres"
    RECENCY = "recency"
    UNIFORM = "uniform"
    UNTRAINED = "untrained"
    SHUFFLED_QUERIES = "shuffled_queries"


# Vanilla models wrapped in a fixed schedule, and nulls of the trained model.
WRAPS = (Model.RECENCY, Model.UNIFORM)
NULLS = (Model.UNTRAINED, Model.SHUFFLED_QUERIES)


class Measure(StrEnum):
    """What is measured of a family at a read, beside the effect of its removal."""

    MASS = "mass"
    NORM_SHARE = "norm_share"
    DISPLACEMENT = "displacement"


class Verdict(StrEnum):
    """On a cell: `Verdict.NEGLIGIBLE` is equivalence within the margin, not the absence of proof.

    No word here is one that pandas reads in a CSV as a missing value, as it does `null`.
    """

    EXCLUDED = "excluded"
    NEGLIGIBLE = "negligible"
    CAUSAL = "causal"
    INCONCLUSIVE = "inconclusive"


class ContrastVerdict(StrEnum):
    """On a difference between the trained model and another one: of effect, or (`EQUAL`) of mass."""

    EQUIVALENT = "equivalent"
    EQUAL = "equal"
    TRAINED_LARGER = "trained larger"
    BASELINE_LARGER = "baseline larger"
    INCONCLUSIVE = "inconclusive"


class MotifVerdict(StrEnum):
    """On a cell as a motif; `UNCONTROLLED`: it stands out, and no matched control says whether any mass would."""

    MOTIF = "motif"
    UNCONTROLLED = "uncontrolled"
    NO_MOTIF = "no motif"
    INCONCLUSIVE = "inconclusive"


class Shown(StrEnum):
    """On a property of a masked cell that no verdict depends on: necessity, sufficiency, specificity."""

    SHOWN = "shown"
    NOT_SHOWN = "not shown"
    NOT_TESTED = "not tested"


class Learned(StrEnum):
    """Whether training made what a motif shows, by the contrast with the uniform wrap."""

    LEARNED = "learned"
    INHERITED = "inherited"
    UNDECIDED = "undecided"
    NOT_TESTED = "not tested"


class DissociationVerdict(StrEnum):
    """On a sublayer: is the largest mass the largest effect?"""

    DISSOCIATED = "dissociated"
    COINCIDE = "coincide"
    INCONCLUSIVE = "inconclusive"


class ClaimVerdict(StrEnum):
    """On a claim of the study."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_TESTED = "not tested"


# The intervention that verdicts are about, and its control; what a family does alone; what puts it back behind a mask.
MASK, MATCHED, KEEP, RESCUE = "mask", "matched", "keep", "rescue"
# The motifs that the study reports: (what it says, family, sublayer, band).
STUDY_MOTIFS = (
    ("embedding through early MLPs", "embedding", "mlp", "early"),
    ("current state through early attention", "current", "attn", "early"),
    ("current state through early MLPs", "current", "mlp", "early"),
    ("older history through late attention", "older", "attn", "late"),
)
