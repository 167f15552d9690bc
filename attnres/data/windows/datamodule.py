"""Batches for training and validation, in an order that is a pure function of seed and step."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from attnres.data.config import DataConfig
from attnres.data.corpus.corpus import Corpus
from attnres.data.windows.mixing import Mix, Mixture
from attnres.data.windows.sampler import BatchSampler, accumulation_steps, global_batch
from attnres.data.windows.windows import WindowDataset
from attnres.errors import ConfigError

logger = logging.getLogger(__name__)


class TextDataModule(LightningDataModule):
    """Windows of a corpus' train and validation splits.

    Under a trainer (with `use_distributed_sampler=False`), the first step is its `global_step`, so a resumed
    run continues where it stopped without any state of this module. Without one, pass `start_step` and
    `max_steps`.

    A training batch holds `input_ids [B, T]`, `labels [B, T]` (already shifted; -100 where there is no
    target), `sample_ids [B]` and, with `isolate_documents`, `position_ids [B, T]`; all int64.

    Args:
        corpus: Prepared corpus.
        config: The configuration it was prepared with.
        micro_batch_size: Windows in one forward pass of one rank.
        global_batch_size: Windows in one optimizer step, over all ranks and accumulated micro-batches.
        num_workers: Processes that read ahead, per rank; 0 reads in the training process.
        validation_windows: Validate on the first this many windows; None takes all.
        start_step: Optimizer steps already made; a trainer's `global_step` overrides it.
        max_steps: Optimizer steps of the whole run; a trainer's `max_steps` overrides it.

    Raises:
        ConfigError: The batch sizes do not divide.
        DataError: The train split has fewer windows than one global batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        validation_windows: int | None = None,
        start_step: int = 0,
        max_steps: int | None = None,
    ) -> None:
        super().__init__()
        accumulation_steps(global_batch_size, micro_batch_size, world_size=1)
        self._config = config
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._num_workers = num_workers
        self._validation_windows = validation_windows
        self._start_step = start_step
        self._max_steps = max_steps
        self.train_windows = WindowDataset(corpus, "train", config.sequence_length, config.isolate_documents)
        self.validation_set = WindowDataset(corpus, "validation", config.sequence_length, config.isolate_documents)
        self._mix = _mix(corpus, "train", config)
        self._validation_mix = _mix(corpus, "validation", config)
        global_batch(0, config.seed, len(self.train_windows), global_batch_size, self._mix)  # is there one?

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's micro-batches from the current step on.

        Raises:
            ConfigError: The number of steps is not set, or the trainer accumulates another number of batches.
        """
        start_step, max_steps = self._start_step, self._max_steps
        rank, world_size = self._rank_and_world_size()
        if self.trainer is not None:
            start_step, max_steps = self.trainer.global_step, self.trainer.max_steps
            expected = accumulation_steps(self._global_batch_size, self._micro_batch_size, world_size)
            if (found := self.trainer.accumulate_grad_batches) != expected:
                raise ConfigError(
                    f"trainer.accumulate_grad_batches: expected {expected} (global batch "
                    f"{self._global_batch_size} / {self._micro_batch_size} x {world_size} ranks), got {found}"
                )
        if max_steps is None or max_steps < 0:
            raise ConfigError(f"max_steps: expected the number of optimizer steps, got {max_steps}; set it")
        sampler = BatchSampler(
            num_windows=len(self.train_windows),
            global_batch_size=self._global_batch_size,
            micro_batch_size=self._micro_batch_size,
            max_steps=max_steps,
            seed=self._config.seed,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            mix=self._mix,
        )
        return DataLoader(self.train_windows, batch_sampler=sampler, num_workers=self._num_workers)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's share of the validation windows, in order; of a mixture, mixed like the training windows.

        Every rank gets equally many, or sharded models would wait for each other forever; the up to
        `world_size - 1` windows that this leaves over are not used, and the log says so.
        """
        rank, world_size = self._rank_and_world_size()
        ids: Sequence[int] = range(len(self.validation_set))
        if self._validation_mix is not None:
            ids = self._validation_mix.in_order(self._validation_windows).tolist()
        count = len(ids) if self._validation_windows is None else min(len(ids), self._validation_windows)
        if left_over := count % world_size:
            logger.info("validation leaves out %d of %d windows: ranks take equal shares", left_over, count)
        mine = Subset(self.validation_set, ids[rank : count - left_over : world_size])
        return DataLoader(mine, batch_size=self._micro_batch_size, num_workers=self._num_workers)

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Among data-parallel ranks, which under tensor parallelism are fewer than the processes."""
        strategy = getattr(self.trainer, "strategy", None)
        place = getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return place["rank"], place["num_replicas"]


def documents_in_step(corpus: Corpus, config: DataConfig, step: int, global_batch_size: int) -> dict[int, list[int]]:
    """Which documents an optimizer step saw: document ids by window id (`sample_ids`), in the step's order.

    Args:
        corpus: Prepared corpus; `corpus.names` tells what each document is.
        config: The run's data configuration.
        step: Optimizer step, counting from 0.
        global_batch_size: Windows in one optimizer step.
    """
    windows = WindowDataset(corpus, "train", config.sequence_length)
    ids = global_batch(step, config.seed, len(windows), global_batch_size, _mix(corpus, "train", config))
    return {window: windows.documents(window).tolist() for window in ids.tolist()}


def _mix(corpus: Corpus, split: str, config: DataConfig) -> Mix | None:
    return corpus.mix(split, config.sequence_length) if isinstance(corpus, Mixture) else None
