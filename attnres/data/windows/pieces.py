"""Which documents an optimizer step was made of, and where in its windows they lie."""

from collections.abc import Iterator
from dataclasses import dataclass

from attnres.data.config import DataConfig
from attnres.data.corpus.folder import Corpus
from attnres.data.windows.mixing import mix_of
from attnres.data.windows.sampler import Order
from attnres.data.windows.windows import WindowDataset


@dataclass(frozen=True)
class Piece:
    """A piece of a document in a window. One that gives only the window's last target has 0 tokens.

    Attributes:
        sample: Place of the window in the global batch.
        window: The window's id, its `sample_ids`.
        at: Where in the window's inputs the piece begins.
        tokens: Its length.
        offset: Of its first token in the document.
    """

    sample: int
    window: int
    document: int
    name: str
    at: int
    tokens: int
    offset: int


def documents_in_step(corpus: Corpus, config: DataConfig, step: int, global_batch_size: int) -> dict[int, list[int]]:
    """Which documents an optimizer step saw: document ids by window id (`sample_ids`), in the step's order.

    Args:
        step: Optimizer step, counting from 0.
    """
    length = config.sequence_length
    windows = WindowDataset(corpus, "train", length)
    order = Order(len(windows), global_batch_size, seed=config.seed, mix=mix_of(corpus, "train", length))
    return {window: windows.documents(window).tolist() for window in order.batch(step).tolist()}


def pieces_in_step(corpus: Corpus, config: DataConfig, step: int, global_batch_size: int) -> Iterator[Piece]:
    """The pieces of documents that an optimizer step reads, sample by sample; the arguments of `documents_in_step`."""
    length = config.sequence_length
    for sample, (window, documents) in enumerate(documents_in_step(corpus, config, step, global_batch_size).items()):
        first = window * length
        for document, name in zip(documents, corpus.names_of(documents), strict=True):
            start, end = int(corpus.starts[document]), int(corpus.starts[document] + corpus.lengths[document])
            begin = max(start, first)
            yield Piece(
                sample=sample,
                window=window,
                document=document,
                name=name,
                at=begin - first,
                tokens=min(end, first + length) - begin,
                offset=begin - start,
            )
