"""The grid of a probe: which cells are asked for, in which models each can be judged, and why not in the others.

It is worked out once, before a model runs, and is a value: the preregistration, the runner and the tables read it. What
the pilot split excludes comes as a second step, `Grid.excluding`, which gives another value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnres.depth.families import Cell, place_sublayer, places
from attnres.depth.plan import DepthPlan
from attnres.interventions.config import GridConfig
from attnres.interventions.ids import FAMILY_KINDS, Composition, Intervention, Spec, parse
from attnres.tables.names import MASK, RESCUE, STUDY_MOTIFS

_MOTIF_SLICES = frozenset((family, sublayer, band) for _, family, sublayer, band in STUDY_MOTIFS)


@dataclass(frozen=True)
class Candidate:
    """A cell that is asked for, in one model.

    Attributes:
        spec: what is done where.
        cell: where it can be judged, or why it is excluded.
    """

    model: str
    spec: Spec
    cell: Cell

    @property
    def is_mask(self) -> bool:
        """Whether it is an eligible mask of one family."""
        return self.spec.what == MASK and self.cell.eligible

    @property
    def row(self) -> dict[str, Any]:
        """Its row of the table of eligibility."""
        return {
            "model": self.model,
            "cell": self.spec.id,
            "intervention": self.spec.what,
            "family": self.cell.family,
            "sublayer": self.cell.sublayer,
            "band": self.cell.band,
            "eligible": self.cell.eligible,
            "reason": self.cell.reason,
            "eligible_reads": len(self.cell.reads),
            "reads": self.cell.candidates,
            "mean_sources": self.cell.mean_sources,
        }


@dataclass(frozen=True)
class Grid:
    """Every cell that is asked for in every model, excluded ones included.

    Attributes:
        candidates: model by model, each in the order of the cells.
        whole: how many cells the grid has of which this one may be a part: over all families, sublayers and bands.
    """

    candidates: tuple[Candidate, ...]
    whole: int

    @classmethod
    def of(cls, specs: Sequence[Spec], plans: Mapping[str, DepthPlan], whole: int | None = None) -> "Grid":
        """The grid of these cells in models with these plans; the plan alone decides which are eligible."""
        everywhere = (Candidate(model, spec, spec.cell(plan)) for model, plan in plans.items() for spec in specs)
        return cls(tuple(everywhere), len(specs) if whole is None else whole)

    @property
    def specs(self) -> list[Spec]:
        """What is asked for, each cell once."""
        return list(dict.fromkeys(candidate.spec for candidate in self.candidates))

    @property
    def models(self) -> list[str]:
        """Names of the models, each once."""
        return list(dict.fromkeys(candidate.model for candidate in self.candidates))

    def of_model(self, model: str) -> list[Candidate]:
        """A model's candidates."""
        return [candidate for candidate in self.candidates if candidate.model == model]

    def eligible(self, model: str) -> list[Spec]:
        """The cells that can be judged in a model."""
        return [candidate.spec for candidate in self.of_model(model) if candidate.cell.eligible]

    def excluding(self, model: str, reasons: Mapping[str, str]) -> "Grid":
        """This grid without some more cells of a model: id -> why it cannot be carried out, empty where it can."""

        def judged(candidate: Candidate) -> Candidate:
            if candidate.model != model or not candidate.cell.eligible:
                return candidate
            return replace(candidate, cell=replace(candidate.cell, reason=reasons.get(candidate.spec.id, "")))

        return replace(self, candidates=tuple(map(judged, self.candidates)))


def make_grid(config: GridConfig, plans: Mapping[str, DepthPlan]) -> Grid:
    """The grid that a configuration asks for.

    Args:
        plans: model -> its depth plan, the trained model's first; all are equally deep.
    """
    plan = next(iter(plans.values()))
    specs = candidates(config, plan)
    everywhere = candidates(replace(config, families="all", sublayers="all", bands="all"), plan)
    return Grid.of(specs, plans, len({*specs, *everywhere}))


def candidates(config: GridConfig, plan: DepthPlan) -> list[Spec]:
    """Every cell that a configuration asks for, excluded ones included, none of them twice.

    Intervention by intervention, each at all places from early to late and there on all families; then the controls,
    then what tests sufficiency, then the cells that are named one by one, each rescue behind the cell without it.
    """
    specs = [spec for what in config.interventions for spec in _everywhere(what, config, plan)]
    masks = [spec for spec in specs if spec.kind == MASK]
    controls = [
        replace(mask, kind="matched")
        for mask in masks
        if config.controls == "all" or (config.controls == "motifs" and _is_motif(mask))
    ]
    kept = [
        replace(control, kind="keep")
        for control in controls
        if config.sufficiency == "all" or (config.sufficiency == "motifs" and _is_motif(control))
    ]
    named = [cell for spec in map(parse, config.cells) for cell in (without_rescue(spec), spec)]
    return list(dict.fromkeys([*specs, *controls, *kept, *named]))


def without_rescue(spec: Spec) -> Spec:
    """A cell without what it puts back: what its recovered share is a share of; itself where it puts nothing back."""
    left = tuple(member for member in spec.members if member.kind != RESCUE)
    return spec if not left or left == spec.members else left[0] if len(left) == 1 else Composition(left)


def _is_motif(item: Intervention) -> bool:
    return (item.family, item.sublayer, item.band) in _MOTIF_SLICES


def _everywhere(what: str, config: GridConfig, plan: DepthPlan) -> Iterable[Intervention]:
    kind, _, argument = what.partition(":")
    families = config.families if kind in FAMILY_KINDS else (None,)
    if kind == "schedule" and not argument:
        argument = repr(config.recency_bias)
    number = float(argument) if argument else None
    for sublayer, band in places(plan, config.places):
        for family in families if _wanted(sublayer, band, config, plan) else ():
            yield Intervention(kind, family, sublayer, band, number)  # type: ignore[arg-type]


def _wanted(sublayer: str | None, band: str, config: GridConfig, plan: DepthPlan) -> bool:
    feeds = place_sublayer(plan, sublayer, band)
    # The final read feeds no sublayer: it belongs to a grid that leaves none out.
    sublayers = (*config.sublayers, "final") if len(config.sublayers) == 2 else config.sublayers
    return feeds in sublayers and (config.places != "bands" or band in config.bands)
