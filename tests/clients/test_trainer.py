"""Training by the Trainer of transformers, where accelerate is installed."""

import pytest
import torch
from tiny_models import SHAPE
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments


def first_losses(model, rows: int, folder) -> list[float]:
    """Logged losses of two steps over eight sequences, `rows` at a time."""
    ids = torch.randint(0, 64, (16, 20), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=8 // rows,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_losses_of_accumulated_batches_are_those_of_the_whole_batch(tmp_path, kind):
    fields = SHAPE | {"num_hidden_layers": 2}
    losses = []
    for rows in (1, 2, 8):
        torch.manual_seed(0)
        if kind == "attnres":
            model = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**fields, attnres_num_blocks=2))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**fields))
        losses.append(first_losses(model, rows, tmp_path))
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)
