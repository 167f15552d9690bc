"""Which parameters are decayed, and what may not be trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import settings

from attnres.training.config import OptimConfig
from attnres.training.models import build_model, model_config
from attnres.training.optimizer import build_optimizer, parameter_groups


@pytest.mark.parametrize("kind", ["attnres", "vanilla"])
def test_parameter_groups_decay_matrices_only(tmp_path: Path, data: dict[str, Any], kind: str) -> None:
    model = build_model(model_config(settings(tmp_path, data, kind)["model"], 300, 0, 16), seed=0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    decayed_names = {names[p].rsplit(".", 2)[-2] for p in decayed["params"]}
    assert decayed_names == {
        *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    plain_names = {names[p] for p in plain["params"]}
    assert "model.norm.weight" in plain_names
    routing = {name for name in plain_names if "_res_" in name}
    if kind == "attnres":
        assert "model.layers.1.mlp_res_proj.weight" in routing
        assert "model.final_res_proj.weight" in routing
        assert "model.layers.1.attn_res_bias" in routing
    else:
        assert not routing
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, trained))


def test_build_optimizer_refuses_low_precision_master_weights() -> None:
    with pytest.raises(ValueError, match="expected fp32 master weights, got torch.bfloat16"):
        build_optimizer(torch.nn.Linear(2, 2).bfloat16(), OptimConfig(), torch.device("cpu"))
