"""Cost of the probe's grid: with prefix reuse, recomputed from the embedding, and against its floor. CPU, no network.

    python benchmarks/bench_probe_grid.py [--rounds 5]

The floor of a grid is, summed over its cells, the layers that must be rerun (those from the first edited layer on) plus
one readout (final read, norm, logits, NLL and KL), at the cost of each as measured in the same interleaved run on the
fast path, without any intervention. Exits with 1 if the grid with prefix reuse costs more than 1.15 floors.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.model.families import grid
from attnres.probe.interventions import Intervention
from attnres.probe.runner import Clean, first_layer, run_clean, run_edited

LIMIT = 1.15
LAYERS, WIDTH, BLOCKS, VOCAB, WINDOWS, TOKENS = 12, 128, 4, 4096, 16, 128


def build() -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        attnres_num_blocks=BLOCKS,
    )
    return Qwen3AttnResForCausalLM(config).eval()


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = build()
    decoder, plan = model.model, model.model.plan
    ids, labels = torch.randint(0, VOCAB, (2, WINDOWS, TOKENS))
    cells = [Intervention("mask", cell.family, cell.sublayer, cell.band) for cell in grid(plan) if cell.eligible]
    starts = sorted({first_layer(cell, plan) for cell in cells})
    clean = run_clean(model, ids, labels, starts)
    every = run_clean(model, ids, labels, range(LAYERS + 1))
    last = every.states[LAYERS - 1]
    plain = replace(clean.context, edit=None)
    end = decoder.step(last, LAYERS - 1, plain)
    from_embedding = Clean(clean.context, {start: every.states[0] for start in starts}, clean.readout, clean.logits)

    def cell_from_embedding(cell: Intervention) -> object:
        state, context = from_embedding.states[starts[0]], replace(clean.context, edit=cell.edit(plan))
        for layer in range(LAYERS):
            state = decoder.step(state, layer, context)
        return clean.readout.compare(model.lm_head(decoder.finish(state, context)))

    variants: dict[str, Callable[[], object]] = {
        "reuse": lambda: [clean.readout.compare(run_edited(model, clean, cell)) for cell in cells],
        "from_embedding": lambda: [cell_from_embedding(cell) for cell in cells],
        "readout": lambda: clean.readout.compare(model.lm_head(decoder.finish(end, plain))),
    }
    for layer in range(LAYERS):
        variants[f"layer {layer}"] = lambda layer=layer: decoder.step(every.states[layer], layer, plain)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            # The small pieces are timed as often as the grid runs them, so that one round sees the same machine.
            repeats = 1 if name in ("reuse", "from_embedding") else 8
            values = [timed(run) for _ in range(repeats)]
            if round_:
                seconds[name].append(statistics.median(values))
    floors = [
        sum(
            seconds["readout"][i]
            + sum(seconds[f"layer {layer}"][i] for layer in range(first_layer(cell, plan), LAYERS))
            for cell in cells
        )
        for i in range(rounds)
    ]
    over_floor = statistics.median(a / b for a, b in zip(seconds["reuse"], floors, strict=True))
    saved = statistics.median(a / b for a, b in zip(seconds["from_embedding"], seconds["reuse"], strict=True))
    row = {
        "candidate_cells": 24,
        "cells": len(cells),
        "reuse_ms": round(1e3 * statistics.median(seconds["reuse"]), 1),
        "from_embedding_ms": round(1e3 * statistics.median(seconds["from_embedding"]), 1),
        "floor_ms": round(1e3 * statistics.median(floors), 1),
        "reuse_over_floor": round(over_floor, 3),
        "from_embedding_over_reuse": round(saved, 3),
    }
    print(json.dumps(row))
    held = over_floor <= LIMIT
    print(
        f"{'holds' if held else 'FAILS'}: grid with prefix reuse <= {LIMIT} floors ({torch.get_num_threads()} threads)"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
