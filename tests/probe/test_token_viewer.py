"""The data of the per-token viewer: the model's own routing, bounded, whatever the tokens are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows
from attnres.depth.plan import CONVENTIONS
from attnres.probe.subjects import Subject
from attnres.probe.token_viewer import collect_viewer, write_viewer
from attnres.tables.viewer import read_viewer, viewer_text

CORPUS = SimpleNamespace(
    names=[f"document {k}" for k in range(9)],
    tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: f"</script>\u202e{ids[0]}"),
)


def subject(convention: str = "block_sum") -> Subject:
    torch.manual_seed(0)
    shape = dict(vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
                 num_key_value_heads=2, head_dim=8)  # fmt: skip
    model = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**shape, attnres_sources=convention, attnres_num_blocks=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_res_" in name:
                parameter.add_(torch.randn_like(parameter))
    return Subject("attnres", model.eval())


def windows(documents: list[int], length: int = 12) -> ProbeWindows:
    ids = torch.randint(0, 48, (len(documents), length), generator=torch.Generator().manual_seed(1))
    return ProbeWindows(ids, ids, torch.arange(len(documents)), torch.tensor(documents))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_collect_viewer_holds_the_routing_of_every_read(convention):
    probed, drawn = subject(convention), windows([3, 3, 1, 4])
    shown = collect_viewer(probed, drawn, CORPUS, sequences=2, tokens=8)
    assert [s.document for s in shown.sequences] == ["document 3", "document 1"]
    with torch.no_grad():
        routing = probed.model(drawn.input_ids[[0, 2]], output_routing=True).routing
    assert len(shown.reads) == len(routing) == len(probed.plan.reads)
    for k, sequence in enumerate(shown.sequences):
        assert sequence.tokens == [f"</script>\u202e{i}" for i in drawn.input_ids[2 * k, :8].tolist()]
        for read, weights, whole in zip(shown.reads, sequence.weights, routing, strict=True):
            assert len(read.sources) == len(read.families) == whole.shape[-1]
            shares = np.reshape(weights, (8, whole.shape[-1])) / 1000
            np.testing.assert_allclose(shares, whole[k, :8].numpy(), atol=5.1e-4)


def test_collect_viewer_names_each_source_of_a_read_once():
    for convention in CONVENTIONS:
        for read in collect_viewer(subject(convention), windows([0]), CORPUS, tokens=2).reads:
            # `cumulative` reads its newest finished block and the same vector as the running state.
            assert len(set(read.sources)) == len(read.sources), read
    read = collect_viewer(subject(), windows([0]), CORPUS, tokens=2).reads[6]
    assert read.sources == ["embedding", "layers 0 to 1", "running state"]
    assert read.families == ["embedding", "recent", "current"]


def test_collect_viewer_shortens_what_would_not_fit():
    whole, half, quarter = (collect_viewer(subject(), windows([0, 1]), CORPUS, tokens=n) for n in (12, 6, 3))
    assert [len(s.tokens) for s in whole.sequences] == [12, 12]
    for part in (half, quarter):
        most = len(viewer_text(part).encode())
        assert collect_viewer(subject(), windows([0, 1]), CORPUS, tokens=12, max_bytes=most) == part
    assert len(quarter.sequences[0].tokens) == 3


def test_write_viewer_leaves_what_the_report_reads(tmp_path):
    write_viewer(tmp_path, subject(), windows([0, 1]), CORPUS)
    assert read_viewer(tmp_path) == collect_viewer(subject(), windows([0, 1]), CORPUS)
