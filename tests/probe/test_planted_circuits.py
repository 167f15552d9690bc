"""Models whose causal sites are known by construction: the probe's grid and statistics find them, and only them."""

from dataclasses import dataclass

import pandas as pd
import pytest

from attnres.depth.families import grid
from attnres.interventions.ids import Intervention, Spec, parse
from attnres.probe.subjects import Subject
from attnres.statistics.cells import cell_table
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.dissociation import dissociation_table
from attnres.statistics.rank_correlation import spearman_table
from tests.probe.in_memory import measure_cells
from tests.probe.planted_models import Planted, backup, duplicated_source, norm_trap, one_attention, one_mlp, two_mlps

STATISTICS = StatisticsConfig(sign_flips=999, bootstrap=200)


@dataclass(frozen=True)
class Probed:
    """A planted model and what the probe says of it."""

    planted: Planted
    cells: pd.DataFrame
    dissociation: pd.DataFrame
    spearman: pd.DataFrame

    @property
    def verdicts(self) -> dict[str, str]:
        return dict(zip(self.cells["cell"], self.cells["verdict"], strict=True))


def probed(planted: Planted, *more: str) -> Probed:
    """The grid of masks on a planted model, and `more` cells by their ids."""
    subject = Subject("attnres", planted.model)
    specs: list[Spec] = [Intervention("mask", cell.family, cell.sublayer, cell.band) for cell in grid(subject.plan)]
    specs += [parse(text) for text in more]
    measured = measure_cells(subject, specs, planted.windows, 64)
    design = Design.of(measured.effects, measured.mass, measured.eligibility)
    spearman = spearman_table(design, STATISTICS)
    dissociation = dissociation_table(design, spearman, STATISTICS)
    return Probed(planted, cell_table(design, STATISTICS), dissociation, spearman)


@pytest.fixture(scope="module")
def everything() -> list[Probed]:
    planted = [
        *(one_mlp(seed, layer) for seed, layer in enumerate((1, 3, 5))),
        *(two_mlps(10 + layer, layer, family) for layer, family in ((1, "current"), (3, "recent"), (5, "older"))),
        one_attention(22, 2),
        duplicated_source(33, 3),
        *(norm_trap(40 + seed) for seed in range(2)),
    ]
    return [probed(one) for one in planted]


def test_planted_sites_are_causal_and_others_are_not(everything):
    judged = [
        (verdict, cell in one.planted.causal)
        for one in everything
        for cell, verdict in one.verdicts.items()
        if verdict != "excluded"
    ]
    detected = sum(verdict == "causal" for verdict, planted in judged if planted)
    sites = sum(planted for _, planted in judged)
    others = [verdict for verdict, planted in judged if not planted]
    counts = pd.Series(others).value_counts().to_dict()
    print(
        f"\n{len(everything)} models: {detected} of {sites} planted sites causal; {len(others)} other cells: {counts}"
    )
    assert sites == sum(len(one.planted.causal) for one in everything)
    assert detected == sites
    assert others.count("causal") <= 0.05 * len(others)


def test_mass_without_a_role_is_null(everything):
    """A vector in a subspace that nothing reads: masking it changes what the norm returns, and no effect follows."""
    with_role = [one for one in everything if one.planted.without_role]
    assert len(with_role) == 3
    for one in with_role:
        cells = one.cells.set_index("cell")
        for cell in one.planted.without_role:
            assert cells.loc[cell, "verdict"] == "negligible", one.planted.name
            assert cells.loc[cell, "appreciable"]
            assert cells.loc[cell, "displacement"] > 0.05
            (site,) = one.planted.causal
            assert cells.loc[cell, "mass"] > 2 * cells.loc[site, "mass"] or "early" in cell


def test_duplicated_source_is_excluded_and_only_its_reader_is_causal(everything):
    for one in (one for one in everything if one.planted.name.startswith("duplicated")):
        cells = one.cells.set_index("cell")
        for band in ("early", "mid", "late"):
            assert cells.loc[f"mask:current@attn.{band}", "verdict"] == "excluded"
            assert "duplicate" in cells.loc[f"mask:current@attn.{band}", "reason"]
        assert {cell for cell, verdict in one.verdicts.items() if verdict == "causal"} == one.planted.causal


def test_norm_trap_is_named_by_the_norm_aware_share(everything):
    traps = [one for one in everything if one.planted.name == "norm_trap"]
    assert len(traps) == 2
    for one in traps:
        row = one.dissociation.set_index("sublayer").loc["mlp"]
        assert row["verdict"] == "dissociated"
        assert row["effect_cell"] in one.planted.causal and row["mass_cell"] not in one.planted.causal
        assert "norm_share" in row["predicted_by"].split(", ")
        rho = one.spearman.set_index(["sublayer", "metric"])["rho"]
        assert rho["mlp", "mass"] < 0 < rho["mlp", "norm_share"]


def test_source_with_a_backup_is_causal_only_together_with_it():
    """What a single mask cannot see: two sources hold the answer, and neither is needed while the other is there."""
    both = "mask:embedding@mlp.late+mask:older@mlp.late"
    verdicts = probed(backup(50), both).verdicts
    assert {verdicts["mask:embedding@mlp.late"], verdicts["mask:older@mlp.late"]} == {"negligible"}
    assert [cell for cell, verdict in verdicts.items() if verdict == "causal"] == [both]
