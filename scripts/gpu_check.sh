#!/usr/bin/env bash
# Everything that only a CUDA card can say, in one call of under ten minutes on a bare machine:
#
#     scripts/gpu_check.sh OUT
#
# GPU tests, reads against peers and goals, a training step of the 0.6B shape (vanilla and AttnRes, eager and compiled),
# a short training run whose loss falls, compute-sanitizer where it is installed. Needs Python >= 3.11 with torch >= 2.11
# (CUDA), triton, transformers; pytest for the tests. Hydra is not needed. $PYTHON names the interpreter.
# Logs and JSON go to OUT. Exit status: 0 if nothing failed, 1 if something did, 2 without a CUDA card.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: scripts/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no CUDA device (or no torch with CUDA) for $python; nothing measured" >&2
    exit 2
fi

failed=0
summary="$out/summary.txt"
: >"$summary"

# section NAME SECONDS COMMAND...: run under a time limit, log, and add a line to the summary.
section() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "ok      $name ($((SECONDS - began)) s)" | tee -a "$summary"
    else
        failed=1
        echo "FAILED  $name (status $status, 124 is its limit of $limit s; $((SECONDS - began)) s)" | tee -a "$summary"
        tail -n 5 "$out/$name.log"
    fi
}

skipped() { echo "skipped $1: $2" | tee -a "$summary"; }

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
"$python" - >"$out/environment.json" <<'PYTHON'
import json, platform, torch, transformers, triton
card = torch.cuda.get_device_properties(0)
versions = {m.__name__: m.__version__ for m in (torch, triton, transformers)}
print(json.dumps({"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda,
                  "python": platform.python_version(), "versions": versions}))
PYTHON
cat "$out/environment.json"

if "$python" -c 'import pytest' 2>/dev/null; then
    section tests 150 "$python" -m pytest tests/ops -q -p no:cacheprovider
else
    skipped tests "pytest is not installed"
fi

section reads 120 "$python" benchmarks/bench_depth_mix.py --part reads --rounds 12 --out "$out/reads.json"
section step 200 "$python" benchmarks/bench_depth_mix.py --part step --rounds 12 --out "$out/step.json"

cat >"$out/train_short.py" <<'PYTHON'
"""A small byte-level AttnRes model on the source of the standard library: the loss has to fall."""
import json, sys, sysconfig
from pathlib import Path
import torch
import torch.nn.functional as F
from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM

torch.manual_seed(0)
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
data = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8).long().cuda()
config = Qwen3AttnResConfig(vocab_size=256, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                            num_attention_heads=8, num_key_value_heads=4, head_dim=64, attnres_num_blocks=4)
model = Qwen3AttnResForCausalLM(config).cuda().train()
model.model.backend = "triton"
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
losses = []
for step in range(200):
    starts = torch.randint(0, len(data) - 257, (32, 1), device="cuda")
    batch = data[starts + torch.arange(257, device="cuda")]
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.detach())
losses = torch.stack(losses).tolist()
first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
print(json.dumps({"first_10": first, "last_10": last, "losses": losses}))
# Uniform bytes are 5.5 nats; 200 steps of a working model go well below 3.
sys.exit(not last < min(3.0, first - 1.0))
PYTHON
section train 60 "$python" "$out/train_short.py"

cat >"$out/sanitize.py" <<'PYTHON'
"""All kernels once on ragged sizes, for compute-sanitizer."""
import torch
from attnres.ops import ReadParameters, depth_mix, merge, prepare_block

def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

for width in (1000, 1024):
    for n in (3, 7, 9):
        tensors = [leaf(2, 5, width, dtype=torch.bfloat16) for _ in range(n + 2)]
        reads = [ReadParameters(leaf(width), leaf(width), leaf(2, n + 1)) for _ in range(8)]
        block = prepare_block(tensors[:n], reads, backend="triton")
        merged = merge(block, 7, tensors[n], tensors[n + 1], reads[7], leaf(width), backend="triton")
        empty = merge(block, 0, None, None, reads[0], leaf(width), dtype=torch.bfloat16, backend="triton")
        mixed, weights = depth_mix(tensors[:n], leaf(width), leaf(width), backend="triton")
        (merged.normed.sum() + empty.normed.sum() + mixed.sum() + weights[..., 0].sum()).backward()
torch.cuda.synchronize()
PYTHON
if command -v compute-sanitizer >/dev/null; then
    # Compiled once outside, so that the sanitizer times out on nothing but the kernels.
    "$python" "$out/sanitize.py" >/dev/null 2>&1
    section memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" "$out/sanitize.py"
    section racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" "$out/sanitize.py"
else
    skipped sanitizer "compute-sanitizer is not installed"
fi

for log in reads step; do
    grep -hE '^(met|NOT MET|not measured)' "$out/$log.log" 2>/dev/null
done | sort -u | tee -a "$summary"
[ $failed -eq 0 ] && echo "gpu_check: all sections passed" || echo "gpu_check: a section FAILED, see $out"
exit $failed
