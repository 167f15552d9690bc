"""Families of sources, places in the depth, cells of the grid, and which of them can be judged at all.

`ineligibility` decides whether a family can be judged at a read, and `cell` excludes a cell of whose reads fewer than
half are eligible. Both follow from the depth plan, before any model is run. Two exclusions are decided elsewhere: of
compositions whose members conflict (`interventions.ids`), and of what the pilot split cannot serve
(`interventions.donors`).
"""

from dataclasses import dataclass

from attnres.depth.places import BANDS, FAMILIES, NUMBERED, SUBLAYERS, WHOLE_READ, Places
from attnres.depth.plan import DepthPlan, ReadPlan


def family_indices(family: str, num_sources: int) -> tuple[int, ...]:
    """Positions of a family among S sources, oldest first; empty where the family does not exist.

    `embedding = {0}`, `current = {S-1}`, `recent = {S-2}` if S >= 3, `older = {1 .. S-3}` if S >= 4. A read with one
    source has no families.
    """
    last = num_sources - 1
    members = {
        "embedding": (0,) if num_sources > 1 else (),
        "current": (last,) if num_sources > 1 else (),
        "recent": (last - 1,) if num_sources >= 3 else (),
        "older": tuple(range(1, last - 1)),
    }
    if family not in members:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, received {family!r}")
    return members[family]


def other_indices(family: str, num_sources: int) -> tuple[int, ...]:
    """Positions of every other source of a read, oldest first."""
    members = family_indices(family, num_sources)
    return tuple(source for source in range(num_sources) if source not in members)


def family_of(source: int, num_sources: int) -> str:
    """The family of a source position (`"embedding"` for the only source of a read)."""
    for family in FAMILIES:
        if source in family_indices(family, num_sources):
            return family
    return "embedding"


def band_layers(band: str, num_layers: int) -> range:
    """Layers of a third of the depth: `[round(kL/3), round((k+1)L/3))` (28 layers: 0-8, 9-18, 19-27)."""
    if band not in BANDS:
        raise ValueError(f"band: expected one of {', '.join(BANDS)}, received {band!r}")
    k = BANDS.index(band)
    return range(round(k * num_layers / 3), round((k + 1) * num_layers / 3))


def check_place(sublayer: str | None, band: str) -> None:
    """Raises ValueError where the two name no place (see `place_reads`)."""
    numbered = NUMBERED.fullmatch(band)
    if numbered is not None and numbered[1] == "read":
        if sublayer is not None:
            raise ValueError(f"sublayer: {band} is one read and takes none, received {sublayer!r}")
        return
    if sublayer not in SUBLAYERS:
        raise ValueError(f"sublayer: expected one of {', '.join(SUBLAYERS)}, received {sublayer!r}")
    if band not in BANDS and numbered is None:
        known = f"{', '.join(BANDS)}, layer<N>, block<N>, or read<N> without a sublayer"
        raise ValueError(f"band: expected one of {known}, received {band!r}")


def place_reads(plan: DepthPlan, sublayer: str | None, band: str) -> tuple[ReadPlan, ...]:
    """The reads of a place in the depth; none where the model is too small for it.

    Args:
        sublayer: `"attn"` or `"mlp"`, or None for one read.
        band: a third of the depth (`"early"`, `"mid"`, `"late"`); `"layer7"`; `"block3"`, the layers `3m .. 4m-1` of a
            model with m layers a block (also under `full`, where a block of sources is one sublayer); or `"read12"`,
            the final read `2L` included.
    """
    check_place(sublayer, band)
    if band in BANDS:
        layers = band_layers(band, plan.num_layers)
    else:
        numbered = NUMBERED.fullmatch(band)
        assert numbered is not None
        unit, number = numbered[1], int(numbered[2])
        if unit == "read":
            return plan.reads[number : number + 1]
        size = 1 if unit == "layer" else plan.layers_per_block
        layers = range(number * size, min((number + 1) * size, plan.num_layers))
    assert sublayer is not None
    return tuple(plan.reads[2 * layer + SUBLAYERS.index(sublayer)] for layer in layers)


def place_sublayer(plan: DepthPlan, sublayer: str | None, band: str) -> str:
    """`"attn"`, `"mlp"` or `"final"`: what the reads of a place feed, also where this model has no such read."""
    if sublayer is not None:
        return sublayer
    number = int(band.removeprefix("read"))
    return "final" if number == 2 * plan.num_layers else SUBLAYERS[number % 2]


def places(plan: DepthPlan, kind: Places) -> tuple[tuple[str | None, str], ...]:
    """All places of a kind as (sublayer, band), in the order of the depth."""
    if kind == "reads":
        return tuple((None, f"read{index}") for index in range(2 * plan.num_layers + 1))
    counts = {"layers": plan.num_layers, "blocks": plan.num_real_blocks}
    bands = BANDS if kind == "bands" else [f"{kind[:-1]}{number}" for number in range(counts[kind])]
    return tuple((sublayer, band) for band in bands for sublayer in SUBLAYERS)


def ineligibility(plan: DepthPlan, read: ReadPlan, family: str) -> str:
    """Why a family, or `WHOLE_READ`, cannot be judged at a read; empty if it can."""
    if family == WHOLE_READ:
        if read.num_sources == 1:
            return "only one source"
        return "" if plan.routing_is_trainable(read) else "its sources are all one vector"
    members = family_indices(family, read.num_sources)
    if read.num_sources == 1:
        return "only one source"
    if not members:
        return "family is empty"
    inside = {read.sources[i] for i in members}
    outside = {source for i, source in enumerate(read.sources) if i not in members}
    if inside & outside:
        return "a duplicate of its source is in another family"
    return ""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid and the reads at which it can be judged.

    Attributes:
        family, sublayer, band: its coordinates; see `place_reads` for the last two.
        reads: indices of the eligible reads.
        candidates: how many reads the place has.
        mean_sources: mean S over the eligible reads (0 where there are none).
        reason: why the cell is excluded; empty if it is eligible.
    """

    family: str
    sublayer: str
    band: str
    reads: tuple[int, ...]
    candidates: int
    mean_sources: float
    reason: str

    @property
    def eligible(self) -> bool:
        return not self.reason


def cell(plan: DepthPlan, family: str, sublayer: str | None, band: str) -> Cell:
    """One cell, excluded (with a `reason`) unless at least half of its place's reads are eligible."""
    reads = place_reads(plan, sublayer, band)
    reasons = [ineligibility(plan, read, family) for read in reads]
    good = [read for read, reason in zip(reads, reasons, strict=True) if not reason]
    mean_sources = sum(read.num_sources for read in good) / len(good) if good else 0.0
    if good and 2 * len(good) >= len(reads):
        reason = ""
    elif not reads:
        reason = "the band has no layers" if band in BANDS else f"the model has no {band}"
    else:
        counts = {why: reasons.count(why) for why in dict.fromkeys(reasons) if why}
        reason = "; ".join(f"{why} at {count} of {len(reads)} reads" for why, count in counts.items())
        reason += ": fewer than half are eligible" if good else ""
    feeds = place_sublayer(plan, sublayer, band)
    return Cell(family, feeds, band, tuple(read.index for read in good), len(reads), mean_sources, reason)


def grid(plan: DepthPlan) -> tuple[Cell, ...]:
    """All candidate cells: families x sublayers x bands (24), excluded ones included with their reasons."""
    return tuple(cell(plan, f, s, b) for b in BANDS for s in SUBLAYERS for f in FAMILIES)
