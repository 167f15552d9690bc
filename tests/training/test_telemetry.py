"""What a run keeps and logs: permanent checkpoints, the model card, pace, and loss spikes."""

import csv
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from training_runs import fake_wandb, run, settings

from attnres.config import build
from attnres.files.run_folder import list_steps, verify
from attnres.training.checkpoint_schedule import CheckpointSchedule
from attnres.training.config import LoggerConfig, TrainConfig, TrainerConfig, config_hash
from attnres.training.flops import flops_per_token, known_gpu, peak_flops
from attnres.training.loggers import CsvLogger, WandbLogger
from attnres.training.models import build_model, model_config
from attnres.training.module import CausalLMModule
from attnres.training.telemetry import SpikeDetector


def test_schedule_keeps_milestones_and_log_spaced_steps() -> None:
    schedule = CheckpointSchedule.of(
        TrainerConfig(checkpoint_every_steps=10, milestone_every_steps=25, log_spaced=True)
    )
    assert [step for step in range(70) if schedule.permanent(step)] == [0, 1, 2, 4, 8, 16, 25, 32, 50, 64]
    assert [step for step in range(1, 40) if schedule.due(step)] == [1, 2, 4, 8, 10, 16, 20, 25, 30, 32]
    by_half = CheckpointSchedule.of(TrainerConfig(log_spaced=1.5))
    assert [step for step in range(1, 20) if by_half.permanent(step)] == [1, 2, 3, 5, 8, 11, 17]
    plain = CheckpointSchedule.of(TrainerConfig(checkpoint_every_steps=0))
    assert not any(plain.due(step) or plain.permanent(step) for step in range(1, 100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """A finished run that kept a trajectory."""
    changes = {"trainer__log_spaced": True, "trainer__milestone_every_steps": 3, "trainer__keep_last": 1}
    return run(settings(tmp_path_factory.mktemp("telemetry"), data, trainer__peak_tflops=0.5, **changes))


def test_train_keeps_the_trajectory_in_the_same_folder(folder: Path, data: dict[str, Any]) -> None:
    assert list(list_steps(folder)) == [1, 2, 3, 4, 6]
    plain = build(TrainConfig, settings(folder.parent, data))
    assert folder.name == f"attnres-{config_hash(plain)}"


def test_train_logs_its_pace(folder: Path, data: dict[str, Any]) -> None:
    with open(folder / "metrics.csv", newline="") as stream:
        logged = list(csv.DictReader(stream))
    for row in logged:
        assert float(row["peak_memory_gib"]) > 0.1 and 0 <= float(row["data_wait"]) < 1
        assert row["tokens_per_second"] == row["tokens_per_second_per_device"]
    assert all(float(row["eta_seconds"]) >= 0 for row in logged[2:])
    config = model_config(settings(folder, data)["model"], 300, 0, 16)
    per_token = flops_per_token(build_model(config, 0), config, 16)
    last = logged[-1]
    assert float(last["mfu"]) == pytest.approx(float(last["tokens_per_second"]) * per_token / 0.5e12)


def test_export_has_a_model_card(folder: Path) -> None:
    export = folder / "checkpoints" / "step_00000006" / "model"
    card = (export / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    data, training = (json.loads((export / f"{name}.json").read_text()) for name in ("data", "training"))
    for text_on_card in (
        data["fingerprint"],
        "python train.py",
        f"{6 * 64:,}",
        f"{training['val_loss']:.4f}",
        "import attnres",
    ):
        assert text_on_card in text
    assert "model/README.md" in verify(export.parent)["files"]


def test_spike_detector_tells_a_jump_from_noise() -> None:
    draw = random.Random(0)
    detector = SpikeDetector()
    falling = [3.0 + 4.0 * 0.98**step + draw.gauss(0, 0.05) for step in range(300)]
    assert not any(detector.rise(loss) for loss in falling)
    rise = detector.rise(4.0)
    assert rise == pytest.approx(1.0, abs=0.15)
    # Once, not at every step until the loss is back.
    assert detector.rise(4.0) is None
    young = SpikeDetector()
    assert [young.rise(loss) for loss in (9.0, 1.0, 9.0)] == [None] * 3
    flat = SpikeDetector()
    assert not any(flat.rise(2.0 + 0.05 * (step == 30)) for step in range(40))


def test_train_alerts_at_a_loss_spike_and_goes_on(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alerts: list[str] = []
    monkeypatch.setattr(WandbLogger, "alert", lambda self, title, text: alerts.append(text))
    step = CausalLMModule.training_step

    def training_step(self: CausalLMModule, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step == 17:
            self._micro[-1] = self._micro[-1]._replace(nll=self._micro[-1].nll * 2)
        return loss

    monkeypatch.setattr(CausalLMModule, "training_step", training_step)
    plain = settings(tmp_path, data, trainer__max_steps=20, trainer__checkpoint_every_steps=0)
    with caplog.at_level(logging.WARNING):
        folder = run(plain | {"trainer": plain["trainer"] | {"val_every_steps": 0, "routing_every_steps": 0}})
    assert (folder / "complete.json").exists()
    assert caplog.text.count("LOSS SPIKE at step 18") == 1
    assert len(alerts) == 1 and alerts[0].startswith("attnres, step 18")


def test_loggers_take_tables_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            sent.append((step, values))

        def alert(self, title: str, text: str) -> None:
            sent.append((title, text))

    fake_wandb(monkeypatch, init=lambda **_: Run(), Table=lambda columns, data: (columns, data))
    table = [{"tokens": 7, "family": "older", "mass": 0.5}, {"tokens": 7, "family": "recent", "mass": 0.25}]
    for logger in (WandbLogger(LoggerConfig(), tmp_path, {}, resume_step=0), CsvLogger(tmp_path / "metrics.csv", 0)):
        logger.log_table("routing", table, step=3)
        logger.alert("Loss spike", "at step 3")
    columns = ["tokens", "family", "mass"]
    assert sent == [(3, {"routing": (columns, [[7, "older", 0.5], [7, "recent", 0.25]])}), ("Loss spike", "at step 3")]
    assert (tmp_path / "routing.csv").read_text().split() == [
        *("step,tokens,family,mass", "3,7,older,0.5", "3,7,recent,0.25")
    ]


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_flops_per_token_counts_what_torch_counts(kind: str) -> None:
    length, vocab = 64, 500
    plain = settings(Path("unused"), {}, kind)["model"] | {"hidden_size": 64, "intermediate_size": 128}
    config = model_config(plain, vocab, 0, length)
    config._attn_implementation = "eager"
    model = build_model(config, 0)
    ids = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    # Torch counts the whole square of attention, of which a causal mask needs half, and of the routing only what the
    # fast path does as matrix products.
    attention = 3 * config.num_hidden_layers * 2 * length * config.num_attention_heads * config.head_dim
    assert counted == pytest.approx(flops_per_token(model, config, length) + attention, rel=0.02)


def test_peak_flops_of_known_devices_and_given_ones() -> None:
    assert known_gpu("NVIDIA H200") == known_gpu("h200") and known_gpu("NVIDIA H100 80GB HBM3") == known_gpu("h100")
    assert known_gpu("a card of tomorrow") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed", None) is None
    assert peak_flops(torch.device("cpu"), "32-true", 0.5) == 0.5e12
