"""How the contract's keywords reach peers whose signatures differ. Imports torch only; peers are imported where used.

An adapter takes what `module:function` names and returns a function of the contract's keywords, and of those only that
the peer serves: what it has not is left out, never emulated. `NotImplementedError` says that a case is out of reach.
"""

import builtins
import importlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Read = Callable[..., Any]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpret(*modules: Any) -> None:
    """Makes the kernels of modules run on the CPU: no autotuning, and fp32 rounded to bf16 as a GPU does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    for module in modules:
        for kernel in vars(module).values():
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return original(data, source, target, rounding)

    interpreter._convert_float = convert


class _Index(int):
    """A loop index as a kernel sees it on a card: Triton's interpreter makes it a plain int."""

    def __mul__(self, other: Any) -> "_Index":
        return _Index(int(self) * int(getattr(other, "value", other)))

    def to(self, dtype: Any) -> int:
        return int(self)


class _OnCard(Tensor):
    """A CPU tensor that passes for one on a card, for a check in front of kernels that the interpreter runs."""

    is_cuda = True


def _loop(*bounds: Any) -> Iterator[_Index]:
    return map(_Index, builtins.range(*(int(getattr(bound, "value", bound)) for bound in bounds)))


def fla(function: Read) -> Read:
    """fla-core: `fused_attnres` and `naive_attnres`."""
    kernels = importlib.import_module("fla.ops.attnres.fused")
    named = function.__name__
    on_cpu = INTERPRETED and named == "fused_attnres"
    if on_cpu:
        interpret(kernels)
        kernels.range = _loop  # type: ignore[attr-defined]
    elif named == "fused_attnres" and not torch.cuda.is_available():
        raise RuntimeError("needs CUDA, or TRITON_INTERPRET=1")

    def read(sources: list[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        given = [source.as_subclass(_OnCard) for source in sources] if on_cpu else sources
        mixed, weights = function(query, given, key_weight, rms_eps=eps, return_weights=True)
        return mixed, weights.movedim(0, -1)

    return read


def liger(function: Read) -> Read:
    """liger-kernel: `liger_attn_res`."""
    if INTERPRETED:
        interpret(importlib.import_module("liger_kernel.ops.attn_res"))
    elif not torch.cuda.is_available():
        raise RuntimeError("needs CUDA, or TRITON_INTERPRET=1")

    def read(sources: list[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        if INTERPRETED and query.dtype == torch.bfloat16:
            raise NotImplementedError("its kernel multiplies in bf16, which Triton's interpreter cannot")
        return function(torch.stack(sources), query, key_weight, eps)

    return read


def _flash_kernels() -> None:
    if INTERPRETED:
        names = ("phase_1", "phase_2", "reduce")
        interpret(*(importlib.import_module(f"flash_attn_res.kernels.{name}") for name in names))
    elif not torch.cuda.is_available():
        raise RuntimeError("needs CUDA, or TRITON_INTERPRET=1")


def flash_phase_1(function: Read) -> Read:
    """flash-attn-res: one query against all sources."""
    _flash_kernels()

    def read(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
        return function(torch.stack(sources), query[None], eps)[0][0]

    return read


def flash_phase_2(function: Read) -> Read:
    """flash-attn-res: all sources but the newest by phase 1, which phase 2 merges with the newest."""
    _flash_kernels()
    phase_1 = importlib.import_module("flash_attn_res").phase_1_batched_attention_triton_op

    def read(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
        if len(sources) < 2:
            raise NotImplementedError("phase 2 merges a source with others")
        mixes, lse = phase_1(torch.stack(sources[:-1]), query[None], eps)
        return function(sources[-1].contiguous(), query, mixes[0], lse[0], eps)

    return read


def attn_res(operator: type[torch.nn.Module]) -> Read:
    """attn-res: `AttnResOperator`."""

    def read(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
        module = operator(query.numel(), eps)
        return torch.func.functional_call(module, {"pseudo_query": query}, (torch.stack(sources),))

    return read


def attn_res_two_phase(function: Read) -> Read:
    """attn-res: `two_phase_block_attnres_inference` for all sources but the newest, merged with the newest."""
    package = importlib.import_module("attn_res")

    def read(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
        if len(sources) < 2:
            raise NotImplementedError("the second phase merges a source with others")
        norm = package.RMSNormNoWeight(eps)
        halves = [function(query[None], torch.stack(part), norm) for part in (sources[:-1], sources[-1:])]
        (o1, m1, l1), (o2, m2, l2) = ([x[0] for x in half] for half in halves)
        return package.online_softmax_merge(o1, m1, l1, o2, m2, l2)

    return read


def inkling2(residual: type[torch.nn.Module]) -> Read:
    """transformers: `Inkling2BlockAttentionResidual`, whose eps is fixed."""

    def read(sources: list[Tensor], query: Tensor) -> Tensor:
        # From 5.24 on the read goes through the attention function that the configuration names.
        module = residual(SimpleNamespace(hidden_size=query.numel(), _attn_implementation="sdpa"))
        finished = torch.stack(sources, dim=-2)[..., :-1, :]
        return torch.func.functional_call(module, {"query": query}, (finished, sources[-1]))[0]

    return read


def fast_attnres(function: Read) -> Read:
    """fast-attnres: `attnres`; from version 2 on for bf16 on a card only."""
    major = int(importlib.import_module("attnres").__version__.partition(".")[0])
    if major > 1 and not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")

    def read(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
        if major > 1 and query.dtype != torch.bfloat16:
            raise NotImplementedError("bf16 only")
        return function(sources, query, eps=eps)

    return read


def fused(function: Read) -> Read:
    """This package's `depth_mix` on its Triton kernels."""
    if INTERPRETED:
        interpret()

    def read(sources: list[Tensor], query: Tensor, key_weight: Tensor, eps: float, bias: Tensor | None = None) -> Any:
        if query.numel() % 8:
            raise NotImplementedError("widths that are a multiple of 8")
        return function(sources, query, key_weight, bias, eps, backend="triton")

    return read


ADAPTERS: dict[str, Callable[[Any], Read]] = {
    "fla.ops.attnres:fused_attnres": fla,
    "fla.ops.attnres:naive_attnres": fla,
    "liger_kernel.transformers.functional:liger_attn_res": liger,
    "flash_attn_res:phase_1_batched_attention_triton_op": flash_phase_1,
    "flash_attn_res:phase_2_online_softmax_merge_triton_op": flash_phase_2,
    "attn_res:AttnResOperator": attn_res,
    "attn_res:two_phase_block_attnres_inference": attn_res_two_phase,
    "transformers.models.inkling2.modeling_inkling2:Inkling2BlockAttentionResidual": inkling2,
    "attnres:attnres": fast_attnres,
}
