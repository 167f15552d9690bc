"""The read: plain-torch backend against the fp64 reference, outputs and every gradient."""

import inspect

import pytest
import torch
from torch import Tensor

from attnres.ops import ReadParameters, batched, depth_mix, log_weights, merge, mix_and_norm, prepare_block, reference

WIDTH, BATCH, TOKENS = 24, 2, 5


def make(num_sources: int, dtype: torch.dtype, bias: str | None, seed: int = 0) -> dict[str, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = {"per source": (num_sources,), "per row": (BATCH, num_sources)}
    return {
        "sources": [leaf(BATCH, TOKENS, WIDTH) for _ in range(num_sources)],
        # Logits of order one: rounding errors grow with their size, in every implementation alike.
        "parameters": [(leaf(WIDTH) / WIDTH**0.5).detach().requires_grad_(), leaf(WIDTH)]
        + ([leaf(*shapes[bias])] if bias else []),
        "cotangents": [leaf(BATCH, TOKENS, WIDTH).detach(), leaf(BATCH, TOKENS, num_sources).detach()],
    }


def run(function, case: dict[str, list[Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Mix, weights, and the gradient of every input; inputs cast to `dtype` first."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in case["sources"] + case["parameters"]]
    sources, parameters = leaves[: len(case["sources"])], leaves[len(case["sources"]) :]
    mixed, weights = function(sources, *parameters)
    d_mixed, d_weights = case["cotangents"]
    loss = (mixed * d_mixed.to(mixed.dtype)).sum() + (weights * d_weights.to(weights.dtype)).sum()
    return [mixed, weights, *torch.autograd.grad(loss, leaves)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-12))


@pytest.mark.parametrize("bias", [None, "per source", "per row"])
@pytest.mark.parametrize("num_sources", [1, 2, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_depth_mix_matches_reference(dtype, num_sources, bias):
    case = make(num_sources, dtype, bias)
    exact = run(reference.depth_mix, case, torch.float64)
    if dtype == torch.float64:
        for found, wanted in zip(run(depth_mix, case), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        return
    # Low precision: at most twice the error of plain autograd through the reference in the same dtype.
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    for found, plain, wanted in zip(run(depth_mix, case), run(reference.depth_mix, case), exact, strict=True):
        assert error(found, wanted) <= max(2 * error(plain, wanted), floor)


def test_depth_mix_signature_equals_the_reference():
    ours = inspect.signature(depth_mix).parameters
    theirs = inspect.signature(reference.depth_mix).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_depth_mix_zero_query_is_uniform():
    case = make(4, torch.float32, None)
    _, weights = depth_mix(case["sources"], torch.zeros(WIDTH), torch.ones(WIDTH))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25), rtol=0, atol=1e-7)


def test_depth_mix_infinite_bias_equals_leaving_the_source_out():
    case = make(4, torch.float64, None)
    query, key_weight = case["parameters"]
    bias = torch.zeros(4, dtype=torch.float64)
    bias[1] = -torch.inf
    mixed, weights = depth_mix(case["sources"], query, key_weight, bias)
    left = [case["sources"][i] for i in (0, 2, 3)]
    wanted, wanted_weights = reference.depth_mix(left, query, key_weight)
    torch.testing.assert_close(mixed, wanted)
    torch.testing.assert_close(weights[..., [0, 2, 3]], wanted_weights)
    assert bool((weights[..., 1] == 0).all())
    gradients = torch.autograd.grad(mixed.sum(), case["sources"])
    assert bool((gradients[1] == 0).all()) and all(bool(g.isfinite().all()) for g in gradients)


def test_depth_mix_zeroing_a_family_equals_masking_it_behind_a_norm_without_eps():
    case = make(4, torch.float64, None)
    query, key_weight = case["parameters"]
    _, weights = depth_mix(case["sources"], query, key_weight)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=torch.float64)
    masked, _ = depth_mix(case["sources"], query, key_weight, bias)
    zeroed = sum(weights[..., i : i + 1] * case["sources"][i] for i in (0, 2, 3))

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True))

    torch.testing.assert_close(norm(zeroed), norm(masked))


def test_depth_mix_refuses_a_row_without_sources():
    case = make(3, torch.float32, None)
    bias = torch.zeros(BATCH, 3)
    bias[1] = -torch.inf
    with pytest.raises(ValueError, match="removes every source"):
        depth_mix(case["sources"], *case["parameters"], bias)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [torch.zeros(2, 3)]}, "sources"),
        ({"sources": [torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)]}, r"sources\[1\]"),
        ({"query": torch.zeros(5)}, "query"),
        ({"key_weight": torch.zeros(5)}, "key_weight"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_depth_mix_names_the_argument_that_is_wrong(change, named):
    good = {"sources": [torch.zeros(1, 2, 4)] * 2, "query": torch.zeros(4), "key_weight": torch.ones(4)}
    with pytest.raises(ValueError, match=named):
        depth_mix(**(good | change))


@pytest.mark.parametrize("has_update", [True, False])
@pytest.mark.parametrize("bias", [None, "per source", "per row"])
@pytest.mark.parametrize("finished", [1, 3])
def test_merge_equals_read_add_and_norm(finished, bias, has_update):
    """The block-wise form against the read over all sources, the residual add and RMSNorm, in fp64."""
    case = make(finished + 1, torch.float64, bias)
    norm_weight = torch.rand(WIDTH, dtype=torch.float64, requires_grad=True)
    update = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [*case["sources"], *case["parameters"], norm_weight, *([update] if has_update else [])]
    *done, state = case["sources"]
    read = ReadParameters(*case["parameters"])
    other = ReadParameters(torch.randn(WIDTH).double(), torch.ones(WIDTH).double())

    def blockwise() -> list[Tensor]:
        block = prepare_block(done, [other, read])
        merged = merge(block, 1, state, update if has_update else None, read, norm_weight, 1e-6, 1e-3)
        return [merged.current, merged.normed, torch.exp(log_weights(block, 1, merged.logit))]

    def plain() -> list[Tensor]:
        current = state + update if has_update else state
        mixed, weights = reference.depth_mix([*done, current], *case["parameters"])
        return [current, batched.rms_norm(mixed, norm_weight, 1e-3), weights]

    results = []
    for form in (blockwise, plain):
        outputs = form()
        draw = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=draw).double()).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_merge_gives_the_state_all_mass_where_finished_sources_are_masked():
    case = make(3, torch.float64, None)
    *done, state = case["sources"]
    read = ReadParameters(*case["parameters"], torch.tensor([-torch.inf, -torch.inf, 0.0]).double())
    block = prepare_block(done, [read])
    merged = merge(block, 0, state, None, read, torch.ones(WIDTH).double())
    assert torch.exp(log_weights(block, 0, merged.logit)).tolist()[0][0] == [0.0, 0.0, 1.0]
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(merged.normed.sum(), case["sources"]))


def test_mix_and_norm_with_the_reads_own_weights_equals_merge():
    case = make(4, torch.float32, "per source")
    *done, state = case["sources"]
    read = ReadParameters(*case["parameters"])
    block = prepare_block(done, [read])
    norm_weight = torch.rand(WIDTH)
    merged = merge(block, 0, state, None, read, norm_weight)
    weights = torch.exp(log_weights(block, 0, merged.logit))
    torch.testing.assert_close(mix_and_norm(case["sources"], weights, norm_weight), merged.normed)


def test_depth_mix_is_bitwise_repeatable():
    case = make(5, torch.float32, "per source")
    for first, second in zip(run(depth_mix, case), run(depth_mix, case), strict=True):
        assert torch.equal(first, second)


def test_depth_mix_accepts_aliased_sources():
    case = make(2, torch.float64, None)
    source = case["sources"][0]
    aliased, _ = depth_mix([source, source], *case["parameters"])
    torch.testing.assert_close(aliased, source)
    (gradient,) = torch.autograd.grad(aliased.sum(), source)
    torch.testing.assert_close(gradient, torch.ones_like(source))
