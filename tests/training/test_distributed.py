"""Two processes: resumed bitwise, replicated and sharded; the same run as one process to rounding."""

import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import assert_same_run, rows, state
from training_runs import KILLED, child_rank, run, sample_ids, settings, two_ranks
from warm_processes import exit_code, in_child

from attnres.files.run_folder import list_steps
from attnres.model.loading import load_model

pytestmark = pytest.mark.slow

# Strategy, micro-batches in a step, workers.
BITWISE = list(product(("ddp", "fsdp2"), (1, 2), (0, 2)))
STEPS = 4
# Largest difference of a loss (nats/token) and of a weight between one process and two, after four steps.
LOSS, WEIGHT = 5e-6, 2e-5


def four_steps(folder: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return settings(folder, data, trainer__max_steps=STEPS, trainer__val_every_steps=4, **changes)


def two(folder: Path, data: dict[str, Any], strategy: str, **changes: Any) -> dict[str, Any]:
    defaults = {"trainer__micro_batch_size": 1, "trainer__devices": 2, "trainer__strategy": strategy}
    return four_steps(folder, data, **(defaults | changes))


@dataclass(frozen=True)
class Runs:
    """Folders of finished runs: `whole` uninterrupted, `resumed` killed in step 4 (both by case), `one` process."""

    whole: dict[Any, Path]
    resumed: dict[Any, Path]
    one: Path


def cut(run_folder: Path, runs_dir: Path) -> None:
    """Copies a run as it was after step 2."""
    copy = runs_dir / run_folder.name
    shutil.copytree(run_folder, copy)
    (copy / "complete.json").unlink()
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Runs:
    """All runs of this file, in few processes: starting one costs more than its steps do."""
    top = tmp_path_factory.mktemp("distributed")

    def bitwise(case: tuple[str, int, int], name: str) -> dict[str, Any]:
        strategy, accumulate, workers = case
        folder = top / f"{name}-{strategy}-{accumulate}-{workers}"
        folder.mkdir()
        return two(
            folder,
            data,
            strategy,
            # With dropout, so that random numbers matter.
            model__attention_dropout=0.2,
            trainer__micro_batch_size=2 // accumulate,
            trainer__num_workers=workers,
        )

    def undropped(name: str, strategy: str, **changes: Any) -> dict[str, Any]:
        (top / name).mkdir(exist_ok=True)
        return two(top / name, data, strategy, **changes)

    whole = {case: bitwise(case, "whole") for case in BITWISE}
    changes = {"trainer__gradient_checkpointing": True, "trainer__loss": "chunked", "trainer__async_checkpoint": True}
    whole["fsdp2"] = undropped("fsdp2", "fsdp2", **changes)
    whole["bf16"] = undropped("bf16", "fsdp2", trainer__precision="bf16-mixed", trainer__loss="chunked")
    one = run(four_steps(top / "one", data))
    assert two_ranks(child_rank, list(whole.values())) == [0, 0]

    resumed = {case: bitwise(case, "resumed") for case in BITWISE}
    for case, plain in resumed.items():
        # In the last micro-batch of step 4: step 3 is lost too.
        codes = two_ranks(child_rank, [plain], (3, case[1] - 1))
        # One may notice that the other is gone before its own time comes.
        assert KILLED in codes and 0 not in codes
        (folder,) = (p for p in Path(plain["runs_dir"]).iterdir() if p.is_dir())
        assert list(list_steps(folder)) == [2]
    for strategy in ("ddp", "fsdp2"):
        resumed[strategy] = undropped(f"from-one-{strategy}", strategy)
        cut(one, top / f"from-one-{strategy}")
    assert two_ranks(child_rank, list(resumed.values())) == [0, 0]

    def folders(plains: dict[Any, dict[str, Any]]) -> dict[Any, Path]:
        return {
            case: next(p for p in Path(plain["runs_dir"]).iterdir() if p.is_dir()) for case, plain in plains.items()
        }

    return Runs(folders(whole), folders(resumed), one)


@pytest.mark.parametrize("case", BITWISE, ids=lambda case: f"{case[0]}-accumulate{case[1]}-workers{case[2]}")
def test_train_on_two_ranks_resumes_bitwise_after_sigkill(runs: Runs, case: tuple[str, int, int]) -> None:
    resumed, whole = runs.resumed[case], runs.whole[case]
    assert_same_run(resumed, whole, STEPS)
    assert sample_ids(resumed.parent, 2) == sample_ids(whole.parent, 2)


def assert_close(folder: Path, one: Path) -> None:
    assert len(rows(folder)) == STEPS
    for ours, theirs in zip(rows(folder), rows(one), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=LOSS)
        # Gradients are clipped at 1: a norm of shards alone would let them pass.
        assert float(ours["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-5)
        assert float(theirs["grad_norm"]) > 1
    weights, expected = state(folder, STEPS)["state_dict"], state(one, STEPS)["state_dict"]
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=WEIGHT)


def test_train_sharded_with_checkpointed_activations_and_chunked_loss_equals_one_process(runs: Runs) -> None:
    assert_close(runs.whole["fsdp2"], runs.one)
    ids = sample_ids(runs.whole["fsdp2"].parent, 2)
    assert len({i for step in ids.values() for i in step}) == 4 * STEPS


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_train_on_two_ranks_continues_what_one_began(runs: Runs, strategy: str) -> None:
    folder = runs.resumed[strategy]
    assert_close(folder, runs.one)
    whole = sample_ids(runs.whole["fsdp2"].parent, 2)
    assert sample_ids(folder.parent, 2) == {step: whole[step] for step in (2, 3)}


def test_train_on_one_process_continues_what_two_sharded_began(
    runs: Runs, tmp_path: Path, data: dict[str, Any]
) -> None:
    cut(runs.whole["fsdp2"], tmp_path)
    plain = four_steps(tmp_path, data)
    environment = {"RANK": "0"}
    assert exit_code(in_child(child_rank, [plain], environment=environment)) == 0
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert_close(folder, runs.one)
    whole = sample_ids(runs.whole["fsdp2"].parent, 2)
    assert sample_ids(tmp_path, 1) == {step: whole[step] for step in (2, 3)}


def test_train_sharded_in_bf16_keeps_fp32_weights_and_moments(runs: Runs) -> None:
    saved = state(runs.whole["bf16"], STEPS)
    moments = [value for entry in saved["optimizer_states"][0]["state"].values() for value in entry.values()]
    assert {value.dtype for value in [*saved["state_dict"].values(), *moments]} == {torch.float32}
    for half, full in zip(rows(runs.whole["bf16"]), rows(runs.one), strict=True):
        assert float(half["loss"]) == pytest.approx(float(full["loss"]), abs=0.02)
        assert half["loss"] != full["loss"]


def test_sharded_checkpoint_and_its_export_give_the_logits_of_each_other(runs: Runs) -> None:
    folder = runs.whole["fsdp2"]
    exported = load_model(folder / "checkpoints" / f"step_{STEPS:08d}" / "model")
    gathered = type(exported)(exported.config)
    weights = state(folder, STEPS)["state_dict"]
    gathered.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    ids = torch.arange(16)[None]
    with torch.no_grad():
        ours = exported(ids).logits
        assert torch.equal(ours, gathered.eval()(ids).logits)
        one = load_model(runs.one / "checkpoints" / f"step_{STEPS:08d}" / "model")
        torch.testing.assert_close(ours, one(ids).logits, rtol=0, atol=1e-4)
