#!/usr/bin/env bash
# fla-core 0.6.0: `naive_attnres` and `fused_attnres` have one docstring and one signature. With return_weights=True the
# weights of the first carry a gradient and those of the second do not, so that a loss with a term on the weights (an
# entropy) has another gradient in the fused path, silently. The docstring does not say so.
# Ends with 0 while that is so, else with 1. $PYTHON names an interpreter with torch and triton. On a CPU Triton's
# interpreter runs the kernels; for that the CPU tensors say that they are a card's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)")
"$python" -m pip install --quiet --no-deps --target "$folder" fla-core==0.6.0 einops==0.8.2
cd "$folder"
on_cpu=$("$python" -c 'import torch; print(int(not torch.cuda.is_available()))')
TRITON_INTERPRET=$on_cpu PYTHONPATH=$folder "$python" -W ignore - <<'PY'
import builtins, importlib.metadata, sys
import torch
from fla.ops.attnres import fused, fused_attnres, naive_attnres

print("fla-core", importlib.metadata.version("fla-core"), "torch", torch.__version__)
device = "cuda" if torch.cuda.is_available() else "cpu"


class OnCard(torch.Tensor):
    is_cuda = True


class Index(int):  # the interpreter makes loop indices plain ints
    def __mul__(self, other):
        return Index(int(self) * int(getattr(other, "value", other)))

    def to(self, dtype):
        return int(self)


if device == "cpu":
    fused.range = lambda *a: map(Index, builtins.range(*(int(getattr(x, "value", x)) for x in a)))
    for kernel in (fused.attnres_fwd_kernel, fused.attnres_bwd_kernel_dv, fused.attnres_bwd_kernel_dqdw):
        kernel.configs = kernel.configs[:1]
torch.manual_seed(0)
sources = [torch.randn(1, 4, 16, device=device) for _ in range(3)]
query, weight = (torch.randn(16, device=device, requires_grad=True) for _ in range(2))
shown = []
for function in (naive_attnres, fused_attnres):
    given = sources if function is naive_attnres or device == "cuda" else [x.as_subclass(OnCard) for x in sources]
    mix, p = function(query, given, weight, return_weights=True)
    loss = mix.square().mean() - (p * p.clamp_min(1e-30).log()).sum(0).mean()
    (grad,) = torch.autograd.grad(loss, query)
    shown.append((loss.item(), grad.norm().item(), p.requires_grad))
    print(function.__name__, "loss %.6f, norm of the query's gradient %.6f, weights differentiable: %s" % shown[-1])
(loss, norm, yes), (same_loss, other_norm, no) = shown
sys.exit(0 if abs(loss - same_loss) < 1e-5 and abs(norm - other_norm) > 1e-3 and yes and not no else 1)
PY
