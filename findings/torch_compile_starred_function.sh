#!/usr/bin/env bash
# torch 2.13.0: `torch.compile` of an autograd.Function with `forward(ctx, scale, *sources)` under `torch.no_grad` drops
# the first argument: `scale` is the first source. Where the shapes fit, the result is wrong without a word.
# Seen: 2 * (5 + 7) is 24 eagerly and 35 = 5 * 7 compiled, with backend "eager" already: it is Dynamo's tracing. With
# gradients on, or with the same arguments named (scale, first, second), it is right. In torch 2.15.0 all are right.
# Ends with 0 while that is so, else with 1. $PYTHON makes the environment; any CPU build of torch does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
cat > shifted.py <<'PY'
import sys
import torch

print("torch", torch.__version__)


class Starred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, *sources):
        return scale * sum(sources)

    @staticmethod
    def backward(ctx, grad):
        return None, 2 * grad, 2 * grad


class Named(Starred):
    @staticmethod
    def forward(ctx, scale, first, second):
        return scale * (first + second)


results = {}
for function in (Starred, Named):
    for grad in (False, True):
        first, second = (torch.tensor([value], requires_grad=grad) for value in (5.0, 7.0))
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            call = lambda first, second, apply=function.apply: apply(2.0, first, second)
            compiled = torch.compile(call, backend="eager", fullgraph=True)
            results[function.__name__, grad] = call(first, second).item(), compiled(first, second).item()
        print(function.__name__, "gradients:", grad, "(eager, compiled):", results[function.__name__, grad])
wrong = results.pop(("Starred", False))
sys.exit(0 if wrong == (24, 35) and set(results.values()) == {(24, 24)} else 1)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" shifted.py
