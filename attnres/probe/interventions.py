"""Interventions on routing: frozen specifications with a string id, and the edits that carry them out.

An id names what is done, to which family, and where: `mask:embedding@mlp.early`, `noop@attn.late`. The same ids serve
every model probed; what they mean at a read follows from that model's depth plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnres.errors import ConfigError
from attnres.model.families import BANDS, FAMILIES, SUBLAYERS, cell, family_indices
from attnres.model.plan import DepthPlan
from attnres.model.state import Site

Kind = Literal["noop", "mask"]
KINDS: tuple[Kind, ...] = ("noop", "mask")


@dataclass(frozen=True)
class Intervention:
    """What is done where.

    Attributes:
        kind: `"mask"` removes the family's sources and renormalises the rest (a bias of -inf); `"noop"` changes
            nothing but takes the same path.
        family: the family of sources, or None for `noop`.
        sublayer: `"attn"` or `"mlp"`.
        band: `"early"`, `"mid"` or `"late"`.

    Raises:
        ConfigError: for a part that does not exist.
    """

    kind: Kind
    family: str | None
    sublayer: str
    band: str

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("sublayer", self.sublayer, SUBLAYERS),
            ("band", self.band, BANDS),
        ):
            if value not in known:
                raise ConfigError(f"intervention {name}: expected one of {', '.join(known)}, received {value!r}")
        if self.kind == "noop":
            if self.family is not None:
                raise ConfigError(f"intervention noop: takes no family, received {self.family!r}")
        elif self.family not in FAMILIES:
            raise ConfigError(f"intervention family: expected one of {', '.join(FAMILIES)}, received {self.family!r}")

    @property
    def id(self) -> str:
        what = self.kind if self.family is None else f"{self.kind}:{self.family}"
        return f"{what}@{self.sublayer}.{self.band}"

    @classmethod
    def parse(cls, text: str) -> "Intervention":
        """The specification behind an id.

        Raises:
            ConfigError: where the text is not of the form `kind[:family]@sublayer.band`.
        """
        what, at, where = text.partition("@")
        kind, colon, family = what.partition(":")
        sublayer, dot, band = where.partition(".")
        if not (at and dot):
            raise ConfigError(f"intervention {text!r}: expected kind[:family]@sublayer.band, e.g. mask:older@attn.late")
        return cls(kind, family if colon else None, sublayer, band)  # type: ignore[arg-type]

    def edit(self, plan: DepthPlan) -> "RoutingEdit":
        """The edit that carries this out at the eligible reads of a model with this plan."""
        if self.family is None:
            return RoutingEdit({})
        reads = cell(plan, self.family, self.sublayer, self.band).reads
        return RoutingEdit({j: family_indices(self.family, plan.reads[j].num_sources) for j in reads})


@dataclass(frozen=True)
class RoutingEdit:
    """Removes sources at some reads; takes the explicit path at all of them.

    Clean and edited runs of a probe go through the same arithmetic at every read, so that they differ by the
    intervention alone, and one clean run serves every cell.

    Attributes:
        removed: read number -> positions of the sources that it loses.
    """

    removed: Mapping[int, tuple[int, ...]]

    def names(self, site: Site) -> bool:
        return True

    def __call__(self, site: Site, log_weights: Tensor) -> Tensor:
        members = self.removed.get(site.read)
        if not members:
            return log_weights
        return log_weights.index_fill(-1, torch.tensor(members, device=log_weights.device), float("-inf"))


CLEAN = RoutingEdit({})
