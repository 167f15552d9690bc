"""Two processes hold one model: what it computes is what one process computes."""

from pathlib import Path

import pytest
from parallel_models import child_sharded_by_layer, save
from training_runs import two_ranks


@pytest.mark.parametrize("checkpointed", [False, True])
def test_model_that_is_sharded_by_layer_gives_the_same_logits_and_gradients(
    make_model, tmp_path: Path, checkpointed: bool
) -> None:
    # Blocks of three layers: one that opens meets reads of layers whose parameters are not gathered yet.
    save(make_model(attnres_num_blocks=2), tmp_path)
    assert two_ranks(child_sharded_by_layer, tmp_path, checkpointed) == [0, 0]
