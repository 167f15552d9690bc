"""Which cells a probe asks for, on which windows."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from attnres.config import key, nearest, require
from attnres.depth.places import BANDS, FAMILIES, SUBLAYERS, Places
from attnres.interventions.ids import FAMILY_KINDS, KINDS, parse
from attnres.tables.names import RESCUE

# Which part of a swept grid a probe runs, and how; its members agree in all the other keys.
_of_a_member = partial(key, may_differ=True)


def _names(value: str | tuple[str, ...], known: tuple[str, ...], where: str) -> tuple[str, ...]:
    """`all`, one name, names joined by commas, or a tuple of names -> the names, in canonical order."""
    given = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value
    given = known if given == ("all",) else given
    for name in given:
        require(name in known, f"probe.{where}: expected all or some of {', '.join(known)}, received {name!r}")
    require(bool(given), f"probe.{where}: expected at least one of {', '.join(known)}, received none")
    return tuple(name for name in known if name in given)


def _split(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names joined by commas, or a tuple of names -> the names, each once."""
    given = tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value
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
        sufficiency: for which cells with a matched control `keep` is run as well: the `"motifs"` of the study, `"all"`
            or `"none"`.
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

    families: str | tuple[str, ...] = _of_a_member("all")
    sublayers: str | tuple[str, ...] = _of_a_member("all")
    bands: str | tuple[str, ...] = _of_a_member("all")
    interventions: str | tuple[str, ...] = _of_a_member(("mask",))
    controls: Literal["motifs", "all", "none"] = _of_a_member("motifs")
    sufficiency: Literal["motifs", "all", "none"] = _of_a_member("motifs", as_before="none")
    places: Places = _of_a_member("bands")
    cells: str | tuple[str, ...] = _of_a_member(())
    length: int = 128
    documents_pilot: int = 32
    documents_confirm: int = 96
    windows_per_document: int = 1
    batch_size: int = _of_a_member(16)
    cells_per_pass: int | None = _of_a_member(None)
    seed: int = 0
    schedules: tuple[Literal["recency", "uniform"], ...] = ("recency", "uniform")
    recency_bias: float = 10.0
    bias: Literal["stored", "init"] = "stored"
    nulls: tuple[Literal["untrained", "shuffled_queries"], ...] = ()
    attribution: bool = False

    def __post_init__(self) -> None:
        for name, known in (("families", FAMILIES), ("sublayers", SUBLAYERS), ("bands", BANDS)):
            object.__setattr__(self, name, _names(getattr(self, name), known, name))
        object.__setattr__(self, "interventions", _split(self.interventions))
        object.__setattr__(self, "cells", _split(self.cells))
        require(bool(self.interventions or self.cells), "probe.interventions: expected at least one, e.g. mask")
        for what in self.interventions:
            _require_intervention(what)
        require(
            RESCUE not in self.interventions,
            "probe.interventions: a rescue is asked for by its id, behind what it rescues from: "
            "probe.cells=[mask:embedding@mlp.early+rescue:recent@mlp.mid]",
        )
        for text in self.cells:
            spec = parse(text)
            require(
                spec.members[0].kind != RESCUE,
                f"probe.cells: {text}: a rescue puts back what came before it in the cell; write mask:...+{text}",
            )
        require(
            self.places == "bands" or self.bands == BANDS,
            f"probe.bands: expected all with probe.places={self.places}, received {', '.join(self.bands)}",
        )
        require(
            self.cells_per_pass is None or self.cells_per_pass >= 1,
            f"probe.cells_per_pass: expected at least 1 or null, received {self.cells_per_pass}",
        )
        for name in ("length", "documents_pilot", "documents_confirm", "windows_per_document", "batch_size"):
            require(getattr(self, name) >= 1, f"probe.{name}: expected at least 1, received {getattr(self, name)}")
        require(self.seed >= 0, f"probe.seed: expected 0 or more, received {self.seed}")
        require(bool(self.schedules), "probe.schedules: expected recency, uniform or both, received none")
