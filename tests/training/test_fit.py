"""`train` from outside: folders, resume modes, refusals and what must never stop a run."""

import json
import logging
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from run_comparison import rows, state
from training_runs import before_micro_batches, fake_wandb, run, settings

from attnres.commands.door import run_command
from attnres.config import build
from attnres.errors import CheckpointError, ConfigError, DataError, NumericsError
from attnres.files.run_folder import list_steps
from attnres.training import fit
from attnres.training.config import LoggerConfig, TrainConfig
from attnres.training.loggers import CsvLogger, WandbLogger
from attnres.training.module import CausalLMModule
from attnres.training.telemetry import Clock


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Sample ids of every micro-batch that is trained on."""
    seen: list[list[int]] = []
    before_micro_batches(monkeypatch, lambda module, batch: seen.append(batch["sample_ids"].tolist()))
    return seen


def test_train_writes_the_run_folder(original: Path, data: dict[str, Any]) -> None:
    assert {p.name for p in original.iterdir()} >= {
        *("config.yaml", "provenance.json", "metrics.csv", "checkpoints", "complete.json")
    }
    config = yaml.safe_load((original / "config.yaml").read_text())
    assert build(TrainConfig, config).data.paths == tuple(data["paths"])
    record = json.loads((original / "provenance.json").read_text())
    assert record["hashes"]["config"] == original.name.split("-")[1]
    logged = rows(original)
    assert [int(row["step"]) for row in logged] == [1, 2, 3, 4, 5, 6]
    assert [int(row["tokens"]) for row in logged] == [64 * step for step in range(1, 7)]
    assert [bool(row["val_loss"]) for row in logged] == [False, True] * 3
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    complete = json.loads((original / "complete.json").read_text())
    assert (complete["step"], complete["tokens"]) == (6, 384)
    assert (original / complete["checkpoint"]).is_dir()


def test_train_leaves_a_complete_run_alone(
    folder: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: Any) -> None:
        raise AssertionError("no data is needed")

    monkeypatch.setattr(fit, "prepare", unexpected)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO):
        assert run(settings(folder.parent, data)) == folder
    assert "already complete at step 6" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_train_finishes_a_run_killed_after_its_last_checkpoint(
    folder: Path, original: Path, data: dict[str, Any]
) -> None:
    (folder / "complete.json").unlink()
    run(settings(folder.parent, data))
    assert (folder / "complete.json").read_text() == (original / "complete.json").read_text()
    assert rows(folder) == rows(original)


def test_train_resume_must_and_never(folder: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="resume=must, but .* holds no checkpoint"):
        run(settings(tmp_path / "empty", data, resume="must"))
    with pytest.raises(ConfigError, match="resume=never, but .* up to step 6; move or delete"):
        run(settings(tmp_path, data, resume="never"))
    (folder / "complete.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    assert run(settings(tmp_path, data, resume="must")) == folder
    assert run(settings(tmp_path / "other", data, resume="never", trainer__max_steps=2)).is_dir()


def test_train_resumes_from_a_path_into_a_longer_run(
    original: Path, tmp_path: Path, data: dict[str, Any], sampled: list[list[int]]
) -> None:
    step_folder = original / "checkpoints" / "step_00000004"
    longer = settings(tmp_path, data, resume=str(step_folder), trainer__max_steps=7)
    folder = run(longer)
    assert folder != original and len(sampled) == 3
    assert [int(row["step"]) for row in rows(folder)] == [5, 6, 7]
    # The same command again goes on with its own checkpoints, as after a requeue.
    shutil.rmtree(folder / "checkpoints" / "step_00000007")
    assert run(longer) == folder
    assert len(sampled) == 4


def test_train_lists_what_differs_in_a_checkpoint_from_elsewhere(
    original: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    changed = settings(tmp_path, data, resume=str(original), seed=5, optim__lr=1e-4, model__hidden_size=64)
    with pytest.raises(CheckpointError) as error:
        run(changed)
    for difference in ("seed: 0 there, 5 here", "optim.lr: 0.003 there, 0.0001 here", "model.hidden_size: 32 there"):
        assert difference in str(error.value)
    assert "runs_dir" not in str(error.value)
    with pytest.raises(CheckpointError, match="no such folder"):
        run(settings(tmp_path, data, resume=str(tmp_path / "nowhere")))


def test_train_refuses_to_resume_on_other_data(folder: Path, data: dict[str, Any]) -> None:
    (folder / "complete.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    path = next(Path(data["paths"][0]).iterdir())
    text = path.read_text()
    try:
        path.write_text(text + " something else")
        with pytest.raises(CheckpointError, match="data fingerprint"):
            run(settings(folder.parent, data))
    finally:
        path.write_text(text)


def test_train_refuses_a_folder_in_use(folder: Path, data: dict[str, Any]) -> None:
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="in use by another training process") as error:
        run(settings(folder.parent, data))
    assert error.value.code == 2
    assert run(settings(folder.parent, data)) == folder


def test_train_makes_no_folder_for_a_model_that_cannot_be(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model\.hiden_size'; did you mean 'model\.hidden_size'"):
        run(settings(tmp_path / "runs", data, model__hiden_size=64))
    assert not (tmp_path / "runs").exists()


def test_train_checks_data_before_the_model(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("built before the data was checked")

    monkeypatch.setattr(fit, "initial_model", unexpected)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError):
        run(settings(tmp_path, data | {"paths": [str(tmp_path / "none")]}))


def test_train_gives_both_kinds_the_same_batches(
    tmp_path: Path, data: dict[str, Any], sampled: list[list[int]]
) -> None:
    run(settings(tmp_path, data, "attnres"))
    attnres = [list(ids) for ids in sampled]
    sampled.clear()
    run(settings(tmp_path, data, "vanilla", trainer__micro_batch_size=2))
    assert len(attnres) == 6 and len({tuple(ids) for ids in attnres}) == 6
    assert [a + b for a, b in zip(sampled[::2], sampled[1::2], strict=True)] == attnres


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_train_stops_at_a_non_finite_value_and_saves_nothing_of_it(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sampled: list[list[int]], what: str
) -> None:
    step = CausalLMModule.training_step

    def training_step(self: CausalLMModule, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step == 3 and len(self._micro) == 2:
            if what == "loss":
                self._micro[-1] = self._micro[-1]._replace(nll=self._micro[-1].nll * torch.nan)
            return loss * torch.inf
        return loss

    monkeypatch.setattr(CausalLMModule, "training_step", training_step)
    with pytest.raises(NumericsError, match=rf"step 4: the {what} is not finite") as error:
        run(settings(tmp_path, data, trainer__micro_batch_size=2))
    assert error.value.code == 5
    # The second micro-batch has the bad loss; of a bad gradient, the whole step is to blame.
    assert str(sampled[7] if what == "loss" else sampled[6] + sampled[7]) in str(error.value)
    (folder,) = tmp_path.iterdir()
    assert list(list_steps(folder)) == [2]
    assert all(value.isfinite().all() for value in state(folder, 2)["state_dict"].values())
    assert not (folder / "complete.json").exists()


def test_train_says_out_of_memory_only_of_memory(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_with(error: Exception) -> tuple[int, str]:
        def fail(module: CausalLMModule, batch: Any) -> None:
            raise error

        before_micro_batches(monkeypatch, fail)
        code = run_command(lambda: print(run(settings(tmp_path, data))))
        return code, capsys.readouterr().err

    code, message = fails_with(torch.OutOfMemoryError("tried to allocate 7 GiB"))
    assert code == 2 and "out of memory (tried to allocate 7 GiB); lower trainer.micro_batch_size" in message
    # A subclass of RuntimeError with a remedy of its own.
    code, message = fails_with(torch.distributed.DistBackendError("NCCL error: unhandled system error"))
    assert code == 1 and "DistBackendError: NCCL error: unhandled system error" in message
    assert "out of memory" not in message


@pytest.mark.parametrize("error", [RuntimeError("no server"), SystemExit(1)])
def test_train_survives_wandb(
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    calls: list[str] = []

    def init(**keywords: Any) -> None:
        calls.append(keywords["mode"])
        raise error

    fake_wandb(monkeypatch, init=init)
    folder = run(settings(tmp_path, data, logger__wandb="offline"))
    assert len(rows(folder)) == 6 and (folder / "complete.json").exists()
    assert calls == ["offline"]
    assert caplog.text.count("W&B failed to log") == 1


def test_wandb_without_a_server_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values["loss"]))

        def finish(self, exit_code: int) -> None:
            logged.append(exit_code)

    def init(**keywords: Any) -> Run:
        assert keywords["mode"] == "offline" and "name" in keywords
        return Run()

    # Nothing listens on port 9 of this machine.
    address = types.SimpleNamespace(settings=types.SimpleNamespace(base_url="http://127.0.0.1:9"))
    fake_wandb(monkeypatch, init=init, setup=lambda: address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    logger = WandbLogger(LoggerConfig(wandb="online"), tmp_path, {}, resume_step=0)
    logger.log_metrics({"loss": 1.5}, step=3)
    logger.finalize("success")
    assert logged == [(3, 1.5), 0]


def test_wandb_gets_again_what_it_lacks_up_to_the_resumed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has steps 0 and 1 and takes nothing below 2; step 4 is trained again."""
    (tmp_path / "metrics.csv").write_text(
        "step,tokens,loss,val_loss\n1,10,0.5,\n2,20,0.25,\n3,30,nan,0.75\n4,40,0.1,\n"
    )
    logged: list[Any] = []
    server = types.SimpleNamespace(step=2, log=lambda values, step: logged.append((step, repr(values))))
    fake_wandb(monkeypatch, init=lambda **_: server)
    WandbLogger(LoggerConfig(wandb="offline"), tmp_path, {}, resume_step=3).log_metrics({"loss": 0.2}, step=4)
    assert logged == [
        (2, "{'step': 2, 'tokens': 20, 'loss': 0.25}"),
        (3, "{'step': 3, 'tokens': 30, 'loss': nan, 'val_loss': 0.75}"),
        (4, "{'step': 4, 'loss': 0.2}"),
    ]


def test_csv_logger_drops_rows_after_the_resumed_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,loss\n1,10,0.5\n2,20,0.25\n3,30,0.125\n4,4")
    logger = CsvLogger(path, resume_step=2)
    logger.log_metrics({"tokens": 30, "loss": 0.1}, step=3)
    logger.log_metrics({"tokens": 40, "loss": 0.3, "val_loss": 0.7}, step=4)
    assert path.read_text().split() == [
        "step,tokens,loss,val_loss",
        *("1,10,0.5,", "2,20,0.25,", "3,30,0.1,", "4,40,0.3,0.7"),
    ]


def test_clock_counts_waiting_apart_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()
    for _ in range(2):
        now += 1.0
        clock.batch_start()
        now += 3.0
        clock.batch_end()
        clock.step_end(tokens=100)
        now += 10.0
        clock.duties_end()
    assert clock.eta(5) == pytest.approx(5 * 14.0)
    assert clock.read() == {"tokens_per_second": pytest.approx(25.0), "data_wait": pytest.approx(0.25)}
