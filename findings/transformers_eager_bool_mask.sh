#!/usr/bin/env bash
# transformers 5.23.0: a boolean attention mask [B, 1, T, S] (True: may attend) masks with attn_implementation="sdpa".
# With "eager" True and False are added to the scores, as 1 and 0: nothing is hidden, and a token sees those behind it.
# No check, no warning; the masking functions say of a 4D mask that it "is returned as-is". The same mask as 0 and the
# lowest float is right in both. Seen, tiny Qwen3 with a causal mask: the logits are off by 4.3, and another last token
# changes the logits of the first one by 0.35.
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
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.2,
)  # fmt: skip
model = Qwen3ForCausalLM(config).eval()
ids = torch.randint(64, (1, 12))
changed = ids.clone()
changed[0, -1] = (ids[0, -1] + 1) % 64
may = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
added = torch.zeros(1, 1, 12, 12).masked_fill(~may, torch.finfo(torch.float32).min)


@torch.no_grad()
def logits(attention: str, mask: torch.Tensor | None, tokens: torch.Tensor = ids) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(tokens, attention_mask=mask, use_cache=False).logits


expected, far = logits("sdpa", None), {}
for attention in ("sdpa", "eager"):
    for name, mask in (("bool", may), ("to be added", added)):
        far[attention, name] = (logits(attention, mask) - expected).abs().max().item()
        print(f"{attention}, mask {name}: logits off by {far[attention, name]:.2g}")
leak = (logits("eager", may) - logits("eager", may, changed))[0, 0].abs().max().item()
print(f"eager, mask bool: another last token changes the first token's logits by {leak:.2g}")
wrong = far.pop(("eager", "bool"))
sys.exit(0 if wrong > 0.1 and leak > 1e-3 and max(far.values()) < 1e-4 else 1)
PY
