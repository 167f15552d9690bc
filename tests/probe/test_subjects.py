"""Further models of a probe: controls and nulls, on the same windows and with contrasts of their own."""

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.commands.probe import probe
from attnres.config import build
from attnres.errors import AttnResError, ConfigError
from attnres.probe.config import ProbeConfig
from attnres.probe.nulls import null_model, shuffle_queries
from attnres.report import report
from tests.training.training_runs import run, settings

NAMES = ["attnres", "uniform", "same_base_frozen", "untrained", "shuffled_queries"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    vocabulary = ("if", "then", "else", "def", "return", "loop", "sum", "alpha", "beta", "gamma")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choice(vocabulary) for _ in range(60)))
    return {
        "source": "files",
        "paths": [str(folder)],
        "vocab_size": 280,
        "sequence_length": 16,
        "validation": 0.15,
        "probe_pilot": 0.2,
        "probe_confirm": 0.3,
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    shape = {"optim__lr": 0.02}
    vanilla = run(settings(folder, data, "vanilla", **shape))
    start = {"init": {"base": "auto", "wrap": "uniform"}, "model__attnres_exact_uniform": True}
    frozen = settings(folder, data, name="same_base_frozen", trainable="routing", **start, **shape)
    return {"vanilla": vanilla, "attnres": run(settings(folder, data, **shape)), "same_base_frozen": run(frozen)}


def probed(runs: dict[str, Path], data: dict[str, Any], ckpt: str, **changes: Any) -> Path:
    grid = {"families": "embedding", "sublayers": "mlp", "length": 16, "documents_pilot": 4, "documents_confirm": 6,
            "schedules": ["uniform"], "controls": "none"}  # fmt: skip
    plain = {
        "ckpt": str(runs[ckpt]),
        "runs_dir": str(runs[ckpt].parent),
        "cache_dir": data["cache_dir"],
        "threads": 1,
        "statistics": {"sign_flips": 999, "bootstrap": 100},
        "probe": grid | changes.pop("probe", {}),
    }
    return probe(build(ProbeConfig, plain | changes), "python probe.py").folder


@pytest.fixture(scope="module")
def folder(runs, data) -> Path:
    controls = [str(runs["same_base_frozen"])]
    return probed(runs, data, "attnres", controls=controls, probe={"nulls": ["untrained", "shuffled_queries"]})


def test_further_models_are_probed_on_the_same_windows_under_their_names(folder):
    effects = pd.read_parquet(folder / "effects.parquet")
    assert list(effects["model"].unique()) == NAMES
    seen = effects.groupby("model")[["cell", "window"]].apply(lambda rows: tuple(sorted(map(tuple, rows.values))))
    assert seen.nunique() == 1
    cells = pd.read_csv(folder / "cells.csv")
    assert list(cells["model"].unique()) == NAMES


def test_trained_model_is_contrasted_with_every_other(folder):
    contrasts = pd.read_csv(folder / "contrasts.csv")
    assert list(contrasts["baseline"].unique()) == NAMES[1:]
    effects = pd.read_parquet(folder / "effects.parquet")
    confirm = effects[effects["split"] == "confirm"].groupby(["model", "cell"])["dnll"].mean()
    for row in contrasts.itertuples():
        expected = confirm["attnres", row.cell] - confirm[row.baseline, row.cell]
        assert row.diff == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_summary_says_what_each_model_is(folder, runs):
    summary = json.loads((folder / "summary.json").read_text())
    described = {model["name"]: model for model in summary["models"]}
    assert list(described) == NAMES
    assert described["same_base_frozen"]["run"] == runs["same_base_frozen"].name
    assert str(runs["same_base_frozen"]) in described["same_base_frozen"]["path"]
    assert described["same_base_frozen"]["kind"].startswith("control")
    assert described["untrained"]["kind"].startswith("null")
    assert described["attnres"]["kind"] == "trained AttnRes"
    assert len({check["model"] for check in summary["checks"]}) == len(NAMES)
    assert summary["provenance"]["hashes"].keys() >= {"control same_base_frozen"}
    # An untrained model predicts nothing; the trained one has learned something.
    assert described["untrained"]["clean_nll"] > described["attnres"]["clean_nll"] + 0.1


def test_routing_of_an_untrained_model_is_uniform_and_of_a_shuffled_one_is_not_the_trained(folder):
    routing = pd.read_csv(folder / "routing.csv").set_index("model")
    untrained = routing.loc["untrained"]
    assert (untrained["weight"] - 1 / untrained["num_sources"]).abs().max() < 1e-6
    differ = routing.loc["shuffled_queries", "weight"].to_numpy() - routing.loc["attnres", "weight"].to_numpy()
    assert abs(differ).max() > 1e-4


def test_control_is_a_checkpoint_like_any_other(runs, data, monkeypatch):
    """Trained from a base, exported, loaded and probed against the vanilla run that it started from."""
    monkeypatch.setattr(report, "write_report", lambda folder: folder / "report.html")
    summary = json.loads((probed(runs, data, "same_base_frozen") / "summary.json").read_text())
    described = {model["name"]: model for model in summary["models"]}
    assert described["uniform"]["run"] == runs["vanilla"].name
    stored = json.loads((Path(described["attnres"]["path"]) / "config.json").read_text())
    assert stored["attnres_exact_uniform"] is True
    assert all(check["passed"] for check in summary["checks"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": {"uniform": "same_base_frozen"}}, r"the name 'uniform' .* is taken"),
        ({"controls": ["same_base_frozen", "same_base_frozen"]}, "is taken; give it another"),
        ({"controls": {"1": "same_base_frozen"}}, "takes the name '1' for a number or a missing value"),
        ({"controls": {"None": "same_base_frozen"}}, "takes the name 'None' for a number or a missing value"),
        ({"controls": {"other": "vanilla"}}, "holds a vanilla Qwen3"),
        ({"controls": {"other": "nowhere"}}, "no such file or folder"),
        ({"probe": {"nulls": ["shufled_queries"]}}, "did you mean 'shuffled_queries'"),
    ],
)
def test_further_models_that_do_not_fit_are_refused(runs, data, changes, message):
    def path(name: str) -> str:
        return str(runs.get(name, name))

    if given := changes.get("controls"):
        named = {k: path(v) for k, v in given.items()} if isinstance(given, dict) else [path(v) for v in given]
        changes = {"controls": named}
    with pytest.raises(AttnResError, match=message):
        probed(runs, data, "attnres", **changes)


def model(**changes: Any) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(3)
    config = Qwen3AttnResConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attnres_num_blocks=2, **changes,
    )  # fmt: skip
    made = Qwen3AttnResForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "_res_" in name:
                parameter.add_(torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("convention", ["block_sum", "seeded_block_sum", "cumulative"])
def test_shuffled_queries_pass_each_on_and_keep_none(convention):
    trained = model(attnres_sources=convention)
    null = null_model("shuffled_queries", trained, 0)
    before, after = trained.state_dict(), null.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    plan = trained.model.plan
    routed = [read for read in plan.reads if plan.routing_is_trainable(read)]
    assert len(moved) == 2 * len(routed)
    assert all(name.endswith(("_res_proj.weight", "_res_norm.weight")) for name in moved)
    for kind in ("_res_proj.weight", "_res_norm.weight"):
        rows = [sorted(tuple(d[name].flatten().tolist()) for name in d if name.endswith(kind)) for d in (before, after)]
        assert rows[0] == rows[1]
    again = null_model("shuffled_queries", trained, 0).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_shuffling_a_model_without_queries_is_refused():
    plain = model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "_res_proj" in name:
                parameter.zero_()
    with pytest.raises(ConfigError, match="shuffled_queries changes nothing"):
        shuffle_queries(plain, 0)


def test_untrained_null_of_a_bf16_model_has_its_rotary_frequencies(tmp_path):
    model().save_pretrained(tmp_path)
    trained = Qwen3AttnResForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    null = null_model("untrained", trained, 0)
    assert null.dtype == torch.bfloat16 and not null.training
    for name, buffer in trained.named_buffers():
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(null.get_buffer(name), buffer, rtol=0, atol=0)
