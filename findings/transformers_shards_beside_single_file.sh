#!/usr/bin/env bash
# transformers 5.23.0: `save_pretrained` into the folder of another model removes the shards of that model, but not
# its `model.safetensors`, where the new one is written in shards. The folder then holds both, and `from_pretrained`
# takes the single file: the older model, without a warning. The other order is right.
# Seen: all weights are 1.0 in the first model and 2.0 in the second; what is loaded is 1.0.
# Ends with 0 while that is so, else with 1. $PYTHON makes the environment; any CPU build of torch does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys
from pathlib import Path
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

print("transformers", transformers.__version__, "torch", torch.__version__)
disable_progress_bar()
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
)  # fmt: skip


def model_of(value: float) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.constant_(weight, value)
    return model


older, newer = model_of(1.0), model_of(2.0)
older.save_pretrained("model")
newer.save_pretrained("model", max_shard_size="20KB")
print("the folder holds", *sorted(path.name for path in Path("model").iterdir()))
loaded = {weight.unique().item() for weight in Qwen3ForCausalLM.from_pretrained("model").parameters()}
print("saved last: 2.0, loaded:", loaded)
newer.save_pretrained("other", max_shard_size="20KB")
older.save_pretrained("other")
print("saved in the other order, the folder holds", *sorted(path.name for path in Path("other").iterdir()))
loaded_other = {weight.unique().item() for weight in Qwen3ForCausalLM.from_pretrained("other").parameters()}
print("saved last: 1.0, loaded:", loaded_other)
sys.exit(0 if loaded == {1.0} and loaded_other == {1.0} else 1)
PY
