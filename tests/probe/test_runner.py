"""The runner and the checks on tiny models: every cell against brute force, and checks that can fail."""

import dataclasses

import pandas as pd
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM, wrap_qwen3
from attnres.data import ProbeWindows
from attnres.depth.families import SUBLAYERS, family_indices, grid
from attnres.depth.plan import CONVENTIONS
from attnres.errors import NumericsError
from attnres.interventions.grid import Grid
from attnres.interventions.ids import Intervention, parse
from attnres.probe import checks
from attnres.probe.checks import check_subject, require_passed
from attnres.probe.measure import Effects, measure_mass
from attnres.probe.passes import run_clean, run_edited
from attnres.probe.subjects import Subject
from attnres.tables.columns import SLICE
from tests.probe.in_memory import measure_cells

SHAPE = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)  # fmt: skip


def attnres(convention: str = "block_sum", dtype: torch.dtype = torch.float32) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(**SHAPE, attnres_sources=convention, attnres_num_blocks=3)
    model = Qwen3AttnResForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_res_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


def vanilla() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.2)
    return model


def windows(count: int = 5, length: int = 12) -> ProbeWindows:
    drawn = torch.randint(0, 48, (count, length + 1), generator=torch.Generator().manual_seed(2))
    order = torch.arange(count)
    return ProbeWindows(drawn[:, :-1], drawn[:, 1:], order * 100, order // 2)


def cells(model: Qwen3AttnResForCausalLM) -> list[Intervention]:
    return [Intervention("mask", c.family, c.sublayer, c.band) for c in grid(model.model.plan) if c.eligible]


@torch.no_grad()
def test_measure_does_not_depend_on_the_batch_size():
    model = attnres()
    subject, items = Subject("attnres", model), cells(model)[:4]
    one, five = (measure_cells(subject, items, {"confirm": windows()}, size) for size in (1, 5))
    for name, keys in (("effects", ["cell", "window"]), ("mass", [*SLICE, "window"]), ("routing", ["read", "source"])):
        left, right = (getattr(tables, name).sort_values(keys, ignore_index=True) for tables in (one, five))
        assert len(left) and left.drop(columns=keys).select_dtypes("number").abs().max().max() > 1e-3
        pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_noop_is_bitwise_the_clean_run_from_every_start():
    model, drawn = attnres(), windows()
    subject = Subject("attnres", model)
    noops = [Intervention("noop", None, s, b) for s in SUBLAYERS for b in ("early", "mid", "late")]
    noops += [Intervention("noop", None, None, f"read{j}") for j in range(13)]
    table = measure_cells(subject, noops, {"confirm": drawn}, 2, excluding=False).effects
    assert set(table["cell"]) == {item.id for item in noops}
    assert bool((table[["dnll", "kl", "flips"]] == 0).all(axis=None))


@torch.no_grad()
def test_mass_metrics_by_hand():
    model, drawn = attnres(dtype=torch.float32), windows()
    traces = []
    run_clean(model, drawn.input_ids, drawn.labels, [], traces.append)
    trace = traces[9]
    weights = trace.log_weights.exp().double()
    sources = torch.stack([source.double() for source in trace.sources], -2)
    shares = weights.unsqueeze(-1) * sources
    h = shares.sum(-2)
    masses = measure_mass(trace, ("embedding", "older", "recent", "current"))
    assert sum(m.norm_share for m in masses.values()) == pytest.approx(torch.ones(5), abs=1e-5)
    for family, measured in masses.items():
        members = list(family_indices(family, 4))
        share = shares[..., members, :].sum(-2)
        left = (h - share) / (1 - weights[..., members].sum(-1, keepdim=True))
        norm, norm_left = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) for x in (h, left))
        assert measured.mass == pytest.approx(weights[..., members].sum(-1).mean(-1), abs=1e-6)
        assert measured.norm_share == pytest.approx(((share * h).sum(-1) / h.square().sum(-1)).mean(-1), abs=1e-5)
        wanted = (norm - norm_left).square().sum(-1).mean(-1) / 64
        assert measured.displacement == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_edited_run_starts_from_the_clean_state_of_its_band():
    model, drawn = attnres(), windows()
    item = Intervention.parse("mask:embedding@mlp.late")
    clean = run_clean(model, drawn.input_ids, drawn.labels, [4])
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
    run_edited(model, clean, item)
    assert ran == [4, 5]


def test_measure_stops_at_a_value_that_is_not_finite():
    model = attnres()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(NumericsError, match=r"attnres: mask:embedding@attn.early"):
        measure_cells(Subject("attnres", model), cells(model)[:1], {"confirm": windows()}, 5)


def wrapped(schedule: str) -> tuple[Subject, Qwen3ForCausalLM]:
    base = vanilla()
    bias = 10.0 if schedule == "recency" else 0.0
    return Subject(schedule, wrap_qwen3(base, schedule, 3, 10.0), schedule, bias), base


@pytest.mark.parametrize("schedule", ["recency", "uniform"])
def test_checks_pass_on_wraps(schedule):
    subject, base = wrapped(schedule)
    found = check_subject(subject, base, windows().input_ids, windows().labels)
    require_passed(found)
    assert len(found) == 6


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_checks_pass_on_every_convention(convention):
    found = check_subject(Subject("attnres", attnres(convention)), None, windows().input_ids, windows().labels)
    require_passed(found)
    assert len(found) == 4


def test_noop_is_checked_from_every_start_of_the_grid_and_in_a_shared_pass(monkeypatch):
    subject = Subject("attnres", attnres("block_sum"))
    specs = [parse(f"mask:embedding@mlp.layer{layer}") for layer in (1, 4)]

    def failed(specs=()):
        found = check_subject(subject, None, windows().input_ids, windows().labels, specs)
        return {check.name: check.detail for check in found if not check.passed}

    assert failed(specs) == {}
    original = checks.run_from

    def run_from(model, clean, start, edit):
        return original(model, clean, start, edit) + (start == 4)

    monkeypatch.setattr(checks, "run_from", run_from)
    assert failed(specs) == {"noop is bitwise the clean run": "differs: from layer 4"}
    monkeypatch.setattr(checks, "run_from", original)
    shared = checks.run_rows
    monkeypatch.setattr(checks, "run_rows", lambda *a: [shared(*a)[0], Effects(*(v + 1e-3 for v in shared(*a)[1]))])
    assert list(failed()) == ["noop has no effect in a shared pass"]


@pytest.mark.parametrize("schedule", ["recency", "uniform"])
def test_checks_fail_when_a_query_is_not_zeroed(schedule):
    subject, base = wrapped(schedule)
    with torch.no_grad():
        subject.model.model.layers[3].mlp_res_proj.weight.normal_(std=0.02)
    with pytest.raises(NumericsError, match="content-independent"):
        require_passed(check_subject(subject, base, windows().input_ids, windows().labels))


def test_checks_fail_when_the_wrap_is_another_model():
    subject, base = wrapped("uniform")
    with torch.no_grad():
        base.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(NumericsError, match="equals the unwrapped model"):
        require_passed(check_subject(subject, base, windows().input_ids, windows().labels))


def test_checks_fail_on_a_value_that_is_not_a_number():
    subject, base = wrapped("recency")
    with torch.no_grad():
        base.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="distance to the unwrapped model"):
        require_passed(check_subject(subject, base, windows().input_ids, windows().labels))


def test_recency_check_uses_the_bias_it_was_given():
    subject, base = wrapped("recency")
    wrong = dataclasses.replace(subject, recency_bias=3.0)
    with pytest.raises(NumericsError, match="content-independent"):
        require_passed(check_subject(wrong, base, windows().input_ids, windows().labels))


def test_grid_lists_all_candidates_with_reasons():
    plan = attnres().model.plan
    specs = [Intervention("mask", c.family, c.sublayer, c.band) for c in grid(plan)]
    table = pd.DataFrame([candidate.row for candidate in Grid.of(specs, {"attnres": plan}).candidates])
    assert list(table["cell"]) == [item.id for item in specs] and len(table) == 24
    assert set(table["intervention"]) == {"mask"}
    assert bool((table["eligible"] == (table["reason"] == "")).all())
