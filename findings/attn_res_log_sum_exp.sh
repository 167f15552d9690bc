#!/usr/bin/env bash
# attn-res 0.1.0: `two_phase_block_attnres_inference` says that it returns "lse: Per-query log-sum-exp". What it returns
# is the sum of exponentials, taken after the maximum is subtracted: 3 for three equal logits of 0, where log-sum-exp is
# 1.0986. Merged with `torch.logaddexp`, as a log-sum-exp would be, the weights are wrong; its own
# `online_softmax_merge` expects the sum.
# Ends with 0 while that is so, else with 1. $PYTHON names an interpreter with torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)")
"$python" -m pip install --quiet --no-deps --target "$folder" attn-res==0.1.0
cd "$folder"
PYTHONPATH=$folder "$python" - <<'PY'
import importlib.metadata, math, sys
import torch
from attn_res import RMSNormNoWeight, two_phase_block_attnres_inference

print("attn-res", importlib.metadata.version("attn-res"), "torch", torch.__version__)
assert "lse: Per-query log-sum-exp" in two_phase_block_attnres_inference.__doc__
_, _, lse = two_phase_block_attnres_inference(torch.zeros(1, 8), torch.randn(3, 1, 2, 8), RMSNormNoWeight())
print("three logits of 0: returned", lse.flatten().tolist(), "log-sum-exp is", round(math.log(3), 4))
sys.exit(0 if bool((lse == 3).all()) else 1)
PY
