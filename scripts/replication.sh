#!/usr/bin/env bash
# One seed of the small replication (results/*_small_replication): a Block AttnRes and a vanilla model on the same
# 3M tokens of the installed packages' text, two same-base controls on 1M more, and the probe of them all.
#
#     scripts/replication.sh SEED [FOLDER]      # FOLDER: replication
#
# About two hours on one core. Stopped anywhere (Ctrl-C, kill, power), the same command goes on: what is
# complete is kept. One thread, so that the same machine, Python and torch give the same digits. $PYTHON names the
# interpreter.
set -euo pipefail
seed=${1:?usage: scripts/replication.sh SEED [FOLDER]}
out=${2:-replication}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=$out/seed$seed
export OMP_NUM_THREADS=1

train=(data=pyenv seed="$seed" runs_dir="$runs" trainer.threads=1 logger.wandb=disabled)
"$python" train.py +experiment=attnres_small "${train[@]}" trainer.max_steps=1465 trainer.log_spaced=true
"$python" train.py +experiment=vanilla_small "${train[@]}" trainer.max_steps=1465
"$python" train.py +experiment=same_base_frozen "${train[@]}"
"$python" train.py +experiment=same_base_full "${train[@]}"

"$python" probe.py ckpt="$runs/attnres_small" runs_dir="$runs" threads=1 device=cpu \
    controls="{frozen:$runs/same_base_frozen,full:$runs/same_base_full}" \
    probe.documents_pilot=128 probe.documents_confirm=512
