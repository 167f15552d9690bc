"""Figures of the report: what they hold, that they come out the same, that no text breaks them."""

import itertools
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from attnres.depth.places import BANDS
from attnres.errors import DataError
from attnres.report import words
from attnres.report.figures import cells as figures_cells
from attnres.report.figures import doses as figures_doses
from attnres.report.figures import effects as figures_effects
from attnres.report.figures import forest as figures_forest
from attnres.report.figures import maps as figures
from attnres.report.figures import plotting
from tests.tables.fake_folder import MARGIN, MODELS, cells_table, contrasts_table, routing_table

ROUTING, CELLS = routing_table(), cells_table()
CONTRASTS = contrasts_table(CELLS)
LIMIT = plotting.effect_limit(CELLS, MARGIN)
HOSTILE = "</svg><script>x</script>--> $\\frac{$ \x00\x1b"


def of(table, model):
    return table[table["model"] == model]


def texts(figure):
    return [t.get_text() for axis in figure.axes for t in axis.texts]


def drawn_weights(figure):
    """Values of the two triangles of a heatmap, without its colour bar."""
    meshes = [mesh for axis in figure.axes[:2] for mesh in axis.collections]
    return np.sort(np.concatenate([np.ma.compressed(mesh.get_array()) for mesh in meshes]))


@pytest.mark.parametrize("model", MODELS)
def test_routing_heatmap_draws_each_weight_once(model):
    reads = of(ROUTING, model)
    figure = figures.routing_heatmap(reads, model)
    np.testing.assert_array_equal(drawn_weights(figure), np.sort(reads["weight"]))
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels == ["emb", "1", "2", "3", "current"]
    assert ("final" in [t.get_text() for t in figure.axes[0].get_yticklabels()]) == (model != "recency")


def test_routing_heatmap_puts_the_current_state_in_a_column_of_its_own():
    reads = of(ROUTING, "recency")
    figure = figures.routing_heatmap(reads, "recency")
    newest = [m for a in figure.axes[:2] for m in a.collections if m.get_coordinates()[0, 0, 0] > 4]
    assert len(newest) == 2
    drawn = np.concatenate([np.ma.compressed(m.get_array()) for m in newest])
    np.testing.assert_array_equal(np.sort(drawn), np.sort(reads[reads["role"] == "current"]["weight"]))


def test_routing_heatmap_hatches_a_read_of_one_source():
    hatched = [p for a in figures.routing_heatmap(of(ROUTING, "attnres"), "x").axes for p in a.patches if p.get_hatch()]
    assert [p.get_xy() for p in hatched] == [(0, 0)]


def test_routing_heatmap_of_many_sources_stays_readable():
    reads = of(ROUTING, "uniform")
    wide = reads.assign(source=reads["source"] * 20)
    labels = [t.get_text() for t in figures.routing_heatmap(wide, "full").axes[0].get_xticklabels()]
    assert 5 < len(labels) <= 14


def test_analytic_lines_show_every_read_that_has_a_choice():
    for model, groups in (("recency", 2), ("uniform", 1)):
        reads = of(ROUTING, model)
        top, bottom = figures.analytic_lines(reads, model).axes
        measured = [line for line in top.lines if "measured" in line.get_label()]
        assert len(measured) == groups
        chosen = reads[reads["num_sources"] > 1]
        assert sum(len(line.get_xdata()) for line in measured) == len(chosen)
        assert len(bottom.lines[0].get_xdata()) == chosen["read"].nunique()
        assert "limit 1e−6" in [t.get_text() for t in bottom.texts]


@pytest.mark.parametrize("model", MODELS)
def test_effect_map_fills_each_cell_and_says_why_one_is_excluded(model):
    cells = of(CELLS, model)
    figure = figures_effects.effect_map(cells, model, LIMIT, MARGIN)
    shown = texts(figure)
    excluded = [w for w in shown if w.startswith("excluded:")]
    assert len(excluded) == (~cells["eligible"]).sum() > 0
    assert all("the family exists" in w.replace("\n", " ") for w in excluded)
    for row in cells[cells["eligible"]].to_dict("records"):
        assert words.number(row["dnll"]) in shown
        assert f"[{words.number(row['dnll_lo'])}, {words.number(row['dnll_hi'])}]" in shown
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]
    assert len(boxes) == 24


def test_effect_map_gives_one_effect_one_colour_in_every_model():
    colours = set()
    for model in MODELS:
        cells = of(CELLS, model)
        chosen = cells[cells["cell"] == "mask:current@attn.late"].assign(dnll=0.3)
        figure = figures_effects.effect_map(chosen, model, LIMIT, MARGIN)
        colours.add(to_hex(figure.axes[0].patches[0].get_facecolor()))
    assert len(colours) == 1


def layers(count=28):
    """The cells of `attnres` repeated over layers; early layers have no older family."""
    repeated = [of(CELLS, "attnres").assign(band=f"layer{k}") for k in reversed(range(count))]
    return pd.concat(repeated).drop_duplicates(["family", "sublayer", "band"])


def test_place_map_shows_each_layer_in_order_with_a_sign_for_its_verdict():
    cells = layers()
    figure = figures_effects.place_map(cells, "attnres", LIMIT, MARGIN)
    assert figure.get_size_inches()[0] < 8
    strips, curves = figure.axes[0:4:2], figure.axes[1:4:2]
    assert [a.get_title(loc="left") for a in strips] == ["attention", "MLP"]
    signs = [t.get_text() for a in strips for t in a.texts]
    used = cells[cells["eligible"]]
    assert sorted(signs) == sorted(plotting.VERDICT_SIGNS[v] for v in used["verdict"])
    marks = [line for a in curves for line in a.lines if line.get_marker() != "None"]
    assert len(marks) == len(used)
    assert [t.get_text() for t in figure.axes[3].get_xticklabels()] == [str(k) for k in range(28)]


def test_places_are_ordered_from_the_input_to_the_output():
    places = ["layer10", "late", "read3", "layer9", "early", "block1", "elsewhere"]
    assert plotting.ordered_places(places) == ["early", "late", "elsewhere", "layer9", "layer10", "block1", "read3"]


@pytest.mark.parametrize(
    ("name", "factor"),
    [("mask", 0.0), ("scale:0.5", 0.5), ("scale:2", 2.0), ("scale:x", None), ("matched", None), ("scale:1e999", None)],
)
def test_dose_is_the_factor_on_the_odds(name, factor):
    assert plotting.dose(name) == factor


def test_ink_can_be_read_on_every_colour_of_the_effect_scale():
    for colour in matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, 256)):
        light, dark = plotting.luminance(colour), plotting.luminance(plotting.ink_on(colour))
        assert (max(light, dark) + 0.05) / (min(light, dark) + 0.05) >= 4.5


def test_colours_of_series_and_families_stand_out_on_white():
    colours = [c for c, _ in plotting.SERIES] + list(plotting.FAMILY_COLOURS.values())
    assert all(1.05 / (plotting.luminance(c) + 0.05) >= 3 for c in colours)
    assert all(1.05 / (plotting.luminance(c) + 0.05) >= 4.5 for c in (plotting.INK, plotting.GREY))
    assert len(set(plotting.FAMILY_MARKERS.values())) == len(plotting.FAMILY_MARKERS)
    assert len({marker for _, marker in plotting.SERIES}) == len(plotting.SERIES)


def test_mass_effect_scatter_marks_each_eligible_cell_under_each_measure():
    cells = of(CELLS, "attnres")
    figure = figures_cells.mass_effect_scatter(cells, "attnres", MARGIN)
    axes = np.reshape(figure.axes, (2, 3))
    for row, sublayer in zip(axes, ("attn", "mlp"), strict=True):
        used = cells[cells["eligible"] & (cells["sublayer"] == sublayer)]
        for axis, column in zip(row, figures_cells.MEASURES, strict=True):
            marks = [line for line in axis.lines if line.get_marker() in plotting.FAMILY_MARKERS.values()]
            assert sorted(float(line.get_xdata()[0]) for line in marks) == sorted(used[column])
            assert sorted(t.get_text() for t in axis.texts) == sorted(b[0].upper() for b in used["band"])
            assert axis.get_title(loc="left").startswith("Spearman ρ = ")


def doses():
    """`attnres` under four factors: an effect that falls to zero at x = 1."""
    cells = of(CELLS, "attnres")
    by_factor = []
    for factor in (0.0, 0.5, 2.0):
        name = "mask" if factor == 0 else f"scale:{factor:g}"
        numbers = {c: cells[c] * (1 - factor) for c in ("dnll", "dnll_lo", "dnll_hi")}
        by_factor.append(cells.assign(intervention=name, **numbers))
    return pd.concat(by_factor, ignore_index=True)


def test_dose_response_draws_a_line_per_family_through_the_clean_run():
    cells = doses()
    figure = figures_doses.dose_response(cells, "attnres", MARGIN)
    panels = cells[cells["eligible"]].groupby(["sublayer", "band"])
    assert len(figure.axes) == len(panels) == 6
    for axis, (sublayer, band) in zip(figure.axes, itertools.product(("attn", "mlp"), BANDS), strict=True):
        drawn = panels.get_group((sublayer, band))
        curves = [line for line in axis.lines if len(line.get_xdata()) == 3 and line.get_marker() == "None"]
        assert len(curves) == drawn["family"].nunique()
        assert [line for line in axis.lines if line.get_marker() == "x"][0].get_xydata().tolist() == [[0, 0]]
    assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == ["0.5", "1", "2", "0"]


def test_read_ladder_orders_the_rungs_and_starts_from_the_clean_run():
    one = of(CELLS, "attnres").query("family == 'current'").assign(family="read")
    cells = pd.concat([one.assign(intervention=k) for k in ("schedule:10", "uniform", "mean", "resample")])
    figure = figures_doses.read_ladder(cells, "attnres", MARGIN)
    assert len(figure.axes) == 2
    names = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert names == ["clean", "mean", "resample", "uniform", "schedule:10"]


def test_trajectory_has_a_point_for_each_step():
    cells = pd.concat([of(CELLS, "attnres").assign(step=s) for s in (10, 100, 1000)])
    figure = figures_doses.trajectory(cells, "run", MARGIN)
    marks = [line for a in figure.axes for line in a.lines if line.get_marker() not in ("None",)]
    assert len(marks) == 3 * of(CELLS, "attnres")["eligible"].sum()
    assert {a.get_xscale() for a in figure.axes} == {"log"}
    near = pd.concat([of(CELLS, "attnres").assign(step=s) for s in (16, 128, 1024, 1465)])
    axis = figures_doses.trajectory(near, "run", MARGIN).axes[-1]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["16", "128", "", "1465"]


def test_rank_slopegraph_orders_the_cells_by_effect():
    cells = of(CELLS, "attnres")
    axis = figures_cells.rank_slopegraph(cells, "attnres").axes[0]
    count = int(cells["eligible"].sum())
    assert len(axis.lines) == count and len(axis.texts) == 2 * count
    right = sorted((t.get_position()[1], t.get_text()) for t in axis.texts if t.get_position()[0] > 2)
    expected = cells[cells["eligible"]].sort_values("dnll", ascending=False)["dnll"]
    assert [text.split()[-1] for _, text in right] == [words.number(v) for v in expected]


def test_effect_forest_has_a_row_for_each_cell_and_a_mark_for_each_model():
    axis = figures_forest.effect_forest(CELLS, list(MODELS), MARGIN).axes[0]
    assert len(axis.get_yticklabels()) == 24
    marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(marks) == CELLS["eligible"].sum()
    notes = [t.get_text() for t in axis.texts]
    assert "excluded: all" in notes and "excluded: attnres, uniform" in notes
    low, high = axis.get_xlim()
    assert low < CELLS["dnll_lo"].min() and high > CELLS["dnll_hi"].max()


def test_contrast_forest_shows_each_contrast_in_the_colour_of_its_baseline():
    forest = figures_forest.effect_forest(CELLS, list(MODELS), MARGIN).axes[0]
    axis = figures_forest.contrast_forest(CONTRASTS, list(MODELS), MARGIN).axes[0]
    marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(marks) == len(CONTRASTS)
    by_marker = {line.get_marker(): to_hex(line.get_color()) for line in forest.lines if len(line.get_xdata()) == 1}
    assert {line.get_marker(): to_hex(line.get_color()) for line in marks}.items() <= by_marker.items()


def test_figures_of_part_of_a_grid_are_drawn():
    older = CELLS[CELLS["family"] == "older"]
    assert len(figures_forest.effect_forest(older, list(MODELS), MARGIN).axes[0].get_yticklabels()) == 6
    assert len(figures_effects.effect_map(of(older, "attnres"), "x", LIMIT, MARGIN).axes[0].get_yticklabels()) == 1
    alone = of(older, "attnres").query("eligible").head(1)
    title = figures_cells.mass_effect_scatter(alone, "x", MARGIN).axes[0].get_title(loc="left")
    assert title == "Spearman ρ undefined (1 cells)"


def test_figures_of_many_cells_draw_the_largest_and_say_so():
    cells = layers(12).assign(dnll=np.arange(96) / 96.0)
    axis = figures_forest.effect_forest(cells, ["attnres"], MARGIN).axes[0]
    assert len(axis.get_yticklabels()) == figures_forest.MOST_ROWS
    assert axis.get_title(loc="left") == "the 48 cells of the largest values, of 96"
    ranked = figures_cells.rank_slopegraph(cells, "x")
    assert len(ranked.axes[0].lines) == figures_cells.MOST_RANKED and "largest effects" in ranked.get_suptitle()


def test_effect_forest_sets_interventions_side_by_side():
    cells = doses()
    axis = figures_forest.effect_forest(cells, ["mask", "scale:2"], MARGIN, by="intervention").axes[0]
    marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(marks) == cells["eligible"].sum()


def test_to_svg_gives_the_same_text_twice_and_leaves_the_settings_alone():
    before = dict(matplotlib.rcParams)
    one, two = (plotting.to_svg(figures_effects.effect_map(of(CELLS, "uniform"), "u", LIMIT, MARGIN)) for _ in range(2))
    assert one == two and "<!DOCTYPE" not in one
    assert dict(matplotlib.rcParams) == before


def test_figures_survive_hostile_text():
    cells = of(CELLS, "attnres").assign(
        **{c: of(CELLS, "attnres")[c] + HOSTILE for c in ("family", "band", "sublayer", "verdict", "reason")}
    )
    drawn = [
        figures.routing_heatmap(of(ROUTING, "attnres"), HOSTILE),
        figures_effects.effect_map(cells, HOSTILE, LIMIT, MARGIN),
        figures_effects.place_map(cells.assign(band="layer1"), HOSTILE, LIMIT, MARGIN),
        figures_cells.mass_effect_scatter(cells, HOSTILE, MARGIN),
        figures_doses.read_ladder(cells.assign(intervention=f"mean:{HOSTILE}"), HOSTILE, MARGIN),
        figures_doses.dose_response(cells, HOSTILE, MARGIN),
        figures_forest.effect_forest(cells.assign(model=HOSTILE), [HOSTILE], MARGIN),
    ]
    for figure in drawn:
        tree = ElementTree.fromstring(plotting.to_svg(figure))
        assert not [e for e in tree.iter() if e.tag.endswith("script")]


@pytest.mark.parametrize(
    ("draw", "table", "column"),
    [
        (lambda t: figures.routing_heatmap(t, "x"), ROUTING, "role"),
        (lambda t: figures.analytic_lines(t, "x"), ROUTING, "analytic"),
        (lambda t: figures_effects.effect_map(t, "x", LIMIT, MARGIN), CELLS, "dnll_lo"),
        (lambda t: figures_cells.mass_effect_scatter(t, "x", MARGIN), CELLS, "norm_share"),
        (lambda t: figures_effects.place_map(t, "x", LIMIT, MARGIN), CELLS, "verdict"),
        (lambda t: figures_cells.rank_slopegraph(t, "x"), CELLS, "displacement"),
        (lambda t: figures_doses.dose_response(t, "x", MARGIN), CELLS, "intervention"),
        (lambda t: figures_doses.read_ladder(t, "x", MARGIN), CELLS, "band"),
        (lambda t: figures_doses.trajectory(t, "x", MARGIN), CELLS.assign(step=1), "step"),
        (lambda t: figures_forest.effect_forest(t, [], MARGIN), CELLS, "verdict"),
        (lambda t: figures_forest.contrast_forest(t, [], MARGIN), CONTRASTS, "diff"),
    ],
)
def test_figure_names_the_column_that_its_table_lacks(draw, table, column):
    with pytest.raises(DataError, match=f"needs the column '{column}'"):
        draw(table.drop(columns=column))
