"""The depth plan, families and eligibility, against examples worked out by hand."""

import pytest

from attnres.depth.families import BANDS, band_layers, cell, family_indices, family_of, grid, ineligibility
from attnres.depth.plan import CONVENTIONS, DepthPlan
from attnres.errors import AttnResError

SIX = {
    "block_sum": [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4],
    "seeded_block_sum": [2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4],
    "cumulative": [2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4],
    "full": list(range(1, 14)),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_plan_number_of_sources_six_layers_three_blocks(convention):
    assert [read.num_sources for read in DepthPlan(6, 3, convention).reads] == SIX[convention]


def test_plan_names_what_each_source_sums():
    reads = DepthPlan(6, 3, "block_sum").reads
    assert [str(s) for s in reads[4].sources] == ["emb", "o0..o3"]
    assert [str(s) for s in reads[5].sources] == ["emb", "o0..o3", "o4"]
    assert [str(s) for s in reads[12].sources] == ["emb", "o0..o3", "o4..o7", "o8..o11"]
    assert not reads[4].has_current and reads[5].has_current


def test_plan_of_qwen3_0p6b_has_seven_real_blocks():
    plan = DepthPlan(28, 8)
    assert (plan.layers_per_block, plan.num_real_blocks) == (4, 7)
    assert (len(plan.reads), sum(read.num_sources for read in plan.reads)) == (57, 281)
    assert [len(block) for block in plan.blocks] == [8] * 6 + [9]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("layers, blocks", [(1, 1), (5, 2), (7, 3), (12, 4), (28, 8)])
def test_plan_sources_of_a_read_cover_every_earlier_output_once(layers, blocks, convention):
    """Block conventions partition what came before; `cumulative`'s state is the whole residual stream."""
    for read in DepthPlan(layers, blocks, convention).reads:
        if convention == "cumulative":
            newest = read.sources[-1]
            assert (newest.embedding, newest.start, newest.stop) == (True, 0, read.index)
            continue
        outputs = [j for source in read.sources for j in range(source.start, source.stop)]
        assert outputs == list(range(read.index))
        assert read.sources[0].embedding and not read.sources[0].stop


def test_plan_duplicates_of_released_conventions():
    def twins(plan: DepthPlan) -> list[int]:
        return [read.index for read in plan.reads if len(set(read.sources)) < read.num_sources]

    assert twins(DepthPlan(28, 8, "seeded_block_sum")) == [0]
    # The last finished block is the state at the attention reads of layers 0 (embedding twice), 4, 8, ..., 24.
    assert twins(DepthPlan(28, 8, "cumulative")) == [2 * layer for layer in range(0, 28, 4)]
    assert twins(DepthPlan(28, 8, "block_sum")) == twins(DepthPlan(28, 8, "full")) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1), "num_hidden_layers"), ((4, 0), "num_blocks"), ((4, 5), "num_blocks"), ((4, 2, "sum"), "sources")],
)
def test_plan_refuses_sizes_that_make_no_plan(arguments, named):
    with pytest.raises(ValueError, match=named):
        DepthPlan(*arguments)


@pytest.mark.parametrize(
    ("num_sources", "embedding", "older", "recent", "current"),
    [
        (1, (), (), (), ()),
        (2, (0,), (), (), (1,)),
        (3, (0,), (), (1,), (2,)),
        (4, (0,), (1,), (2,), (3,)),
        (6, (0,), (1, 2, 3), (4,), (5,)),
    ],
)
def test_families_are_positions_in_the_source_list(num_sources, embedding, older, recent, current):
    found = {family: family_indices(family, num_sources) for family in ("embedding", "older", "recent", "current")}
    assert found == {"embedding": embedding, "older": older, "recent": recent, "current": current}
    for family, members in found.items():
        assert all(family_of(i, num_sources) == family for i in members)


def test_bands_of_28_layers():
    assert [(r.start, r.stop) for r in (band_layers(b, 28) for b in BANDS)] == [(0, 9), (9, 19), (19, 28)]


def test_cells_of_28_layers_in_8_blocks_block_sum():
    """By hand: m = 4. S = 1 at read 0; 2 in layers 0-3 and at layer 4's attention; 3 until layer 8's attention; ..."""
    plan = DepthPlan(28, 8)
    early = {family: cell(plan, family, "attn", "early") for family in ("embedding", "current", "recent", "older")}
    assert early["embedding"].reads == tuple(2 * layer for layer in range(1, 9))
    assert early["current"].eligible
    # recent needs S >= 3: attention reads of layers 5-8, fewer than half of the nine.
    assert early["recent"].reads == (10, 12, 14, 16) and not early["recent"].eligible
    assert "fewer than half" in early["recent"].reason
    assert early["older"].reads == () and "empty" in early["older"].reason
    # MLP reads: recent from layer 4 on (five of nine); older needs S >= 4, from layer 8 on (one of nine).
    assert cell(plan, "recent", "mlp", "early").reads == (9, 11, 13, 15, 17)
    assert cell(plan, "recent", "mlp", "early").eligible
    assert cell(plan, "older", "mlp", "early").reads == (17,)
    assert all(cell(plan, "older", s, b).eligible for s in ("attn", "mlp") for b in ("mid", "late"))
    assert len(grid(plan)) == 24 and sum(c.eligible for c in grid(plan)) == 21


def test_cells_of_the_recency_wrap_leave_out_duplicates():
    plan = DepthPlan(28, 8, "cumulative")
    # Attention reads of layers 4 and 8: the state is also the last finished block, which is `recent`.
    for family in ("current", "recent"):
        assert "duplicate" in ineligibility(plan, plan.reads[8], family)
    assert ineligibility(plan, plan.reads[8], "embedding") == ""
    assert ineligibility(plan, plan.reads[0], "embedding") == "a duplicate of its source is in another family"
    assert cell(plan, "current", "attn", "early").reads == (2, 4, 6, 10, 12, 14)


def test_cell_refuses_names_that_do_not_exist():
    plan = DepthPlan(4, 2)
    for arguments in (("newest", "attn", "early"), ("current", "ffn", "early"), ("current", "attn", "first")):
        with pytest.raises((ValueError, AttnResError)):
            cell(plan, *arguments)
