"""What the report's per-token viewer shows: tokens and routing weights of a few windows, as `viewer.json`.

The file is bounded: windows are few, tokens are the first of each, weights are whole thousandths. Token strings are
written as they are; whoever shows them takes them for hostile (`attnres.report.viewer`).
"""

import json
from pathlib import Path
from typing import Any

import torch

from attnres.data import Corpus, ProbeWindows
from attnres.depth.families import family_of
from attnres.depth.plan import ReadPlan
from attnres.files.whole_files import write_text
from attnres.probe.subjects import Subject

VIEWER = "viewer.json"
FORMAT = 1
SEQUENCES, TOKENS = 4, 64
MAX_BYTES = 1_400_000


@torch.no_grad()
def collect_viewer(
    subject: Subject,
    windows: ProbeWindows,
    corpus: Corpus,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """Token strings and routing weights of the first windows, from one clean run.

    Args:
        subject: the model.
        windows: where the sequences come from; of each document, the first window.
        corpus: turns ids into text, documents into names.
        sequences: most sequences.
        tokens: most tokens of each; fewer where the file would grow beyond `max_bytes`.
        max_bytes: size of the JSON text.

    Returns:
        `model`, `reads` (a row per read: number, layer, sublayer, sources with name and family) and `sequences`
        (document, `tokens [T]`, `weights`: per read, `[T * S]` thousandths, token by token, oldest source first).
    """
    rows = _first_of_each_document(windows)[:sequences]
    tokens = min(tokens, windows.input_ids.shape[1])
    ids = windows.input_ids[rows, :tokens]
    routing = subject.model(ids.to(subject.model.device), output_routing=True).routing
    thousandths = [(weights.float() * 1000).round().int().cpu() for weights in routing]
    while True:
        viewer = {
            "format": FORMAT,
            "model": subject.name,
            "reads": [_read(read) for read in subject.plan.reads],
            "sequences": [
                {
                    "document": corpus.names[int(windows.document_ids[row])],
                    "tokens": [corpus.tokenizer.decode([i], skip_special_tokens=False) for i in ids[k].tolist()],
                    "weights": [weights[k, : ids.shape[1]].flatten().tolist() for weights in thousandths],
                }
                for k, row in enumerate(rows)
            ],
        }
        if ids.shape[1] == 1 or len(_text(viewer).encode()) <= max_bytes:
            return viewer
        ids = ids[:, : ids.shape[1] // 2]


def write_viewer(folder: Path, subject: Subject, windows: ProbeWindows, corpus: Corpus) -> Path:
    """Writes `viewer.json` into a probe's folder."""
    write_text(folder / VIEWER, _text(collect_viewer(subject, windows, corpus)))
    return folder / VIEWER


def _text(viewer: dict[str, Any]) -> str:
    return json.dumps(viewer, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _first_of_each_document(windows: ProbeWindows) -> list[int]:
    seen: dict[int, int] = {}
    for row, document in enumerate(windows.document_ids.tolist()):
        seen.setdefault(document, row)
    return list(seen.values())


def _read(read: ReadPlan) -> dict[str, Any]:
    names = []
    for place, source in enumerate(read.sources):
        if read.has_current and place == read.num_sources - 1:
            names.append("running state")
        else:
            terms = ["embedding"] * source.embedding + [_outputs(source.start, source.stop)]
            names.append(" and ".join(term for term in terms if term))
    families = [family_of(place, read.num_sources) for place in range(read.num_sources)]
    return {"read": read.index, "layer": read.layer, "sublayer": read.sublayer, "sources": names, "families": families}


def _outputs(start: int, stop: int) -> str:
    """Sublayer outputs `start .. stop-1` in words; outputs 2k and 2k + 1 belong to layer k."""
    if stop <= start:
        return ""
    first, last = start // 2, (stop - 1) // 2
    if stop == start + 1:
        return f"{('attention', 'MLP')[start % 2]} of layer {first}"
    return f"layer {first}" if first == last else f"layers {first} to {last}"
