"""What the report's per-token viewer shows: tokens and routing weights of a few windows (`attnres.tables.viewer`).

The file is bounded: windows are few, tokens are the first of each, weights are whole thousandths.
"""

from pathlib import Path

import torch

from attnres.data import Corpus, ProbeWindows
from attnres.depth.families import family_of
from attnres.depth.plan import ReadPlan
from attnres.files.whole_files import write_text
from attnres.probe.subjects import Subject
from attnres.tables.folder import VIEWER
from attnres.tables.viewer import MOST_WRITTEN, SEQUENCES, TOKENS, Read, Shown, Viewer, viewer_text


@torch.no_grad()
def collect_viewer(
    subject: Subject,
    windows: ProbeWindows,
    corpus: Corpus,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    max_bytes: int = MOST_WRITTEN,
) -> Viewer:
    """Token strings and routing weights of the first windows, from one clean run.

    Args:
        subject: the model.
        windows: where the sequences come from; of each document, the first window.
        corpus: turns ids into text, documents into names.
        sequences: most sequences.
        tokens: most tokens of each; fewer where the file would grow beyond `max_bytes`.
        max_bytes: size of the JSON text.
    """
    rows = _first_of_each_document(windows)[:sequences]
    tokens = min(tokens, windows.input_ids.shape[1])
    ids = windows.input_ids[rows, :tokens]
    routing = subject.model(ids.to(subject.model.device), output_routing=True).routing
    thousandths = [(weights.float() * 1000).round().int().cpu() for weights in routing]
    while True:
        viewer = Viewer(
            model=subject.name,
            reads=[_read(read) for read in subject.plan.reads],
            sequences=[
                Shown(
                    document=corpus.names[int(windows.document_ids[row])],
                    tokens=[corpus.tokenizer.decode([i], skip_special_tokens=False) for i in ids[k].tolist()],
                    weights=[weights[k, : ids.shape[1]].flatten().tolist() for weights in thousandths],
                )
                for k, row in enumerate(rows)
            ],
        )
        if ids.shape[1] == 1 or len(viewer_text(viewer).encode()) <= max_bytes:
            return viewer
        ids = ids[:, : ids.shape[1] // 2]


def write_viewer(folder: Path, subject: Subject, windows: ProbeWindows, corpus: Corpus) -> None:
    """Writes the viewer's file into a probe's folder."""
    write_text(folder / VIEWER, viewer_text(collect_viewer(subject, windows, corpus)))


def _first_of_each_document(windows: ProbeWindows) -> list[int]:
    seen: dict[int, int] = {}
    for row, document in enumerate(windows.document_ids.tolist()):
        seen.setdefault(document, row)
    return list(seen.values())


def _read(read: ReadPlan) -> Read:
    names = []
    for place, source in enumerate(read.sources):
        if read.has_current and place == read.num_sources - 1:
            names.append("running state")
        else:
            terms = ["embedding"] * source.embedding + [_outputs(source.start, source.stop)]
            names.append(" and ".join(term for term in terms if term))
    families = [family_of(place, read.num_sources) for place in range(read.num_sources)]
    return Read(read=read.index, layer=read.layer, sublayer=read.sublayer, sources=names, families=families)


def _outputs(start: int, stop: int) -> str:
    """Sublayer outputs `start .. stop-1` in words; outputs 2k and 2k + 1 belong to layer k."""
    if stop <= start:
        return ""
    first, last = start // 2, (stop - 1) // 2
    if stop == start + 1:
        return f"{('attention', 'MLP')[start % 2]} of layer {first}"
    return f"layer {first}" if first == last else f"layers {first} to {last}"
