"""The model card of an exported folder: what was trained, on what, how far, and how to load it."""

import json
from typing import Any

from transformers import PretrainedConfig


def model_card(config: PretrainedConfig, parameters: int, training: dict[str, Any], data: dict[str, Any]) -> str:
    """README.md of an export, as the hub reads it.

    Args:
        config: of the model.
        parameters: their number; tied ones count once.
        training: what becomes `training.json`.
        data: what becomes `data.json`.
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
    settings = json.dumps(training.get("config", {}), indent=2, sort_keys=True)
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
{_fenced(settings)}
```
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    return text.replace("```", "'''")
