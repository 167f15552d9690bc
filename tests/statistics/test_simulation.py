"""The simulation of error rates, in a reduced form whose bounds can fail, and its table."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats

from attnres.commands.error_rates import main
from attnres.statistics import error_rates as power
from attnres.statistics import simulation
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.error_rates import Scenario, measure
from attnres.statistics.inference import sign_flip_p
from attnres.statistics.simulation import DISTRIBUTIONS, NoEffect, family_wise

NORMAL, HEAVY, SKEWED, LEFT = DISTRIBUTIONS


def rate(outcome, replicates, distribution=NORMAL, documents=96, chunk=100):
    drawn = outcome(DISTRIBUTIONS[distribution], documents)
    scenario = Scenario(
        name="reduced", kind="shown", distribution=distribution, documents=documents, draw=drawn,
        replicates=replicates, chunk=chunk,
    )  # fmt: skip
    return measure(scenario, replicates).rate


def most(replicates, level=0.05):
    return stats.binom.ppf(0.999, replicates, level) / replicates


@pytest.mark.parametrize("distribution", [NORMAL, SKEWED])
def test_family_wise_error_is_held_over_a_grid(distribution):
    assert rate(family_wise, 200, distribution) <= most(200)
    if distribution == SKEWED:
        assert rate(simulation.student_family_wise, 200, distribution) > most(200)


def test_family_wise_error_is_held_with_several_windows_a_document_and_not_by_window():
    by_window = NoEffect(shared=0.5, windows=8)
    assert rate(partial(family_wise, truth=by_window), 100, documents=60, chunk=50) <= most(100)
    naive = rate(partial(family_wise, truth=replace(by_window, unit="window")), 10, documents=60, chunk=10)
    assert naive > most(10)


def test_detection_of_a_small_effect_with_512_documents():
    found = rate(simulation.detection, 60, documents=512, chunk=30)
    assert found >= stats.binom.ppf(0.001, 60, 0.92) / 60


@pytest.mark.parametrize("where", ["dnll", "kl"])
def test_null_at_the_margin_is_rare(where):
    level = rate(lambda draw, n: simulation.negligible_at_margin(draw, n, where), 2000, SKEWED, chunk=1000)
    assert 0.02 <= level <= most(2000)


def test_dissociation_holds_level_and_has_power():
    assert rate(lambda draw, n: simulation.dissociation(draw, n, pilot=32), 100) <= most(100)
    assert rate(lambda draw, n: simulation.dissociation(draw, n, pilot=64, effect=0.8), 20) >= 0.9


def test_motifs_hold_level_at_either_door_and_are_found():
    # Cells as their family elsewhere: every comparison with a control passes, so this one alone holds the level.
    alike = rate(lambda draw, n: simulation.motif(draw, n, "alike"), 200)
    assert 0 < alike <= most(200)
    assert rate(lambda draw, n: simulation.motif(draw, n, "controlled"), 200) <= most(200)
    assert rate(lambda draw, n: simulation.motif(draw, n, "planted"), 30, documents=512) >= 0.8


def test_what_predicts_effect_holds_level_and_is_found():
    assert rate(simulation.ranking, 100, documents=64) <= most(100)
    assert rate(lambda draw, n: simulation.ranking(draw, n, better=True), 10, documents=64) == 1


def test_flip_p_decides_as_all_of_the_flips_do():
    rng, config = np.random.default_rng(0), StatisticsConfig()
    values = rng.normal(size=(60, 300)) + 0.3
    staged, whole = simulation.flip_p(values, config, ((99, 0.06), (999, 0.01))), sign_flip_p(values, 9999, 0)
    small = whole <= 0.05 / 24
    assert 10 < small.sum() < 290
    assert (staged[small] == whole[small]).all() and (staged[~small] > 0.05 / 24).all()


def test_measure_does_not_depend_on_how_many_are_asked_for_beyond_whole_chunks():
    scenario = power.scenarios()[0]
    small = replace(scenario, draw=simulation.negligible_at_margin(DISTRIBUTIONS[NORMAL], 20), documents=20, chunk=50)
    counts = [measure(small, replicates).count for replicates in (50, 100, 50)]
    assert counts[0] == counts[2] <= counts[1]


def test_run_writes_its_table_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    draw = simulation.negligible_at_margin(DISTRIBUTIONS[NORMAL], 20)
    null = Scenario(
        name="null", kind="error", distribution=NORMAL, documents=20, draw=draw, replicates=4000, chunk=1000
    )  # fmt: skip
    few = [null, replace(null, name="same", kind="shown", replicates=50, chunk=50)]
    monkeypatch.setattr(power, "scenarios", lambda: few[:1])
    power.run(tmp_path, full=True)
    monkeypatch.setattr(power, "scenarios", lambda: few)
    new = []
    rates = power.run(tmp_path, full=True, progress=new.append)
    assert [found.scenario for found in new] == ["same"] and len(rates) == 2
    stored = json.loads((tmp_path / "power.json").read_text())
    assert stored["full"] and [row["scenario"] for row in stored["rates"]] == ["null", "same"]
    first = rates[0]
    bound = stats.beta.ppf(0.99, first.count + 1, 4000 - first.count)
    assert first.high == pytest.approx(bound) and first.met == (bound <= 0.06)
    assert f"| {first.rate:.4f} |" in (tmp_path / "power.md").read_text()
    assert main(["--full", "--out", str(tmp_path)]) == (0 if first.met else 5)
    assert "| null | normal | 20 | 4000 |" in capsys.readouterr().out


def test_scenarios_are_told_apart():
    found = power.scenarios()
    assert len({(s.name, s.distribution, s.documents) for s in found}) == len(found)
