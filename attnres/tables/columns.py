"""Every column of every table of a probe, once: its type, its unit, and what it means.

`attnres.tables.folder` writes and reads every table by it, and `docs/tables.md` is made of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from attnres.depth.places import FAMILIES, SUBLAYERS, WHOLE_READ
from attnres.tables import names

Type = Literal["text", "flag", "integer", "number"]
NATS = "nats/token"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in the file's first line, or in its schema.
        type: what a reader makes of it.
        unit: empty where there is none.
        meaning: in words, for `docs/tables.md`.
        optional: it may be absent, and its values may be empty.
        words: the only values of a text; none where any text may stand there.
    """

    name: str
    type: Type
    unit: str
    meaning: str
    optional: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One file of a probe's folder.

    Attributes:
        name: of the file.
        meaning: what a row is.
        columns: in the order in which they are written.
    """

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """Names of all columns, in order."""
        return [column.name for column in self.columns]

    @property
    def required(self) -> list[str]:
        """Names of the columns that a reader insists on."""
        return [column.name for column in self.columns if not column.optional]

    @property
    def measures(self) -> list[str]:
        """Names of the columns that hold numbers other than counts."""
        return [column.name for column in self.columns if column.type == "number"]

    def missing(self, present: Iterable[str]) -> list[str]:
        """Required columns that are not among `present`."""
        there = set(present)
        return [name for name in self.required if name not in there]


def _text(name: str, meaning: str, optional: bool = False) -> Column:
    return Column(name, "text", "", meaning, optional)


def _word(name: str, words: Iterable[str], meaning: str, optional: bool = False) -> Column:
    return Column(name, "text", "", meaning, optional, tuple(words))


def _flag(name: str, meaning: str, optional: bool = False) -> Column:
    return Column(name, "flag", "", meaning, optional)


def _count(name: str, meaning: str, optional: bool = False) -> Column:
    return Column(name, "integer", "", meaning, optional)


def _number(name: str, unit: str, meaning: str, optional: bool = False) -> Column:
    return Column(name, "number", unit, meaning, optional)


def _p(name: str, meaning: str, optional: bool = True) -> Column:
    return Column(name, "number", "probability", meaning, optional)


def _interval(name: str, unit: str, meaning: str, optional: bool = False) -> tuple[Column, ...]:
    """A mean and its interval over documents."""
    return (
        _number(name, unit, meaning, optional),
        _number(f"{name}_lo", unit, f"lower limit of the 95% BCa interval of `{name}`", optional),
        _number(f"{name}_hi", unit, f"upper limit of the 95% BCa interval of `{name}`", optional),
    )


# What names a place and a family; SLICE is their names.
_SLICE = (
    _text("family", f"family of sources, or `{WHOLE_READ}` for a whole read"),
    _text("sublayer", "`attn` or `mlp`: what the reads feed; empty at a single read"),
    _text("band", "third of the depth, layer, block or read"),
)
SLICE = [column.name for column in _SLICE]
_MODEL = _text("model", "name of the model: `attnres`, a wrap, a null, or a control")
_CELL = _text("cell", "id of the intervention and its place")
_INTERVENTION = _text("intervention", "what is done, without family and place")
_DRAWN = (
    _count("window", "id of the window in the corpus"),
    _count("document", "id of the document that the window is of"),
)
_SPLIT = _word("split", names.Split, "which documents the window is of")
_WINDOW = (*_DRAWN, _SPLIT)
_DOCUMENTS = _count("documents", "confirmatory documents that were tested")
_WINDOWS = _count("windows", "windows of those documents", optional=True)
_LOOKS = _count("looks", "looks at which it was measured; its intervals are valid at each", optional=True)
_LOOK = _count("look", "the look at which its document came, in its split; only with looks", optional=True)
_FAMILY_SIZE = _count("family_size", "tests that the correction counts", optional=True)
_CORRECTION = _word("correction", ("holm", "fdr_bh"), "how p was corrected", optional=True)
_DNLL = "mean of what the intervention costs: edited less clean negative log-likelihood, on the same path"
_NORM_SHARE = "norm-aware share of the family: `<sum_F a_i v_i, h> / |h|^2`"
_DISPLACEMENT = "squared distance, over 2, of the normalised mix with and without the family"
_UNIFORM_SHARE = "mass of the family under uniform routing: `|F| / S`"

EFFECTS = Table(
    "effects.parquet",
    "a model, a cell, a window; `effects.csv` holds the same as text",
    (
        *(_MODEL, *_WINDOW, _CELL, _INTERVENTION, *_SLICE),
        _number("dnll", NATS, "edited less clean negative log-likelihood, on the same path"),
        _number("kl", NATS, "KL divergence of the edited from the clean distribution"),
        _number("flips", "fraction", "positions whose most likely token changes"),
        _LOOK,
    ),
)
# For those who do not read parquet; no command reads it.
EFFECTS_AS_TEXT = replace(EFFECTS, name="effects.csv")
MASS = Table(
    "mass.parquet",
    "a model, a slice, a window",
    (
        *(_MODEL, *_WINDOW, *_SLICE),
        _number("mass", "share", "routing weight of the family, mean over eligible reads and positions"),
        _number("norm_share", "share", _NORM_SHARE),
        _number("displacement", "", _DISPLACEMENT),
        _number("uniform_share", "share", _UNIFORM_SHARE),
        _LOOK,
    ),
)
ATTRIBUTION = Table(
    "attribution.parquet",
    "a cell of the trained model, a confirmatory window; only with `probe.attribution=true`",
    (
        *(_MODEL, _CELL, *_DRAWN),
        _number("estimate", NATS, "effect of the mask as estimated from gradients"),
        _SPLIT,
    ),
)
ELIGIBILITY = Table(
    "eligibility.csv",
    "a model, a candidate cell",
    (
        *(_MODEL, _CELL, _INTERVENTION, *_SLICE),
        _flag("eligible", "whether it can be judged"),
        _text("reason", "why not"),
        _count("eligible_reads", "reads at which it can be judged", optional=True),
        _count("reads", "reads of the place", optional=True),
        _number("mean_sources", "", "mean number of sources over the eligible reads", optional=True),
    ),
)
ROUTING = Table(
    "routing.csv",
    "a model, a read, a source",
    (
        _MODEL,
        _count("read", "number of the read"),
        _count("layer", "its layer; L for the final read"),
        _word("sublayer", (*SUBLAYERS, "final"), "what the read feeds"),
        _count("source", "position in the list of sources, oldest first"),
        _count("num_sources", "S"),
        _number("weight", "share", "mean routing weight over confirmatory positions"),
        _number("analytic", "share", "the weight that a wrap's schedule prescribes"),
        _word("role", FAMILIES, "family of the source"),
        _text("holds", "what the source is a sum of", optional=True),
    ),
)
CELLS = Table(
    "cells.csv",
    "a model, a candidate cell",
    (
        *(_MODEL, _CELL, _INTERVENTION, *_SLICE),
        _flag("eligible", "whether it can be judged"),
        _text("reason", "why not"),
        _count("eligible_reads", "reads at which it can be judged"),
        _number("mean_sources", "", "mean number of sources over the eligible reads"),
        _DOCUMENTS,
        Column("windows", "integer", "", "windows of those documents"),
        *_interval("mass", "share", "mean routing weight of the family"),
        _number("uniform_share", "share", _UNIFORM_SHARE),
        _number("uniform_excess", "share", "`mass` less `uniform_share`", optional=True),
        _flag("appreciable", "whether `mass_lo` exceeds `uniform_share`"),
        _number("norm_share", "share", _NORM_SHARE),
        _number("displacement", "", _DISPLACEMENT),
        *_interval("dnll", NATS, _DNLL),
        _p("p", "two-sided sign-flip p of `dnll`"),
        _p("p_holm", "`p` after Holm, over the cells at bands", optional=False),
        _p("tost_p", "p of equivalence: `dnll` within the margin", optional=False),
        *_interval("kl", NATS, "mean KL divergence of the edited from the clean distribution"),
        _p("kl_upper_p", "p of equivalence: `kl` below the margin"),
        _p("kl_lower_p", "p of `kl` above the margin"),
        _p("kl_lower_holm", "`kl_lower_p` after Holm"),
        _number("flips", "fraction", "positions whose most likely token changes"),
        _word("verdict", names.Verdict, "on the cell"),
        _count("documents_needed", "documents that would decide an inconclusive cell"),
        _FAMILY_SIZE,
        _CORRECTION,
        _p("p_fdr", "`p` after Benjamini and Hochberg, over maps of layers, blocks or reads"),
        _p("kl_lower_fdr", "`kl_lower_p` after Benjamini and Hochberg"),
        _number("norm_share_lo", "share", "lower limit of the 95% BCa interval of `norm_share`", optional=True),
        _number("norm_share_hi", "share", "upper limit of the 95% BCa interval of `norm_share`", optional=True),
        _number("displacement_lo", "", "lower limit of the 95% BCa interval of `displacement`", optional=True),
        _number("displacement_hi", "", "upper limit of the 95% BCa interval of `displacement`", optional=True),
        _LOOKS,
    ),
)
CONTRASTS = Table(
    "contrasts.csv",
    "another model, a cell that is eligible in both",
    (
        _text("baseline", "the model that the trained one is compared with"),
        *(_CELL, Column("intervention", "text", "", _INTERVENTION.meaning, optional=True), *_SLICE),
        *(_DOCUMENTS, _WINDOWS),
        *_interval("diff", NATS, "mean effect in the trained model less that in the other one, paired by window"),
        _p("p", "two-sided sign-flip p of `diff`"),
        _p("p_holm", "`p` after Holm", optional=False),
        _p("tost_p", "p of equivalence: `diff` within the margin"),
        _number("trained_dnll", NATS, "mean effect in the trained model"),
        _number("baseline_dnll", NATS, "mean effect in the other one"),
        _word("verdict", names.ContrastVerdict, "on the difference of effect"),
        *(_FAMILY_SIZE, _CORRECTION),
        _p("p_fdr", "`p` after Benjamini and Hochberg"),
        *_interval("mass_diff", "share", "mean mass in the trained model less that in the other one", optional=True),
        _p("mass_p", "two-sided sign-flip p of `mass_diff`"),
        _p("mass_p_holm", "`mass_p` after Holm"),
        _p("mass_p_fdr", "`mass_p` after Benjamini and Hochberg"),
        _word("mass_verdict", names.ContrastVerdict, "on the difference of mass", optional=True),
        _LOOKS,
    ),
)
MOTIFS = Table(
    "motifs.csv",
    "a model, an eligible masked cell at a band",
    (
        *(_MODEL, _CELL, *_SLICE, _DOCUMENTS),
        _flag("causal", "whether the cell is causal with a positive effect"),
        _count("others", "the family's other eligible cells"),
        *_interval("elsewhere_diff", NATS, "its effect less the mean of the family's others", optional=True),
        _p("elsewhere_p", "one-sided sign-flip p of `elsewhere_diff`"),
        _text("matched", "`run`, `not run`, or why the matched control is excluded"),
        *_interval("matched_diff", NATS, "its effect less that of its matched control", optional=True),
        _p("matched_p", "one-sided sign-flip p of `matched_diff`"),
        _flag("ruled_out", "whether the cell is negligible, or an interval lies below zero"),
        _p("p", "the larger of the two p"),
        _p("p_holm", "`p` after Holm over the grid"),
        _word("verdict", names.MotifVerdict, "on the cell as a motif"),
        _word("effect_learned", names.Learned, "whether training made the effect", optional=True),
        _word("mass_learned", names.Learned, "whether training made the mass", optional=True),
        _LOOKS,
        _p("matched_p_holm", "`matched_p` after Holm over the grid"),
        _word("necessity", names.Shown, "the mask is causal and costs something", optional=True),
        _word("sufficiency", names.Shown, "`keep`, which removes every other family, is negligible", optional=True),
        _word("specificity", names.Shown, "it costs more than its matched control, after Holm", optional=True),
    ),
)
RESCUES = Table(
    "rescues.csv",
    "a model, an eligible cell with a rescue; only where one was asked for",
    (
        *(_MODEL, _CELL),
        _text("without", "the cell without the rescue, of whose effect it takes back a share"),
        _DOCUMENTS,
        _number("dnll", NATS, "mean effect with the rescue"),
        _number("dnll_without", NATS, "mean effect without the rescue"),
        *_interval("recovered", "share", "`1 - dnll / dnll_without`", optional=True),
        _text("reason", "why no share is given", optional=True),
    ),
)
DISSOCIATION = Table(
    "dissociation.csv",
    "a model, a sublayer type",
    (
        _MODEL,
        _word("sublayer", SUBLAYERS, "whose cells are compared"),
        _count("cells", "eligible cells"),
        _count("documents", "confirmatory documents", optional=True),
        _text("mass_cell", "the cell of largest mass on the pilot split", optional=True),
        _text("effect_cell", "the cell of largest effect on the pilot split", optional=True),
        *_interval("mass_diff", "share", "mass of `mass_cell` less that of `effect_cell`", optional=True),
        _p("mass_p", "one-sided sign-flip p of `mass_diff`"),
        *_interval("effect_diff", NATS, "effect of `effect_cell` less that of `mass_cell`", optional=True),
        _p("effect_p", "one-sided sign-flip p of `effect_diff`"),
        _p("p", "the larger of the two p"),
        _p("p_holm", "`p` after Holm over the two sublayer types"),
        _word("verdict", names.DissociationVerdict, "whether the largest mass is the largest effect"),
        _text("reason", "why nothing was tested", optional=True),
        _text("predicted_by", "measures other than mass that predict effect", optional=True),
        _LOOKS,
    ),
)
SPEARMAN = Table(
    "spearman.csv",
    "a model, a sublayer type (or `all`), a measure",
    (
        _MODEL,
        _word("sublayer", (*SUBLAYERS, "all"), "whose cells are correlated"),
        _word("metric", names.Measure, "the measure that effect is correlated with"),
        _count("cells", "eligible cells"),
        _count("documents", "confirmatory documents"),
        _number("rho", "", "Spearman's correlation of effect with the measure, over cells", optional=True),
        _number("rho_lo", "", "lower limit of its percentile interval over documents", optional=True),
        _number("rho_hi", "", "upper limit of its percentile interval over documents", optional=True),
        _flag("predicts", "whether `rho_lo` is above zero"),
        _number("over_mass", "", "`rho` less that of mass", optional=True),
        _number("over_mass_lo", "", "lower limit of its percentile interval", optional=True),
        _number("over_mass_hi", "", "upper limit of its percentile interval", optional=True),
        _p("over_mass_p", "p of no difference from mass"),
    ),
)
# Of a table that no probe made: names and units are the user's.
_SECOND = "mean of the second metric"
_DIFF = "mean effect less that of the component's control"
COMPONENTS = Table(
    "cells.csv",
    "a group, a component of somebody's table; written by `attnres.commands.judge`, in a folder of its own",
    (
        _text("group", "the family of tests", optional=True),
        _text("component", "what was removed, edited or compared"),
        _count("documents", "units that were tested"),
        _count("rows", "rows of the table that they were averaged from"),
        *_interval("effect", "the table's", "mean effect over units"),
        _p("p", "two-sided sign-flip p of `effect`", optional=False),
        _p("p_holm", "`p` after Holm, over the group", optional=False),
        _p("tost_p", "p of equivalence: `effect` within the margin", optional=False),
        *_interval("second", "the table's", _SECOND, optional=True),
        _p("second_upper_p", "p of equivalence: `second` below its margin"),
        _p("second_lower_p", "p of `second` above its margin"),
        _p("second_lower_holm", "`second_lower_p` after Holm"),
        *_interval("control_diff", "the table's", _DIFF, optional=True),
        _p("control_p", "one-sided sign-flip p of `control_diff`"),
        _p("control_p_holm", "`control_p` after Holm"),
        _word("specificity", names.Shown, "it costs more than its control, after Holm", optional=True),
        _word("verdict", names.Verdict, "on the component"),
        _count("documents_needed", "documents that would decide an inconclusive component", optional=True),
        _number("detectable", "the table's", "size of a mean effect that is found with the power asked for"),
        _p("smallest_p", "smallest `p` that these flips and documents can give", optional=False),
        _count("family_size", "tests that the correction counts"),
    ),
)
# What is measured, and what is judged from it without a model.
MEASURED = (EFFECTS, MASS, ATTRIBUTION, ELIGIBILITY, ROUTING)
JUDGED = (CELLS, CONTRASTS, DISSOCIATION, SPEARMAN, MOTIFS, RESCUES)
