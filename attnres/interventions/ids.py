"""Interventions on routing: frozen specifications with a string id, and the edits that carry them out.

An id names what is done, to which family, and where:

    kind[:argument][:family]@place      mask:embedding@mlp.early   scale:0.5:older@attn.layer7   mean@read12

and several joined with `+` make one cell: `mask:older@attn.late+mask:recent@attn.late`. The same ids serve every model
probed; what they mean at a read follows from that model's depth plan. On a family:

* `mask` removes its sources and renormalises the rest (a bias of -inf);
* `scale:x` multiplies its odds by x (a bias of log x; 0 is `mask`);
* `values` mixes the vectors of another document in its place, under unchanged weights;
* `matched` is the control of `mask`: see `attnres.interventions.edits.RemoveMatched`.

On a whole read: `mean` (its mean weights on the pilot split: no content, no position), `uniform`, `schedule:b` (the
recency wrap's at bias b), `resample` (the weights of another document at the same position). `noop` changes nothing and
takes the same path.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attnres.depth.families import FAMILIES, WHOLE_READ, Cell, cell, check_place, family_indices, place_reads
from attnres.depth.plan import DepthPlan
from attnres.errors import ConfigError
from attnres.interventions.edits import CLEAN, Change, Exchange, RemoveMatched, Replace, RoutingEdit, Scale

__all__ = ["CLEAN", "KINDS", "Composition", "Intervention", "Kind", "Materials", "Spec", "parse"]

Kind = Literal["noop", "mask", "scale", "values", "matched", "mean", "uniform", "schedule", "resample"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FAMILY_KINDS = ("mask", "scale", "values", "matched")
# What a kind's argument is, for those that have one.
ARGUMENTS = {"scale": "a factor of 0 or more", "schedule": "the bias b in nats"}
# Kinds that take vectors or weights from another document.
DONOR_KINDS = ("values", "resample")


@dataclass(frozen=True)
class Materials:
    """What interventions need beside the model, for one batch of windows.

    Attributes:
        mean: read -> mean routing weights `[S]` on the pilot split.
        donor_weights: read -> log weights `[B, T, S]` of each window's donor.
        donor_sources: read -> source vectors of each window's donor, S tensors `[B, T, D]`.
        noise: read -> uniform numbers `[B, T, S]`, a function of seed, window and read.
    """

    mean: Mapping[int, Tensor]
    donor_weights: Mapping[int, Tensor]
    donor_sources: Mapping[int, tuple[Tensor, ...]]
    noise: Mapping[int, Tensor]


NOTHING = Materials({}, {}, {}, {})


@dataclass(frozen=True)
class Intervention:
    """What is done where.

    Attributes:
        kind: see the module.
        family: of sources; None for `noop` and what is done to a whole read.
        sublayer: `"attn"` or `"mlp"`; None where `band` is one read.
        band: a band, layer, block or read; see `attnres.depth.families.place_reads`.
        argument: the factor of `scale`, the bias of `schedule`; None for the rest.

    Raises:
        ConfigError: for a part that does not exist.
    """

    kind: Kind
    family: str | None
    sublayer: str | None
    band: str
    argument: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"intervention kind: expected one of {', '.join(KINDS)}, received {self.kind!r}")
        if self.kind in FAMILY_KINDS:
            if self.family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise ConfigError(
                    f"intervention {self.kind}: family: expected one of {known}, received {self.family!r}"
                )
        elif self.family is not None:
            raise ConfigError(f"intervention {self.kind}: takes no family, received {self.family!r}")
        expected, given = ARGUMENTS.get(self.kind), self.argument
        if (given is None) == (expected is not None):
            told = f"expected {expected}, e.g. {self.kind}:0.5" if expected else "takes no argument"
            raise ConfigError(f"intervention {self.kind}: {told}, received {given}")
        if given is not None and (not math.isfinite(given) or (self.kind == "scale" and given < 0)):
            raise ConfigError(f"intervention {self.kind}: expected {expected}, received {given}")
        try:
            check_place(self.sublayer, self.band)
        except ValueError as error:
            raise ConfigError(f"intervention {error}") from error

    @property
    def what(self) -> str:
        """What is done, without the family: `mask`, `scale:0.5`."""
        if self.argument is None:
            return self.kind
        # The shortest digits that read back as the same number; `+` joins interventions.
        return f"{self.kind}:{repr(self.argument + 0.0).removesuffix('.0').replace('e+', 'e')}"

    @property
    def id(self) -> str:
        family = "" if self.family is None else f":{self.family}"
        place = self.band if self.sublayer is None else f"{self.sublayer}.{self.band}"
        return f"{self.what}{family}@{place}"

    @property
    def parts(self) -> "tuple[Intervention, ...]":
        return (self,)

    @classmethod
    def parse(cls, text: str) -> "Intervention":
        """The specification behind the id of a single intervention.

        Raises:
            ConfigError: where the text is not of the form `kind[:argument][:family]@place`.
        """
        what, at, where = text.partition("@")
        kind, *words = what.split(":")
        sublayer, dot, band = where.partition(".")
        wanted = (kind in ARGUMENTS) + (kind in FAMILY_KINDS)
        if not at or not where or (kind in KINDS and len(words) != wanted):
            raise ConfigError(
                f"intervention {text!r}: expected kind[:argument][:family]@place, e.g. mask:older@attn.late"
            )
        argument = None
        if kind in ARGUMENTS:
            try:
                argument = float(words[0])
            except ValueError:
                raise ConfigError(f"intervention {text!r}: expected {ARGUMENTS[kind]}, received {words[0]!r}") from None
        family = words[-1] if kind in FAMILY_KINDS else None
        return cls(kind, family, sublayer if dot else None, band if dot else where, argument)  # type: ignore[arg-type]

    def cell(self, plan: DepthPlan) -> Cell:
        """Where a model with this plan can be judged, and why not elsewhere."""
        return cell(plan, WHOLE_READ if self.family is None else self.family, self.sublayer, self.band)

    def edit(self, plan: DepthPlan, materials: Materials = NOTHING) -> RoutingEdit:
        """The edit that carries this out at the eligible reads of a model with this plan."""
        if self.kind == "noop":
            return CLEAN
        return RoutingEdit({j: (self._change(plan.reads[j].num_sources, j, materials),) for j in self.cell(plan).reads})

    def _change(self, num_sources: int, read: int, materials: Materials) -> Change:
        if self.family is not None:
            members = family_indices(self.family, num_sources)
            if self.kind == "values":
                return Exchange(members, tuple(materials.donor_sources[read][i] for i in members))
            if self.kind == "matched":
                return RemoveMatched(members, materials.noise[read])
            return Scale(members, 0.0 if self.argument is None else self.argument)
        if self.kind == "resample":
            return Replace(materials.donor_weights[read])
        if self.kind == "mean":
            # A weight that underflowed stays finite: what sets all weights of a read removes none of its sources.
            return Replace(torch.log(materials.mean[read].clamp_min(torch.finfo(torch.float32).tiny)))
        logits = torch.zeros(num_sources, dtype=torch.float64)
        logits[-1] = self.argument or 0.0
        return Replace(torch.log_softmax(logits, -1))


@dataclass(frozen=True)
class Composition:
    """Several interventions in one cell, carried out in this order where they meet.

    Attributes:
        parts: two or more, none of them twice.

    Raises:
        ConfigError: for fewer, or for one that is repeated.
    """

    parts: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or len(set(self.parts)) != len(self.parts):
            raise ConfigError(f"intervention {self.id!r}: expected two or more different ones joined with +")

    @property
    def id(self) -> str:
        return "+".join(part.id for part in self.parts)

    @property
    def what(self) -> str:
        return "+".join(part.what for part in self.parts)

    def cell(self, plan: DepthPlan) -> Cell:
        """The parts' cells in one: excluded where one of them is, or where nothing would be left of a read."""
        cells = [part.cell(plan) for part in self.parts]
        labels = [_joined([getattr(one, name) for one in cells]) for name in ("family", "sublayer", "band")]
        reads = tuple(sorted({read for one in cells for read in one.reads}))
        candidates = {read.index for part in self.parts for read in place_reads(plan, part.sublayer, part.band)}
        mean_sources = sum(plan.reads[j].num_sources for j in reads) / len(reads) if reads else 0.0
        reason = next(
            (f"{part.id}: {one.reason}" for part, one in zip(self.parts, cells, strict=True) if one.reason), ""
        )
        for j in reads if not reason else ():
            meeting = [part.kind for part, one in zip(self.parts, cells, strict=True) if j in one.reads]
            if "matched" in meeting and len(meeting) > 1:
                reason = f"matched meets another intervention at read {j}"
            elif self._removed(plan, j) == set(range(plan.reads[j].num_sources)):
                reason = f"every source is removed at read {j}"
            if reason:
                break
        return Cell(labels[0], labels[1], labels[2], reads, len(candidates), mean_sources, reason)

    def _removed(self, plan: DepthPlan, read: int) -> set[int]:
        """Sources that are certainly gone at a read when all parts are done."""
        removed: set[int] = set()
        for part in self.parts:
            if read not in part.cell(plan).reads:
                continue
            if part.family is None:
                # Weights that are set anew bring back what was removed before.
                removed = removed if part.kind == "noop" else set()
            elif part.kind == "mask" or part.argument == 0:
                removed |= set(family_indices(part.family, plan.reads[read].num_sources))
        return removed

    def edit(self, plan: DepthPlan, materials: Materials = NOTHING) -> RoutingEdit:
        """The edit that carries all of them out."""
        changes: dict[int, tuple[Change, ...]] = {}
        for part in self.parts:
            for read, change in part.edit(plan, materials).at.items():
                changes[read] = (*changes.get(read, ()), *change)
        return RoutingEdit(changes)


def _joined(labels: list[str]) -> str:
    """One label where all are the same; else all of them, so that no two compositions share their coordinates."""
    return labels[0] if len(set(labels)) == 1 else "+".join(labels)


Spec = Intervention | Composition


def parse(text: str) -> Spec:
    """The specification behind an id.

    Raises:
        ConfigError: where a part of it is not of the form `kind[:argument][:family]@place`.
    """
    parts = tuple(Intervention.parse(part) for part in text.split("+"))
    return parts[0] if len(parts) == 1 else Composition(parts)
