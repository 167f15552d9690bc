"""Loss, gradient scaling, and what is measured, against plain torch."""

import csv
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from run_comparison import rows, state
from torch import Tensor
from torch.utils.data import DataLoader
from training_runs import run, settings

from attnres.depth.plan import DepthPlan
from attnres.errors import DataError, NumericsError
from attnres.training.config import OptimConfig
from attnres.training.evaluation import routing_metrics, slice_rows, summarise_read, validation_loss
from attnres.training.loss import nll_sum
from attnres.training.models import build_model, model_config
from attnres.training.module import CausalLMModule, MicroBatch

VOCAB, LENGTH, STEPS = 50, 12, 3
# The large eps keeps Adam from dividing rounding errors by themselves where a gradient is almost zero.
OPTIM = OptimConfig(lr=1e-2, eps=1e-3, warmup_steps=1)


class Uneven(torch.utils.data.Dataset):
    """Windows with 1 to 11 targets: token counts of micro-batches differ by a factor of ten."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[: (index * 5) % LENGTH] = -100
        return {"input_ids": ids[:-1], "labels": labels, "sample_ids": torch.tensor(index)}


def tiny_model(kind: str = "vanilla") -> Any:
    model = settings(Path("unused"), {}, kind)["model"]
    return build_model(model_config(model, VOCAB, 0, LENGTH), seed=0)


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_the_embedding_of_a_separator_that_also_pads_learns(kind: str) -> None:
    plain = settings(Path("unused"), {}, kind)["model"] | {"pad_token_id": 0, "tie_word_embeddings": False}
    model = build_model(model_config(plain, VOCAB, 0, LENGTH), seed=0)
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    total, _ = nll_sum(model, {"input_ids": ids, "labels": ids + 1})
    total.backward()
    assert model.config.pad_token_id == model.config.eos_token_id == 0
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def trained(micro_batch_size: int, grad_clip: float) -> tuple[dict[str, Tensor], CausalLMModule]:
    module = CausalLMModule(tiny_model(), replace(OPTIM, grad_clip=grad_clip), STEPS, seed=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=4 // micro_batch_size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Uneven(), batch_size=micro_batch_size))
    return module.model.state_dict(), module


def reference(weighted: bool, grad_clip: float) -> tuple[dict[str, Tensor], float]:
    """Plain torch on the whole batch: mean over its tokens, or (wrongly) mean over its windows' means."""
    model = tiny_model()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    for step, batch in enumerate(DataLoader(Uneven(), batch_size=4)):
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        counts = (batch["labels"] != -100).sum(dim=1)
        loss = losses.sum() / counts.sum() if weighted else (losses.sum(dim=1) / counts).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        # Warm-up of one step, then the cosine over the two that are left, ending at the floor.
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * (1.0, 1.0, 0.1)[step]
        optimizer.step()
    return model.state_dict(), loss.item()


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_module_weighs_every_token_of_the_global_batch_alike(micro_batch_size: int, grad_clip: float) -> None:
    expected, loss = reference(True, grad_clip)
    weights, module = trained(micro_batch_size, grad_clip)
    assert furthest(weights, expected) < 1e-6
    assert module.last_step is not None
    assert module.last_step.loss == pytest.approx(loss, abs=1e-5)
    windows = [Uneven()[index] for index in range(len(Uneven()))]
    assert module.tokens_seen == sum(int((window["labels"] != -100).sum()) for window in windows)
    # The comparison would notice the usual mistake.
    assert furthest(reference(False, grad_clip)[0], expected) > 1e-3


def test_validation_loss_weighs_tokens() -> None:
    model = tiny_model()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loss = validation_loss(trainer, model, DataLoader(Uneven(), batch_size=1), limit=6)
    with torch.no_grad():
        sums = [nll_sum(model, batch) for batch in islice(DataLoader(Uneven(), batch_size=1), 6)]
    expected = sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert abs(sum(float(total / count) for total, count in sums) / 6 - expected) > 1e-3
    assert model.training
    with pytest.raises(DataError, match="no batch"):
        validation_loss(trainer, model, [], limit=6)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="validation loss is not finite"):
        validation_loss(trainer, model, DataLoader(Uneven(), batch_size=1), limit=6)


def exact_mean(batches: list[tuple[float, int]]) -> float:
    return math.fsum(nll for nll, _ in batches) / sum(count for _, count in batches)


# 50 million tokens: in batches of one size, and in large ones with very small ones behind or before them.
EQUAL = [(2047 * (4.1 + math.sin(i)), 2047) for i in range(24426)]
LARGE, SMALL = [(32768 * 2.1, 32768)] * 1526, [(12.3, 1)] * 4000


@pytest.mark.parametrize("batches", [EQUAL, LARGE + SMALL, SMALL + LARGE])
def test_validation_loss_is_exact_over_50_million_tokens(batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(float(torch.tensor(nll)), count) for nll, count in batches]  # as fp32 has them
    monkeypatch.setattr(
        "attnres.training.evaluation.nll_sum", lambda model, batch, loss: tuple(map(torch.tensor, batch["pair"]))
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found = validation_loss(trainer, tiny_model(), ({"pair": pair} for pair in batches), limit=len(batches))
    assert abs(found - exact_mean(batches)) < 1e-6


def test_step_counts_targets_and_losses_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2^24 targets and a few, in micro-batches: fp32 would not count the few."""
    module = CausalLMModule(tiny_model(), OPTIM, STEPS, seed=0)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    batches = [(2.0**24, 2**24), *((5.0, 1) for _ in range(7))]
    module._micro = [MicroBatch(torch.tensor(nll), torch.tensor(count), torch.zeros(1)) for nll, count in batches]
    module._positions = 2**24 + 7
    for parameter in module.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.on_before_optimizer_step(torch.optim.SGD(module.model.parameters(), lr=0.1))
    assert module.tokens_seen == 2**24 + 7
    assert module.last_step is not None and module.last_step.loss == exact_mean(batches)


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_nll_sum_isolates_packed_documents(kind: str) -> None:
    model = tiny_model(kind).eval()
    ids = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    labels = torch.full((1, LENGTH), -100)
    labels[0, 5:-1] = ids[0, 6:]
    packed, count = nll_sum(model, {"input_ids": ids, "labels": labels, "position_ids": positions})
    alone, _ = nll_sum(model, {"input_ids": ids[:, 5:], "labels": labels[:, 5:]})
    leaking, _ = nll_sum(model, {"input_ids": ids, "labels": labels})
    assert count == LENGTH - 6
    assert packed.item() == pytest.approx(alone.item(), abs=1e-4)
    assert abs(leaking.item() - alone.item()) > 1e-3


def test_slice_rows_of_uniform_routing() -> None:
    plan = DepthPlan(num_layers=6, num_blocks=3)
    draw = torch.Generator().manual_seed(0)
    reads = []
    for read in plan.reads:
        sources = [torch.randn(2, 3, 8, generator=draw) for _ in range(read.num_sources)]
        # The newest source is a thousand times longer than the others: the mix is hardly anything else.
        sources[-1] = sources[-1] * 1000
        reads.append(summarise_read(torch.full((2, 3, read.num_sources), -math.log(read.num_sources)), sources))
    rows = slice_rows(plan, reads)
    summary = {name: float(value) for name, value in routing_metrics(rows).items()}
    last = [plan.reads[2 * layer + 1].num_sources for layer in (4, 5)]
    share = sum(1 / s for s in last) / 2
    assert summary["routing/embedding/mlp/late"] == pytest.approx(share)
    assert summary["routing/current/mlp/late"] == pytest.approx(share)
    assert summary["routing/older/mlp/late"] == pytest.approx(sum((s - 3) / s for s in last) / 2)
    assert summary["routing/entropy/mlp/late"] == pytest.approx(sum(math.log(s) for s in last) / 2)
    # Equal mass, unequal share.
    assert summary["routing/share/current/mlp/late"] == pytest.approx(1.0, abs=0.01)
    families = [f"routing/share/{family}/mlp/late" for family in ("embedding", "current", "recent", "older")]
    assert sum(summary[name] for name in families) == pytest.approx(1.0, abs=1e-5)
    assert all(float(row["uniform_excess"]) == pytest.approx(0.0, abs=1e-6) for row in rows)
    # No read of the first third has four sources.
    assert "routing/older/mlp/early" not in summary


def test_train_logs_routing_of_the_model_that_routes(tmp_path: Path, data: dict[str, Any]) -> None:
    logged = rows(run(settings(tmp_path, data, "attnres", trainer__max_steps=3)))
    columns = [name for name in logged[0] if name.startswith("routing/")]
    assert "routing/embedding/attn/late" in columns and "routing/entropy/mlp/mid" in columns
    assert [bool(row["routing/entropy/mlp/mid"]) for row in logged] == [False, False, True]
    assert 0 < float(logged[2]["routing/current/mlp/late"]) < 1
    assert 0 < float(logged[2]["routing/share/current/mlp/late"]) < 1.5
    (table,) = tmp_path.glob("attnres-*/routing.csv")
    with open(table, newline="") as stream:
        slices = list(csv.DictReader(stream))
    assert {row["step"] for row in slices} == {"3"} and len(slices) == len({tuple(row.values()) for row in slices})
    late = next(row for row in slices if (row["family"], row["sublayer"], row["band"]) == ("current", "mlp", "late"))
    assert late["mass"] == logged[2]["routing/current/mlp/late"]
    plain = rows(run(settings(tmp_path, data, "vanilla", trainer__max_steps=3)))
    assert not [name for name in plain[0] if name.startswith("routing/")]


def test_train_in_bf16_keeps_fp32_weights_and_moments(tmp_path: Path, data: dict[str, Any]) -> None:
    folder = run(settings(tmp_path, data, trainer__precision="bf16-mixed", trainer__max_steps=3))
    exact = run(settings(tmp_path, data, trainer__max_steps=3))
    saved = state(folder, 3)
    moments = [value for entry in saved["optimizer_states"][0]["state"].values() for value in entry.values()]
    assert {value.dtype for value in [*saved["state_dict"].values(), *moments]} == {torch.float32}
    losses = [(float(a["loss"]), float(b["loss"])) for a, b in zip(rows(folder), rows(exact), strict=True)]
    assert all(a == pytest.approx(b, abs=0.05) for a, b in losses)
    assert any(a != b for a, b in losses)


def test_train_with_gradient_checkpointing_is_the_same_run(tmp_path: Path, data: dict[str, Any]) -> None:
    plain = run(settings(tmp_path / "a", data, trainer__max_steps=3))
    recomputed = run(settings(tmp_path / "b", data, trainer__max_steps=3, trainer__gradient_checkpointing=True))
    assert furthest(state(plain, 3)["state_dict"], state(recomputed, 3)["state_dict"]) < 1e-6
