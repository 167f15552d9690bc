"""The whole model through the Triton kernels: values, routing, gradients, checkpointing, autocast, `torch.compile`."""

import contextlib

import pytest
import torch
from tiny_models import SHAPE
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from attnres.depth.plan import CONVENTIONS
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.ops import ReadParameters, depth_mix, log_weights, merge, prepare_block

pytest.importorskip("triton")


def make_model(convention: str, device: torch.device) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    # A width that is no power of two.
    shape = SHAPE | {"hidden_size": 40, "num_hidden_layers": 4}
    config = Qwen3AttnResConfig(**shape, attnres_sources=convention, attnres_num_blocks=2, attnres_bias="sources")
    model = Qwen3AttnResForCausalLM(config).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_res_" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def step(model: Qwen3AttnResForCausalLM, backend: str, amp: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits and routing of one batch, and the gradient of every parameter through both."""
    model.model.backend = backend
    model.zero_grad()
    device = model.lm_head.weight.device
    tokens = (torch.arange(2 * 9) * 7 % 32).view(2, 9).to(device)
    with torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext():
        out = model(tokens, output_routing=True, use_cache=False)
    routing = sum((weights[..., 0] ** 2).sum() for weights in out.routing)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    (loss + 0.1 * routing).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [out.logits.detach(), *(weights.detach() for weights in out.routing)], found


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_model_on_triton_equals_the_torch_path(convention, device, poison):
    model = make_model(convention, device)
    outputs, found = step(model, "triton")
    wanted_outputs, wanted = step(model, "torch")
    for ours, theirs in zip(outputs, wanted_outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    assert found.keys() == wanted.keys()
    scale = max(float(g.norm()) for g in wanted.values())
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm()) <= 1e-5 * max(float(wanted[name].norm()), 1e-2 * scale), name


def test_model_on_triton_with_activation_checkpointing_equals_without(device):
    model = make_model("block_sum", device).train()
    plain, wanted = step(model, "triton")
    model.gradient_checkpointing_enable()
    outputs, found = step(model, "triton")
    for ours, theirs in zip([*outputs, *found.values()], [*plain, *wanted.values()], strict=True):
        assert torch.equal(ours, theirs)


def test_model_on_triton_under_autocast_stays_close_to_fp32(device):
    model = make_model("block_sum", device)
    outputs, found = step(model, "triton", amp=True)
    exact, wanted = step(model, "torch")
    torch_outputs, torch_found = step(model, "torch", amp=True)

    def distance(first: list[Tensor], second: list[Tensor]) -> float:
        return float(torch.cat([(a - b).float().flatten() for a, b in zip(first, second, strict=True)]).norm())

    assert distance(outputs, exact) <= 2 * distance(torch_outputs, exact)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert distance([*found.values()], [*wanted.values()]) <= 2 * distance([*torch_found.values()], [*wanted.values()])


def small_case(device: torch.device) -> tuple[list[Tensor], ReadParameters, Tensor]:
    torch.manual_seed(0)
    sources = [torch.randn(2, 5, 64, device=device, requires_grad=True) for _ in range(3)]
    read = ReadParameters(*(torch.randn(*s, device=device, requires_grad=True) for s in ((64,), (64,), (2, 4))))
    return sources, read, torch.randn(64, device=device, requires_grad=True)


def block_of_two(sources: list[Tensor], read: ReadParameters, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    block = prepare_block(sources, [read, read], backend="triton")
    first = merge(block, 0, None, None, read, norm, dtype=torch.float32, backend="triton")
    second = merge(block, 1, sources[0], first.normed, read, norm, backend="triton")
    return second.normed, second.current, torch.exp(log_weights(block, 1, second.logit))


def one_read(sources: list[Tensor], read: ReadParameters, norm: Tensor) -> tuple[Tensor, Tensor]:
    return depth_mix(sources, read.query, read.key_weight, read.bias[:, :3], backend="triton")


@pytest.mark.parametrize("function", [block_of_two, one_read])
def test_triton_ops_compile_without_graph_breaks(function, device):
    case = small_case(device)
    leaves = [*case[0], *case[1], case[2]]

    def run(form) -> list[Tensor]:
        outputs = form(*case)
        loss = sum((out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum() for out in outputs)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [*outputs, *(g for g in found if g is not None)]

    torch._dynamo.reset()
    for ours, eager in zip(
        run(torch.compile(function, fullgraph=True, backend="aot_eager")), run(function), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_model_layer_on_triton_compiles_without_graph_breaks(device):
    model = make_model("block_sum", device)
    hidden = torch.randn(1, 4, 40, device=device)
    context = model.model.context(hidden)
    state = model.model.embed(hidden)
    layer = model.model.layers[0]
    wanted = layer(state, context, "torch").update
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True, backend=counter)(state, context, "triton")
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.update, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["read", "read_block", "merge_add", "norm"])
def test_triton_ops_pass_opcheck(name, device):
    """Schema, fake kernel and autograd registration, by torch's own checks."""
    from attnres.ops import triton_backend

    sources, read, norm = small_case(device)
    lse = torch.randn(2, 5, device=device, requires_grad=True)
    cases = {
        "read": (sources, read.query, read.bias[:, :3].detach(), 1e-6),
        "read_block": (sources, torch.stack([read.query, norm]).detach().requires_grad_(), None, 1e-6),
        "merge_add": (sources[0], sources[1], sources[2], lse, read.query, read.bias[:, 3:].detach(), norm, 1e-6, 1e-6),
        "norm": (sources[0], norm, 1e-6),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(triton_backend, name), cases[name], test_utils=checks)
