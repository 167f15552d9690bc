"""Which windows make up which optimizer step: a pure function, so that a resumed run needs no saved position.

The run walks through permutations of all windows, one per epoch, end to end; global batch `k` is the `k`-th
slice of `global_batch_size` ids, and may straddle two epochs. A mixture of sets has an epoch per set (see `Mix`).
Ranks and gradient accumulation only cut a global batch into micro-batches: changing their number changes nothing
about which windows a step sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from attnres.data.windows.mixing import Mix
from attnres.data.windows.order import permutation
from attnres.errors import ConfigError, DataError


@dataclass(frozen=True)
class Order:
    """What decides which windows a step sees.

    Attributes:
        num_windows: Windows to draw from.
        global_batch_size: Windows in one optimizer step, over all ranks.
        seed: Decides the permutations.
        mix: The sets that the windows belong to and their weights, if there are several.

    Raises:
        DataError: There are fewer windows than a global batch holds, so that one would repeat within it.
    """

    num_windows: int
    global_batch_size: int
    seed: int
    mix: Mix | None = None

    def __post_init__(self) -> None:
        if self.num_windows < self.global_batch_size:
            raise DataError(
                f"data: {self.num_windows} training windows are fewer than one global batch of "
                f"{self.global_batch_size}; give more text, or lower the global batch size or data.sequence_length"
            )
        if self.mix is not None:
            self.mix.check_batch(self.global_batch_size)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Window ids `[global_batch_size]` of an optimizer step, which counts from 0."""
        size = self.global_batch_size
        if self.mix is not None:
            return self.mix.ids(range(step * size, (step + 1) * size), self.seed)
        epoch, start = divmod(step * size, self.num_windows)
        ids = permutation(self.num_windows, self.seed, epoch)[start : start + size]
        if missing := size - len(ids):
            ids = np.concatenate([ids, permutation(self.num_windows, self.seed, epoch + 1)[:missing]])
        return ids


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank adds up in one optimizer step.

    Raises:
        ConfigError: The sizes do not divide.
    """
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "world size": world_size}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}: expected at least 1, got {size}")
    if global_batch_size % (micro_batch_size * world_size):
        raise ConfigError(
            f"global_batch_size: expected a multiple of micro_batch_size x ranks = {micro_batch_size} x "
            f"{world_size}, got {global_batch_size}; change one of the three"
        )
    return global_batch_size // (micro_batch_size * world_size)


class BatchSampler(Sampler[list[int]]):
    """One rank's micro-batches of the steps `start_step .. max_steps - 1`.

    Its length counts the micro-batches since step 0, not those left: Lightning compares it with the number of
    batches since the run began, and would end a resumed run early otherwise.

    Args:
        max_steps: Optimizer steps of the whole run.
        start_step: Optimizer steps already made.
        rank: This process' place among the data-parallel ranks.

    Raises:
        ConfigError: The sizes do not divide, or a step or rank is out of range.
    """

    def __init__(
        self,
        order: Order,
        micro_batch_size: int,
        *,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._accumulation = accumulation_steps(order.global_batch_size, micro_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if not 0 <= start_step <= max_steps:
            raise ConfigError(f"max_steps: expected at least the {start_step} already made, got {max_steps}")
        self._order = order
        self._cut = (self._accumulation, world_size, micro_batch_size)
        self._rank = rank
        self._start_step, self._max_steps = start_step, max_steps

    def __len__(self) -> int:
        return self._max_steps * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._start_step, self._max_steps):
            yield from self._order.batch(step).reshape(self._cut)[:, self._rank].tolist()
