"""Interventions: ids that round-trip, and what they do at a read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.errors import ConfigError
from attnres.model.families import BANDS, FAMILIES, SUBLAYERS
from attnres.model.plan import DepthPlan
from attnres.model.state import Site
from attnres.probe.interventions import Intervention

SPECS = st.one_of(
    st.builds(Intervention, st.just("mask"), *map(st.sampled_from, (FAMILIES, SUBLAYERS, BANDS))),
    st.builds(Intervention, st.just("noop"), st.none(), *map(st.sampled_from, (SUBLAYERS, BANDS))),
)


@given(SPECS)
def test_intervention_id_round_trips(spec):
    assert Intervention.parse(spec.id) == spec


@pytest.mark.parametrize(
    "text",
    [
        "mask",
        "mask@attn",
        "mask@attn.early",
        "mask:new@attn.early",
        "noop:older@mlp.mid",
        "mask:older@ffn.mid",
        "mask:older@mlp.first",
        "drop:older@mlp.mid",
        "mask:@mlp.mid",
    ],
)
def test_intervention_parse_refuses(text):
    with pytest.raises(ConfigError, match="intervention"):
        Intervention.parse(text)


def test_mask_edits_the_eligible_reads_of_its_cell_only():
    edit = Intervention.parse("mask:older@attn.late").edit(DepthPlan(12, 4))
    # Layers 8-11 in blocks of three: the attention read of layer 9 opens a block, so it has one source fewer.
    assert edit.removed == {16: (1,), 18: (1,), 20: (1, 2), 22: (1, 2)}


def test_mask_renormalises_what_is_left():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(2, 3, 4)
    edit = Intervention.parse("mask:older@attn.late").edit(DepthPlan(12, 4))
    untouched = edit(Site(17, "mlp", 8), weights)
    masked = torch.softmax(edit(Site(16, "attn", 8), weights), -1)
    assert untouched is weights
    torch.testing.assert_close(masked[0, 0], torch.tensor([0.1, 0.0, 0.3, 0.4]) / 0.8)
