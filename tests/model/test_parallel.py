"""Two processes hold one model: what it computes is what one process computes."""

from pathlib import Path

import pytest
from parallel_models import child_sharded_by_layer, save
from tiny_models import SHAPE
from training_runs import two_ranks
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.mark.parametrize("checkpointed", [False, True])
def test_model_that_is_sharded_by_layer_gives_the_same_logits_and_gradients(
    make_model, tmp_path: Path, checkpointed: bool
) -> None:
    # Blocks of three layers: one that opens meets reads of layers whose parameters are not gathered yet.
    save(make_model(attnres_num_blocks=2), tmp_path)
    assert two_ranks(child_sharded_by_layer, tmp_path, checkpointed) == [0, 0]


def test_head_has_the_librarys_plans_and_no_pipeline_is_promised(make_model) -> None:
    ours, theirs = make_model(), Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    assert ours.tp_plan == theirs.tp_plan and "lm_head" in ours.tp_plan
    assert ours.fsdp_plan == theirs.fsdp_plan and "lm_head" in ours.fsdp_plan
    assert not ours.supports_pp_plan and not ours.pp_plan
