"""Which windows make up which optimizer step: a pure function, so that a resumed run needs no saved position.

The run walks through permutations of all windows, one per epoch, end to end; global batch `k` is the `k`-th
slice of `global_batch_size` ids, and may straddle two epochs. A mixture of sets has an epoch per set (see `Mix`).
Ranks and gradient accumulation only cut a global batch into micro-batches: changing their number changes nothing
about which windows a step sees.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from attnres.data.windows.mixing import Mix
from attnres.data.windows.order import permutation
from attnres.errors import ConfigError, DataError


def global_batch(
    step: int, seed: int, num_windows: int, global_batch_size: int, mix: Mix | None = None
) -> NDArray[np.int64]:
    """Window ids `[global_batch_size]` of optimizer step `step`, which counts from 0; from several sets with `mix`.

    Raises:
        DataError: There are fewer windows than a global batch holds, so that one would repeat within it.
    """
    if num_windows < global_batch_size:
        raise DataError(
            f"data: {num_windows} training windows are fewer than one global batch of {global_batch_size}; "
            "give more text, or lower the global batch size or data.sequence_length"
        )
    if mix is not None:
        mix.check_batch(global_batch_size)
        return mix.ids(range(step * global_batch_size, (step + 1) * global_batch_size), seed)
    epoch, start = divmod(step * global_batch_size, num_windows)
    ids = permutation(num_windows, seed, epoch)[start : start + global_batch_size]
    if missing := global_batch_size - len(ids):
        ids = np.concatenate([ids, permutation(num_windows, seed, epoch + 1)[:missing]])
    return ids


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank adds up in one optimizer step.

    Raises:
        ConfigError: The sizes do not divide.
    """
    sizes = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "world size": world_size,
    }
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
        num_windows: Windows to draw from.
        global_batch_size: Windows in one optimizer step, over all ranks.
        micro_batch_size: Windows in one forward pass of one rank.
        max_steps: Optimizer steps of the whole run.
        seed: Decides the order.
        start_step: Optimizer steps already made.
        rank: This process' place among the data-parallel ranks.
        world_size: Number of data-parallel ranks.
        mix: The sets that the windows belong to and their weights, if there are several.

    Raises:
        ConfigError: The sizes do not divide, or a step or rank is out of range.
        DataError: There are fewer windows than a global batch holds.
    """

    def __init__(
        self,
        *,
        num_windows: int,
        global_batch_size: int,
        micro_batch_size: int,
        max_steps: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mix: Mix | None = None,
    ) -> None:
        self._accumulation = accumulation_steps(global_batch_size, micro_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if not 0 <= start_step <= max_steps:
            raise ConfigError(f"max_steps: expected at least the {start_step} already made, got {max_steps}")
        self._num_windows = num_windows
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._max_steps = max_steps
        self._seed = seed
        self._start_step = start_step
        self._rank = rank
        self._world_size = world_size
        self._mix = mix
        global_batch(0, seed, num_windows, global_batch_size, mix)  # fails now rather than at the first batch

    def __len__(self) -> int:
        return self._max_steps * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._start_step, self._max_steps):
            ids = global_batch(step, self._seed, self._num_windows, self._global_batch_size, self._mix)
            yield from ids.reshape(self._accumulation, self._world_size, self._micro_batch_size)[:, self._rank].tolist()
