"""From a path to a verified folder."""

import json
import os
import shutil
from pathlib import Path

import pytest

from attnres.errors import CheckpointError
from attnres.files.hashes import sha256_of
from attnres.model import locate as module
from attnres.model.locate import locate, model_folder, vanilla_runs

GOLDEN = Path(__file__).parents[1] / "golden" / "block_sum_L6_n3"
DATA = {"fingerprint": "f", "tokenizer_sha256": "t"}


def checkpoint(run: Path, step: int, **config) -> Path:
    """A step folder as training writes it, with a manifest."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(GOLDEN, folder / "model")
    stored = json.loads((folder / "model" / "config.json").read_text()) | config
    for name, value in (("config.json", stored), ("data.json", DATA), ("training.json", {"step": step, "seed": 0})):
        (folder / "model" / name).write_text(json.dumps(value))
    (folder / "training.ckpt").write_text("state")
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in folder.rglob("*")
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}) + "\n")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "attnres-0"
    for step in (2, 4):
        checkpoint(folder, step)
    return folder


def test_model_folder_of_every_path_to_it(run):
    step = run / "checkpoints" / "step_00000002"
    for path in (step, step / "model", step / "training.ckpt", str(step)):
        assert model_folder(path) == step / "model"
    assert model_folder(run) == run / "checkpoints" / "step_00000004" / "model"


@pytest.mark.parametrize("path", ["runs/none", "./owner/name", "~/name", "/owner/name", "owner/name/more", "name", ""])
def test_model_folder_downloads_for_a_hub_id_alone(run, monkeypatch, path):
    monkeypatch.chdir(run.parents[1])
    monkeypatch.setattr(module, "_download", lambda hub_id: Path("downloaded", hub_id))
    assert model_folder("owner/name") == Path("downloaded/owner/name")
    with pytest.raises(CheckpointError):
        model_folder(path)


def test_locate_verifies_a_run_and_falls_back_to_an_older_checkpoint(run):
    found = locate(str(run))
    assert (found.folder, found.run, found.verified, found.finished) == (
        run / "checkpoints" / "step_00000004" / "model", "attnres-0", True, False,
    )  # fmt: skip
    assert found.data == DATA and found.training["step"] == 4
    (run / "complete.json").write_text("{}")
    (run / "checkpoints" / "step_00000004" / "training.ckpt").write_text("STATE")
    again = locate(str(run))
    assert again.training["step"] == 2 and again.finished is True
    with pytest.raises(CheckpointError, match="differs from the manifest"):
        locate(str(run / "checkpoints" / "step_00000004"))


def test_locate_takes_the_newest_run_of_a_name_without_its_hash(run):
    newer = run.with_name("attnres-1")
    checkpoint(newer, 2)
    os.utime(newer / "checkpoints", (2e9, 2e9))
    assert locate(str(run.parent / "attnres")).run == "attnres-1"


def test_locate_of_a_plain_folder_is_unverified_and_its_digest_is_of_the_bytes(tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    found = locate(str(folder))
    assert (found.run, found.verified, found.finished, found.data, found.training) == ("model", False, None, {}, {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    assert locate(str(folder)).digest != found.digest


def test_locate_refuses_a_run_without_a_checkpoint_and_what_is_not_there(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        locate(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="no such file"):
        locate(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("data", "shape", "seed"), [({"fingerprint": "g"}, {}, 0), ({}, {"hidden_size": 1}, 0), ({}, {}, 1)]
)
def test_vanilla_runs_have_the_same_data_shape_and_seed(run, data, shape, seed):
    vanilla = run.with_name("vanilla-0")
    checkpoint(vanilla, 2, model_type="qwen3")
    config = json.loads((run / "checkpoints" / "step_00000002" / "model" / "config.json").read_text())
    assert vanilla_runs(run.parent, DATA, config, 0) == [vanilla]
    assert vanilla_runs(run.parent, DATA | data, config | shape, seed) == []
