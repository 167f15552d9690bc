"""How a probe is carried out: in batches and stages, by several processes, with kept pieces, progress and a stop."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from attnres.data import ProbeWindows
from attnres.errors import AttnResError, ConfigError, Stopped, StorageError
from attnres.files.run_folder import LOCK, refuse_links
from attnres.files.whole_files import locked, storage_errors
from attnres.probe.pieces import Key, Pieces, pieces_folder
from attnres.probe.preregistration import FREE, Fixed
from attnres.processes.ranks import Ranks
from attnres.processes.signals import StopSignals

_PROMISE = "finishing the current cell"

# Split -> the windows that a stage measures, by position.
Stage = Mapping[str, range]


@dataclass(frozen=True)
class Batch:
    """The unit of work: some windows of a split, `number` in it.

    Attributes:
        look: the look at its split that the batch belongs to, from 1; 0 where everything is measured at once.
    """

    split: str
    number: int
    windows: ProbeWindows
    look: int = 0

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels `[B, T]`."""
        return self.windows.input_ids.to(device), self.windows.labels.to(device)

    @property
    def identity(self) -> dict[str, Any]:
        """What names its windows: columns `window` and `document`."""
        return {"window": self.windows.window_ids.numpy(), "document": self.windows.document_ids.numpy()}

    def key(self, model: str, kind: str) -> Key:
        """Of a piece."""
        return Key(model, self.split, self.number, kind)


@dataclass(frozen=True)
class Execution:
    """How a grid is walked through.

    Attributes:
        windows: per split.
        batch_size: windows a batch; bounds memory, which does not grow with the number of cells.
        seed: of donors and noise.
        cells_per_pass: cells that share a forward pass as rows of one batch; None chooses: one on a CPU, where more
            gain nothing.
        pieces: where finished pieces go.
        ranks: the processes that share the work.
        progress: counts cells finished on a batch.
        stop: asked between cells; the name of the signal that ends the walk after what is finished is kept, or empty.
        signals: those that handlers of other libraries wait for.
        stages: in what portions the windows are measured; none: all at once.
    """

    windows: Mapping[str, ProbeWindows]
    batch_size: int
    seed: int = 0
    cells_per_pass: int | None = None
    pieces: Pieces = field(default_factory=Pieces)
    ranks: Ranks = field(default_factory=Ranks)
    progress: Any = field(default_factory=partial(tqdm, disable=True))
    stop: Callable[[], str] = lambda: ""
    signals: StopSignals = field(default_factory=partial(StopSignals, "", ""))
    stages: tuple[Stage, ...] = ()

    @cached_property
    def batches(self) -> tuple[tuple[Batch, ...], ...]:
        """The batches of every stage, in order; those of a split are numbered through all stages."""
        stages = self.stages or ({split: range(len(drawn)) for split, drawn in self.windows.items()},)
        numbers: Counter[str] = Counter()
        looks: Counter[str] = Counter()
        listed = []
        for stage in stages:
            batches = []
            looks.update(stage.keys() if self.stages else ())
            for split, positions in stage.items():
                for begin in range(positions.start, positions.stop, self.batch_size):
                    rows = slice(begin, min(begin + self.batch_size, positions.stop))
                    batches.append(Batch(split, numbers[split], _taken(self.windows[split], rows), looks[split]))
                    numbers[split] += 1
            listed.append(tuple(batches))
        return tuple(listed)

    def mine(self, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        """Those of these batches that fall to this process."""
        return batches[self.ranks.rank :: self.ranks.size]

    def stopping(self) -> bool:
        """Whether this process or another one was asked to stop, and is to keep what is finished."""
        if self.stop():
            self.pieces.ask_to_stop()
            return True
        return self.signals.asked() or self.pieces.asked_to_stop()

    def end_if_stopping(self) -> None:
        """Raises `Stopped` where a stop was asked for; a handler of another library may end the process otherwise."""
        if self.stop() or self.pieces.asked_to_stop():
            self.pieces.ask_to_stop()
            by = self.stop() or "a signal to another process"
            raise Stopped(f"stopped by {by}; what is finished is kept, the same command resumes")
        self.signals.hand_on()

    def together(self, phase: Callable[[], None]) -> None:
        """One phase in all processes; an error or a signal in one of them ends it in all."""
        failure: AttnResError | None = None
        try:
            phase()
        except AttnResError as error:
            self.pieces.ask_to_stop()
            failure = error
        self.ranks.agree(failure)
        self.pieces.refresh()


def stages_of(windows: Mapping[str, ProbeWindows], looks: Mapping[str, Sequence[int]]) -> tuple[Stage, ...]:
    """A stage for each look at each split, the pilot's first.

    Args:
        windows: per split, a document's beside each other, in the order in which documents were drawn.
        looks: per split, after how many documents each is taken.
    """
    stages: list[Stage] = []
    for split, drawn in windows.items():
        owners = drawn.document_ids.tolist()
        ends = [place + 1 for place in range(len(owners)) if owners[place : place + 2] != [owners[place]] * 2]
        edges = [0, *(ends[documents - 1] for documents in looks[split])]
        stages += [{split: range(begin, end)} for begin, end in pairwise(edges)]
    return tuple(stages)


@contextmanager
def executing(folder: Path, fixed: Fixed, ranks: Ranks) -> Iterator[Execution]:
    """The execution of a command: pieces in the probe's folder, a bar in the terminal, signals that stop it."""
    config = fixed.config
    pieces = Pieces(pieces_folder(folder, config, fixed.subjects.hashes, ranks.device.type))
    if ranks.rank == 0:
        pieces.remove_leftovers()
    ranks.agree()
    with (
        StopSignals(_PROMISE, "", can_save=True) as signals,
        tqdm(unit="cell", desc="probe", mininterval=1.0, disable=ranks.rank > 0) as bar,
    ):
        yield Execution(
            windows=fixed.subjects.text.windows,
            batch_size=config.batch_size,
            seed=config.seed,
            cells_per_pass=config.cells_per_pass,
            pieces=pieces,
            ranks=ranks,
            progress=bar,
            stop=lambda: signals.name if signals.ends() else "",
            signals=signals,
            stages=stages_of(fixed.subjects.text.windows, fixed.looks) if fixed.looks else (),
        )


@contextmanager
def only_probe_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """The folder, made and locked by the first process for all of them.

    Raises:
        ConfigError: another probe is at work in it.
        StorageError: it cannot be written.
    """
    with ExitStack() as stack, storage_errors(folder, FREE):
        taken: AttnResError | None = None
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                busy = f"{folder} is in use by another probe; wait for it or change the configuration"
                stack.enter_context(locked(folder / LOCK, busy))
            except ConfigError as error:
                taken = error
        ranks.agree(taken)
        refuse_links(folder)
        yield


def _taken(windows: ProbeWindows, rows: slice) -> ProbeWindows:
    return replace(windows, **{field.name: getattr(windows, field.name)[rows] for field in fields(windows)})


def damaged(model: str, batch: Batch) -> StorageError:
    """What to raise where a piece that was kept is gone."""
    return StorageError(
        f"{model}: batch {batch.number} of split {batch.split} was measured and cannot be read again; "
        "run the same command"
    )
