#!/usr/bin/env bash
# liger-kernel 0.8.5: the docstring of `liger_attn_res` says of V "can also be a list of N tensors each of shape
# [B, T, D]". A list raises AttributeError: the autograd function under it reads `V.shape`. A stacked tensor works.
# Ends with 0 while that is so, else with 1. $PYTHON names an interpreter with torch and triton.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)")
"$python" -m pip install --quiet --no-deps --target "$folder" liger-kernel==0.8.5
cd "$folder"
TRITON_INTERPRET=1 PYTHONPATH=$folder "$python" - <<'PY'
import importlib.metadata, sys
import torch
from liger_kernel.transformers.functional import liger_attn_res

print("liger-kernel", importlib.metadata.version("liger-kernel"), "torch", torch.__version__)
assert "list of N tensors" in " ".join(liger_attn_res.__doc__.split())
device = "cuda" if torch.cuda.is_available() else "cpu"
stacked, query, weight = (torch.randn(*shape, device=device) for shape in ((3, 1, 2, 16), (16,), (16,)))
print("stacked [3, 1, 2, 16] ->", list(liger_attn_res(stacked, query, weight).shape))
try:
    print("list of 3 ->", list(liger_attn_res(list(stacked), query, weight).shape))
except AttributeError as error:
    print("list of 3 -> AttributeError:", error)
    sys.exit(0)
sys.exit(1)
PY
