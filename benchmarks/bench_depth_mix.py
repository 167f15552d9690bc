"""The fused read on a CUDA card: correct first, then interleaved medians against peers and goals.

    python benchmarks/bench_depth_mix.py [--part reads|step|all] [--tokens 32768] [--out FILE.json]
                                         [--fast-attnres PYTHON]

reads   one read with S = 9, the same with an output norm, a block of 8 reads forward, all 57 reads of the Qwen3-0.6B
        shape: this package's Triton kernels, its torch path, eager and compiled reference, and the peers that are
        installed (extra `bench`: fla-core, liger-kernel, flash-attn-res). Variants take turns; medians and GB/s of the
        floor's bytes, beside the card's own copy rate.
step    a training step (forward, loss, backward, AdamW) of Qwen3-0.6B with vanilla residuals and with AttnRes, eager
        and compiled: time, tokens/s, MFU (6 N D over --peak), peak memory.

fast-attnres imports under this package's name: `--fast-attnres` names the Python of an environment that has it, and it
runs in a process of its own, not interleaved with the others; its times are scaled by the copy rate of both processes.

The last lines say for each goal whether it is met. Exit status: 0 if the run is complete (met or not), 1 if a result
is wrong, 2 without a CUDA device.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, LAYERS, LAYERS_PER_BLOCK, EPS = 1024, 28, 4, 1e-6
QWEN3_0P6B = dict(
    vocab_size=151936,
    hidden_size=WIDTH,
    intermediate_size=3072,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=40960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)

Call = Callable[[], Any]


def event_ms(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(calls: dict[str, Call], rounds: int, warmup: int = 3) -> dict[str, float | str]:
    """Median milliseconds of each call, taking turns; what fails is reported by name and dropped."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                took = event_ms(call)
            except Exception as error:
                # A peer may not support the card, or run out of memory: that is a result too.
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                torch.cuda.empty_cache()
                continue
            if round_ >= warmup:
                times[name].append(took)
    return {name: failed.get(name) or statistics.median(times[name]) for name in calls}


def copy_rate(rounds: int = 20) -> float:
    """Bytes per second of a device-to-device copy, read plus written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    took = statistics.median(event_ms(lambda: target.copy_(source)) for _ in range(rounds))
    return 2 * source.numel() * 4 / took * 1e3


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()


class Inputs:
    """Sources, updates and parameters of one case, shared by all variants."""

    def __init__(self, tokens: int, sources: int, reads: int) -> None:
        self.sources = [leaf(1, tokens, WIDTH) for _ in range(sources)]
        self.queries = [leaf(WIDTH, scale=WIDTH**-0.5) for _ in range(reads)]
        self.keys = [leaf(WIDTH) for _ in range(reads)]
        self.norms = [leaf(WIDTH) for _ in range(reads)]
        self.d_out = torch.randn(1, tokens, WIDTH, device="cuda").bfloat16()

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.sources, *self.queries, *self.keys, *self.norms]


Read = Callable[[list[Tensor], Tensor, Tensor], Tensor]
NormedRead = Callable[[list[Tensor], Tensor, Tensor, Tensor], Tensor]


def readers() -> dict[str, tuple[Read, NormedRead]]:
    """Per-read implementations: the mix, and RMSNorm of the mix."""
    from attnres.ops import ReadParameters, depth_mix, merge, prepare_block, reference

    def plain(v: list[Tensor], q: Tensor, g: Tensor) -> Tensor:
        return reference.depth_mix(v, q, g, None, EPS)[0]

    def ours(backend: str) -> tuple[Read, NormedRead]:
        def normed(v: list[Tensor], q: Tensor, g: Tensor, n: Tensor) -> Tensor:
            read = ReadParameters(q, g)
            block = prepare_block(v, [read], EPS, backend)
            return merge(block, 0, None, None, read, n, EPS, EPS, v[0].dtype, backend).normed

        return lambda v, q, g: depth_mix(v, q, g, None, EPS, backend)[0], normed

    def with_norm(read: Read) -> tuple[Read, NormedRead]:
        return read, lambda v, q, g, n: F.rms_norm(read(v, q, g), (WIDTH,), n, EPS)

    found = {"triton": ours("triton"), "torch": ours("torch"), "eager": with_norm(plain)}
    found["compiled"] = with_norm(torch.compile(plain, dynamic=False))
    try:
        from fla.ops.attnres import fused_attnres

        found["fla"] = (
            lambda v, q, g: fused_attnres(q, v, g, rms_eps=EPS),
            lambda v, q, g, n: fused_attnres(q, v, g, n, rms_eps=EPS),
        )
    except Exception as error:  # a peer can break while it is imported: its kernels are checked by the installed Triton
        print(f"fla-core: not measured ({type(error).__name__}: {error})")
    try:
        from liger_kernel.ops.attn_res import LigerAttnResFunction

        found["liger"] = with_norm(lambda v, q, g: LigerAttnResFunction.apply(torch.stack(v), q, g, EPS))
    except Exception as error:
        print(f"liger-kernel: not measured ({type(error).__name__}: {error})")
    return found


def check(tokens: int = 257) -> list[str]:
    """What is wrong: the Triton path against the reference in fp64, in the dtype that is timed."""
    from attnres.ops import depth_mix, reference

    wrong = []
    for sources in (1, 5, 9, 33):
        case = Inputs(tokens, sources, 1)
        leaves = [*case.sources, case.queries[0], case.keys[0]]

        def run(form: Callable[..., Any], args: list[Tensor], n: int, d_out: Tensor) -> list[Tensor]:
            mixed = form(args[:n], args[n], args[n + 1])[0]
            return [mixed, *torch.autograd.grad(mixed, args, d_out.to(mixed.dtype))]

        exact = run(reference.depth_mix, [x.detach().double().requires_grad_() for x in leaves], sources, case.d_out)
        ours = run(lambda *a: depth_mix(*a, backend="triton"), leaves, sources, case.d_out)
        own = run(reference.depth_mix, leaves, sources, case.d_out)
        for k, (found, plain, wanted) in enumerate(zip(ours, own, exact, strict=True)):
            scale = wanted.norm().clamp_min(1e-12)
            error, allowed = ((x.double() - wanted).norm() / scale for x in (found, plain))
            if not error <= max(2 * allowed, 1e-4):
                wrong.append(f"S={sources} tensor {k}: {error:.1e}, plain torch {allowed:.1e}")
    return wrong


def chain_two_phase(case: Inputs, backend: str) -> Tensor:
    """All reads of the model, each sublayer the identity: its output is its input."""
    from attnres.ops import ReadParameters, merge, prepare_block

    reads = [ReadParameters(q, g) for q, g in zip(case.queries, case.keys, strict=True)]
    finished, current, update = list(case.sources), None, None
    length = 2 * LAYERS_PER_BLOCK
    starts = range(0, 2 * LAYERS, length)
    for start in starts:
        if start:
            finished.append(update if current is None else current + update)
            current = update = None
        stop = len(reads) if start == starts[-1] else start + length
        block = prepare_block(finished, reads[start:stop], EPS, backend)
        for index in range(stop - start):
            norm, dtype = case.norms[start + index], finished[0].dtype
            current, update, _ = merge(
                block, index, current, update, reads[start + index], norm, EPS, EPS, dtype, backend
            )
    assert update is not None
    return update


def chain_per_read(case: Inputs, read: NormedRead) -> Tensor:
    """The same, a read at a time: what a library without the block-wise form leaves to autograd."""
    finished, state = list(case.sources), None
    out = finished[0]
    for j in range(2 * LAYERS + 1):
        if j:
            state = out if state is None else state + out
        if j and j % (2 * LAYERS_PER_BLOCK) == 0 and j < 2 * LAYERS:
            finished, state = [*finished, state], None
        present = finished if state is None else [*finished, state]
        out = read(present, case.queries[j], case.keys[j], case.norms[j])
    return out


def forward_block_flash(case: Inputs) -> Call | None:
    """flash-attn-res: a block of 8 reads forward, with the residual add and the norm that it leaves to torch."""
    try:
        from flash_attn_res import (
            phase_1_batched_attention_triton_op as phase_1,
        )
        from flash_attn_res import (
            phase_2_online_softmax_merge_triton_op as phase_2,
        )
    except Exception as error:
        print(f"flash-attn-res: not measured ({type(error).__name__}: {error})")
        return None
    bank = torch.stack([s.detach() for s in case.sources])
    queries = torch.stack([(q * g).detach() for q, g in zip(case.queries, case.keys, strict=True)])

    def run() -> Tensor:
        mixes, lse = phase_1(bank, queries, EPS)
        update = F.rms_norm(mixes[0], (WIDTH,), case.norms[0], EPS)
        state = torch.zeros_like(update)
        for k in range(1, len(case.norms)):
            state = state + update
            h = phase_2(state, queries[k], mixes[k], lse[k], EPS)
            update = F.rms_norm(h.to(state.dtype), (WIDTH,), case.norms[k], EPS)
        return update

    return torch.no_grad()(run)


def forward_block(case: Inputs, backend: str) -> Call:
    from attnres.ops import ReadParameters, merge, prepare_block

    reads = [ReadParameters(q, g) for q, g in zip(case.queries, case.keys, strict=True)]

    def run() -> Tensor:
        block = prepare_block(case.sources, reads, EPS, backend)
        current = update = None
        for k, norm in enumerate(case.norms):
            dtype = case.sources[0].dtype
            current, update, _ = merge(block, k, current, update, reads[k], norm, EPS, EPS, dtype, backend)
        assert update is not None
        return update

    return torch.no_grad()(run)


def both(form: Callable[[], Tensor], case: Inputs) -> Call:
    def run() -> None:
        torch.autograd.grad(form(), case.leaves, case.d_out, allow_unused=True)

    return run


def bench_reads(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of name, floor bytes, and milliseconds per variant."""
    vector, found, rows = 2 * WIDTH * tokens, readers(), []

    def add(name: str, vectors: int | None, calls: dict[str, Call], count: int = rounds) -> None:
        row = {"case": name, "floor_bytes": vectors and vectors * vector, "ms": interleaved(calls, count)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()

    case = Inputs(tokens, 9, 1)
    q, g, n = case.queries[0], case.keys[0], case.norms[0]
    with torch.no_grad():
        plain = {k: (lambda f=f: f[0](case.sources, q, g)) for k, f in found.items()}
        add("read S=9 forward", 10, {k: torch.no_grad()(f) for k, f in plain.items()})
    add("read S=9 forward+backward", 29, {k: both(f, case) for k, f in plain.items()})
    normed = {k: (lambda f=f: f[1](case.sources, q, g, n)) for k, f in found.items()}
    add("read S=9 and norm forward+backward", 29, {k: both(f, case) for k, f in normed.items()})
    del case

    case = Inputs(tokens, 7, 8)
    calls = {backend: forward_block(case, backend) for backend in ("triton", "torch")}
    if flash := forward_block_flash(case):
        calls["flash-attn-res"] = flash
    add("block of 8 reads, 7 sources, forward", 15 + 2 + 4 + 6 * 5, calls)
    del case, calls

    case = Inputs(tokens, 1, 2 * LAYERS + 1)
    forms: dict[str, Callable[[], Tensor]] = {b: (lambda b=b: chain_two_phase(case, b)) for b in ("triton", "torch")}
    forms |= {k: (lambda f=f: chain_per_read(case, f[1])) for k, f in found.items() if k not in forms}
    forms["triton a read at a time"] = lambda: chain_per_read(case, found["triton"][1])
    add("57 reads forward", None, {k: torch.no_grad()(f) for k, f in forms.items()}, max(3, rounds // 4))
    add("57 reads forward+backward", None, {k: both(f, case) for k, f in forms.items()}, max(3, rounds // 4))
    return rows


def bench_step(sequences: int, length: int, rounds: int, peak: float) -> list[dict[str, Any]]:
    """A training step of the 0.6B shape: vanilla and AttnRes, eager and compiled, one model at a time in memory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM

    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    tokens = torch.randint(0, QWEN3_0P6B["vocab_size"], (sequences, length + 1), device="cuda")
    rows = []
    for name in ("vanilla", "attnres"):
        for compiled in (False, True):
            torch.manual_seed(0)
            torch._dynamo.reset()
            if name == "vanilla":
                model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_0P6B))
            else:
                model = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**QWEN3_0P6B, attnres_num_blocks=8))
            model = model.cuda().train()
            run = torch.compile(model) if compiled else model
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
            size = sum(p.numel() for p in model.parameters())

            def step(run: Any = run, optimizer: Any = optimizer) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    logits = run(tokens[:, :-1], use_cache=False).logits
                F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()

            torch.cuda.reset_peak_memory_stats()
            took = interleaved({"step": step}, rounds, warmup=3)["step"]
            row: dict[str, Any] = {"case": f"{name} step", "compiled": compiled, "ms": took}
            row["tokens"] = sequences * length
            if not isinstance(took, str):
                rate = sequences * length / took * 1e3
                memory = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                row |= {"tokens_per_s": round(rate), "mfu": round(6 * size * rate / peak, 4), "peak_gib": memory}
            rows.append(row)
            print(json.dumps(row), flush=True)
            del model, run, optimizer, trainable, step
            torch.cuda.empty_cache()
    return rows


def fast_attnres_child(tokens: int, rounds: int) -> None:
    """In the environment of fast-attnres: one read and all reads, and this process's copy rate."""
    from attnres import attnres

    def normed(v: list[Tensor], q: Tensor, g: Tensor, n: Tensor) -> Tensor:
        return F.rms_norm(attnres(list(v), q * g, eps=EPS), (WIDTH,), n, EPS)

    case = Inputs(tokens, 9, 1)
    one = both(lambda: attnres(list(case.sources), case.queries[0] * case.keys[0], eps=EPS), case)
    deep = Inputs(tokens, 1, 2 * LAYERS + 1)
    ms = interleaved({"read S=9 forward+backward": one}, rounds)
    all_reads = both(lambda: chain_per_read(deep, normed), deep)
    ms |= interleaved({"57 reads forward+backward": all_reads}, max(3, rounds // 4))
    print(json.dumps({"copy_rate": copy_rate(), "ms": ms}))


def add_fast_attnres(python: str, tokens: int, rounds: int, rate: float, rows: list[dict[str, Any]]) -> None:
    command = [python, __file__, "--fast-attnres-child", "--tokens", str(tokens), "--rounds", str(rounds)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        print(f"fast-attnres: not measured ({(child.stderr.strip().splitlines() or ['no message'])[-1]})")
        return
    found = json.loads(child.stdout.splitlines()[-1])
    for row in rows:
        took = found["ms"].get(row["case"])
        if took is not None:
            row["ms"]["fast-attnres"] = took if isinstance(took, str) else took * found["copy_rate"] / rate


def goals(rows: list[dict[str, Any]], rate: float) -> list[str]:
    """A line per goal: met, not met, or not measured."""
    table = {row["case"] + (" compiled" if row.get("compiled") else ""): row for row in rows}
    lines = []

    def say(goal: str, value: float | None, limit: float, at_least: bool = True) -> None:
        if value is None:
            lines.append(f"not measured  {goal}")
            return
        met = value >= limit if at_least else value <= limit
        bound = f"{'>=' if at_least else '<='} {limit}"
        lines.append(f"{'met' if met else 'NOT MET':<13} {goal}: {value:.3f} (goal {bound})")

    def ms(case: str, variant: str) -> float | None:
        took = table.get(case, {}).get("ms", {})
        took = took.get(variant) if isinstance(took, dict) else took
        return took if isinstance(took, float) else None

    def over(case: str, peer: str) -> float | None:
        ours, theirs = ms(case, "triton"), ms(case, peer)
        return theirs / ours if ours and theirs else None

    one, deep = "read S=9 forward+backward", "57 reads forward+backward"
    forward, whole = ms("read S=9 forward", "triton"), ms(one, "triton")
    if forward and whole:
        u = table[one]["floor_bytes"] / 29
        say("read S=9 forward, share of copy rate", 10 * u / forward * 1e3 / rate, 0.90)
        say("read S=9 backward, share of copy rate", 19 * u / (whole - forward) * 1e3 / rate, 0.85)
    say("read S=9 over fla", over(one, "fla"), 1.15)
    say("read S=9 with output norm over fla", over("read S=9 and norm forward+backward", "fla"), 1.3)
    say("57 reads over fla", over(deep, "fla"), 2.3)
    say("read S=9 over fast-attnres", over(one, "fast-attnres"), 1.2)
    say("57 reads over fast-attnres", over(deep, "fast-attnres"), 2.4)
    say("read S=9 forward over liger", over("read S=9 forward", "liger"), 2.4)
    say("read S=9 over liger", over(one, "liger"), 1.8)
    say("block forward over flash-attn-res", over("block of 8 reads, 7 sources, forward", "flash-attn-res"), 1.35)
    say("57 reads over eager stack", over(deep, "eager"), 5.5)
    for suffix in ("", " compiled"):
        attnres, vanilla = (ms(f"{name} step{suffix}", "") for name in ("attnres", "vanilla"))
        ratio = attnres / vanilla - 1 if attnres and vanilla else None
        say(f"training step{suffix}, share added to vanilla", ratio, 0.05, at_least=False)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("reads", "step", "all"), default="all")
    parser.add_argument("--tokens", type=int, default=32768, help="of the reads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=4, help="of the step")
    parser.add_argument("--length", type=int, default=2048, help="of the step")
    parser.add_argument("--peak", type=float, default=989e12, help="bf16 FLOP/s of the card, for MFU")
    parser.add_argument("--fast-attnres", metavar="PYTHON", help="Python of an environment with fast-attnres")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fast-attnres-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_depth_mix: no CUDA device here; nothing measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if arguments.fast_attnres_child:
        fast_attnres_child(arguments.tokens, arguments.rounds)
        return 0
    import transformers
    import triton

    if wrong := check():
        print("WRONG, nothing timed: " + "; ".join(wrong))
        return 1
    rate = copy_rate()
    about = {
        "card": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, transformers)},
        "python": platform.python_version(),
        "copy_gb_per_s": round(rate / 1e9, 1),
        "tokens": arguments.tokens,
    }
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    if arguments.part != "step":
        rows += bench_reads(arguments.tokens, arguments.rounds)
        if arguments.fast_attnres:
            add_fast_attnres(arguments.fast_attnres, arguments.tokens, arguments.rounds, rate, rows)
        for row in rows:
            for name, took in row["ms"].items():
                result = took
                if not isinstance(took, str):
                    floor = row["floor_bytes"]
                    result = f"{took:9.3f} ms" + (f" {floor / took / 1e6:8.0f} GB/s" if floor else "")
                print(f"{row['case']:<38} {name:<24} {result}")
    if arguments.part != "reads":
        rows += bench_step(arguments.sequences, arguments.length, max(3, arguments.rounds // 2), arguments.peak)
    verdicts = goals(rows, rate)
    if arguments.out:
        arguments.out.write_text(json.dumps({**about, "rows": rows, "goals": verdicts}, indent=1) + "\n")
    print("\n".join(verdicts))
    return 0


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
