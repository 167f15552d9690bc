"""Motifs, the null of permuted labels, and the study's claims with their verdict against each baseline."""

import numpy as np
import pandas as pd
import pytest

from attnres.probe.claims import baseline_disagreements, has_trained_routing, study_claims
from attnres.probe.dissociation import which_predicts
from attnres.probe.judgement import judge
from attnres.probe.motifs import permutation_null
from tests.probe.probed_tables import QUICK, SLICES, measured

MOTIF, ELSEWHERE = ("embedding", "mlp", "early"), ("embedding", "mlp", "late")
NAME = "mask:embedding@mlp.early"


def motif(judged, cell=NAME, model="attnres"):
    table = judged.motifs
    return table[(table["model"] == model) & (table["cell"] == cell)].iloc[0]


def claims(judged, models=("attnres", "uniform")):
    found = study_claims(judged.cells, judged.contrasts, judged.dissociation, judged.motifs, judged.spearman, [], QUICK)
    assert all(set(row["against"]) in (set(models) - {"attnres"}, set()) for row in found)
    return {row["claim"]: row for row in found}


@pytest.fixture(scope="module")
def learned():
    """A motif that the uniform wrap has not, with a matched control, and the mass of it in both."""
    effect = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): 0.05}
    return judge(*measured(effect, models=("attnres", "uniform", "recency"), controls=[MOTIF]), QUICK)


def test_motif_is_causal_and_exceeds_its_family_and_its_control(learned):
    row = motif(learned)
    assert (row["verdict"], row["matched"], row["others"]) == ("motif", "run", 5)
    assert row["elsewhere_diff"] == pytest.approx(0.3, abs=0.02) and row["matched_diff"] == pytest.approx(
        0.25, abs=0.02
    )
    assert row["p"] == max(row["elsewhere_p"], row["matched_p"]) and row["p_holm"] == pytest.approx(23 * row["p"])
    assert (row["effect_learned"], row["mass_learned"]) == ("learned", "undecided")
    assert (learned.motifs["verdict"] == "motif").sum() == 1
    other = motif(learned, "mask:older@attn.late")
    assert other["matched"] == "not run" and np.isnan(other["matched_p"]) and other["p"] == other["elsewhere_p"]


def test_motif_needs_its_matched_control_and_its_family():
    as_control = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): 0.4}
    assert motif(judge(*measured(as_control, controls=[MOTIF]), QUICK))["verdict"] == "no motif"
    everywhere = {("attnres", piece): 0.3 for piece in SLICES if piece[0] == "embedding"}
    judged = judge(*measured(everywhere, noise=0.005), QUICK)
    assert motif(judged)["causal"] and motif(judged)["verdict"] != "motif"


def test_motif_says_why_a_control_is_missing():
    effects, mass, eligibility = measured({("attnres", MOTIF): 0.3}, controls=[MOTIF])
    gone = eligibility["intervention"] == "matched"
    eligibility.loc[gone, ["eligible", "reason"]] = False, "the family holds over half of the mass"
    judged = judge(effects[effects["intervention"] == "mask"], mass, eligibility, QUICK)
    assert motif(judged)["matched"] == "the family holds over half of the mass"
    assert motif(judged)["verdict"] == "motif"


def test_claims_are_judged_against_each_baseline(learned):
    found = claims(learned, ("attnres", "uniform", "recency"))
    row = found["motif: embedding through early MLPs"]
    assert row["verdict"] == "reproduced" and row["effect_learned"] == "learned"
    assert row["against"] == {"uniform": "reproduced", "recency": "reproduced"}
    training = found["structured routing emerges only when routing was trained"]
    assert training["verdict"] == "reproduced" and set(training["against"].values()) == {"reproduced"}
    older = found["motif: older history through late attention"]
    assert older["verdict"] != "reproduced" and "reproduced" not in older["against"].values()


def test_claims_of_an_inherited_motif_are_not_learned_and_the_baselines_disagree():
    effect = {("attnres", MOTIF): 0.3, ("uniform", MOTIF): 0.3}
    models = ("attnres", "uniform", "recency")
    judged = judge(*measured(effect, models=models, noise=0.004), QUICK)
    found = claims(judged, models)
    row = found["motif: embedding through early MLPs"]
    assert row["verdict"] == "reproduced" and row["effect_learned"] == "inherited"
    assert row["against"] == {"uniform": "not reproduced", "recency": "reproduced"}
    training = found["structured routing emerges only when routing was trained"]
    assert training["verdict"] == "not reproduced" and training["evidence"].startswith("the baselines disagree")
    disagree = baseline_disagreements(judged.contrasts)
    assert disagree["cells"] == {NAME: {"uniform": "equivalent", "recency": "trained larger"}}
    assert "disagree on 1 of 23" in disagree["statement"]


def test_claims_judge_learned_mass_apart_from_inherited_effect():
    effect = {("attnres", MOTIF): 0.3, ("uniform", MOTIF): 0.3}
    judged = judge(*measured(effect, {("attnres", MOTIF): 0.5}, noise=0.004), QUICK)
    row = claims(judged)["motif: embedding through early MLPs"]
    assert (row["effect_learned"], row["mass_learned"]) == ("inherited", "learned")


def test_claims_take_other_controls_as_baselines():
    effect = {("attnres", MOTIF): 0.3, ("same_base_frozen", MOTIF): 0.3}
    models = ("attnres", "uniform", "same_base_frozen", "same_base_uniform")
    training = claims(judge(*measured(effect, models=models), QUICK), models)[
        "structured routing emerges only when routing was trained"
    ]
    assert training["against"] == dict.fromkeys(models[1:], "reproduced") and training["verdict"] == "reproduced"
    assert [has_trained_routing(model) for model in models] == [False, False, True, False]


def test_claims_of_dissociation_hold_against_a_baseline_without_it():
    effect = {(m, s): 0.3 for m in ("attnres", "uniform") for s in (MOTIF, ("embedding", "attn", "early"))}
    largest = {("attnres", ("current", "mlp", "late")): 0.6, ("attnres", ("current", "attn", "late")): 0.6}
    found = claims(judge(*measured(effect, largest), QUICK))
    row = found["mass is not effect: in both sublayers the largest mass is not the largest effect"]
    # Uniform masses are all equal here, so mass and effect coincide there.
    assert row["verdict"] == "reproduced" and row["against"] == {"uniform": "reproduced"}
    assert found["mlp: the slice of largest mass is not the slice of largest effect"]["verdict"] == "reproduced"


def test_which_predicts_names_the_norm_aware_share():
    effect = {("attnres", piece): 0.02 * place for place, piece in enumerate(SLICES)}
    weights = {("attnres", piece): 0.5 - 0.01 * place for place, piece in enumerate(SLICES)}
    effects, mass, eligibility = measured(effect, weights, noise=0.01)
    mass["norm_share"] = 1 - mass["mass"]
    judged = judge(effects, mass, eligibility, QUICK)
    found = which_predicts(judged.spearman, 0.05)
    assert (
        found["better"] == ["norm_share"] and "norm-aware share predicts effect better than mass" in found["statement"]
    )
    row = judged.spearman.set_index(["model", "sublayer", "metric"]).loc[("attnres", "all", "norm_share")]
    assert row["over_mass"] == pytest.approx(2.0, abs=0.1) and 1.5 < row["over_mass_lo"] <= row["over_mass_hi"]
    norm = claims(judged)["mass is not just norm: a norm-aware measure predicts effect no better than mass does"]
    assert norm["verdict"] == "not reproduced"
    alike = judge(effects, mass.assign(norm_share=mass["mass"], displacement=mass["mass"]), eligibility, QUICK).spearman
    assert which_predicts(alike, 0.05)["better"] == which_predicts(alike, 0.05)["worse"] == []
    assert (alike["over_mass_p"].dropna() == 1).all()


def test_permuted_labels_give_no_motif_beyond_the_level(learned):
    effects, *_ = measured({("attnres", MOTIF): 0.3, ("attnres", ELSEWHERE): 0.3}, noise=0.1)
    null = permutation_null(effects, learned.cells, QUICK, 60)
    assert null["cells"] == 23 and null["permutations"] == 60
    assert null["found"] <= 8  # binomial(60, .05) exceeds this once in 140
    assert permutation_null(effects, learned.cells, QUICK, 0)["permutations"] == 0


def test_motifs_of_nothing_are_an_empty_table():
    effects, mass, eligibility = measured()
    judged = judge(effects.iloc[:0], mass, eligibility.assign(eligible=False, reason="empty"), QUICK)
    assert judged.motifs.empty
    assert set(pd.DataFrame(claims(judged).values())["verdict"]) <= {"not tested", "inconclusive", "not reproduced"}
