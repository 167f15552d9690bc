#!/usr/bin/env bash
# torchmetrics 1.9.0: `MeanMetric` sums values and weights in fp32 whatever it is given: fp64 tensors are cast, and
# `.double()` does nothing. The sums lose a little with each batch, so that the mean of equal values is not that value.
# `.set_dtype(torch.float64)` mends it.
# Seen: 24,426 batches of weight 2,047, each with the value 10.1234567 (an evaluation of 50 million tokens): the mean is
# off by 7e-4 (relatively 7e-5, a thousand times the rounding of fp32), by 1e-12 with set_dtype.
# Ends with 0 while that is so, else with 1. $PYTHON makes the environment; any CPU build of torch does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet torchmetrics==1.9.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys
import torch, torchmetrics

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
value, weight = (torch.tensor(number, dtype=torch.float64) for number in (10.1234567, 2047))
metrics = {
    "MeanMetric()": torchmetrics.MeanMetric(),
    "MeanMetric().double()": torchmetrics.MeanMetric().double(),
    "MeanMetric().set_dtype(torch.float64)": torchmetrics.MeanMetric().set_dtype(torch.float64),
}
off = []
for name, metric in metrics.items():
    for _ in range(24_426):
        metric.update(value, weight)
    mean = metric.compute()
    off.append(abs(mean.item() - value.item()))
    print(f"{name}: {mean.item():.7f} ({mean.dtype}), off by {off[-1]:.1e}")
plain, double, mended = off
sys.exit(0 if plain > 1e-4 and double == plain and mended < 1e-9 else 1)
PY
