"""Motifs, the null of permuted labels, and the study's claims with their verdict against each baseline."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from attnres.statistics.claims import baseline_disagreements, study_claims
from attnres.statistics.design import Design
from attnres.statistics.judgement import judge
from attnres.statistics.motifs import motif_table, permutation_null
from attnres.statistics.rank_correlation import which_predicts
from attnres.tables.roles import Roles
from tests.statistics.probed_tables import QUICK, SLICES, measured, model_rows

MOTIF, ELSEWHERE = ("embedding", "mlp", "early"), ("embedding", "mlp", "late")
NAME = "mask:embedding@mlp.early"


def motif(judged, cell=NAME, model="attnres"):
    table = judged.motifs
    return table[(table["model"] == model) & (table["cell"] == cell)].iloc[0]


def judged_of(effect=None, mass=None, models=("attnres", "uniform"), trainable=None, **options):
    """Judged tables, and the roles of their models."""
    rows = model_rows(models, **trainable or {})
    return judge(*measured(effect, mass, models, **options), QUICK, rows), Roles.of(rows)


def claims(judged, roles):
    found = study_claims(judged, [], QUICK, roles)
    assert all(set(row["against"]) in (set(roles.baselines + roles.nulls), set()) for row in found)
    assert all(set(row["recurs"]) == set(roles.trained_too) for row in found)
    return {row["claim"]: row for row in found}


@pytest.fixture(scope="module")
def learned():
    """A motif that the uniform wrap has not, with a matched control, and the mass of it in both."""
    effect = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): 0.05}
    return judged_of(effect, models=("attnres", "uniform", "recency"), controls=[MOTIF])


def test_motif_is_causal_and_exceeds_its_family_and_its_control(learned):
    judged, _ = learned
    row = motif(judged)
    assert (row["verdict"], row["matched"], row["others"]) == ("motif", "run", 5)
    assert row["elsewhere_diff"] == pytest.approx(0.3, abs=0.02) and row["matched_diff"] == pytest.approx(
        0.25, abs=0.02
    )
    assert row["p"] == max(row["elsewhere_p"], row["matched_p"]) and row["p_holm"] == pytest.approx(23 * row["p"])
    assert (row["effect_learned"], row["mass_learned"]) == ("learned", "undecided")
    assert (judged.motifs["verdict"] == "motif").sum() == 1
    other = motif(judged, "mask:older@attn.late")
    assert other["matched"] == "not run" and np.isnan(other["matched_p"]) and other["p"] == other["elsewhere_p"]


def test_motif_needs_its_matched_control_and_its_family():
    as_control = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): 0.4}
    assert motif(judged_of(as_control, controls=[MOTIF])[0])["verdict"] == "no motif"
    everywhere = {("attnres", piece): 0.3 for piece in SLICES if piece[0] == "embedding"}
    judged, _ = judged_of(everywhere, noise=0.005, controls=[MOTIF])
    assert motif(judged)["causal"] and motif(judged)["verdict"] != "motif"


def test_motif_is_not_called_one_where_its_control_is_missing():
    effects, mass, eligibility = measured({("attnres", MOTIF): 0.3}, controls=[MOTIF])
    gone = eligibility["intervention"] == "matched"
    eligibility.loc[gone, ["eligible", "reason"]] = False, "the family holds over half of the mass"
    models = model_rows(("attnres", "uniform"))
    judged = judge(effects[effects["intervention"] == "mask"], mass, eligibility, QUICK, models)
    assert motif(judged)["matched"] == "the family holds over half of the mass"
    assert motif(judged)["verdict"] == "uncontrolled"
    row = claims(judged, Roles.of(models))["motif: embedding through early MLPs"]
    assert row["verdict"] == "inconclusive" and "no matched control" in row["evidence"]
    uncontrolled, roles = judged_of({("attnres", MOTIF): 0.3})
    assert motif(uncontrolled)["verdict"] == "uncontrolled"
    training = claims(uncontrolled, roles)["structured routing emerges only when routing was trained"]
    assert (
        training["verdict"] == "inconclusive" and "0 motifs (and 1 without a matched control)" in training["evidence"]
    )


def test_motif_is_learned_or_not_only_against_a_wrap_with_the_same_sources():
    effect = {("attnres", MOTIF): 0.3}
    rows = model_rows(("attnres", "uniform"))
    rows[0]["convention"] = "full"
    judged = judge(*measured(effect, controls=[MOTIF]), QUICK, rows)
    assert Roles.of(rows).shared == () and Roles.of(rows).uniform is None
    assert motif(judged)["effect_learned"] == motif(judged)["mass_learned"] == "not tested"
    training = claims(judged, Roles.of(rows))["structured routing emerges only when routing was trained"]
    assert training["verdict"] == "inconclusive" and training["against"] == {"uniform": "reproduced"}


def test_claims_are_judged_against_each_baseline(learned):
    found = claims(*learned)
    row = found["motif: embedding through early MLPs"]
    assert row["verdict"] == "reproduced" and row["effect_learned"] == "learned"
    assert row["against"] == {"uniform": "reproduced", "recency": "reproduced"}
    training = found["structured routing emerges only when routing was trained"]
    assert training["verdict"] == "reproduced" and set(training["against"].values()) == {"reproduced"}
    older = found["motif: older history through late attention"]
    assert older["verdict"] != "reproduced" and "reproduced" not in older["against"].values()


def test_claims_of_an_inherited_motif_are_not_learned_and_the_baselines_disagree():
    effect = {("attnres", MOTIF): 0.3, ("uniform", MOTIF): 0.3}
    judged, roles = judged_of(effect, models=("attnres", "uniform", "recency"), noise=0.004, controls=[MOTIF])
    found = claims(judged, roles)
    row = found["motif: embedding through early MLPs"]
    assert row["verdict"] == "reproduced" and row["effect_learned"] == "inherited"
    assert row["against"] == {"uniform": "not reproduced", "recency": "reproduced"}
    training = found["structured routing emerges only when routing was trained"]
    assert training["verdict"] == "not reproduced" and training["evidence"].startswith("the baselines disagree")
    disagree = baseline_disagreements(judged.contrasts, roles)
    assert disagree["cells"] == {NAME: {"uniform": "equivalent", "recency": "trained larger"}}
    assert "disagree on 1 of 24" in disagree["statement"] and "(uniform)" in disagree["statement"]


def test_claims_judge_learned_mass_apart_from_inherited_effect():
    effect = {("attnres", MOTIF): 0.3, ("uniform", MOTIF): 0.3}
    found = claims(*judged_of(effect, {("attnres", MOTIF): 0.5}, noise=0.004))
    row = found["motif: embedding through early MLPs"]
    assert (row["effect_learned"], row["mass_learned"]) == ("inherited", "learned")


def test_roles_go_by_what_was_trained_and_not_by_names():
    names = ("attnres", "recency", "uniform", "frozen", "idle", "untrained")
    roles = Roles.of(model_rows(names, frozen="routing", idle="body"))
    assert roles.baselines == ("recency", "uniform", "idle") and roles.nulls == ("untrained",)
    assert roles.trained_too == ("frozen",) and roles.shared == ("uniform", "idle")


def test_claims_that_recur_in_a_control_with_trained_routing_are_not_refuted_by_it():
    effect = {(model, MOTIF): 0.3 for model in ("attnres", "frozen")}
    effect |= {(model, ("embedding", "attn", "early")): 0.3 for model in ("attnres", "frozen")}
    pair = [("current", "mlp", "late"), ("current", "attn", "late")]
    largest = {(model, piece): 0.6 for model in ("attnres", "frozen") for piece in pair}
    models, trained = ("attnres", "uniform", "frozen", "idle"), {"frozen": "routing", "idle": "body"}
    judged, roles = judged_of(effect, largest, models, trained, controls=[MOTIF])
    found = claims(judged, roles)
    for claim in (
        "motif: embedding through early MLPs",
        "structured routing emerges only when routing was trained",
        "mass is not effect: in both sublayers the largest mass is not the largest effect",
        "mlp: the slice of largest mass is not the slice of largest effect",
    ):
        assert found[claim]["verdict"] == "reproduced", claim
        assert set(found[claim]["against"]) == {"uniform", "idle"}, claim
        assert found[claim]["against"]["uniform"] == "reproduced", claim
        assert found[claim]["recurs"] == {"frozen": "reproduced"}, claim
    # The same effects in the control are no disagreement between baselines.
    assert baseline_disagreements(judged.contrasts, roles)["cells"] == {}
    alone, roles = judged_of({("attnres", MOTIF): 0.3}, models=models, trainable=trained, controls=[MOTIF])
    row = claims(alone, roles)["motif: embedding through early MLPs"]
    assert row["verdict"] == "reproduced" and row["recurs"]["frozen"] != "reproduced"


def test_claims_of_dissociation_hold_against_a_baseline_without_it():
    effect = {(m, s): 0.3 for m in ("attnres", "uniform") for s in (MOTIF, ("embedding", "attn", "early"))}
    largest = {("attnres", ("current", "mlp", "late")): 0.6, ("attnres", ("current", "attn", "late")): 0.6}
    found = claims(*judged_of(effect, largest))
    row = found["mass is not effect: in both sublayers the largest mass is not the largest effect"]
    # Uniform masses are all equal here, so mass and effect coincide there.
    assert row["verdict"] == "reproduced" and row["against"] == {"uniform": "reproduced"}
    assert found["mlp: the slice of largest mass is not the slice of largest effect"]["verdict"] == "reproduced"


def test_which_predicts_names_the_norm_aware_share():
    effect = {("attnres", piece): 0.02 * place for place, piece in enumerate(SLICES)}
    weights = {("attnres", piece): 0.5 - 0.01 * place for place, piece in enumerate(SLICES)}
    effects, mass, eligibility = measured(effect, weights, noise=0.01)
    mass["norm_share"] = 1 - mass["mass"]
    models = model_rows(("attnres", "uniform"))
    judged = judge(effects, mass, eligibility, QUICK, models)
    found = which_predicts(judged.spearman, 0.05)
    assert (
        found["better"] == ["norm_share"] and "norm-aware share predicts effect better than mass" in found["statement"]
    )
    row = judged.spearman.set_index(["model", "sublayer", "metric"]).loc[("attnres", "all", "norm_share")]
    assert row["over_mass"] == pytest.approx(2.0, abs=0.1) and 1.5 < row["over_mass_lo"] <= row["over_mass_hi"]
    norm = claims(judged, Roles.of(models))[
        "mass is not just norm: a norm-aware measure predicts effect no better than mass does"
    ]
    assert norm["verdict"] == "not reproduced"
    mass = mass.assign(norm_share=mass["mass"], displacement=mass["mass"])
    alike = judge(effects, mass, eligibility, QUICK, models).spearman
    assert which_predicts(alike, 0.05)["better"] == which_predicts(alike, 0.05)["worse"] == []
    assert (alike["over_mass_p"].dropna() == 1).all()


def test_permuted_labels_give_no_motif_beyond_the_level(learned):
    design = Design.of(*measured({("attnres", MOTIF): 0.3, ("attnres", ELSEWHERE): 0.3}, noise=0.1))
    null = permutation_null(design, learned[0].cells, replace(QUICK, permutations=60))
    assert null["cells"] == 23 and null["permutations"] == 60
    assert null["found"] <= 8  # binomial(60, .05) exceeds this once in 140
    assert permutation_null(design, learned[0].cells, QUICK)["permutations"] == 0


def test_motifs_of_nothing_are_an_empty_table():
    effects, mass, eligibility = measured()
    models = model_rows(("attnres", "uniform"))
    judged = judge(effects.iloc[:0], mass, eligibility.assign(eligible=False, reason="empty"), QUICK, models)
    assert judged.motifs.empty
    assert set(pd.DataFrame(claims(judged, Roles.of(models)).values())["verdict"]) <= {
        "not tested",
        "inconclusive",
        "not reproduced",
    }


@pytest.mark.parametrize(
    ("table", "column"), [("contrasts", "verdict"), ("contrasts", "mass_verdict"), ("dissociation", "verdict"),
                          ("cells", "verdict")],
)  # fmt: skip
def test_word_that_is_no_verdict_raises(learned, table, column):
    judged, roles = learned
    frame = getattr(judged, table)
    wrong = replace(judged, **{table: frame.assign(**{column: "certainly"})})
    with pytest.raises(ValueError, match="'certainly' is not a valid"):
        motif_table(judged.design, wrong.cells, wrong.contrasts, QUICK, roles.uniform)
        study_claims(wrong, [], QUICK, roles)


def test_tables_hold_plain_words(tmp_path, learned):
    """An enumeration's member would be written as `Verdict.CAUSAL` by some writers and read back by none."""
    judged, _ = learned
    for table in (judged.cells, judged.contrasts, judged.dissociation, judged.spearman, judged.motifs):
        for name in table.columns[table.dtypes == "str"]:
            assert {type(word) for word in table[name].dropna()} <= {str}, name
        table.to_parquet(tmp_path / "table.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)
    assert ",causal," in judged.texts()["cells.csv"] and "Verdict." not in "".join(judged.texts().values())


@pytest.mark.parametrize(
    ("alone", "matched", "labels"),
    [
        (0.0, 0.05, ("shown", "shown", "shown")),
        (0.2, 0.3, ("shown", "not shown", "not shown")),
        (None, None, ("shown", "not tested", "not tested")),
    ],
)
def test_labels_of_a_motif_say_what_is_shown_and_change_no_verdict(alone, matched, labels):
    effect = {("attnres", MOTIF): 0.3, ("attnres", MOTIF, "matched"): matched, ("attnres", MOTIF, "keep"): alone}
    with_control, with_keep = ([MOTIF] if value is not None else [] for value in (matched, alone))
    judged, _ = judged_of(effect, controls=with_control, kept=with_keep, noise=0.001)
    row = motif(judged)
    assert (row["necessity"], row["sufficiency"], row["specificity"]) == labels
    without, _ = judged_of(effect, controls=with_control, noise=0.001)
    assert motif(without)["verdict"] == row["verdict"] and motif(without)["p_holm"] == row["p_holm"]
    assert motif(judged, "mask:older@attn.late")["necessity"] == "not shown"
