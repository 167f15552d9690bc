#!/usr/bin/env bash
# The golden vectors of the read on every public implementation, each installed in an environment of its own on top of
# this one; writes the page of results.
#
#     scripts/conformance.sh FOLDER > docs/conformance.md      # FOLDER: of the environments
#
# A few minutes on one core. $PYTHON names the interpreter, $DEVICE is cpu or cuda; on a CPU, Triton's interpreter runs
# the kernels.
set -euo pipefail
folder=${1:?usage: scripts/conformance.sh FOLDER > docs/conformance.md}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cpu}
table=$folder/table.md
: > "$table"
export OMP_NUM_THREADS=1

held() {  # held INTERPRETER WORDS...: one row; what deviates or cannot run is a result too
    local code=0
    "$python" -m attnres.commands.conformance --python "$@" --device "$device" --append "$table" >&2 || code=$?
    [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$code" = 5 ]
}

with() {  # with PACKAGES...: the interpreter of an environment that has them, on top of this one
    local env=$folder/${1%%==*}-${1##*==}
    if [ ! -x "$env/bin/python" ]; then
        "$python" -m venv "$env"
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            > "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/on_top.pth"
        "$env/bin/python" -m pip install --quiet --no-deps "$@" >&2
    fi
    echo "$env/bin/python"
}

kernels() { [ "$device" = cuda ] && held "$@" || TRITON_INTERPRET=1 held "$@"; }

here=$("$python" -c 'import sys; print(sys.executable)')
fla=$(with fla-core==0.6.0 einops==0.8.2)
liger=$(with liger-kernel==0.8.5)
flash=$(with flash-attn-res==0.1.12)
attn_res=$(with attn-res==0.1.0)
fast=$(with fast-attnres==2.1.0)
fast_1=$(with fast-attnres==1.0.0)

held "$here" attnres.ops.reference:depth_mix
held "$here" attnres.ops:depth_mix
kernels "$here" attnres.ops:depth_mix --adapter fused
held "$fla" fla.ops.attnres:naive_attnres
kernels "$fla" fla.ops.attnres:fused_attnres
kernels "$liger" liger_kernel.transformers.functional:liger_attn_res
kernels "$flash" flash_attn_res:phase_1_batched_attention_triton_op
kernels "$flash" flash_attn_res:phase_2_online_softmax_merge_triton_op
held "$attn_res" attn_res:AttnResOperator
held "$attn_res" attn_res:two_phase_block_attnres_inference
held "$here" transformers.models.inkling2.modeling_inkling2:Inkling2BlockAttentionResidual
held "$fast" attnres:attnres
held "$fast_1" attnres:attnres

cat <<'PAGE'
# Who computes the read

`scripts/conformance.sh FOLDER > docs/conformance.md` writes this page. It installs each package below in an environment
of its own and runs `python -m attnres.commands.conformance module:function --python ENVIRONMENT/bin/python`, which
holds an implementation to the golden vectors in `attnres/ops/conformance/` and prints every deviation.

**The vectors** are calls of the read, made in fp64 by `attnres/ops/reference.py` from fixed inputs that are exact in
bf16: the mix, the routing weights, and the gradients of sources, query, key weight and bias. `contract.json` says what
each case shows and how near is near enough; `vectors.safetensors` holds the numbers. Neither needs this package.

| case | what it shows |
|---|---|
PAGE
"$python" -c '
from attnres.ops.conformance.vectors import CASES
print("\n".join(f"| `{case.name}` | {case.about} |" for case in CASES))'
cat <<'PAGE'

**A variant** is another read that is documented somewhere: values normalised, key norm unweighted, logits scaled by
D^-0.5, or several of them. An implementation that computes one exactly is named as that variant, and the command ends
with 5 unless `--variant` asks for it. **Not offered** is what an implementation has no argument for, or says that it
cannot: no deviation, but nothing was tested either. A peer's arguments are passed as they are; what it lacks is not
emulated (a key weight could be folded into the query). The tolerance is 1e-5 of the largest entry for outputs and 2e-5
for gradients in fp32 (1e-4 where logits are large), and two roundings to bf16 in bf16.

PAGE
echo '| implementation | ran on | verdict | largest deviations | not offered |'
echo '|---|---|---|---|---|'
cat "$table"
cat <<'PAGE'

Triton's interpreter shows what a kernel computes, not what a compiler makes of it on a card: alignment, race conditions
and other orders of summation need `DEVICE=cuda`. There it also truncates fp32 to bf16 where a card rounds; the adapters
(`attnres/ops/conformance/adapters.py`) round. They take one configuration of each kernel instead of autotuning, and for
fla-core they pass CPU tensors off as a card's, because its function asks before its kernels run.

**Your own implementation.** A function with these keywords needs no adapter; leave out what it has not:

    def my_read(sources, query, key_weight, bias=None, eps=1e-6):
        """sources: S tensors [B, T, D]; query, key_weight: [D]; bias: [S] or [B, S]; returns mix, or (mix, weights)."""

    python -m attnres.commands.conformance my_module:my_read
    python -m attnres.commands.conformance their_module:their_read --adapter my_module:adapt --python their/bin/python

An adapter takes the function and returns one with these keywords; `NotImplementedError` says that a case is out of
reach.
PAGE
