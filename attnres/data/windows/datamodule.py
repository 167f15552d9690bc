"""Batches for training and validation, in an order that is a pure function of seed and step."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from attnres.data.config import DataConfig
from attnres.data.corpus.folder import Corpus
from attnres.data.windows.mixing import mix_of
from attnres.data.windows.sampler import BatchSampler, Order, accumulation_steps
from attnres.data.windows.windows import WindowDataset
from attnres.errors import ConfigError
from attnres.processes.signals import ignore_stop_signals

logger = logging.getLogger(__name__)


class TextDataModule(LightningDataModule):
    """Windows of a corpus' train and validation splits.

    Under a trainer (with `use_distributed_sampler=False`), the first step is its `global_step`, so a resumed
    run continues where it stopped without any state of this module. Without a trainer, pass `steps`.

    A training batch holds `input_ids [B, T]`, `labels [B, T]` (already shifted; -100 where there is no
    target), `sample_ids [B]` and, with `isolate_documents`, `position_ids [B, T]`; all int64.

    Args:
        micro_batch_size: Windows in one forward pass of one rank.
        global_batch_size: Windows in one optimizer step, over all ranks and accumulated micro-batches.
        num_workers: Processes that read ahead, per rank; 0 reads in the training process.
        steps: Optimizer steps without a trainer.

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
        steps: range | None = None,
    ) -> None:
        super().__init__()
        accumulation_steps(global_batch_size, micro_batch_size, world_size=1)
        self._micro_batch_size = micro_batch_size
        self._num_workers = num_workers
        self._steps = steps
        self.train_windows = WindowDataset(corpus, "train", config.sequence_length, config.isolate_documents)
        self.validation_set = WindowDataset(corpus, "validation", config.sequence_length, config.isolate_documents)
        mix = mix_of(corpus, "train", config.sequence_length)
        self._order = Order(len(self.train_windows), global_batch_size, seed=config.seed, mix=mix)
        self._validation_mix = mix_of(corpus, "validation", config.sequence_length)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's micro-batches from the current step on.

        Raises:
            ConfigError: The number of steps is not set, or the trainer accumulates another number of batches.
        """
        steps = self._steps
        rank, world_size = self._rank_and_world_size()
        if self.trainer is not None:
            steps = range(self.trainer.global_step, self.trainer.max_steps)
            size = self._order.global_batch_size
            expected = accumulation_steps(size, self._micro_batch_size, world_size)
            if (accumulated := self.trainer.accumulate_grad_batches) != expected:
                raise ConfigError(
                    f"trainer.accumulate_grad_batches: expected {expected} (global batch "
                    f"{size} / {self._micro_batch_size} x {world_size} ranks), got {accumulated}"
                )
        if steps is None or steps.stop < 0:
            raise ConfigError("max_steps: expected the number of optimizer steps, got none; set it")
        sampler = BatchSampler(
            self._order,
            self._micro_batch_size,
            max_steps=steps.stop,
            start_step=steps.start,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(self.train_windows, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's share of the validation windows, in order; of a mixture, mixed like the training windows.

        Every rank gets equally many, or sharded models would wait for each other forever; the up to
        `world_size - 1` windows that this leaves over are not used, and the log says so.
        """
        rank, world_size = self._rank_and_world_size()
        ids: Sequence[int] = range(len(self.validation_set))
        if self._validation_mix is not None:
            ids = self._validation_mix.in_order().tolist()
        if left_over := len(ids) % world_size:
            logger.info("validation leaves out %d of %d windows: ranks take equal shares", left_over, len(ids))
        mine = Subset(self.validation_set, ids[rank : len(ids) - left_over : world_size])
        return self._loader(mine, batch_size=self._micro_batch_size)

    def _loader(self, windows: Dataset[dict[str, Any]], **batches: Any) -> DataLoader[dict[str, Any]]:
        # A scheduler and Ctrl-C signal the whole process group; a worker that dies takes the training process with it
        # before that has saved. Workers end when the training process does.
        return DataLoader(windows, num_workers=self._num_workers, worker_init_fn=ignore_stop_signals, **batches)

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Among data-parallel ranks, which under tensor parallelism are fewer than the processes."""
        strategy = getattr(self.trainer, "strategy", None)
        place = getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return place["rank"], place["num_replicas"]
