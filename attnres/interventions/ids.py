"""The grammar of interventions on routing: frozen specifications with a string id. What they do is in `edits.py`.

An id names what is done, to which family, and where:

    kind[:argument][:family]@place      mask:embedding@mlp.early   scale:0.5:older@attn.layer7   mean@read12

and several joined with `+` make one cell: `mask:older@attn.late+mask:recent@attn.late`. The same ids serve every model
probed; what they mean at a read follows from that model's depth plan. On a family:

* `mask` removes its sources and renormalises the rest (a bias of -inf);
* `scale:x` multiplies its odds by x (a bias of log x; 0 is `mask`);
* `keep` removes every other family and renormalises: what the family can do alone (sufficiency);
* `values` mixes the vectors of another document in its place, under unchanged weights;
* `rescue`, in one cell behind a mask, puts back its vectors of the clean run, under the edited run's weights;
* `matched` is the control of `mask`: see `attnres.interventions.edits.RemoveMatched`.

On a whole read: `mean` (its mean weights on the pilot split: no content, no position), `uniform`, `schedule:b` (the
recency wrap's at bias b), `resample` (the weights of another document at the same position). `noop` changes nothing and
takes the same path.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from attnres.depth.families import (
    FAMILIES,
    WHOLE_READ,
    Cell,
    cell,
    check_place,
    family_indices,
    other_indices,
    place_reads,
)
from attnres.depth.plan import DepthPlan
from attnres.errors import ConfigError

Kind = Literal[
    "noop", "mask", "scale", "keep", "values", "rescue", "matched", "mean", "uniform", "schedule", "resample"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
FAMILY_KINDS = ("mask", "scale", "keep", "values", "rescue", "matched")
# What a kind's argument is, for those that have one.
ARGUMENTS = {"scale": "a factor of 0 or more", "schedule": "the bias b in nats"}
# Kinds that take vectors or weights from another document.
DONOR_KINDS = ("values", "resample")
_COORDINATES = ("family", "sublayer", "band")


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
            rule = f"expected {expected}, e.g. {self.kind}:0.5" if expected else "takes no argument"
            raise ConfigError(f"intervention {self.kind}: {rule}, received {given}")
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
    def members(self) -> "tuple[Intervention, ...]":
        """Itself: what a `Composition` has several of."""
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


@dataclass(frozen=True)
class Composition:
    """Several interventions in one cell, carried out in this order where they meet.

    Attributes:
        members: two or more, none of them twice.

    Raises:
        ConfigError: for fewer, or for one that is repeated.
    """

    members: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(set(self.members)) != len(self.members):
            raise ConfigError(f"intervention {self.id!r}: expected two or more different ones joined with +")

    @property
    def id(self) -> str:
        return "+".join(member.id for member in self.members)

    @property
    def what(self) -> str:
        return "+".join(member.what for member in self.members)

    def cell(self, plan: DepthPlan) -> Cell:
        """The members' cells in one: excluded where a member is, or where nothing would be left of a read."""
        cells = [member.cell(plan) for member in self.members]
        family, sublayer, band = (_joined([getattr(cell, name) for cell in cells]) for name in _COORDINATES)
        reads = tuple(sorted({read for cell in cells for read in cell.reads}))
        candidates = {read.index for member in self.members for read in place_reads(plan, member.sublayer, member.band)}
        mean_sources = sum(plan.reads[j].num_sources for j in reads) / len(reads) if reads else 0.0
        reasons = [
            f"{member.id}: {cell.reason}" for member, cell in zip(self.members, cells, strict=True) if cell.reason
        ]
        if not reasons:
            reasons = [reason for read in reads if (reason := self._conflict(plan, read))]
        return Cell(family, sublayer, band, reads, len(candidates), mean_sources, next(iter(reasons), ""))

    def _conflict(self, plan: DepthPlan, read: int) -> str:
        """Why the members cannot be carried out together at a read; empty where they can."""
        meeting = [member.kind for member in self.members if read in member.cell(plan).reads]
        if "matched" in meeting and len(meeting) > 1:
            return f"matched meets another intervention at read {read}"
        if self._removed(plan, read) == set(range(plan.reads[read].num_sources)):
            return f"every source is removed at read {read}"
        return ""

    def _removed(self, plan: DepthPlan, read: int) -> set[int]:
        """Sources that are certainly gone at a read when all members are done."""
        removed: set[int] = set()
        for member in self.members:
            if read not in member.cell(plan).reads:
                continue
            if member.family is None:
                # Weights that are set anew bring back what was removed before.
                removed = removed if member.kind == "noop" else set()
            elif member.kind == "mask" or member.argument == 0:
                removed |= set(family_indices(member.family, plan.reads[read].num_sources))
            elif member.kind == "keep":
                removed |= set(other_indices(member.family, plan.reads[read].num_sources))
        return removed


def _joined(labels: list[str]) -> str:
    """One label where all are the same; else all of them, so that no two compositions share their coordinates."""
    return labels[0] if len(set(labels)) == 1 else "+".join(labels)


Spec = Intervention | Composition


def parse(text: str) -> Spec:
    """The specification behind an id.

    Raises:
        ConfigError: where a member is not of the form `kind[:argument][:family]@place`.
    """
    members = tuple(Intervention.parse(member) for member in text.split("+"))
    return members[0] if len(members) == 1 else Composition(members)
