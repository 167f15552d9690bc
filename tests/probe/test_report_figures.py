"""Figures of the report: what they hold, that they come out the same, that no text breaks them."""

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from attnres.errors import DataError
from attnres.probe import figures, figures_cells, plotting
from tests.probe.synthetic_tables import MARGIN, MODELS, cells_table, contrasts_table, routing_table

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
    figure = figures.effect_map(cells, model, LIMIT, MARGIN)
    words = texts(figure)
    excluded = [w for w in words if w.startswith("excluded:")]
    assert len(excluded) == (~cells["eligible"]).sum() > 0
    assert all("the family exists" in w.replace("\n", " ") for w in excluded)
    for row in cells[cells["eligible"]].to_dict("records"):
        assert plotting.number(row["dnll"]) in words
        assert f"[{plotting.number(row['dnll_lo'])}, {plotting.number(row['dnll_hi'])}]" in words
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]
    assert len(boxes) == 24


def test_effect_map_gives_one_effect_one_colour_in_every_model():
    colours = set()
    for model in MODELS:
        cells = of(CELLS, model)
        chosen = cells[cells["cell"] == "mask:current@attn.late"].assign(dnll=0.3)
        figure = figures.effect_map(chosen, model, LIMIT, MARGIN)
        colours.add(to_hex(figure.axes[0].patches[0].get_facecolor()))
    assert len(colours) == 1


def test_effect_map_of_single_layers_fits():
    layers = [of(CELLS, "attnres").assign(band=f"layer{k:02d}") for k in range(28)]
    cells = pd.concat(layers).drop_duplicates(["family", "sublayer", "band"])
    figure = figures.effect_map(cells, "attnres", LIMIT, MARGIN)
    assert figure.get_size_inches()[0] < 12
    assert texts(figure) == ["attention", "MLP"]


def test_mass_effect_scatter_marks_each_eligible_cell_in_both_panels():
    cells = of(CELLS, "attnres")
    figure = figures_cells.mass_effect_scatter(cells, "attnres", MARGIN)
    left, right = figure.axes
    for axis, column in ((left, "mass"), (right, "norm_share")):
        marks = [line for line in axis.lines if line.get_marker() in ("o", "s")]
        shown = sorted(float(line.get_xdata()[0]) for line in marks)
        assert shown == sorted(cells[cells["eligible"]][column])
        letters = [t.get_text() for t in axis.texts]
        assert sorted(letters) == sorted(b[0].upper() for b in cells[cells["eligible"]]["band"])
    assert left.get_title(loc="left").startswith("Spearman ρ = ")


def test_rank_slopegraph_orders_the_cells_by_effect():
    cells = of(CELLS, "attnres")
    axis = figures_cells.rank_slopegraph(cells, "attnres").axes[0]
    count = int(cells["eligible"].sum())
    assert len(axis.lines) == count and len(axis.texts) == 2 * count
    right = sorted((t.get_position()[1], t.get_text()) for t in axis.texts if t.get_position()[0] > 2)
    expected = cells[cells["eligible"]].sort_values("dnll", ascending=False)["dnll"]
    assert [text.split()[-1] for _, text in right] == [plotting.number(v) for v in expected]


def test_effect_forest_has_a_row_for_each_cell_and_a_mark_for_each_model():
    axis = figures_cells.effect_forest(CELLS, list(MODELS), MARGIN).axes[0]
    assert len(axis.get_yticklabels()) == 24
    marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(marks) == CELLS["eligible"].sum()
    notes = [t.get_text() for t in axis.texts]
    assert "excluded: all models" in notes and "excluded: attnres, uniform" in notes
    low, high = axis.get_xlim()
    assert low < CELLS["dnll_lo"].min() and high > CELLS["dnll_hi"].max()


def test_contrast_forest_shows_each_contrast_in_the_colour_of_its_baseline():
    forest = figures_cells.effect_forest(CELLS, list(MODELS), MARGIN).axes[0]
    axis = figures_cells.contrast_forest(CONTRASTS, list(MODELS), MARGIN).axes[0]
    marks = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(marks) == len(CONTRASTS)
    by_marker = {line.get_marker(): to_hex(line.get_color()) for line in forest.lines if len(line.get_xdata()) == 1}
    assert {line.get_marker(): to_hex(line.get_color()) for line in marks}.items() <= by_marker.items()


def test_figures_of_part_of_a_grid_are_drawn():
    part = CELLS[CELLS["family"] == "older"]
    assert len(figures_cells.effect_forest(part, list(MODELS), MARGIN).axes[0].get_yticklabels()) == 6
    assert len(figures.effect_map(of(part, "attnres"), "x", LIMIT, MARGIN).axes[0].get_yticklabels()) == 1
    alone = of(part, "attnres").query("eligible").head(1)
    title = figures_cells.mass_effect_scatter(alone, "x", MARGIN).axes[0].get_title(loc="left")
    assert title == "Spearman ρ undefined (1 cells)"


def test_to_svg_gives_the_same_text_twice_and_leaves_the_settings_alone():
    before = dict(matplotlib.rcParams)
    one, two = (plotting.to_svg(figures.effect_map(of(CELLS, "uniform"), "u", LIMIT, MARGIN)) for _ in range(2))
    assert one == two and "<!DOCTYPE" not in one
    assert dict(matplotlib.rcParams) == before


def test_figures_survive_hostile_text():
    cells = of(CELLS, "attnres").assign(
        **{c: of(CELLS, "attnres")[c] + HOSTILE for c in ("family", "band", "sublayer", "verdict", "reason")}
    )
    drawn = [
        figures.routing_heatmap(of(ROUTING, "attnres"), HOSTILE),
        figures.effect_map(cells, HOSTILE, LIMIT, MARGIN),
        figures_cells.mass_effect_scatter(cells, HOSTILE, MARGIN),
        figures_cells.effect_forest(cells.assign(model=HOSTILE), [HOSTILE], MARGIN),
    ]
    for figure in drawn:
        tree = ElementTree.fromstring(plotting.to_svg(figure))
        assert not [e for e in tree.iter() if e.tag.endswith("script")]


@pytest.mark.parametrize(
    ("draw", "table", "column"),
    [
        (lambda t: figures.routing_heatmap(t, "x"), ROUTING, "role"),
        (lambda t: figures.analytic_lines(t, "x"), ROUTING, "analytic"),
        (lambda t: figures.effect_map(t, "x", LIMIT, MARGIN), CELLS, "dnll_lo"),
        (lambda t: figures_cells.mass_effect_scatter(t, "x", MARGIN), CELLS, "norm_share"),
        (lambda t: figures_cells.rank_slopegraph(t, "x"), CELLS, "mass"),
        (lambda t: figures_cells.effect_forest(t, [], MARGIN), CELLS, "verdict"),
        (lambda t: figures_cells.contrast_forest(t, [], MARGIN), CONTRASTS, "diff"),
    ],
)
def test_figure_names_the_column_that_its_table_lacks(draw, table, column):
    with pytest.raises(DataError, match=f"needs the column '{column}'"):
        draw(table.drop(columns=column))
