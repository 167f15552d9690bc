"""A folder's name is part of the contract: whoever gives a command again finds the folder that the command made before.

The names, and the run in `fixtures/`, are those of commit 3f58b8e. They follow from `conf/` and the command's words
alone; the weights that a run or a probe starts from depend on the machine, so their digests are given.
"""

import csv
import json
import runpy
import shutil
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from attnres.config import build
from attnres.errors import CheckpointError
from attnres.files.run_folder import latest, verify
from attnres.probe.config import ProbeConfig
from attnres.probe.config import config_hash as probe_hash
from attnres.training.config import TrainConfig, run_folder
from attnres.training.fit import train

ROOT = Path(__file__).parents[1]
BEGUN = Path(__file__).parent / "fixtures" / "run_begun_at_3f58b8e"
BASE = f"init.digest={'0' * 64}"

RUNS = {
    "": "attnres_tiny-6755ccf1",
    "+experiment=attnres_tiny": "attnres_tiny-6755ccf1",
    "+experiment=vanilla_tiny": "vanilla_tiny-d4725544",
    "+experiment=attnres_small": "attnres_small-6d85ffab",
    "+experiment=vanilla_small": "vanilla_small-f573a2bc",
    "+experiment=attnres_0p6b": "attnres_0p6b-f997bb55",
    "+experiment=vanilla_0p6b": "vanilla_0p6b-f2120653",
    "+experiment=scratch_bias_only": "scratch_bias_only-f5078ba0",
    "+experiment=scratch_uniform": "scratch_uniform-d36b696d",
    f"+experiment=same_base_bias_only {BASE}": "same_base_bias_only-c0fa0874",
    f"+experiment=same_base_frozen {BASE}": "same_base_frozen-488c1e7e",
    f"+experiment=same_base_full {BASE}": "same_base_full-b106fcaf",
    f"+experiment=same_base_uniform {BASE}": "same_base_uniform-dc02ea6b",
    "trainer.micro_batch_size=8": "attnres_tiny-6755ccf1",
    "trainer.devices=2 runs_dir=elsewhere logger.wandb=disabled": "attnres_tiny-6755ccf1",
    "optim.lr=1e-3": "attnres_tiny-0edf7065",
    "seed=1": "attnres_tiny-b7f0360e",
    "data=pyenv": "attnres_tiny-9fdaaa13",
    "trainable=body": "attnres_tiny-7ed62278",
    "trainer.max_steps=300": "attnres_tiny-60c58207",
    "trainer.precision=bf16-mixed": "attnres_tiny-ae5ec1b6",
    "model.attnres_num_blocks=2": "attnres_tiny-d09fec3e",
    "data=files data.paths=[text]": "attnres_tiny-034a9448",
    "data=prepared data.paths=[a,b] data.weights=[0.8,0.2]": "attnres_tiny-a6728a4d",
    f"init.base=runs/other {BASE}": "attnres_tiny-fe96d1ca",
    f"init.base=runs/other init.wrap=recency {BASE} model.attnres_sources=cumulative": "attnres_tiny-cff33b5d",
    "+experiment=attnres_small data=pyenv trainer.log_spaced=true": "attnres_small-82d68af0",
    "+experiment=attnres_0p6b trainer.num_nodes=4": "attnres_0p6b-f997bb55",
    "+experiment=attnres_0p6b data=pyenv": "attnres_0p6b-16bf4a23",
    f"+experiment=same_base_full model=attnres_tiny {BASE}": "same_base_full-c46d4c6f",
}
PROBES = {
    "": "0b385150",
    "device=cpu runs_dir=elsewhere threads=2": "0b385150",
    "probe.families=older": "1c12686e",
    "probe.batch_size=8": "ee9dc2c5",
    "probe.attribution=true": "8015c3fb",
    "statistics.sign_flips=999": "0be1b1c9",
    "data=pyenv": "c6ae6555",
    "controls=[runs/same_base_frozen]": "771ebbbb",
}


def composed(command: str, words: str) -> dict:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return OmegaConf.to_container(hydra.compose(command, words.split()), resolve=True)


@pytest.mark.parametrize("words", RUNS)
def test_run_keeps_the_name_of_its_folder(words):
    assert run_folder(build(TrainConfig, composed("train", words))).name == RUNS[words]


def test_every_experiment_has_its_name_pinned():
    pinned = {words.split()[0].partition("=")[2] for words in RUNS if words.startswith("+experiment=")}
    assert pinned == {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}


# What has another default since: the values of then give the names of then.
THEN = "probe.sufficiency=none"


@pytest.mark.parametrize("words", PROBES)
def test_probe_keeps_the_hash_in_the_name_of_its_folder(words):
    config = build(ProbeConfig, composed("probe", f"{words} {THEN}"))
    assert probe_hash(config, ["0" * 64, "1" * 64]) == PROBES[words]


@pytest.mark.parametrize("key", THEN.split())
def test_what_has_another_default_since_decides_the_name(key):
    before, after = (build(ProbeConfig, composed("probe", words)) for words in (THEN, THEN.replace(key, "")))
    assert probe_hash(before, []) != probe_hash(after, [])


def test_probe_of_the_demo_keeps_the_name_of_its_folder():
    digests = ["e1d7c0074cf0253e-8339ccf40803d9fc", "d62d06b3c650cff9-f971ec66508982fa"]
    assert probe_hash(build(ProbeConfig, composed("probe", THEN)), digests) == "936dd24b"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A copy of the run, and its configuration, which names its text relative to the copy."""
    shutil.copytree(BEGUN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = build(TrainConfig, runpy.run_path("begin.py")["RUN"])
    return run_folder(config), config


def test_run_that_an_earlier_version_began_goes_on_in_its_folder(begun):
    folder, config = begun
    before = (folder / "metrics.csv").read_text()
    assert train(config, "python train.py") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["begun-b1fa43f1"]
    resumed = json.loads((folder / "provenance.json").read_text())["resumed"]
    assert [record["step"] for record in resumed] == [3]
    after = (folder / "metrics.csv").read_text()
    assert after.startswith(before)
    (step,) = csv.DictReader([before.splitlines()[0], *after[len(before) :].splitlines()])
    # What 3f58b8e computes for the step, up to the rounding of another machine.
    computed = {"step": 4, "loss": 5.5782623, "lr": 3e-4, "grad_norm": 1.3672262, "val_loss": 5.5521288}
    assert {name: float(step[name]) for name in computed} == pytest.approx(computed, rel=1e-5)


def test_checkpoint_of_another_format_is_refused_in_one_line(begun):
    folder, config = begun
    step = latest(folder)
    manifest = json.loads((step / "manifest.json").read_text())
    # A folder that names no format is of the first.
    assert "format" not in manifest and verify(step) == manifest
    (step / "manifest.json").write_text(json.dumps({"format": 2}) + "\n")
    # Neither passed over for an older checkpoint, nor begun anew.
    shutil.copytree(BEGUN / step, step.with_name("step_00000002"))
    for attempt in (lambda: verify(step), lambda: train(config, "python train.py")):
        with pytest.raises(CheckpointError) as refused:
            attempt()
        (line,) = str(refused.value).splitlines()
        assert line.startswith(f"{step / 'manifest.json'}: format 2, this version reads format 1; read it with the")
