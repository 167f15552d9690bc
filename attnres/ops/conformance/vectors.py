"""The golden vectors, made from the reference in fp64: `python -m attnres.ops.conformance.vectors`.

Inputs are multiples of 2^-6 below 2 in size, or those times a power of two: exact in bf16, and drawn by Python's own
generator, so that every machine makes the same bytes.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from attnres.ops import reference

FOLDER = Path(__file__).parent
CONTRACT, VECTORS = FOLDER / "contract.json", FOLDER / "vectors.safetensors"

NORMALISED, UNWEIGHTED, SCALED = "values normalised", "key norm unweighted", "logits scaled by D^-0.5"
VARIANTS = (NORMALISED, UNWEIGHTED, SCALED)
INPUTS = ("sources", "query", "key_weight", "bias", "upstream")

# Twice the largest error of one rounding to bf16.
_BF16 = 2.0**-7


@dataclass(frozen=True)
class Case:
    """One call of the read, with the gradients of one scalar.

    Attributes:
        name: of the case.
        about: what only this case shows.
        sources: S.
        shape: `(B, T, D)`.
        bias: `"none"`, `"sources"` for `[S]`, or `"rows"` for `[B, S]`.
        masked: for each row of the bias the sources that `-inf` removes.
        repeated: one tensor is the first and the last source.
        strided: sources are not contiguous.
        dtype: of sources, query and key weight; a bias is fp32.
        eps: of the key norm.
        upstream: the output whose product with the tensor `upstream` is differentiated.
        source_scale, query_scale: powers of two.
        tolerance: relative to the largest entry that is expected, by output; `grad` for every gradient.
    """

    name: str
    about: str
    sources: int
    shape: tuple[int, int, int]
    bias: str = "none"
    masked: tuple[tuple[int, ...], ...] = ()
    repeated: bool = False
    strided: bool = False
    dtype: str = "float32"
    eps: float = 1e-6
    upstream: str = "mixed"
    source_scale: float = 1.0
    query_scale: float = 0.5
    tolerance: tuple[tuple[str, float], ...] = (("mixed", 1e-5), ("weights", 1e-5), ("grad", 2e-5))


CASES = (
    Case("plain", "the equations, no bias", 5, (2, 3, 16)),
    Case("routing_gradient", "gradients through the routing weights", 5, (2, 3, 16), upstream="weights"),
    Case("bias", "a bias for each source", 4, (2, 3, 16), bias="sources"),
    Case("bias_rows", "a bias for each row and source", 4, (2, 3, 16), bias="rows"),
    Case("masked", "a bias of -inf removes two sources, the newest among them", 5, (2, 3, 16), "sources", ((1, 4),)),
    Case("masked_rows", "-inf removes other sources in each row", 4, (2, 3, 16), "rows", ((0,), (1, 2, 3))),
    Case("one_source", "one source: its weight is 1, no gradient reaches the query", 1, (2, 3, 16)),
    Case("many_sources", "33 sources: more than a power of two", 33, (1, 2, 8)),
    Case("odd_sizes", "three sources, seven tokens, width 13", 3, (1, 7, 13)),
    Case("zero_query", "the usual first step: uniform weights", 4, (2, 3, 16), query_scale=0.0),
    Case("small_sources", "the mean square is of the size of eps", 4, (2, 3, 16), source_scale=2.0**-10),
    Case("large_eps", "an eps of 0.25", 4, (2, 3, 16), eps=0.25),
    Case(
        *("large_logits", "logits beyond 100: exp alone overflows", 5, (2, 12, 16)),
        query_scale=16.0,
        tolerance=(("mixed", 1e-4), ("weights", 1e-4), ("grad", 1e-4)),
    ),
    Case("repeated_source", "the first source is also the last; its gradients add up", 4, (2, 3, 16), repeated=True),
    Case("strided", "sources that are not contiguous", 3, (2, 5, 16), strided=True),
    Case(
        *("bf16", "bf16 in and out, fp32 inside: one rounding of what is returned", 9, (2, 4, 64)),
        dtype="bfloat16",
        tolerance=(("mixed", _BF16), ("weights", 1e-4), ("grad", _BF16)),
    ),
)


def read(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    variant: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """`reference.depth_mix` under a variant that others use, a subset of `VARIANTS`; none is the read itself."""
    if UNWEIGHTED in variant:
        key_weight = torch.ones_like(key_weight)
    if SCALED in variant:
        query = query * query.numel() ** -0.5
    mixed, weights = reference.depth_mix(sources, query, key_weight, bias, eps)
    if NORMALISED in variant:
        values = torch.stack([source.to(weights.dtype) for source in sources], dim=-2)
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        mixed = (weights.unsqueeze(-1) * values).sum(-2).to(mixed.dtype)
    return mixed, weights


def inputs(case: Case) -> dict[str, Tensor]:
    """In fp32: `sources [n, B, T, D]` (n distinct), `query`, `key_weight`, `upstream`, `bias` where there is one."""
    draw = random.Random(case.name)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        steps = [draw.randrange(-127, 128) for _ in range(torch.Size(shape).numel())]
        return torch.tensor(steps, dtype=torch.float32).reshape(shape) * (scale / 64)

    batch, time, width = case.shape
    found = {
        "sources": tensor(case.sources - case.repeated, *case.shape, scale=case.source_scale),
        "query": tensor(width, scale=case.query_scale),
        "key_weight": tensor(width),
        "upstream": tensor(batch, time, width if case.upstream == "mixed" else case.sources),
    }
    if case.bias != "none":
        bias = tensor(batch if case.bias == "rows" else 1, case.sources)
        for row, removed in zip(bias, case.masked, strict=bool(case.masked)):
            row[list(removed)] = float("-inf")
        found["bias"] = bias if case.bias == "rows" else bias[0]
    return found


def expected(case: Case, given: Mapping[str, Tensor], variant: Sequence[str] = ()) -> dict[str, Tensor]:
    """What the read gives in fp64: `mixed`, `weights`, and `grad_*` of sources, query, key_weight and bias."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in given.items() if name != "upstream"}
    sources = list(leaves["sources"]) + [leaves["sources"][0]] * case.repeated
    mixed, weights = read(sources, leaves["query"], leaves["key_weight"], leaves.get("bias"), case.eps, variant)
    outputs = {"mixed": mixed, "weights": weights}
    upstream = given["upstream"].double()
    grads = torch.autograd.grad(
        outputs[case.upstream], list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    found = outputs | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    # What is 0 in exact arithmetic is 0 here too.
    return {name: torch.where(x.abs().max() < 1e-12, 0.0, x).detach() for name, x in found.items()}


def contract() -> dict[str, object]:
    """What `contract.json` holds."""
    return {
        "read": "r_i = rsqrt(mean_d(v_i^2) + eps); logit_i = r_i sum_d(w_d g_d v_i,d) + b_i; "
        "a = softmax_i(logit); mixed = sum_i a_i v_i (Attention Residuals, arXiv 2603.15031)",
        "call": "function(sources=[S tensors [B, T, D]], query=w [D], key_weight=g [D], bias=b [S] or [B, S], eps=eps) "
        "-> mixed [B, T, D], or (mixed, weights [B, T, S])",
        "tensors": "CASE/NAME: sources [n, B, T, D] (where `repeated`, the first is the last source as well), query, "
        "key_weight, bias, upstream are given; mixed, weights, grad_* are expected, in fp64. Gradients are of "
        "sum(upstream * output), the output that `upstream` names",
        "conforms": "max |found - expected| <= tolerance * max |expected|; where all of it is 0, <= tolerance",
        "variants": list(VARIANTS),
        "cases": [{**asdict(case), "tolerance": dict(case.tolerance)} for case in CASES],
    }


def contract_text() -> str:
    """`contract.json`, a case a line."""
    plain = contract()
    cases = plain.pop("cases")
    assert isinstance(cases, list)
    head = json.dumps(plain, indent=1)[:-2]
    return head + ',\n "cases": [\n' + ",\n".join(f"  {json.dumps(case)}" for case in cases) + "\n ]\n}\n"


def vectors() -> dict[str, Tensor]:
    """What `vectors.safetensors` holds: what is given in fp32, what is expected in fp64."""
    found = {}
    for case in CASES:
        given = inputs(case)
        for name, tensor in (given | expected(case, given)).items():
            found[f"{case.name}/{name}"] = tensor.contiguous()
    return found


if __name__ == "__main__":
    CONTRACT.write_text(contract_text(), encoding="utf-8")
    save_file(vectors(), VECTORS)
