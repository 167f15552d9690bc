"""Families of sources, bands of layers, cells of the grid, and which of them can be judged at all.

Everything here follows from the depth plan, so eligibility is fixed before any model is run.
"""

from dataclasses import dataclass

from attnres.model.plan import DepthPlan, ReadPlan

FAMILIES = ("embedding", "current", "recent", "older")
SUBLAYERS = ("attn", "mlp")
BANDS = ("early", "mid", "late")


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


def ineligibility(plan: DepthPlan, read: ReadPlan, family: str) -> str:
    """Why a family cannot be judged at a read; empty if it can."""
    members = family_indices(family, read.num_sources)
    if read.num_sources == 1:
        return "only one source"
    if not members:
        return "family is empty"
    if len(members) == read.num_sources:
        return "family is every source"
    inside = {read.sources[i] for i in members}
    outside = {source for i, source in enumerate(read.sources) if i not in members}
    if inside & outside:
        return "a duplicate of its source is in another family"
    return ""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid and the reads at which it can be judged.

    Attributes:
        family, sublayer, band: its coordinates.
        reads: indices of the eligible reads.
        candidates: how many reads the band has.
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

    @property
    def slice_id(self) -> str:
        """`family@sublayer.band`."""
        return f"{self.family}@{self.sublayer}.{self.band}"


def cell(plan: DepthPlan, family: str, sublayer: str, band: str) -> Cell:
    """One cell: it needs at least half of its band's reads to be eligible."""
    if sublayer not in SUBLAYERS:
        raise ValueError(f"sublayer: expected one of {', '.join(SUBLAYERS)}, received {sublayer!r}")
    layers = band_layers(band, plan.num_layers)
    reads = [plan.reads[2 * layer + SUBLAYERS.index(sublayer)] for layer in layers]
    reasons = [ineligibility(plan, read, family) for read in reads]
    good = [read for read, reason in zip(reads, reasons, strict=True) if not reason]
    mean_sources = sum(read.num_sources for read in good) / len(good) if good else 0.0
    if good and 2 * len(good) >= len(reads):
        reason = ""
    elif not reads:
        reason = "the band has no layers"
    else:
        counts = {why: reasons.count(why) for why in dict.fromkeys(reasons) if why}
        told = "; ".join(f"{why} at {count} of {len(reads)} reads" for why, count in counts.items())
        reason = told if not good else f"{told}: fewer than half are eligible"
    return Cell(family, sublayer, band, tuple(read.index for read in good), len(reads), mean_sources, reason)


def grid(plan: DepthPlan) -> tuple[Cell, ...]:
    """All candidate cells: families x sublayers x bands (24), excluded ones included with their reasons."""
    return tuple(cell(plan, f, s, b) for b in BANDS for s in SUBLAYERS for f in FAMILIES)
