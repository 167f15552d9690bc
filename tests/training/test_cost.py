"""What a run is estimated to need, against what it needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from training_runs import settings

from attnres.commands import plan as plan_command
from attnres.config import build
from attnres.errors import ConfigError
from attnres.training.config import TrainConfig
from attnres.training.cost import ClusterConfig, CostEstimate, describe, estimate_cost, saved_bytes
from attnres.training.models import KINDS, build_model, model_config


def tiny(**changes: Any) -> TrainConfig:
    data = {"source": "files", "paths": ["nowhere"], "vocab_size": 300, "sequence_length": 16}
    return build(TrainConfig, settings(Path("unused"), data, **changes))


def cost(gpus: int = 1, **changes: Any) -> CostEstimate:
    return estimate_cost(tiny(**changes), ClusterConfig(gpus=gpus))


def test_estimate_counts_what_the_run_is_made_of() -> None:
    config = tiny()
    model = build_model(model_config(config.model, 300, 0, 16), 0)
    estimate = cost()
    assert estimate.parameters == sum(p.numel() for p in model.parameters())
    assert estimate.routing_parameters == sum(p.numel() for n, p in model.named_parameters() if "_res_" in n)
    assert (estimate.tokens, estimate.tokens_per_step, estimate.accumulation) == (6 * 64, 64, 1)
    # Reads of one source learn nothing.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.memory["optimizer (two fp32 moments)"] == 8 * trained
    assert estimate.tokens_per_second == pytest.approx(0.4 * 989e12 / estimate.flops_per_token)
    assert estimate.seconds == pytest.approx(estimate.tokens / estimate.tokens_per_second)


def test_estimate_of_a_sharded_run_divides_what_is_sharded() -> None:
    changes = {"trainer__global_batch_size": 8}
    whole, sharded = cost(2, trainer__strategy="ddp", **changes), cost(2, trainer__strategy="fsdp2", **changes)
    for name in ("parameters (fp32)", "gradients (fp32)", "optimizer (two fp32 moments)"):
        assert sharded.memory[name] == whole.memory[name] / 2
    assert sharded.memory["activations"] == whole.memory["activations"]
    less = cost(2, trainer__gradient_checkpointing=True, **changes)
    assert less.memory["activations"] < 0.7 * whole.memory["activations"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_saved_bytes_of_fake_tensors_are_those_of_real_ones(kind: str, precision: str) -> None:
    config = build(TrainConfig, settings(Path("unused"), {"vocab_size": 300}, kind, trainer__precision=precision))
    architecture = model_config(config.model, 300, 0, 16)
    real = saved_bytes(build_model(architecture, 0), config.trainer, 16)
    with FakeTensorMode():
        fake = saved_bytes(KINDS[kind][1](architecture), config.trainer, 16)
    assert fake == pytest.approx(real, rel=0.03) and real > 4 * 16 * 32 * 4


def test_plan_command_prints_the_cluster_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    # Fewer layers: the same words for less time.
    words = ["+experiment=attnres_0p6b", "model.num_hidden_layers=8", "trainer.strategy=fsdp2", "cluster.gpus=16"]
    monkeypatch.setattr("sys.argv", ["plan", *words, "cluster.gpu=h100", "cluster.mfu=0.5"])
    with pytest.raises(SystemExit) as ended:
        plan_command.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for text in ("attnres_0p6b on 16 x h100, fsdp2, bf16-mixed", "10,485,760,000", "of 79: fits", "GPU hours"):
        assert text in printed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cost(3), "expected a multiple of micro_batch_size x ranks = 4 x 3"),
        (lambda: ClusterConfig(gpu="h900"), "gpu: expected one of b200, h200"),
        (lambda: ClusterConfig(mfu=40), "mfu: expected a fraction"),
    ],
)
def test_estimate_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_describe_says_when_it_does_not_fit() -> None:
    config, cluster = tiny(), ClusterConfig(gpus=1, gpu="mine", peak_tflops=1.0, memory_gib=1e-4)
    assert "DOES NOT FIT" in describe(config, cluster, estimate_cost(config, cluster))


def test_estimate_allocates_nothing() -> None:
    # 10**12 bytes of embedding.
    estimate = estimate_cost(tiny(model__vocab_size=2**33), ClusterConfig(gpus=1))
    assert estimate.parameters > 2**33 * 32
