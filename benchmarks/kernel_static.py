"""What can be said about the Triton kernels without a GPU: bytes per token, registers, spills, shared memory.

    python benchmarks/kernel_static.py [--out FILE]

Bytes: the kernels run under Triton's interpreter, one token a program as on a GPU, and every load and store is counted:
`raw` is what programs ask for, `unique` counts each address once, which is what has to cross the memory bus. The
figures are per token of a batch of 32,768 tokens, so they hold a share of the parameters and of the partial rows of
their gradients (written by the fixed number of programs, read by the second reduction), and the routing tensors. The
floor has one vector u = 2 D bytes for each source, mix, state or gradient that must be read or written, no more.

Registers: the launches of that run, and those with gradients of routing too, which is the heaviest variant, are
compiled ahead of time for sm_80, sm_90 and sm_100; the worse of the two is shown. Spills are the stack of the dump.

D = 1024, bf16. Prints a table and JSON lines; the last line is the verdict, the exit status is 0 if all of it holds:
unique bytes within 10% of the floor; no spills on sm_90 for read (S = 1..10), merge and block (7 sources x 8 queries);
none on sm_80 and sm_100 for read, merge, and block at the query count chosen there. Nothing is claimed about speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, BATCH_TOKENS, LIMIT = 1024, 32768, 1.10
VECTOR = 2 * WIDTH
ARCHITECTURES = (80, 90, 100)
SOURCES = range(1, 11)
# n x M of the block launches: the shape of the gate, and the largest that the backend makes, on sm_90 and elsewhere.
BLOCKS = {90: ((7, 8), (7, 9), (8, 6)), 80: ((7, 5), (8, 4)), 100: ((7, 5), (8, 4))}


def floors() -> dict[str, tuple[int, str]]:
    """Bytes per token of every case, and the formula in words."""
    table = {"merge_add fwd": (5, "state, update, mix in; state, normed out")}
    table["merge_add bwd"] = (6, "state, mix, d_state, d_normed in; d_state, d_mix out")
    table["norm fwd"] = (2, "mix in; normed out")
    table["norm bwd"] = (3, "mix, d_normed in; d_mix out")
    for s in SOURCES:
        table[f"read S={s} fwd"] = (s + 1, "S sources in; mix out")
        table[f"read S={s} bwd"] = (2 * s + 1, "S sources, d_mix in; S d_sources out")
    for n, m in sorted({shape for shapes in BLOCKS.values() for shape in shapes}):
        table[f"block {n}x{m} fwd"] = (n + m, "n sources in; M mixes out")
        table[f"block {n}x{m} bwd"] = (2 * n + m, "n sources, M d_mixes in; n d_sources out")
    return {name: (count * VECTOR, words) for name, (count, words) in table.items()}


class Counter:
    """Bytes that kernels load and store, and how each kernel was launched."""

    def __init__(self) -> None:
        self.raw = 0
        self.addresses: dict[str, list[Any]] = {"load": [], "store": []}
        self.launches: list[dict[str, Any]] = []

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        import numpy as np

        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        live = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        self.raw += live.size * size
        self.addresses[kind].append(live.astype(np.uint64) * np.uint64(16) + np.uint64(size))

    @property
    def unique(self) -> int:
        import numpy as np

        touched = [np.unique(np.concatenate(found)) for found in self.addresses.values() if found]
        return sum(int((found % np.uint64(16)).sum()) for found in touched)

    @contextmanager
    def watch(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        run = InterpretedFunction.run

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self.touch("load", pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.touch("store", pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def recorded_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append(describe(kernel, args, kwargs))
            return run(kernel, *args, **kwargs)

        InterpreterBuilder.create_masked_load = counted_load
        InterpreterBuilder.create_masked_store = counted_store
        InterpretedFunction.run = recorded_run
        try:
            yield
        finally:
            InterpreterBuilder.create_masked_load = load
            InterpreterBuilder.create_masked_store = store
            InterpretedFunction.run = run


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A launch as `compile_launch` takes it: types of the arguments, compile-time constants, warps."""
    import torch

    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", int: "i32", float: "fp32"}

    def type_of(value: Any) -> Any:
        if isinstance(value, tuple):
            return [type_of(item) for item in value]
        return names[value.dtype if isinstance(value, torch.Tensor) else type(value)]

    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {name: given[name] for name in kernel.arg_names if name.isupper() or given[name] is None}
    types = {name: type_of(given[name]) for name in kernel.arg_names if name not in constants}
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "types": types,
        "constants": constants,
        "warps": given["num_warps"],
    }


def cases() -> dict[str, Callable[[int, bool], tuple[list[Any], list[Any]]]]:
    """Each case makes, for so many tokens, outputs with their inputs; `True` asks for gradients of routing too."""
    import torch

    from attnres.ops import triton_block, triton_merge, triton_read

    def leaf(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape).to(dtype).requires_grad_()

    def vectors(count: int, tokens: int) -> list[Any]:
        return [leaf(1, tokens, WIDTH, dtype=torch.bfloat16) for _ in range(count)]

    def read(s: int) -> Any:
        def make(tokens: int, routing: bool) -> tuple[list[Any], list[Any]]:
            sources, query, bias = vectors(s, tokens), leaf(WIDTH), leaf(s)
            mixed, logits, lse, _ = triton_read.read(sources, query, bias, 1e-6)
            return [mixed, *([logits, lse] if routing else [])], [*sources, query, bias]

        return make

    def block(n: int, m: int) -> Any:
        def make(tokens: int, routing: bool) -> tuple[list[Any], list[Any]]:
            sources, queries, bias = vectors(n, tokens), leaf(m, WIDTH), leaf(m, n)
            logits, lse, _, *mixed = triton_block.read_block(sources, queries, bias, 1e-6)
            return [lse, *mixed, *([logits] if routing else [])], [*sources, queries, bias]

        return make

    def merge(tokens: int, routing: bool) -> tuple[list[Any], list[Any]]:
        inputs = [*vectors(3, tokens), leaf(1, tokens), leaf(WIDTH), leaf(1), leaf(WIDTH)]
        state, normed, logit, _ = triton_merge.merge_add(*inputs, 1e-6, 1e-6)
        return [state, normed, *([logit] if routing else [])], inputs

    def norm(tokens: int, routing: bool) -> tuple[list[Any], list[Any]]:
        inputs = [*vectors(1, tokens), leaf(WIDTH)]
        return [triton_merge.norm(*inputs, 1e-6)[0]], inputs

    table = {"merge_add": merge, "norm": norm} | {f"read S={s}": read(s) for s in SOURCES}
    shapes = sorted({shape for shapes in BLOCKS.values() for shape in shapes})
    return table | {f"block {n}x{m}": block(n, m) for n, m in shapes}


def measure(make: Any, tokens: int, routing: bool) -> dict[str, Counter]:
    """Counters of the forward and of the backward pass."""
    import torch

    counters = {"fwd": Counter(), "bwd": Counter()}
    with counters["fwd"].watch():
        outputs, inputs = make(tokens, routing)
    cotangents = [torch.randn_like(out) for out in outputs]
    with counters["bwd"].watch():
        torch.autograd.grad(outputs, inputs, cotangents)
    return counters


def count() -> None:
    """Print one JSON line per case and direction: bytes per token, and the launch."""
    import torch

    from attnres.ops import triton_block, triton_common, triton_merge, triton_read

    torch.manual_seed(0)
    programs = {"block": triton_block.PROGRAMS, "read": triton_read.PROGRAMS}
    # One token a program as on a GPU; few programs, so that their partial rows are the same for both token counts.
    triton_common.INTERPRETED_TOKENS = 1
    triton_block.PROGRAMS = triton_read.PROGRAMS = triton_merge.PROGRAMS = 1
    for name, make in cases().items():
        few, many = measure(make, 2, False), measure(make, 4, False)
        launches = measure(make, 1, True)
        for direction in ("fwd", "bwd"):
            per_token = {
                what: (getattr(many[direction], what) - getattr(few[direction], what)) / 2 for what in ("raw", "unique")
            }
            fixed = few[direction].unique - 2 * per_token["unique"]
            variants = [few[direction].launches[0], launches[direction].launches[0]]
            launch = variants[0]
            queries = launch["constants"].get("M", 2 if name == "merge_add" else 1)
            if direction == "bwd":
                rows = programs["block" if name.startswith("block") else "read"] * queries * WIDTH * 4
                # The rows of one program are in `fixed`; all are read again by the second reduction.
                fixed += 2 * rows - queries * WIDTH * 4
                if name != "norm":
                    sources = launch["constants"].get("S", launch["constants"].get("N", 1))
                    scores = 4 * sources * (queries if name.startswith("block") else 1)
                    per_token = {what: value + scores for what, value in per_token.items()}
            share = fixed / BATCH_TOKENS
            figures = {what: round(value + share) for what, value in per_token.items()}
            print(json.dumps({"case": name, "direction": direction, **figures, "launches": variants}), flush=True)


def compile_launch(launch: dict[str, Any], architecture: int) -> dict[str, int]:
    """Registers per thread, spilled bytes per thread and shared memory of a launch on an architecture."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = launch["types"].get(name, "constexpr")
        signature[name] = tuple(kind) if isinstance(kind, list) else kind
        if isinstance(kind, list):
            aligned |= {(position, index): [["tt.divisibility", 16]] for index in range(len(kind))}
        elif kind.startswith("*"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, launch["constants"], aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch["warps"]})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", dump)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "spills": stack, "shared": compiled.metadata.shared}


def wanted(case: str, architecture: int) -> bool:
    """Whether the backend can launch a case on an architecture."""
    return not case.startswith("block") or case in {f"block {n}x{m}" for n, m in BLOCKS[architecture]}


def judge(row: dict[str, Any]) -> list[str]:
    """What fails in a row."""
    name = f"{row['case']} {row['direction']}"
    failures = []
    if row["over_floor"] > LIMIT:
        failures.append(f"{name} moves {row['over_floor']:.3f} of its floor")
    for architecture, resources in row["resources"].items():
        if resources["spills"]:
            failures.append(f"{name} spills {resources['spills']} bytes on sm_{architecture}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        count()
        return 0
    if os.environ.pop("TRITON_INTERPRET", None) is not None:
        os.execv(sys.executable, [sys.executable, *sys.argv])
    command = [sys.executable, __file__, "--count"]
    counted = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    floor_of, lines, failures = floors(), [], []
    columns = "".join(f" {f'sm_{a} reg/spill/smem':>22}" for a in ARCHITECTURES)
    print(f"{'kernel':<16}{'raw B':>8}{'unique B':>9}{'floor B':>8} {'ratio':>6}{columns}  floor", flush=True)
    for line in counted.stdout.splitlines():
        row = json.loads(line)
        launches = row.pop("launches")
        launches = launches[: 1 + (launches[0] != launches[1])]
        name = f"{row['case']} {row['direction']}"
        floor, words = floor_of[name]
        row |= {"floor": floor, "floor_of": words, "over_floor": round(row["unique"] / floor, 4)}
        row["warps"] = launches[0]["warps"]
        resources = {
            architecture: max(
                (compile_launch(launch, architecture) for launch in launches),
                key=lambda found: (found["spills"], found["registers"]),
            )
            for architecture in ARCHITECTURES
            if wanted(row["case"], architecture)
        }
        row["resources"] = resources
        cells = ["/".join(map(str, resources[a].values())) if a in resources else "-" for a in ARCHITECTURES]
        figures = f"{row['raw']:>8}{row['unique']:>9}{floor:>8} {row['over_floor']:>6.3f}"
        print(f"{name:<16}{figures}{''.join(f' {cell:>22}' for cell in cells)}  {words}", flush=True)
        failures += judge(row)
        lines.append(json.dumps(row))
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    import torch
    import triton

    about = f"{len(lines)} kernels, triton {triton.__version__}, torch {torch.__version__}"
    holds = "unique bytes within 10% of the floor, no spills where none may be"
    print(f"FAILS ({about}): {'; '.join(failures)}" if failures else f"holds ({about}): {holds}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
