#!/usr/bin/env bash
# How the motifs of one seed of the small replication came about: the probe at log-spaced steps of its training, on the
# windows of the final probe, against the uniform wrap; then one report over all of them.
#
#     scripts/trajectory.sh SEED [FOLDER]       # after scripts/replication.sh SEED [FOLDER]
#
# About a quarter of an hour a step on one core. Stopped anywhere, the same command goes on.
set -euo pipefail
seed=${1:?usage: scripts/trajectory.sh SEED [FOLDER]}
out=${2:-replication}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=$out/seed$seed
export OMP_NUM_THREADS=1

probes=()
for step in 00000016 00000064 00000128 00000256 00000512 00001024; do
    "$python" probe.py ckpt="$(echo "$runs"/attnres_small-*/checkpoints/step_$step)" \
        baseline="$runs/vanilla_small" runs_dir="$runs/trajectory/step_$step" threads=1 device=cpu \
        probe.schedules="[uniform]" probe.documents_pilot=128 probe.documents_confirm=512
    probes+=("$runs/trajectory/step_$step"/probe_*)
done
"$python" -m attnres.commands.report "${probes[@]}" "$runs"/probe_attnres_small-* --out "$runs/trajectory/report"
