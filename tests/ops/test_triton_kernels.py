"""The Triton kernels against fp64: outputs, routing and every gradient, two-phase and a read at a time."""

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnres import ops
from attnres.ops import ReadParameters, batched, depth_mix, log_weights, merge, prepare_block, reference

pytest.importorskip("triton")

# 14 tokens: a ragged tail for every tile size, and rows of a batch that end within a tile.
BATCH, TOKENS = 2, 7
SIZES = [1, 2, 5, 9, 33]
WIDTHS = [64, 1000, 1024]
DTYPES = [torch.float32, torch.bfloat16]
BIASES = [None, "per source", "per row"]
NORM_EPS = 1e-5


class Draw:
    """Seeded leaves. A token tensor lies inside a buffer of NaN, so that a read out of bounds shows."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, width: int) -> Tensor:
        buffer = torch.full((BATCH * TOKENS + 2, width), torch.nan, dtype=self.dtype, device=self.device)
        buffer[1:-1] = self.values(BATCH * TOKENS, width).to(self.dtype).to(self.device)
        return buffer[1:-1].view(BATCH, TOKENS, width).detach().requires_grad_()

    def parameter(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (self.values(*shape) * scale).to(self.device).requires_grad_()

    def bias(self, kind: str | None, n: int) -> Tensor | None:
        if kind is None:
            return None
        bias = self.values(*((n,) if kind == "per source" else (BATCH, n)))
        if n > 2:
            bias[..., 0] = -torch.inf
        return bias.to(self.device).requires_grad_()

    def read(self, width: int, n: int, bias: str | None) -> ReadParameters:
        # Logits of order one: rounding errors grow with their size, in every implementation alike.
        query = self.parameter(width, scale=width**-0.5)
        return ReadParameters(query, self.parameter(width), self.bias(bias, n))


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a fixed random projection of all outputs."""
    draw = torch.Generator().manual_seed(1)
    loss = 0.0
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=draw).to(out.device)
        # The cotangent itself is exact in every dtype under test.
        loss = loss + (out * cotangent.bfloat16().to(out.dtype)).sum()
    return list(torch.autograd.grad(loss, leaves))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-12))


Form = Callable[..., list[Tensor]]


def judge(form: Form, plain: Form, kinds: list[str], leaves: list[Tensor]) -> None:
    """`form` against `plain` in fp64; at most twice the error of `plain` in the dtypes of the leaves.

    `kinds` names what each output and each gradient is. Those of a kind are judged as one vector: the few entries of
    one bias gradient can cancel by chance, and then neither error says anything.
    """

    def run(function: Form, args: list[Tensor]) -> dict[str, Tensor]:
        outputs = function(*args)
        found: dict[str, list[Tensor]] = {}
        for kind, tensor in zip(kinds, [*outputs, *gradients(outputs, args)], strict=True):
            found.setdefault(kind, []).append(tensor.detach().double().flatten())
        return {kind: torch.cat(parts) for kind, parts in found.items()}

    exact = run(plain, [leaf.detach().double().requires_grad_() for leaf in leaves])
    floor = 2e-6 if leaves[0].dtype == torch.float32 else 1e-4
    ours, own = run(form, leaves), run(plain, leaves)
    errors = {kind: (error(ours[kind], exact[kind]), error(own[kind], exact[kind])) for kind in exact}
    assert all(found <= max(2 * allowed, floor) for found, allowed in errors.values()), errors


def unflatten(reads: Sequence[ReadParameters]) -> tuple[list[Tensor], Callable[[list[Tensor]], list[ReadParameters]]]:
    """The leaves of some reads, and the way back."""
    leaves = [leaf for read in reads for leaf in read if leaf is not None]

    def back(given: list[Tensor]) -> list[ReadParameters]:
        given = list(given)
        return [ReadParameters(*(None if leaf is None else given.pop(0) for leaf in read)) for read in reads]

    return leaves, back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_sources", SIZES)
def test_depth_mix_on_triton_matches_fp64(num_sources, width, dtype, device, poison):
    draw = Draw(device, dtype)
    sources = [draw.tokens(width) for _ in range(num_sources)]
    bias = BIASES[(num_sources + WIDTHS.index(width)) % 3]
    parameters, back = unflatten([draw.read(width, num_sources, bias)])

    def form(*args: Tensor) -> list[Tensor]:
        return list(depth_mix(args[:num_sources], *back(args[num_sources:])[0], backend="triton"))

    def plain(*args: Tensor) -> list[Tensor]:
        return list(reference.depth_mix(args[:num_sources], *back(args[num_sources:])[0]))

    kinds = ["mix", "routing", *["d_source"] * num_sources, *["d_query", "d_key", "d_bias"][: len(parameters)]]
    judge(form, plain, kinds, [*sources, *parameters])


def chain(sources, state, updates, reads, norms, backend: str) -> list[Tensor]:
    """A block of reads: the first without a state or update of its own, each adding the update before it."""
    block = prepare_block(sources, reads, backend=backend)
    dtype, pending, outputs = sources[0].dtype, None, []
    for k, (read, norm) in enumerate(zip(reads, norms, strict=True)):
        merged = merge(block, k, state, pending, read, norm, 1e-6, NORM_EPS, dtype, backend)
        outputs += [merged.normed, torch.exp(log_weights(block, k, merged.logit))]
        state, pending = merged.current, updates[k]
    return outputs if state is None else [*outputs, state]


def plain_chain(sources, state, updates, reads, norms) -> list[Tensor]:
    """The same as PyTorch would do it: residual add, read over all sources, RMSNorm, each in the tensors' dtype."""
    pending, outputs = None, []
    for read, norm, update in zip(reads, norms, updates, strict=True):
        if pending is not None:
            state = pending if state is None else state + pending
        present = sources if state is None else [*sources, state]
        bias = None if read.bias is None else read.bias[..., : len(present)]
        mixed, weights = reference.depth_mix(present, read.query, read.key_weight, bias)
        outputs += [F.rms_norm(mixed, mixed.shape[-1:], eps=NORM_EPS) * norm.to(mixed.dtype), weights]
        pending = update
    return outputs if state is None else [*outputs, state]


def judge_chain(draw: Draw, finished: int, queries: int, width: int, bias: str | None, seeded: bool) -> None:
    tensors = [draw.tokens(width) for _ in range(finished + queries + seeded)]
    norms = [draw.parameter(width) for _ in range(queries)]
    parameters, back = unflatten([draw.read(width, finished + 1, bias) for _ in range(queries)])
    # The last update is pending at the end of the block: nothing depends on it.
    unused = tensors.pop()
    leaves = [*tensors, *norms, *parameters]

    def split(args: Sequence[Tensor]):
        args = list(args)
        sources, args = args[:finished], args[finished:]
        state = args.pop(0) if seeded else None
        updates, args = [*args[: queries - 1], unused.to(sources[0].dtype)], args[queries - 1 :]
        return sources, state, updates, back(args[queries:]), args[:queries]

    kinds = [
        *["normed", "routing"] * queries,
        "state",
        *["d_source"] * finished,
        *["d_state"] * seeded,
        *["d_update"] * (queries - 1),
        *["d_norm"] * queries,
        *["d_query", "d_key", "d_bias"][: len(parameters) // queries] * queries,
    ]
    judge(lambda *args: chain(*split(args), "triton"), lambda *args: plain_chain(*split(args)), kinds, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("finished", SIZES)
def test_prepare_block_and_merge_on_triton_match_fp64(finished, width, dtype, device, poison):
    case = SIZES.index(finished) + WIDTHS.index(width)
    judge_chain(Draw(device, dtype), finished, 3, width, BIASES[case % 3], seeded=bool(case % 2))


@pytest.mark.parametrize("bias", BIASES)
def test_prepare_block_on_triton_with_a_full_block_matches_fp64(bias, device, poison):
    """The largest block of the 0.6B shape: 7 finished sources, and more queries than one launch takes."""
    judge_chain(Draw(device, torch.bfloat16), 7, 10, 1024, bias, seeded=True)


@pytest.mark.parametrize(("finished", "tile"), [(3, 1), (17, 4)])
def test_triton_backend_with_many_tokens_a_program_matches_fp64(finished, tile, device, poison, monkeypatch):
    """So few programs that each walks over several tiles, the last ones past the end; one token a tile as on a GPU."""
    from attnres.ops import triton_block, triton_common, triton_merge, triton_read

    monkeypatch.setattr(triton_common, "INTERPRETED_TOKENS", tile)
    for module in (triton_block, triton_merge, triton_read):
        monkeypatch.setattr(module, "PROGRAMS", 3)
    # 17 sources of 1000 do not stay on chip: every tile is read again.
    judge_chain(Draw(device, torch.bfloat16), finished, 2, 1000, "per row", seeded=True)


def test_prepare_block_and_merge_on_triton_in_fp16_match_fp64(device, poison):
    judge_chain(Draw(device, torch.float16), 3, 2, 64, "per row", seeded=True)


def repeated(device: torch.device) -> list[Tensor]:
    draw = Draw(device, torch.bfloat16)
    sources, updates = [draw.tokens(64) for _ in range(4)], [draw.tokens(64) for _ in range(3)]
    norms = [draw.parameter(64) for _ in range(3)]
    parameters, back = unflatten([draw.read(64, 4, "per row") for _ in range(3)])
    outputs = chain(sources[:3], sources[3], updates, back(parameters), norms, "triton")
    return [*outputs, *gradients(outputs, [*sources, *updates[:2], *norms, *parameters])]


def test_triton_backend_is_bitwise_repeatable(device):
    for first, second in zip(repeated(device), repeated(device), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("finished", [2, 9])
def test_triton_backend_with_a_zero_query_is_uniform(finished, device):
    draw = Draw(device, torch.float32)
    width = 1024
    sources = [draw.tokens(width) for _ in range(finished)]
    zero = ReadParameters(torch.zeros(width, device=device, requires_grad=True), torch.ones(width, device=device))
    block = prepare_block(sources, [zero, zero], backend="triton")
    weights = torch.exp(log_weights(block, 1, None))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / finished))
    torch.testing.assert_close(block.mixed[0], sum(sources) / finished)
    (gradient,) = torch.autograd.grad(block.mixed[1].sum(), zero.query)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


def test_triton_backend_accepts_aliased_and_strided_sources(device):
    draw = Draw(device, torch.float32)
    read = draw.read(64, 3, "per source")
    source = draw.tokens(64)
    strided = draw.tokens(128)[..., ::2]
    assert not strided.is_contiguous()

    def run(backend: str) -> list[Tensor]:
        mixed, weights = depth_mix([source, source, strided], *read, backend=backend)
        return [mixed, weights, *gradients([mixed, weights], [source, *read])]

    for found, wanted in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("finished", [2, 9])
def test_triton_backend_gives_the_state_all_mass_where_finished_sources_are_masked(finished, device, poison):
    draw = Draw(device, torch.float32)
    width = 1024
    sources, state = [draw.tokens(width) for _ in range(finished)], draw.tokens(width)
    bias = torch.tensor([-torch.inf] * finished + [0.0], device=device, requires_grad=True)
    read = ReadParameters(draw.parameter(width), draw.parameter(width), bias)
    block = prepare_block(sources, [read, read], backend="triton")
    merged = merge(block, 1, state, None, read, torch.ones(width, device=device), backend="triton")
    weights = torch.exp(log_weights(block, 1, merged.logit))
    assert bool((weights[..., :-1] == 0).all()) and bool((weights[..., -1] == 1).all())
    torch.testing.assert_close(merged.normed, F.rms_norm(state, (width,), eps=1e-6))
    found = torch.autograd.grad(merged.normed.sum() + weights.sum(), [*sources, state, *read])
    assert all(bool(g.isfinite().all()) for g in found)


def test_triton_backend_without_tokens_returns_empty_tensors_and_zero_gradients(device):
    read = Draw(device, torch.float32).read(64, 2, "per source")
    sources = [torch.zeros(2, 0, 64, device=device, requires_grad=True) for _ in range(2)]
    mixed, weights = depth_mix(sources, *read, backend="triton")
    assert mixed.shape == (2, 0, 64) and weights.shape == (2, 0, 2)
    assert all(not bool(g.any()) for g in torch.autograd.grad(mixed.sum() + weights.sum(), list(read)))


@pytest.mark.parametrize(
    ("like", "named"),
    [
        (torch.zeros(1, 2, 12), "divisible by 8.*12"),
        (torch.zeros(1, 2, 16, dtype=torch.float64), "float64"),
    ],
)
def test_triton_backend_refuses_what_it_cannot_do_and_auto_takes_the_torch_path(like, named):
    width = like.shape[-1]
    args = ([like, like], torch.zeros(width, dtype=like.dtype), torch.ones(width, dtype=like.dtype))
    with pytest.raises(ValueError, match=f"sources: .*{named}.*backend='torch'"):
        depth_mix(*args, backend="triton")
    assert depth_mix(*args, backend="auto")[0].shape == like.shape


def test_auto_takes_triton_on_cuda_only(device):
    from attnres.ops import triton_backend

    expected = triton_backend if device.type == "cuda" else batched
    assert ops._select("auto", torch.zeros(1, 1, 8, device=device)) is expected
    assert ops._select("triton", torch.zeros(1, 1, 8, device=device)) is triton_backend


@pytest.mark.parametrize("name", ["prepare_block", "merge", "rms_norm"])
def test_backends_share_a_signature(name):
    from attnres.ops import triton_backend

    ours, theirs = getattr(triton_backend, name), getattr(batched, name)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("queries", [1, 3])
def test_prepare_block_on_triton_returns_what_the_torch_path_does(queries, device):
    """Shapes, and dtypes but for the mixes, which are in the sources' dtype here."""
    draw = Draw(device, torch.bfloat16)
    sources, reads = [draw.tokens(64) for _ in range(2)], [draw.read(64, 3, "per row") for _ in range(queries)]
    found, wanted = (prepare_block(sources, reads, backend=backend) for backend in ("triton", "torch"))
    assert len(found.mixed) == len(wanted.mixed) == queries
    for name in ("logits", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found.mixed, wanted.mixed, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: programs that run at once")
@pytest.mark.parametrize("finished", [3, 7, 12])
def test_triton_backend_at_scale_is_bitwise_repeatable_and_close_to_torch(finished, device):
    draw = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device).to(dtype).requires_grad_()

    tensors = [leaf(2, 4099, 1024, dtype=torch.bfloat16) for _ in range(finished + 9)]
    norms = [leaf(1024) for _ in range(8)]
    reads = [
        ReadParameters((leaf(1024) / 32).detach().requires_grad_(), leaf(1024), leaf(finished + 1)) for _ in range(8)
    ]
    leaves = [*tensors[:-1], *norms, *(p for read in reads for p in read)]
    results = []
    for backend in ("triton", "triton", "torch"):
        outputs = chain(tensors[:finished], tensors[finished], tensors[finished + 1 :], reads, norms, backend)
        results.append([*outputs, *gradients(outputs, leaves)])
    for first, second, wanted in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert error(first, wanted.double()) < 2e-2
