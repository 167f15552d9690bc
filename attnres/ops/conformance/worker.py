"""Runs an implementation of the read on the golden vectors, in a process of its own.

    python worker.py CONTRACT_FOLDER OUT_FOLDER MODULE:FUNCTION [--adapter NAME] [--stacked] [--device cuda]

Imports torch and safetensors only: a peer may be installed under this package's name. Writes `outputs.safetensors` and
`report.json` in OUT_FOLDER. Exit code 2 where the function or its adapter cannot be imported or made; `report.json`
then says why.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DEFAULT_EPS = 1e-6


def imported(name: str) -> Any:
    """What `module:function` names; a dotted name after the colon reaches into classes."""
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise ImportError(f"expected module:function, received {name!r}")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def adapters() -> Any:
    """The module of adapters beside this file, by its path: its package may not be importable here."""
    spec = importlib.util.spec_from_file_location("conformance_adapters", Path(__file__).with_name("adapters.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapted(name: str, adapter: str | None) -> Callable[..., Any]:
    """The function to call: the one that is named, or what its adapter makes of it."""
    function = imported(name)
    if adapter is None:
        known = adapters().ADAPTERS.get(name)
        return known(function) if known else function
    return (imported(adapter) if ":" in adapter else getattr(adapters(), adapter))(function)


def version(name: str) -> str:
    """The distribution that a module is from, and its version; empty for a module that is in none."""
    top = name.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return ""
    names = sorted(set(importlib.metadata.packages_distributions().get(top, [])))
    found = {one: importlib.metadata.distribution(one) for one in names}
    # Two distributions may share an import name: the one in whose folder the module lies is meant.
    at = {one: dist for one, dist in found.items() if Path(spec.origin).is_relative_to(Path(str(dist.locate_file(""))))}
    return ", ".join(f"{one} {dist.version}" for one, dist in (at or found).items())


def accepted(function: Callable[..., Any]) -> set[str]:
    """Those keywords of the contract that a function takes."""
    every = {"sources", "query", "key_weight", "bias", "eps"}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return every
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return every
    return every & set(parameters)


def run(
    function: Callable[..., Any], case: dict[str, Any], given: dict[str, torch.Tensor], stacked: bool
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one case, by the names of the contract; what is absent was None or is not returned."""
    dtype = getattr(torch, case["dtype"])
    leaves = []
    for source in given["sources"].to(dtype):
        if case["strided"]:
            source = source.transpose(0, 1).contiguous().transpose(0, 1)
        leaves.append(source.clone(memory_format=torch.preserve_format).requires_grad_())
    sources: Any = [*leaves, leaves[0]] if case["repeated"] else list(leaves)
    names = {name: given[name].to(dtype).requires_grad_() for name in ("query", "key_weight")}
    if "bias" in given:
        names["bias"] = given["bias"].clone().requires_grad_()
    takes = accepted(function)
    if "bias" in names and "bias" not in takes:
        raise NotImplementedError("no argument bias")
    if case["eps"] != DEFAULT_EPS and "eps" not in takes:
        raise NotImplementedError("no argument eps")
    call = {"sources": torch.stack(sources) if stacked else sources, **names, "eps": case["eps"]}
    returned = function(**{name: value for name, value in call.items() if name in takes})
    mixed, weights = returned if isinstance(returned, tuple) else (returned, None)
    found = {"mixed": mixed} if weights is None else {"mixed": mixed, "weights": weights}
    output = found.get(case["upstream"])
    if output is None:
        raise NotImplementedError("routing weights are not returned")
    if case["upstream"] == "weights" and not output.requires_grad:
        raise NotImplementedError("routing weights are not differentiable")
    outputs = {name: tensor.detach() for name, tensor in found.items()}
    grads: tuple[torch.Tensor | None, ...] = (None,) * (len(leaves) + len(names))
    if output.requires_grad:
        upstream = given["upstream"].to(output.dtype)
        if upstream.shape != output.shape:
            return outputs
        grads = torch.autograd.grad(output, [*leaves, *names.values()], upstream, allow_unused=True)
    of_sources, of_names = grads[: len(leaves)], grads[len(leaves) :]
    if any(grad is not None for grad in of_sources):
        pairs = zip(of_sources, leaves, strict=True)
        outputs["grad_sources"] = torch.stack([torch.zeros_like(leaf) if g is None else g for g, leaf in pairs])
    outputs |= {f"grad_{name}": grad for name, grad in zip(names, of_names, strict=True) if grad is not None}
    return outputs


def run_all(
    function: Callable[..., Any],
    contract: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    stacked: bool = False,
    begin: Callable[[str], None] = lambda case: None,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """Outputs of all cases (`case/output`), and by case what was raised and what is not offered."""
    outputs: dict[str, torch.Tensor] = {}
    raised, not_offered = {}, {}
    for case in contract["cases"]:
        name = case["name"]
        begin(name)
        given = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        try:
            found = run(function, case, given, stacked)
        except NotImplementedError as error:
            not_offered[name] = str(error)
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            outputs |= {f"{name}/{key}": value.cpu().contiguous() for key, value in found.items()}
    return outputs, raised, not_offered


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("contract", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("function")
    parser.add_argument("--adapter")
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    # The folder of this file would hide packages of the same name; the caller's own modules come last.
    sys.path[0:1] = []
    sys.path.append(os.getcwd())
    report: dict[str, Any] = {
        "function": given.function,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": given.device,
        "version": version(given.function),
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }

    def write() -> None:
        (given.out / "report.json").write_text(json.dumps(report), encoding="utf-8")

    try:
        function = adapted(given.function, given.adapter)
        torch.zeros(1, device=given.device)
    except Exception as error:
        report["unavailable"] = f"{type(error).__name__}: {error}"
        write()
        return 2
    contract = json.loads((given.contract / "contract.json").read_text(encoding="utf-8"))
    tensors = load_file(given.contract / "vectors.safetensors", device=given.device)

    def begin(case: str) -> None:
        report["running"] = case
        write()

    outputs, raised, not_offered = run_all(function, contract, tensors, given.stacked, begin)
    report |= {"raised": raised, "not_offered": not_offered}
    save_file(outputs, given.out / "outputs.safetensors")
    del report["running"]
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
