"""Cost of AttnRes in a training step on the CPU: one interleaved run, medians, ratios.

    python benchmarks/bench_train_step.py [--rounds 5] [--processes 3]

Three variants take turns on the same batch: AttnRes (torch backend), the same decoder with the additive residual in
place of every read, and transformers' `Qwen3ForCausalLM`. The order rotates from round to round, so that no variant
always finds the caches and the heap as the same other one left them. Every shape is measured in several processes, one
after the other, because where a process happens to place its tensors moves a ratio by .02. A step is forward, loss,
backward and the fused AdamW update that training uses. A ratio is the median over all rounds of two steps' wall times
in one round; the ratio of CPU times (all threads), printed beside it, is steadier on a machine that does other work.
Exits with 1 if a ratio of wall times is above 1.10.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM

LIMIT = 1.10
SHAPES = ((12, 256), (8, 128))
VOCAB, BATCH, TOKENS = 4096, 8, 256
WARM_UP = 2  # rounds of a process that are not counted

Seconds = dict[str, list[float]]


class AdditiveResidual(nn.Module):
    """The same layers with the residual of Qwen3: what the read replaces."""

    def __init__(self, model: Qwen3AttnResForCausalLM) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor) -> Tensor:
        model = self.inner.model
        x = model.embed_tokens(input_ids)
        context = model.context(x)
        for layer in model.layers:
            x = x + layer._attend(layer.input_layernorm(x), context)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.inner.lm_head(model.norm(x))


def make_step(model: nn.Module, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(layers: int, width: int, rounds: int) -> tuple[Seconds, Seconds]:
    """Wall and CPU seconds of a step by variant, one of each a round, in this process."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        tie_word_embeddings=True,
    )
    config = Qwen3AttnResConfig(**shape, attnres_num_blocks=4)
    attnres, same = Qwen3AttnResForCausalLM(config), AdditiveResidual(Qwen3AttnResForCausalLM(config))
    vanilla = Qwen3ForCausalLM(Qwen3AttnResConfig(**shape, attnres_num_blocks=4))
    tokens = torch.randint(0, VOCAB, (BATCH, TOKENS + 1))
    steps = {
        "attnres": make_step(attnres, lambda ids: attnres(ids, use_cache=False).logits, tokens),
        "additive": make_step(same, same, tokens),
        "qwen3": make_step(vanilla, lambda ids: vanilla(ids, use_cache=False).logits, tokens),
    }
    wall: Seconds = {name: [] for name in steps}
    cpu: Seconds = {name: [] for name in steps}
    order = list(steps)
    for round_ in range(rounds + WARM_UP):
        for name in order:
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[name]()
            if round_ >= WARM_UP:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
        order = order[1:] + order[:1]
    return wall, cpu


def bench(layers: int, width: int, rounds: int, processes: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        results = [pool.submit(measure, layers, width, rounds).result() for _ in range(processes)]
    wall, cpu = (
        {name: sum((part[name] for part in parts), []) for name in parts[0]} for parts in zip(*results, strict=True)
    )

    def ratio(seconds: Seconds, other: str) -> float:
        pairs = zip(seconds["attnres"], seconds[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "layers": layers,
        "width": width,
        **{f"{name}_ms": round(1e3 * statistics.median(values), 1) for name, values in wall.items()},
        **{f"over_{other}": ratio(wall, other) for other in ("additive", "qwen3")},
        **{f"cpu_over_{other}": ratio(cpu, other) for other in ("additive", "qwen3")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in every process")
    parser.add_argument("--processes", type=int, default=3)
    args = parser.parse_args()
    held = True
    for layers, width in SHAPES:
        row = bench(layers, width, args.rounds, args.processes)
        held &= row["over_additive"] <= LIMIT and row["over_qwen3"] <= LIMIT
        print(json.dumps(row), flush=True)
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{'holds' if held else 'FAILS'}: AttnRes over vanilla <= {LIMIT} ({where})")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
