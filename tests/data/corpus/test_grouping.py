"""Near-duplicates, found on disk."""

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from attnres.data.corpus import grouping
from attnres.data.corpus.chunks import Chunk, Chunks, write_chunk
from attnres.data.corpus.duplicates import BANDS, MIN_EQUAL_ROWS, minhash_signature
from attnres.data.text.sources import Document


def groups_by_all_pairs(signatures: np.ndarray) -> list[int]:
    """The lowest document of each group, by comparing every document with every other."""
    equal = signatures[:, None] == signatures[None]
    share_a_band = equal.reshape(*equal.shape[:2], BANDS, -1).all(-1).any(-1)
    _, labels = connected_components(share_a_band & (equal.sum(-1) >= MIN_EQUAL_ROWS))
    return [labels.tolist().index(label) for label in labels]


@pytest.mark.parametrize(("portion", "bounded"), [(1_000_000, True), (200, True), (37, True), (37, False)])
def test_group_near_duplicates_is_a_comparison_of_all_pairs_whatever_fits(
    random_text, tmp_path, monkeypatch, portion, bounded
):
    monkeypatch.setattr(grouping, "PORTION", portion)
    originals = [random_text(seed, 100) for seed in range(60)]
    texts = [*originals, *(text + " more" for text in originals[:25]), *originals[10:20], "short", "short", "other"]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    counts = []
    for number, start in enumerate(range(0, len(documents), 20)):
        members = documents[start : start + 20]
        write_chunk(tmp_path, Chunk(number, members, None, left_out=[], blank=0, cpu_seconds=0.0), None)
        counts.append(len(members))
    expected = groups_by_all_pairs(np.stack([minhash_signature(text) for text in texts]))
    assert grouping.group_near_duplicates(Chunks(tmp_path, tuple(counts)), bounded).tolist() == expected
    assert len(np.unique(expected)) == 62
