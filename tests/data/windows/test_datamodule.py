"""Batches as a trainer sees them: shapes, order, resumption, ranks."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from attnres.data import Order, TextDataModule, documents_in_step
from attnres.errors import ConfigError, DataError


class Recorder(LightningModule):
    """A model of one weight that records the windows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch["sample_ids"].tolist()))
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class StopAt(Callback):
    """Saves at a step and stops, as a run that is interrupted."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(datamodule, folder, accumulation, callbacks=(), ckpt_path=None):
    model = Recorder()
    trainer = Trainer(
        max_steps=7, accumulate_grad_batches=accumulation, accelerator="cpu", devices=1,
        callbacks=list(callbacks), default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        check_val_every_n_epoch=None, val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule, ckpt_path=ckpt_path)
    return model, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_datamodule_resumed_run_sees_the_rest_of_the_same_windows(corpus, config, tmp_path, accumulation):
    def datamodule():
        return TextDataModule(corpus, config, micro_batch_size=8 // accumulation, global_batch_size=8)

    whole, _ = fit(datamodule(), tmp_path, accumulation)
    assert len(whole.seen) == 7 * accumulation
    for step in range(7):
        ids = sum((ids for at, ids in whole.seen if at == step), [])
        assert ids == Order(len(datamodule().train_windows), 8, config.seed).batch(step).tolist()

    path = tmp_path / "stopped.ckpt"
    before, _ = fit(datamodule(), tmp_path, accumulation, [StopAt(3, path)])
    after, trainer = fit(datamodule(), tmp_path, accumulation, ckpt_path=path)
    assert trainer.global_step == 7
    assert before.seen + after.seen == whole.seen
    assert torch.equal(after.weight, whole.weight)


def test_datamodule_batches_have_the_promised_fields(corpus, config):
    for isolated in (False, True):
        changed = dataclasses.replace(config, isolate_documents=isolated)
        datamodule = TextDataModule(corpus, changed, micro_batch_size=3, global_batch_size=6, steps=range(2))
        batch = next(iter(datamodule.train_dataloader()))
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
        row = ((3, 16), torch.int64)
        positions = {"position_ids": row} if isolated else {}
        assert shapes == {"input_ids": row, "labels": row, "sample_ids": ((3,), torch.int64)} | positions


def test_datamodule_workers_change_nothing_and_a_later_start_skips(corpus, config):
    def ids(start=0, num_workers=0):
        datamodule = TextDataModule(corpus, config, 2, 4, num_workers, range(start, 5))
        return [batch["sample_ids"].tolist() for batch in datamodule.train_dataloader()]

    assert len(ids()) == 10
    assert ids(num_workers=2) == ids()
    assert ids(start=3) == ids()[6:]


def test_datamodule_validation_is_sequential_and_shared_by_ranks(corpus, config):
    datamodule = TextDataModule(corpus, config, 3, 6)
    count = len(datamodule.validation_set)

    def ids(rank, world_size):
        place = {"rank": rank, "num_replicas": world_size}
        datamodule.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=place))
        return [i for batch in datamodule.val_dataloader() for i in batch["sample_ids"].tolist()]

    assert ids(0, 1) == list(range(count))
    for world in (2, 3, 4):
        shares = [ids(rank, world) for rank in range(world)]
        assert sorted(sum(shares, [])) == list(range(count - count % world))
        assert len(set(map(len, shares))) == 1
    assert any(count % world for world in (2, 3, 4))


def test_datamodule_ranks_of_a_trainer_share_the_global_batch(corpus, config):
    datamodule = TextDataModule(corpus, config, 2, 8)
    seen = []
    for rank in range(2):
        place = {"rank": rank, "num_replicas": 2}
        datamodule.trainer = SimpleNamespace(
            strategy=SimpleNamespace(distributed_sampler_kwargs=place),
            global_step=4, max_steps=5, accumulate_grad_batches=2,
        )  # fmt: skip
        seen += [i for batch in datamodule.train_dataloader() for i in batch["sample_ids"].tolist()]
    assert sorted(seen) == sorted(Order(len(datamodule.train_windows), 8, config.seed).batch(4))
    datamodule.trainer.accumulate_grad_batches = 1
    with pytest.raises(ConfigError, match="trainer.accumulate_grad_batches: expected 2 .* got 1"):
        datamodule.train_dataloader()


def test_datamodule_fails_before_a_model_is_built(corpus, config):
    with pytest.raises(DataError, match="training windows are fewer than one global batch of 1000000") as error:
        TextDataModule(corpus, config, 1, 1_000_000)
    assert error.value.code == 3
    with pytest.raises(ConfigError, match="expected a multiple of micro_batch_size"):
        TextDataModule(corpus, config, 3, 8)
    with pytest.raises(ConfigError, match="max_steps: expected the number of optimizer steps, got none"):
        TextDataModule(corpus, config, 4, 8).train_dataloader()


def test_documents_in_step_names_the_documents_of_each_window(corpus, config):
    found = documents_in_step(corpus, config, step=2, global_batch_size=4)
    datamodule = TextDataModule(corpus, config, 4, 4, steps=range(2, 3))
    batch = next(iter(datamodule.train_dataloader()))
    assert list(found) == batch["sample_ids"].tolist()
    for input_ids, documents in zip(batch["input_ids"], found.values(), strict=True):
        joined = sum((corpus.document_tokens(document).tolist() for document in documents), [])
        assert any(joined[i : i + 16] == input_ids.tolist() for i in range(len(joined)))
