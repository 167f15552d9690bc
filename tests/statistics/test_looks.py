"""Looks: the level is spent over them, what is decided is measured no further, and tables alone say what was open."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from attnres.errors import ConfigError, DataError
from attnres.statistics import inference
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.dissociation import in_race
from attnres.statistics.judgement import judge
from attnres.statistics.looks import Looks, Sample, resolved
from attnres.statistics.open_questions import needed_at, open_cells, replayed
from attnres.tables.names import Split
from attnres.tables.roles import Roles
from tests.statistics.probed_tables import QUICK, measured, model_rows

LOOKS = (12, 24, 48)
MOTIF, OTHER = ("embedding", "mlp", "early"), ("older", "attn", "late")
MODELS = model_rows(("attnres", "uniform"))
CONFIG = replace(QUICK, looks=LOOKS, rank_look=24)


def with_looks(table, looks=LOOKS, pilot=(8,)):
    """The table with the look at which each document came, in the order of the documents."""
    table = table.copy()
    edges = {"confirm": looks, "pilot": pilot}
    for split, rows in table.groupby("split"):
        order = {document: place for place, document in enumerate(sorted(rows["document"].unique()))}
        places = rows["document"].map(order)
        table.loc[rows.index, "look"] = np.searchsorted(edges[split], places, side="right") + 1
    return table.astype({"look": int})


def tables(effect=None, **options):
    effects, mass, eligibility = measured(effect, documents=LOOKS[-1], **options)
    return with_looks(effects), with_looks(mass), eligibility


def sample(values, look, shares):
    return Sample(np.asarray(values, float), np.asarray(look), shares)


@pytest.mark.parametrize(
    ("asked", "documents", "looks"),
    [((32, 64, 128), 96, (32, 64, 96)), ((32, 64), 64, (32, 64)), ((32, 64), 20, (20,)), (None, 96, None)],
)
def test_resolved_leaves_out_what_lies_above_and_ends_with_all(asked, documents, looks):
    assert resolved(asked, documents) == looks


@pytest.mark.parametrize("spending", ["linear", "pocock"])
def test_looks_spend_the_whole_level(spending):
    looks = Looks.of((32, 64, 128, 256, 512), spending)
    assert sum(looks.shares) == pytest.approx(1) and min(looks.shares) > 0.04
    assert Looks.of((96,), spending).shares == (1.0,)
    assert [looks.last_within(documents) for documents in (5, 32, 64, 100, 999)] == [1, 1, 2, 2, 5]


def test_sample_of_one_look_gives_the_digits_of_the_fixed_tests():
    values = np.asfortranarray(np.random.default_rng(0).normal(0.3, 1, (40, 5)))
    one, config = sample(values, np.ones(40, int), (1.0,)), QUICK
    assert np.array_equal(one.sign_flip_p(config), inference.sign_flip_p(values, config.sign_flips, config.seed))
    assert np.array_equal(one.equivalence_p(0.5), inference.equivalence_p(values, 0.5))
    assert np.array_equal(one.interval(config), inference.interval(values, config))
    assert np.array_equal(one.mean(), values.mean(axis=0)) and one.documents.tolist() == [40] * 5


def test_sequential_p_is_the_smallest_over_the_looks_of_p_by_its_share():
    values = np.random.default_rng(1).normal(0.5, 1, (30, 3))
    values[10:, 2] = np.nan
    look = np.repeat([1, 2], [10, 20])
    both = sample(values, look, (0.25, 0.75))
    first, whole = (inference.one_sided_p(values[:n], 0.0, "greater") for n in (10, 30))
    expected = np.minimum(1, np.minimum(first / 0.25, np.where([1, 1, 0], whole / 0.75, 1)))
    np.testing.assert_allclose(both.one_sided_p(0.0, "greater"), expected)
    assert both.depth.tolist() == [2, 2, 1] and both.documents.tolist() == [30, 30, 10]
    assert both.mean()[2] == values[:10, 2].mean()
    wide = inference.bca_interval(values[:10, 2:], QUICK.bootstrap, 1 - QUICK.alpha * 0.25, QUICK.seed)
    assert [limit[2] for limit in both.interval(QUICK)] == [limit[0] for limit in wide]


def test_a_sequential_test_holds_its_level_and_reading_every_look_at_the_whole_level_does_not():
    """Each column is a replicate without an effect, read at all five looks."""
    look = np.searchsorted((8, 16, 32, 64), np.arange(128), side="right") + 1
    values = np.random.default_rng(2).normal(size=(128, 4000))
    shares = Looks.of((8, 16, 32, 64, 128), "linear").shares
    spent = (sample(values, look, shares).one_sided_p(0.0, "greater") <= 0.05).mean()
    peeking = (sample(values, look, (1.0,) * 5).one_sided_p(0.0, "greater") <= 0.05).mean()
    assert 0.025 < spent <= 0.055 < 0.1 < peeking


def test_looks_take_the_flips_that_the_whole_grid_needs_or_refuse():
    config = StatisticsConfig(grid_cells=100)
    assert config.flips_at(1.0) == 9999 and config.flips_at(0.0625) == 31_999
    with pytest.raises(ConfigError, match="leave out the first look"):
        config.flips_at(1e-4)
    for looks in ((1, 4), (8, 8), (8, 4)):
        with pytest.raises(ConfigError, match=r"statistics\.looks"):
            StatisticsConfig(looks=looks)


def walk(effects, mass, eligibility, config=CONFIG):
    """A probe's walk: what is needed at each look is measured, and what was asked for at each."""
    parts, clean, asked = [], [mass[mass["split"] == "pilot"]], []
    for split, looks in ((Split.PILOT, 1), (Split.CONFIRM, len(config.looks))):
        for look in range(1, looks + 1):
            so_far = pd.concat(parts, ignore_index=True) if parts else None
            needed = needed_at(split, so_far, pd.concat(clean, ignore_index=True), eligibility, MODELS, config)
            here = effects[(effects["split"] == split) & (effects["look"] == look)]
            chosen = [cell in needed.get(model, ()) for model, cell in zip(here["model"], here["cell"], strict=True)]
            if needed:
                parts.append(here[chosen])
            if split == Split.CONFIRM:
                asked.append(needed)
                runs = mass[(mass["split"] == split) & (mass["look"] == look)]
                clean.append(runs[runs["model"].isin(needed)])
    return pd.concat(parts, ignore_index=True), pd.concat(clean, ignore_index=True), asked


def test_what_is_decided_early_is_measured_no_further_and_what_is_close_to_the_end():
    near = ("current", "attn", "mid")
    effect = {("attnres", MOTIF): 0.5, ("attnres", OTHER): 0.2, ("attnres", near): 0.005, ("uniform", MOTIF): 0.5}
    effects, mass, asked = walk(*tables(effect, noise=0.001))
    depth = effects[effects["split"] == "confirm"].groupby(["model", "cell"])["look"].max()
    assert depth["attnres", "mask:current@attn.mid"] == 3
    # Rank correlations keep the trained model's masks up to 24 documents; nothing asks for the other's so long.
    assert depth["attnres", "mask:embedding@mlp.early"] == 2 and depth["uniform", "mask:older@mlp.mid"] == 1
    assert set(asked[2]["attnres"]) < set(asked[1]["attnres"]) == set(asked[0]["attnres"])


def test_verdicts_under_looks_are_those_of_all_documents():
    effect = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): 0.05, ("attnres", OTHER): 0.1}
    effects, mass, eligibility = tables(effect, controls=[MOTIF], noise=0.001)
    stopped = walk(effects, mass, eligibility)
    seen, whole = (
        judge(*tables_, eligibility, config, MODELS)
        for tables_, config in (
            (stopped[:2], CONFIG),
            ([table.drop(columns="look") for table in (effects, mass)], replace(CONFIG, looks=None)),
        )
    )
    assert len(stopped[0]) < 0.7 * len(effects)
    for table in ("cells", "dissociation"):
        assert getattr(seen, table)["verdict"].tolist() == getattr(whole, table)["verdict"].tolist()
    found = [judged.motifs.loc[judged.motifs["verdict"] == "motif", "cell"].tolist() for judged in (seen, whole)]
    assert found[0] == found[1] == ["mask:embedding@mlp.early"]
    assert (seen.cells["documents"] < 48).any() and set(whole.cells["documents"].dropna()) == {48}
    assert dict(seen.spearman.groupby("model")["documents"].first()) == {"attnres": 24, "uniform": 12}


def test_replayed_gives_the_rows_of_an_undisturbed_probe_from_those_of_members_that_measured_every_look():
    effects, mass, eligibility = tables({("attnres", MOTIF): 0.3, ("attnres", OTHER): 0.006}, noise=0.01)
    alone = walk(effects, mass, eligibility)[:2]
    again = replayed(effects, mass, eligibility, MODELS, CONFIG)
    for mine, theirs in zip(alone, again, strict=True):
        keys = [name for name in ("model", "split", "cell", "family", "sublayer", "band", "window") if name in mine]
        mine, theirs = (table.sort_values(keys, ignore_index=True)[sorted(table)] for table in (mine, theirs))
        pd.testing.assert_frame_equal(mine, theirs)
    lacking = effects[~((effects["cell"] == "mask:older@attn.late") & (effects["look"] == 2))]
    with pytest.raises(DataError, match=r"mask:older@attn\.late of (attnres|uniform) lacks look 2"):
        replayed(lacking, mass, eligibility, MODELS, CONFIG)


def test_a_motif_without_a_control_is_not_asked_about_and_a_study_motif_with_one_is_never_given_up():
    elsewhere = {("attnres", ("embedding", *place)): 0.3 for place in (("mlp", "late"), ("attn", "mid"))}
    effect = {("attnres", MOTIF): 0.2, ("attnres", MOTIF, "matched"): 0.05} | elsewhere
    cell = "mask:embedding@mlp.early"
    for controls, open_ in (((), False), ([MOTIF], True)):
        effects, mass, eligibility = tables(effect, controls=controls, noise=0.5)
        first = [table[(table["split"] == "pilot") | (table["look"] <= 2)] for table in (effects, mass)]
        judged = judge(*first, eligibility, CONFIG, MODELS)
        motif = judged.motifs.set_index(["model", "cell"]).loc[("attnres", cell)]
        assert motif["verdict"] == "inconclusive" and motif["causal"]
        closed = replace(judged, cells=judged.cells.iloc[:0], contrasts=judged.contrasts.iloc[:0])
        needed = open_cells(closed, replace(CONFIG, rank_look=2), Roles.of(MODELS)).get("attnres", set())
        assert (cell in needed) == open_ and ("matched:embedding@mlp.early" in needed) == open_


def test_race_for_the_largest_effect_ends_where_one_cell_is_far_ahead():
    rng = np.random.default_rng(3)
    values = rng.normal([1.0, 0.98, 0.1, 0.0], 0.3, (32, 4))
    look = np.repeat([1, 2], 16)
    assert in_race(sample(values, look, (1.0, 1.0))).tolist() == [True, True, False, False]
    values[16:, 2:] = np.nan  # who has left is measured no further, and does not come back
    assert in_race(sample(values, look, (1.0, 1.0))).tolist() == [True, True, False, False]


def test_design_refuses_documents_of_two_looks_skipped_looks_and_looks_that_were_not_registered():
    effects, mass, eligibility = tables()
    with pytest.raises(DataError, match="came in looks of 12, 24, 48, and those registered are 10, 24, 48"):
        Design.of(effects, mass, eligibility, config=replace(CONFIG, looks=(10, 24, 48)))
    with pytest.raises(DataError, match="those registered are none"):
        Design.of(effects, mass, eligibility, config=replace(CONFIG, looks=None))
    mine = (effects["cell"] == "mask:older@attn.late") & (effects["split"] == "confirm")
    for wrong in (effects[~(mine & (effects["look"] == 2))], effects.assign(look=effects["look"] + 1 * mine)):
        with pytest.raises(ValueError, match="was measured on the same windows"):
            Design.of(wrong, mass, eligibility, config=CONFIG)
