"""The NLL without all logits: the value and every gradient of the plain loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_comparison import rows
from torch import Tensor
from training_runs import run, settings

from attnres.config import build
from attnres.errors import ConfigError
from attnres.training.config import TrainConfig
from attnres.training.loss import LOGITS_BYTES, choose, linear_nll, nll_sum
from attnres.training.models import build_model, model_config

POSITIONS, WIDTH, VOCAB = 70, 24, 517


def problem(ignored: str) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=draw).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=draw).mul(0.3).requires_grad_()
    labels = torch.randint(VOCAB, (POSITIONS,), generator=draw)
    # A whole slice without a target, as a document border at the edge of a window may leave.
    labels[{"none": slice(0), "some": slice(0, None, 5), "a slice": slice(16, 32), "all": slice(None)}[ignored]] = -100
    return hidden, weight, labels


def value_and_gradients(loss: str, ignored: str, bf16: bool = False) -> list[Tensor]:
    hidden, weight, labels = problem(ignored)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if loss == "plain":
            logits = F.linear(hidden, weight).float()
            total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        else:
            # Slices of 16 positions.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("attnres.training.loss.LOGITS_BYTES", 16 * 4 * VOCAB)
                total = linear_nll(hidden, weight, labels, loss)  # type: ignore[arg-type]
    # A gradient other than one, as accumulation and scaling give.
    (0.25 * total).backward()
    assert total.dtype == torch.float32
    return [total.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("ignored", ["none", "some", "a slice", "all"])
@pytest.mark.parametrize("loss", ["chunked", "torch"])
def test_linear_nll_equals_the_plain_loss_in_fp32(loss: str, ignored: str) -> None:
    if loss == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    for ours, plain in zip(value_and_gradients(loss, ignored), value_and_gradients("plain", ignored), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=2e-6)


def test_linear_nll_in_bf16_is_no_further_from_fp32_than_the_plain_loss() -> None:
    exact = value_and_gradients("plain", "some")
    plain = value_and_gradients("plain", "some", bf16=True)
    chunked = value_and_gradients("chunked", "some", bf16=True)
    for ours, theirs, truth in zip(chunked, plain, exact, strict=True):
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm() + 1e-6
    # The head's gradient is added up over slices: in bf16 that would lose digits.
    assert chunked[2].dtype == torch.float32


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_nll_sum_of_a_model_is_the_same_either_way(kind: str) -> None:
    model = build_model(model_config(settings(Path("unused"), {}, kind)["model"], 50, 0, 12), seed=0)
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[:, 3] = -100
    positions = torch.cat([torch.arange(4), torch.arange(8)]).expand(2, -1)
    batch = {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}
    results: dict[str, Any] = {}
    for loss in ("plain", "chunked"):
        model.zero_grad()
        total, count = nll_sum(model, batch, loss)  # type: ignore[arg-type]
        total.backward()
        results[loss] = [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        assert count == 2 * 11
    assert len(results["plain"]) == len(results["chunked"]) > 10
    for ours, plain in zip(results["chunked"], results["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_choose_keeps_small_logits_whole() -> None:
    assert choose("auto", 16 * 128, 2048) == "plain"
    assert choose("auto", LOGITS_BYTES // 4, 1) == "plain"
    assert choose("auto", 8 * 2048, 151936) == "chunked"
    assert choose("plain", 8 * 2048, 151936) == "plain"


def test_train_with_chunked_loss_is_the_same_run(tmp_path: Path, data: dict[str, Any]) -> None:
    plain = rows(run(settings(tmp_path / "a", data, trainer__max_steps=3)))
    chunked = rows(run(settings(tmp_path / "b", data, trainer__max_steps=3, trainer__loss="chunked")))
    for ours, theirs in zip(chunked, plain, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=2e-6)
        assert float(ours["val_loss"] or 0) == pytest.approx(float(theirs["val_loss"] or 0), abs=2e-6)


def test_config_refuses_the_loss_that_adds_up_in_bf16(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.loss: torch adds up bf16"):
        build(TrainConfig, settings(tmp_path, data, trainer__loss="torch", trainer__precision="bf16-mixed"))
