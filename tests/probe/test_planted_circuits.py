"""Models whose causal sites are known by construction: the probe's grid and statistics find them, and only them."""

from dataclasses import dataclass

import pandas as pd
import pytest

from attnres.depth.families import FAMILIES, grid
from attnres.interventions.ids import Intervention, Spec, parse
from attnres.probe.subjects import Subject
from attnres.statistics.cells import cell_table
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import Design
from attnres.statistics.dissociation import dissociation_table
from attnres.statistics.rank_correlation import spearman_table
from tests.probe.in_memory import measure_cells
from tests.probe.planted_models import Planted, backup, duplicated_source, norm_trap, one_attention, one_mlp, two_mlps

EXCLUDED = "excluded"
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


def test_mass_without_a_role_is_negligible(everything):
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


def test_keep_finds_that_the_planted_source_alone_is_sufficient():
    for seed, layer in enumerate((1, 3, 5)):
        planted = one_mlp(seed, layer)
        (site,) = planted.causal
        place = site.partition("@")[2]
        verdicts = probed(planted, *(f"keep:{family}@{place}" for family in FAMILIES)).verdicts
        judged = {
            cell: verdict for cell, verdict in verdicts.items() if cell.startswith("keep") and verdict != EXCLUDED
        }
        assert judged.pop(f"keep:embedding@{place}") == "negligible"
        assert set(judged.values()) == {"causal"}, place


def test_keep_misses_neither_of_two_sources_that_back_each_other_up():
    """Necessity alone would call both useless: a mask finds neither, `keep` finds both."""
    cells = [f"{what}:{family}@mlp.late" for what in ("mask", "keep") for family in FAMILIES]
    verdicts = probed(backup(50), *cells[4:]).verdicts
    assert {verdicts[cell] for cell in cells[:4]} == {"negligible"}
    assert {family: verdicts[f"keep:{family}@mlp.late"] for family in FAMILIES} == {
        "embedding": "negligible", "older": "negligible", "recent": "causal", "current": "causal"
    }  # fmt: skip


@pytest.mark.parametrize(("layer", "family"), [(3, "recent"), (5, "older")])
def test_rescue_takes_back_what_the_mask_upstream_took(layer, family):
    """Layer 0's MLP writes what a later one reads from `family`: that path, put back, is all of the effect."""
    planted = two_mlps(10 + layer, layer, family)
    mask, site = "mask:embedding@mlp.early", next(cell for cell in planted.causal if family in cell)
    others = [name for name in FAMILIES if name not in (family, "current")]
    rescues = {name: f"{mask}+{site.replace('mask', 'rescue').replace(family, name)}" for name in (family, *others)}
    cells = probed(planted, *rescues.values()).cells.set_index("cell")
    lost = cells.loc[mask, "dnll"]
    recovered = {
        name: 1 - cells.loc[cell, "dnll"] / lost for name, cell in rescues.items() if cells.loc[cell, "eligible"]
    }
    assert lost > 1 and recovered.pop(family) > 0.99
    # What other sources hold of the token leaks into the lookup through junk.
    assert recovered and max(recovered.values()) < 0.2
