"""Golden vectors of the read: they are the reference's, and tell what deviates, and which variant another read is."""

import json
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from faulty_reads import read, stacked_only
from safetensors.torch import load_file

from attnres.ops import depth_mix, reference
from attnres.ops.conformance import vectors, worker
from attnres.ops.conformance.judgement import judge
from attnres.ops.conformance.vectors import CONTRACT, INPUTS, NORMALISED, VARIANTS, VECTORS
from attnres.ops.conformance.words import Finding, lines

EVERY_VARIANT = [names for size in range(4) for names in combinations(VARIANTS, size)]
WITH_BIAS = {"bias", "bias_rows", "masked", "masked_rows"}


def judged(function, **how):
    contract = json.loads(CONTRACT.read_text(encoding="utf-8"))
    return judge(*worker.run_all(function, contract, load_file(VECTORS), **how))


def test_vectors_are_made_from_the_reference_again():
    made, stored = vectors.vectors(), load_file(VECTORS)
    assert CONTRACT.read_text(encoding="utf-8") == vectors.contract_text()
    assert made.keys() == stored.keys()
    for name, tensor in made.items():
        if name.partition("/")[2] in INPUTS:
            assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name
            assert torch.equal(tensor, tensor.bfloat16().float()), name
        else:
            torch.testing.assert_close(tensor, stored[name], rtol=1e-9, atol=1e-12)
    assert VECTORS.stat().st_size + CONTRACT.stat().st_size < 300_000


def test_page_of_results_names_every_case():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert all(f"| `{case.name}` | {case.about} |" in page for case in vectors.CASES)


def test_sources_are_laid_out_and_repeated_as_the_contract_says():
    given = []

    def noting(sources, query, key_weight, bias=None, eps=1e-6):
        given.append(sources)
        return read(sources, query, key_weight, bias, eps)

    judged(noting)
    for case, sources in zip(vectors.CASES, given, strict=True):
        assert all(source.is_contiguous() is not case.strided for source in sources), case.name
        assert (len(sources) > 1 and sources[0] is sources[-1]) is case.repeated, case.name
        assert len(sources) == case.sources and all(source.shape == case.shape for source in sources), case.name


@pytest.mark.parametrize("function", [reference.depth_mix, depth_mix, read])
def test_a_right_read_conforms_in_every_output(function):
    found = judged(function)
    assert found.agrees and found.variant == () and not found.not_offered
    assert {check.output for check in found.checks} == {
        *("mixed", "weights", "grad_sources", "grad_query", "grad_key_weight", "grad_bias")
    }


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_the_reference_under_a_variant_is_named_as_that_variant(variant):
    found = judged(
        lambda sources, query, key_weight, bias=None, eps=1e-6: vectors.read(
            sources, query, key_weight, bias, eps, variant
        )
    )
    assert found.agrees and found.variant == variant
    said = lines(Finding({"function": "x", "torch": "", "device": "cpu", "interpreter": False}, found))[1]
    assert said.startswith("this is the variant: " + ", ".join(variant) if variant else "conforms")


@pytest.mark.parametrize(
    ("fault", "cases", "outputs"),
    [
        ("eps outside of the root", {"small_sources", "large_eps"}, {"mixed", "weights", "grad_sources"}),
        ("newest source without its bias", WITH_BIAS, {"mixed", "weights", "grad_bias"}),
        ("mask not renormalised", {"masked", "masked_rows"}, {"mixed", "weights", "grad_bias"}),
        ("gradient of the key weight dropped", None, {"grad_key_weight"}),
        ("bf16 accumulation", {"bf16"}, {"mixed", "weights"}),
        ("largest logit not subtracted", {"large_logits"}, {"mixed", "weights"}),
    ],
)
def test_a_fault_is_named_by_the_cases_and_outputs_in_which_it_shows(fault, cases, outputs):
    found = judged(partial(read, fault=fault))
    assert not found.agrees and found.variant == ()
    assert {check.output for check in found.deviations} >= outputs
    if cases is None:
        assert {check.output for check in found.deviations if check.remark} == outputs
    else:
        assert {check.case for check in found.deviations} == cases


@pytest.mark.parametrize(("fault", "wrong_with_one_source"), [("temperature", False), ("softmax over tokens", True)])
def test_a_wrong_softmax_is_told_by_the_case_of_one_source(fault, wrong_with_one_source):
    found = judged(partial(read, fault=fault))
    deviating = {(check.case, check.output) for check in found.deviations}
    assert found.variant == () and ("plain", "weights") in deviating
    assert (("one_source", "weights") in deviating) is wrong_with_one_source


def test_a_fault_on_top_of_a_variant_is_held_to_the_variant():
    def other(sources, query, key_weight, bias=None, eps=1e-6):
        return vectors.read(sources, query, key_weight, bias, 2 * eps, (NORMALISED,))

    found = judged(other)
    assert found.variant == (NORMALISED,) and not found.agrees
    assert {check.case for check in found.deviations} == {"small_sources", "large_eps"}


def test_what_an_implementation_has_not_is_not_a_deviation():
    found = judged(lambda sources, query, key_weight: read(sources, query, key_weight)[0])
    assert found.agrees and found.absent == ("weights",)
    assert found.not_offered.keys() == WITH_BIAS | {"large_eps", "routing_gradient"}


def test_an_exception_is_named_with_its_case():
    def two_at_least(sources, query, key_weight, bias=None, eps=1e-6):
        if len(sources) < 2:
            raise ValueError("two sources at least")
        return read(sources, query, key_weight, bias, eps)

    found = judged(two_at_least)
    assert not found.agrees and not found.deviations
    assert found.raised == {"one_source": "ValueError: two sources at least"}


def test_a_mix_of_another_shape_is_named():
    found = judged(partial(read, fault="batch and tokens merged"))
    assert {c.remark for c in found.deviations if (c.case, c.output) == ("plain", "mixed")} == {
        "shape [6, 16], not [2, 3, 16]"
    }


def test_sources_come_stacked_where_asked_for():
    assert judged(stacked_only, stacked=True).agrees
    assert not judged(stacked_only).agrees


def test_nothing_run_is_not_conformance():
    def nothing(sources):
        raise NotImplementedError("anything")

    assert not judged(nothing).agrees


def test_inkling_2_is_a_variant():
    pytest.importorskip("transformers.models.inkling2", reason="transformers without Inkling-2")
    module = "transformers.models.inkling2.modeling_inkling2"
    found = judged(worker.adapted(f"{module}:Inkling2BlockAttentionResidual", None))
    assert found.agrees and found.variant == VARIANTS
