"""Which cells a probe asks for: from its settings and the depth of the model to interventions, in a fixed order."""

from dataclasses import replace

from attnres.depth.families import place_sublayer, places
from attnres.depth.plan import DepthPlan
from attnres.interventions.config import GridConfig
from attnres.interventions.ids import FAMILY_KINDS, Intervention, Spec, parse
from attnres.tables.names import STUDY_MOTIFS

_MOTIF_SLICES = frozenset((family, sublayer, band) for _, family, sublayer, band in STUDY_MOTIFS)


def candidates(settings: GridConfig, plan: DepthPlan) -> list[Spec]:
    """Every cell that these settings ask for, excluded ones included, none of them twice.

    Intervention by intervention, each at all places from early to late and there on all families; then the controls,
    then the cells that are named one by one.
    """
    found: list[Spec] = []
    for what in settings.interventions:
        found += _everywhere(what, settings, plan)
    masks = [spec for spec in found if isinstance(spec, Intervention) and spec.kind == "mask"]
    for mask in masks if settings.controls != "none" else ():
        if settings.controls == "all" or (mask.family, mask.sublayer, mask.band) in _MOTIF_SLICES:
            found.append(replace(mask, kind="matched"))
    found += [parse(text) for text in settings.cells]
    return list(dict.fromkeys(found))


def whole_grid(settings: GridConfig, plan: DepthPlan) -> list[Spec]:
    """The candidates of all families, sublayers and bands: the grid of which these settings may be a part."""
    return candidates(replace(settings, families="all", sublayers="all", bands="all"), plan)


def _everywhere(what: str, settings: GridConfig, plan: DepthPlan) -> list[Spec]:
    kind, _, argument = what.partition(":")
    families = settings.families if kind in FAMILY_KINDS else (None,)
    where = [place for place in places(plan, settings.places) if _wanted(place, settings, plan)]
    if kind == "schedule" and not argument:
        argument = repr(settings.recency_bias)
    number = float(argument) if argument else None
    return [
        Intervention(kind, family, sublayer, band, number)  # type: ignore[arg-type]
        for sublayer, band in where
        for family in families
    ]


def _wanted(place: tuple[str | None, str], settings: GridConfig, plan: DepthPlan) -> bool:
    feeds = place_sublayer(plan, *place)
    # The final read feeds no sublayer: it belongs to a grid that leaves none out.
    sublayers = (*settings.sublayers, "final") if len(settings.sublayers) == 2 else settings.sublayers
    return feeds in sublayers and (settings.places != "bands" or place[1] in settings.bands)
