"""Interventions: ids that round-trip, where they apply, and what they do at a read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.depth.families import BANDS, FAMILIES, SUBLAYERS, places
from attnres.depth.plan import DepthPlan
from attnres.errors import ConfigError
from attnres.interventions.edits import NO_EDIT, RemoveMatched, RowsEdit, Scale, edit
from attnres.interventions.grid import Grid
from attnres.interventions.ids import ARGUMENTS, FAMILY_KINDS, KINDS, Composition, Intervention, parse
from attnres.model.state import Site

NUMBERED = st.integers(0, 999).map(str)
PLACES = st.one_of(
    st.tuples(st.sampled_from(SUBLAYERS), st.sampled_from(BANDS)),
    st.tuples(st.sampled_from(SUBLAYERS), st.builds("layer{}".format, NUMBERED)),
    st.tuples(st.sampled_from(SUBLAYERS), st.builds("block{}".format, NUMBERED)),
    st.tuples(st.none(), st.builds("read{}".format, NUMBERED)),
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def single(draw):
    kind = draw(st.sampled_from(KINDS))
    sublayer, band = draw(PLACES)
    family = draw(st.sampled_from(FAMILIES)) if kind in FAMILY_KINDS else None
    argument = draw(NUMBERS.map(abs) if kind == "scale" else NUMBERS) if kind in ARGUMENTS else None
    return Intervention(kind, family, sublayer, band, argument)


SPECS = st.one_of(
    single(), st.lists(single(), min_size=2, max_size=4, unique=True).map(lambda members: Composition(tuple(members)))
)


@given(SPECS)
def test_intervention_id_round_trips(spec):
    assert parse(spec.id) == spec


@given(SPECS, SPECS)
def test_cells_of_different_ids_differ_in_their_coordinates(one, other):
    plan = DepthPlan(6, 3)
    left, right = ((s.what, c.family, c.sublayer, c.band) for s in (one, other) for c in [s.cell(plan)])
    assert (left == right) == (one.id == other.id)


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
        "scale:older@mlp.mid",
        "scale:-1:older@mlp.mid",
        "scale:nan:older@mlp.mid",
        "scale:half:older@mlp.mid",
        "schedule@mlp.mid",
        "schedule:inf@mlp.mid",
        "mask:0.5:older@mlp.mid",
        "mean:older@mlp.mid",
        "mask:older@attn.read3",
        "mask:older@layer3",
        "mask:older@attn.layer03",
        "mask:older@attn.layer-1",
        "mask:older@mlp.mid+mask:older@mlp.mid",
        "mask:older@mlp.mid+",
        "",
    ],
)
def test_intervention_parse_refuses(text):
    with pytest.raises(ConfigError, match="intervention"):
        parse(text)


def sources_changed(spec, plan):
    """read -> positions of the sources whose log weights an edit changes, from what it does to uniform weights."""
    positions = {}
    for read in plan.reads:
        uniform = torch.zeros(1, 1, read.num_sources).log_softmax(-1)
        edited = edit(spec, plan)(Site.of(read), uniform)
        changed = (edited != uniform).flatten().nonzero().flatten().tolist()
        if changed:
            positions[read.index] = tuple(changed)
    return positions


def test_mask_edits_the_eligible_reads_of_its_cell_only():
    # Layers 8-11 in blocks of three: the attention read of layer 9 opens a block, so it has one source fewer.
    spec = parse("mask:older@attn.late")
    assert sources_changed(spec, DepthPlan(12, 4)) == {16: (1,), 18: (1,), 20: (1, 2), 22: (1, 2)}


def test_mask_renormalises_what_is_left():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(2, 3, 4)
    mask = edit(parse("mask:older@attn.late"), DepthPlan(12, 4))
    untouched = mask(Site(17, "mlp", 8), weights)
    masked = torch.softmax(mask(Site(16, "attn", 8), weights), -1)
    assert untouched is weights
    torch.testing.assert_close(masked[0, 0], torch.tensor([0.1, 0.0, 0.3, 0.4]) / 0.8)


# 28 layers in 8 blocks: four layers a block, 7 real blocks.
@pytest.mark.parametrize(
    ("convention", "text", "eligible", "reads", "reason"),
    [
        # block_sum: reads 8, 16, ... open a block and see the finished blocks only.
        ("block_sum", "mask:embedding@attn.layer0", False, (), "only one source at 1 of 1 reads"),
        ("block_sum", "mask:embedding@mlp.layer0", True, (1,), ""),
        ("block_sum", "mask:recent@mlp.layer0", False, (), "family is empty at 1 of 1 reads"),
        ("block_sum", "mask:recent@attn.block1", True, (10, 12, 14), ""),
        ("block_sum", "mask:recent@attn.block2", True, (16, 18, 20, 22), ""),
        ("block_sum", "mask:older@attn.block1", False, (), "family is empty at 4 of 4 reads"),
        ("block_sum", "mask:older@attn.block2", True, (18, 20, 22), ""),
        ("block_sum", "mask:older@mlp.early", False, (17,), "family is empty at 8 of 9 reads: fewer than half"),
        ("block_sum", "mask:older@mlp.mid", True, (19, 21, 23, 25, 27, 29, 31, 33, 35, 37), ""),
        ("block_sum", "mask:older@mlp.block6", True, (49, 51, 53, 55), ""),
        ("block_sum", "mask:older@mlp.block7", False, (), "the model has no block7"),
        ("block_sum", "mask:older@mlp.layer28", False, (), "the model has no layer28"),
        ("block_sum", "mask:older@read56", True, (56,), ""),
        ("block_sum", "mean@read0", False, (), "only one source at 1 of 1 reads"),
        ("block_sum", "mean@read1", True, (1,), ""),
        ("block_sum", "uniform@attn.early", True, (2, 4, 6, 8, 10, 12, 14, 16), ""),
        ("seeded_block_sum", "mask:embedding@read0", False, (), "a duplicate of its source is in another family"),
        ("seeded_block_sum", "uniform@read0", False, (), "its sources are all one vector"),
        ("seeded_block_sum", "uniform@read1", True, (1,), ""),
        ("cumulative", "mask:current@attn.layer4", False, (), "a duplicate of its source is in another family"),
        ("cumulative", "uniform@attn.layer4", True, (8,), ""),
        ("cumulative", "mask:current@attn.block1", True, (10, 12, 14), ""),
        ("cumulative", "resample@read56", False, (), "the model has no read56"),
        ("full", "mask:older@attn.layer1", False, (), "family is empty"),
        ("full", "mask:older@mlp.layer1", True, (3,), ""),
        ("full", "mask:older@mlp.block0", True, (3, 5, 7), ""),
    ],
)
def test_exclusions_for_28_layers_in_8_blocks(convention, text, eligible, reads, reason):
    cell = parse(text).cell(DepthPlan(28, 8, convention))
    assert (cell.eligible, cell.reads) == (eligible, reads)
    assert cell.reason.startswith(reason) if reason else cell.reason == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mask:embedding@read3+mask:recent@read3", "mask:recent@read3: family is empty"),
        ("mask:embedding@read3+mask:current@read3", "every source is removed at read 3"),
        ("mask:embedding@read3+scale:0:current@read3", "every source is removed at read 3"),
        ("mask:embedding@mlp.early+mask:current@mlp.layer2", "every source is removed at read 5"),
        ("mask:embedding@read3+mask:current@read3+uniform@read3", ""),
        ("uniform@read3+mask:embedding@read3+mask:current@read3", "every source is removed at read 3"),
        ("mask:embedding@read3+scale:0.5:current@read3", ""),
        ("mask:embedding@read3+mask:current@read5", ""),
        ("matched:embedding@read3+scale:2:embedding@read3", "matched meets another intervention at read 3"),
        ("matched:embedding@read3+scale:2:embedding@read5", ""),
    ],
)
def test_composition_is_excluded_where_nothing_would_be_left(text, reason):
    assert parse(text).cell(DepthPlan(28, 8)).reason.startswith(reason) or not reason
    assert bool(parse(text).cell(DepthPlan(28, 8)).reason) == bool(reason)


@pytest.mark.parametrize(("kind", "count"), [("bands", 6), ("layers", 56), ("blocks", 14), ("reads", 57)])
def test_places_cover_the_depth(kind, count):
    plan = DepthPlan(28, 8)
    specs = [Intervention("uniform", None, *place) for place in places(plan, kind)]
    covered = [j for spec in specs for j in spec.cell(plan).reads]
    assert len(specs) == count
    # Read 0 has one source; only the grid of reads has the final one.
    assert sorted(covered) == list(range(1, 57 if kind == "reads" else 56))


def test_scale_by_nothing_is_mask_and_scale_multiplies_odds():
    log_weights = torch.randn(2, 3, 5).log_softmax(-1)
    assert torch.equal(Scale((1, 2), 0.0).weights(log_weights), Scale((1, 2), -0.0).weights(log_weights))
    assert bool(torch.isneginf(Scale((1, 2), 0.0).weights(log_weights)[..., 1:3]).all())
    odds = lambda w: w[..., 1:3].sum(-1) / (1 - w[..., 1:3].sum(-1))  # noqa: E731
    scaled = torch.softmax(Scale((1, 2), 0.25).weights(log_weights), -1)
    torch.testing.assert_close(odds(scaled), 0.25 * odds(log_weights.exp()))


def test_matched_by_hand():
    # Order by noise: source 3 first, then 1; source 0 is the family.
    log_weights = torch.tensor([0.3, 0.1, 0.35, 0.25]).log().expand(1, 1, 4)
    noise = torch.tensor([0.0, 0.4, 0.9, 0.2]).expand(1, 1, 4)
    left = RemoveMatched((0,), noise).weights(log_weights).exp()
    torch.testing.assert_close(left[0, 0], torch.tensor([0.3, 0.05, 0.35, 0.0]))
    # A family that holds .8: at most .9 of the other .2 may go.
    log_weights = torch.tensor([0.8, 0.05, 0.1, 0.05]).log().expand(1, 1, 4)
    left = RemoveMatched((0,), noise).weights(log_weights).exp()
    torch.testing.assert_close(left[0, 0], torch.tensor([0.8, 0.0, 0.02, 0.0]))


@given(st.integers(0, 2**16), st.integers(2, 7))
def test_matched_removes_its_share_outside_the_family_only(seed, num_sources):
    generator = torch.Generator().manual_seed(seed)
    log_weights = (3 * torch.randn(2, 5, num_sources, generator=generator, dtype=torch.float64)).log_softmax(-1)
    members = tuple(range(1 + seed % (num_sources - 1)))
    noise = torch.rand(2, 5, num_sources, generator=generator, dtype=torch.float64)
    weights, left = log_weights.exp(), RemoveMatched(members, noise).weights(log_weights).exp()
    held = weights[..., list(members)].sum(-1)
    torch.testing.assert_close((weights - left).sum(-1), torch.minimum(held, 0.9 * (1 - held)))
    assert torch.equal(left[..., list(members)], weights[..., list(members)])
    assert bool((left <= weights).all()) and bool((left >= 0).all())


def test_rows_edit_gives_each_group_its_own_edit():
    plan = DepthPlan(6, 3)
    site, log_weights = Site(9, "mlp", 4), torch.randn(6, 4, 4).log_softmax(-1)
    edits = [NO_EDIT, *(edit(parse(text), plan) for text in ("mask:embedding@mlp.late", "scale:3:older@mlp.late"))]
    edited = RowsEdit(edits, 2)(site, log_weights)
    for index, each in enumerate(edits):
        rows = slice(2 * index, 2 * index + 2)
        assert torch.equal(edited[rows], each(site, log_weights[rows]))
    assert RowsEdit(edits, 2)(Site(2, "attn", 1), log_weights) is log_weights


def test_grid_excludes_in_two_steps_and_each_is_a_value():
    specs = [parse(text) for text in ("mask:embedding@mlp.late", "mask:recent@attn.layer0", "mean@mlp.late")]
    planned = Grid.of(specs, {"attnres": DepthPlan(6, 3), "recency": DepthPlan(6, 3, "cumulative")})
    assert planned.eligible("attnres") == [specs[0], specs[2]]
    piloted = planned.excluding("attnres", {"mean@mlp.late": "no pilot", "mask:recent@attn.layer0": "not this reason"})
    assert piloted.eligible("attnres") == [specs[0]]
    assert piloted.eligible("recency") == planned.eligible("recency") and planned.specs == piloted.specs == specs
    reasons = {one.spec.id: one.cell.reason for one in piloted.candidates if one.model == "attnres"}
    assert reasons["mean@mlp.late"] == "no pilot" and reasons["mask:recent@attn.layer0"].startswith("only one source")
    assert planned.eligible("attnres") == [specs[0], specs[2]]
