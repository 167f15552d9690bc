"""The Hugging Face folder of a checkpoint: weights, tokenizer, where both come from, and a model card."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from attnres.files.whole_files import write_json, write_text
from attnres.model.weights import head_differs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportInfo:
    """What a checkpoint says about its run, so that the probe needs no training YAML.

    Attributes:
        training: becomes `training.json`, with step, tokens and val_loss of the checkpoint.
        data: becomes `data.json`.
    """

    tokenizer_path: Path
    eos_id: int
    training: dict[str, Any]
    data: dict[str, Any]


def export_model(
    folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], info: ExportInfo, progress: Mapping[str, Any]
) -> None:
    """Writes a Hugging Face folder that loads without the rest of the run.

    Args:
        model: gives architecture and configuration.
        weights: whole tensors by the model's own names.
        progress: step, tokens and val_loss of the checkpoint.
    """
    if model.config.tie_word_embeddings and head_differs(weights):
        # A model that was loaded with a head of its own, whatever its configuration says.
        log.warning("export %s: the head is not the embedding; written with tie_word_embeddings: false", folder)
        model.config.tie_word_embeddings = False
    with _without_progress_bar():
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="100GB")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(info.tokenizer_path))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(info.eos_id)
    tokenizer.model_max_length = int(model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    training = info.training | dict(progress)
    write_json(folder / "data.json", info.data)
    write_json(folder / "training.json", training)
    parameters = sum(p.numel() for p in model.parameters())
    write_text(folder / "README.md", model_card(model.config, parameters, training, info.data))


def model_card(config: PreTrainedConfig, parameters: int, training: dict[str, Any], data: dict[str, Any]) -> str:
    """README.md of an export, as the hub reads it.

    Args:
        parameters: their number; tied ones count once.
        training: the content of `training.json`.
        data: the content of `data.json`.
    """
    routed = config.model_type == "qwen3_attnres"
    imports = "import attnres  # registers the architecture\n" if routed else ""
    val_loss = training.get("val_loss")
    rows = {
        "Architecture": f"`{config.model_type}`" + (f", `{config.attnres_sources}` sources" if routed else ""),
        "Parameters": f"{parameters:,}",
        "Layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "Optimizer steps": f"{training.get('step', 0):,}",
        "Target tokens seen": f"{training.get('tokens', 0):,}",
        "Validation loss": "not measured at this step" if val_loss is None else f"{val_loss:.4f} nats/token",
        "Seed": training.get("seed"),
        "Data fingerprint": f"`{data.get('fingerprint')}`",
        "Tokenizer sha256": f"`{data.get('tokenizer_sha256')}`",
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    run_config = json.dumps(training.get("config", {}), indent=2, sort_keys=True)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"attention-residuals, " if routed else ""}attnres]
---

# {_cell(training.get("name", "model"))}, step {training.get("step", 0)}

| | |
|---|---|
{table}

A research checkpoint: trained to look at, not tuned or tested for use.

## Load

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## How it was made

```
{_fenced(training.get("command", ""))}
```

```json
{_fenced(run_config)}
```
"""


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    return text.replace("```", "'''")
