"""Which cells a probe asks for, on which windows."""

from dataclasses import dataclass
from typing import Literal

from attnres.config import nearest, require
from attnres.depth.places import BANDS, FAMILIES, SUBLAYERS, Places
from attnres.interventions.ids import FAMILY_KINDS, KINDS, parse


def _names(value: str | tuple[str, ...], known: tuple[str, ...], key: str) -> tuple[str, ...]:
    """`all`, one name, names joined by commas, or a tuple of names -> the names, in canonical order."""
    given = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    given = known if given == ("all",) else given
    for name in given:
        require(name in known, f"probe.{key}: expected all or some of {', '.join(known)}, received {name!r}")
    require(bool(given), f"probe.{key}: expected at least one of {', '.join(known)}, received none")
    return tuple(name for name in known if name in given)


def _split(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names joined by commas, or a tuple of names -> the names, each once."""
    given = tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    return tuple(dict.fromkeys(given))


def _require_intervention(what: str) -> None:
    """Raises ConfigError unless `what` is a kind with the argument that it takes."""
    kind = what.partition(":")[0]
    guess = nearest(kind, KINDS)
    remedy = f"; did you mean {guess!r}?" if guess else ""
    require(kind in KINDS, f"probe.interventions: expected some of {', '.join(KINDS)}, received {kind!r}{remedy}")
    with_argument = "schedule:0" if what == "schedule" else what
    parse(f"{with_argument}{':older' if kind in FAMILY_KINDS else ''}@attn.early")


@dataclass(frozen=True)
class GridConfig:
    """Which cells, on which windows.

    Attributes:
        families, sublayers, bands: `"all"`, one name, or several.
        interventions: what is done at every place: kinds of `attnres.interventions.ids`, with their argument (`mask`,
            `scale:0.5`, `mean`, ...); `schedule` alone takes the bias of the recency wrap.
        controls: for which masked cells the control `matched` is run as well: the `"motifs"` of the study where they
            are in the grid, `"all"` or `"none"`.
        places: what the grid is made of: `"bands"`, `"layers"`, `"blocks"`, or single `"reads"`; the last three take
            all of the depth.
        cells: more cells by their ids, compositions included: `mask:older@attn.late+mask:recent@attn.late`.
        length: tokens of a window, each inside one document.
        documents_pilot, documents_confirm: most documents per split.
        windows_per_document: most windows of one document; they are averaged before any test.
        batch_size: windows a batch, the unit of work: of a forward pass, of what is kept when a probe is stopped, and
            of what several processes share.
        cells_per_pass: cells that share a forward pass as rows of one batch; None chooses.
        seed: chooses documents, offsets, donors and the controls' sources.
        schedules: how the vanilla baseline is wrapped.
        recency_bias: bias b of the recency wrap, in nats.
        bias: `"stored"` or `"init"`: which routing biases of a released checkpoint are used.
        nulls: null models to probe as well: `"untrained"`, `"shuffled_queries"`; see `attnres.probe.nulls`.
        attribution: estimate the trained model's masks from gradients as well, and say how that stands to the exact
            effects; see `attnres.probe.attribution`.
    """

    families: str | tuple[str, ...] = "all"
    sublayers: str | tuple[str, ...] = "all"
    bands: str | tuple[str, ...] = "all"
    interventions: str | tuple[str, ...] = ("mask",)
    controls: Literal["motifs", "all", "none"] = "motifs"
    places: Places = "bands"
    cells: str | tuple[str, ...] = ()
    length: int = 128
    documents_pilot: int = 32
    documents_confirm: int = 96
    windows_per_document: int = 1
    batch_size: int = 16
    cells_per_pass: int | None = None
    seed: int = 0
    schedules: tuple[Literal["recency", "uniform"], ...] = ("recency", "uniform")
    recency_bias: float = 10.0
    bias: Literal["stored", "init"] = "stored"
    nulls: tuple[Literal["untrained", "shuffled_queries"], ...] = ()
    attribution: bool = False

    def __post_init__(self) -> None:
        for key, known in (("families", FAMILIES), ("sublayers", SUBLAYERS), ("bands", BANDS)):
            object.__setattr__(self, key, _names(getattr(self, key), known, key))
        object.__setattr__(self, "interventions", _split(self.interventions))
        object.__setattr__(self, "cells", _split(self.cells))
        require(bool(self.interventions or self.cells), "probe.interventions: expected at least one, e.g. mask")
        for what in self.interventions:
            _require_intervention(what)
        for text in self.cells:
            parse(text)
        require(
            self.places == "bands" or self.bands == BANDS,
            f"probe.bands: expected all with probe.places={self.places}, received {', '.join(self.bands)}",
        )
        require(
            self.cells_per_pass is None or self.cells_per_pass >= 1,
            f"probe.cells_per_pass: expected at least 1 or null, received {self.cells_per_pass}",
        )
        for key in ("length", "documents_pilot", "documents_confirm", "windows_per_document", "batch_size"):
            require(getattr(self, key) >= 1, f"probe.{key}: expected at least 1, received {getattr(self, key)}")
        require(self.seed >= 0, f"probe.seed: expected 0 or more, received {self.seed}")
        require(bool(self.schedules), "probe.schedules: expected recency, uniform or both, received none")
