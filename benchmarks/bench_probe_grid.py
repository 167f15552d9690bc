"""Cost of the probe's grids: with prefix reuse, from the embedding, and against their floor. CPU, no network.

    python benchmarks/bench_probe_grid.py [--rounds 5] [--threads N] [--grids bands,layers]

`bands` is the 24-cell grid on 12 layers, `layers` the full per-layer grid on 28 (every family at every attention and
every MLP read), both at width 128. The floor of a grid is, summed over its cells, the layers that must be rerun (those
from the first edited layer on) plus one readout (final read, norm, logits, NLL and KL), on the fast path without any
intervention. Cells and floors take turns, layer by layer. With one thread the clock counts this process's own time, so
that other work on the machine matters little. Exits with 1 if a grid costs more than 1.15 floors.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.depth.families import Places
from attnres.interventions.config import GridConfig
from attnres.interventions.edits import edit
from attnres.interventions.grid import candidates
from attnres.interventions.ids import Spec
from attnres.model.modeling import Context
from attnres.probe.passes import first_layer, run_clean, run_edited

LIMIT = 1.15
WIDTH, VOCAB, TOKENS = 128, 4096, 128


@dataclass(frozen=True)
class Case:
    """A grid and the model that it is run on."""

    places: Places
    layers: int
    blocks: int
    windows: int


CASES = {"bands": Case("bands", 12, 4, 16), "layers": Case("layers", 28, 8, 8)}


def build(case: Case) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        attnres_num_blocks=case.blocks,
    )
    return Qwen3AttnResForCausalLM(config).eval()


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict[str, float]:
    """Ratios of one grid: medians over rounds, each a whole grid and its floor in turns."""
    model = build(case)
    decoder, plan = model.model, model.model.plan
    ids, labels = torch.randint(0, VOCAB, (2, case.windows, TOKENS))
    settings = GridConfig(places=case.places, controls="none")
    asked = candidates(settings, plan)
    by_start: dict[int, list[Spec]] = {}
    for spec in asked:
        if spec.cell(plan).eligible:
            by_start.setdefault(first_layer(spec, plan), []).append(spec)
    clean = run_clean(model, ids, labels, [0, *by_start])
    plain = replace(clean.context, edit=None)

    def onward(start: int, context: Context = plain) -> object:
        state = clean.states[start]
        for layer in range(start, case.layers):
            state = decoder.step(state, layer, context)
        return clean.readout.compare(model.lm_head(decoder.finish(state, context)))

    totals: dict[str, list[float]] = {"reuse": [], "floor": [], "embedding": []}
    for round_ in range(rounds + 1):
        spent = dict.fromkeys(totals, 0.0)
        for start, specs in by_start.items():
            # As many floors as cells, each beside its cell: both see the same machine.
            for spec in specs:
                spent["floor"] += timed(lambda start=start: onward(start))
                spent["reuse"] += timed(lambda spec=spec: clean.readout.compare(run_edited(model, clean, spec)))
            edited = replace(clean.context, edit=edit(specs[0], plan))
            spent["embedding"] += len(specs) * timed(lambda edited=edited: onward(0, edited))
        if round_:
            for name, seconds in spent.items():
                totals[name].append(seconds)
    ratios = [a / b for a, b in zip(totals["reuse"], totals["floor"], strict=True)]
    saved = [a / b for a, b in zip(totals["embedding"], totals["reuse"], strict=True)]
    return {
        "candidate_cells": len(asked),
        "cells": sum(map(len, by_start.values())),
        "reuse_ms": round(1e3 * statistics.median(totals["reuse"]), 1),
        "floor_ms": round(1e3 * statistics.median(totals["floor"]), 1),
        "reuse_over_floor": round(statistics.median(ratios), 3),
        "reuse_over_floor_worst": round(max(ratios), 3),
        "from_embedding_over_reuse": round(statistics.median(saved), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--grids", default=",".join(CASES))
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    held = True
    for name in arguments.grids.split(","):
        row = measure(CASES[name], arguments.rounds)
        held = held and row["reuse_over_floor"] <= LIMIT
        print(json.dumps({"grid": name, "layers": CASES[name].layers} | row), flush=True)
    print(
        f"{'hold' if held else 'FAIL'}: grids with prefix reuse <= {LIMIT} floors ({torch.get_num_threads()} threads)"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
