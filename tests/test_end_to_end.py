"""The two commands on a tiny corpus: train both arms, probe, read what was written; then parts of the grid."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from warm_processes import exit_code, run_command, start_command

from attnres.commands.rejudge import main as rejudge

ROOT = Path(__file__).parents[1]
FAST = (
    "data.max_bytes=600000 data.vocab_size=300 data.sequence_length=32 data.cache_dir={tmp}/cache runs_dir={tmp}/runs "
    "model.hidden_size=32 model.intermediate_size=48 model.head_dim=8 model.num_hidden_layers=6 "
    "trainer.max_steps=6 trainer.global_batch_size=4 trainer.micro_batch_size=2 trainer.val_batches=1 "
    "trainer.checkpoint_every_steps=3 optim.warmup_steps=2 logger.wandb=disabled trainer.threads=1"
)
PROBE = (
    "runs_dir={tmp}/runs cache_dir={tmp}/cache threads=1 ckpt={tmp}/runs/attnres_tiny probe.length=32 "
    "probe.documents_pilot=4 probe.documents_confirm=6 probe.batch_size=4 statistics.sign_flips=999 "
    "statistics.bootstrap=100 probe.attribution=true"
)
WRITTEN = ("preregistration.json", "effects.parquet", "effects.csv", "mass.parquet", "cells.csv", "contrasts.csv",
           "attribution.parquet", "summary.json", "report.html", "report.md", "figures")  # fmt: skip


def run(tmp: Path, script: str, settings: str, *more: str) -> subprocess.CompletedProcess:
    """A command as a user starts it."""
    arguments = [sys.executable, script, *settings.format(tmp=tmp).split(), *more]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def run_warm(tmp: Path, script: str, settings: str, *more: str, code: int = 0) -> subprocess.CompletedProcess:
    """The same without the seconds in which libraries are loaded."""
    done = run_command([script, *settings.format(tmp=tmp).split(), *more], tmp / "log")
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("project")
    run(tmp, "train.py", FAST, "model.attnres_num_blocks=3")
    run_warm(tmp, "train.py", FAST, "+experiment=vanilla_tiny")
    return tmp


@pytest.fixture(scope="module")
def probed(trained) -> Path:
    report = Path(run(trained, "probe.py", PROBE).stdout.strip().splitlines()[-1])
    assert report.name == "report.html"
    return report.parent


def test_train_leaves_checkpoints_with_exports(trained):
    (folder,) = (trained / "runs").glob("attnres_tiny-*")
    assert json.loads((folder / "complete.json").read_text())["step"] == 6
    for step in ("step_00000003", "step_00000006"):
        assert (folder / "checkpoints" / step / "model" / "model.safetensors").is_file()


def test_train_again_says_complete_and_reuses(trained):
    (folder,) = (trained / "runs").glob("attnres_tiny-*")
    before = (folder / "complete.json").stat().st_mtime_ns
    done = run_warm(trained, "train.py", FAST, "model.attnres_num_blocks=3")
    assert "already complete" in done.stderr
    assert done.stdout.strip() == str(folder)
    assert (folder / "complete.json").stat().st_mtime_ns == before


def test_probe_writes_what_it_promises(probed):
    assert all((probed / name).exists() for name in WRITTEN)
    cells = pd.read_csv(probed / "cells.csv")
    assert list(cells["model"].unique()) == ["attnres", "recency", "uniform"]
    assert (cells[cells["intervention"] == "mask"].groupby("model").size() == 24).all()
    for beside in ("matched", "keep"):
        assert (cells[cells["intervention"] == beside].groupby("model").size() == 4).all()
    summary = json.loads((probed / "summary.json").read_text())
    assert summary["grid"]["complete"] and all(check["passed"] for check in summary["checks"])
    masked = cells[(cells["model"] == "attnres") & (cells["intervention"] == "mask") & cells["eligible"]]
    assert {row["cell"]: row["dnll"] for row in summary["attribution"]} == pytest.approx(
        dict(zip(masked["cell"], masked["dnll"], strict=True)), abs=1e-7
    )
    assert -1 <= summary["attribution_rank"]["rho"] <= 1
    assert {model["verified"] for model in summary["models"]} == {True}


def test_probe_compares_all_models_on_the_same_windows(probed):
    effects = pd.read_parquet(probed / "effects.parquet")
    seen = effects.groupby(["model", "cell"])["window"].apply(lambda windows: tuple(sorted(windows)))
    assert seen.nunique() == 1
    registered = json.loads((probed / "preregistration.json").read_text())
    assert set(effects["cell"]) <= set(registered["cells"])
    assert not (probed / "parts").exists()


@pytest.mark.slow
def test_probe_twice_gives_the_same_tables_also_when_it_is_stopped_and_resumed(trained, probed):
    tables = ("cells.csv", "contrasts.csv", "effects.csv", "mass.parquet", "routing.csv", "attribution.parquet")
    before = {name: (probed / name).read_bytes() for name in tables}
    registered = (probed / "preregistration.json").read_bytes()
    (probed / "cells.csv").unlink()
    probe = start_command(["probe.py", *PROBE.format(tmp=trained).split()], trained / "log")
    while probe.is_alive() and not list(probed.glob("parts/*/*.effects.*")):
        time.sleep(0.05)
    os.kill(probe.pid, signal.SIGTERM)
    assert exit_code(probe) == 75, (trained / "log.err").read_text()
    assert list(probed.glob("parts/*/*.parquet"))
    run_warm(trained, "probe.py", PROBE)
    assert {name: (probed / name).read_bytes() for name in tables} == before
    assert (probed / "preregistration.json").read_bytes() == registered


@pytest.mark.slow
def test_probe_as_a_submitit_job_that_is_preempted_keeps_its_cells_before_it_goes_back_into_the_queue(trained, probed):
    """SIGUSR2 comes after twelve cells of a life; the second one has fewer left."""
    settings = PROBE.replace("runs_dir={tmp}/runs", "runs_dir={tmp}/requeued").format(tmp=trained).split()
    launch = ["probe.py", "-m", "hydra/launcher=submitit_local", f"hydra.sweep.dir={trained}/sweep"]
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ATTNRES_FAULT": "probe.cell@12:usr2"}
    done = run_command([*launch, *settings, "probe.families=embedding", "probe.bands=late"], trained / "log", here)
    assert done.returncode == 0, done.stderr
    (log,) = (trained / "sweep").glob(".submitit/*/*.out")
    assert log.read_text().count("Requeued job") == 1
    (table,) = (trained / "requeued").glob("probe_*/effects.parquet")
    keys = ["model", "cell", "window"]
    ours, theirs = (pd.read_parquet(path).set_index(keys) for path in (table, probed / "effects.parquet"))
    assert set(ours.index.unique("model")) == {"attnres", "recency", "uniform"}
    pd.testing.assert_frame_equal(ours.sort_index(), theirs.loc[ours.index].sort_index())


@pytest.mark.slow
def test_probe_shared_by_two_processes_gives_the_same_tables(trained, probed):
    settings = PROBE.replace("runs_dir={tmp}/runs", "runs_dir={tmp}/shared")
    done = run_warm(trained, "probe.py", settings, "device=cpu", "devices=2")
    (folder,) = (trained / "shared").glob("probe_*")
    assert done.stdout.strip().splitlines()[-1] == str(folder / "report.html")
    for name in ("effects.csv", "mass.parquet", "routing.csv", "cells.csv", "attribution.parquet"):
        assert (folder / name).read_bytes() == (probed / name).read_bytes(), name


@pytest.mark.slow
def test_probe_sweep_leaves_a_report_per_family_each_saying_that_it_is_a_member(trained, probed):
    run_warm(trained, "probe.py", "-m " + PROBE, "probe.families=embedding,older")
    members = sorted(set((trained / "runs").glob("probe_*/summary.json")) - {probed / "summary.json"})
    assert len(members) == 2
    for path in members:
        grid = json.loads(path.read_text())["grid"]
        assert (grid["run_cells"], grid["candidate_cells"], grid["complete"]) == (8, 32, False)
        assert "8 of 32" in (path.parent / "report.html").read_text()
        # The members do not name each other; the whole probe before them is an earlier one.
        earlier = json.loads((path.parent / "preregistration.json").read_text())["earlier_looks"]
        assert [(probe["folder"], probe["cells"], list(probe["differs"])) for probe in earlier] == [
            (probed.name, 8, ["families"])
        ]
    whole = pd.read_csv(probed / "cells.csv").set_index(["model", "cell"])
    for path in members:
        member = pd.read_csv(path.parent / "cells.csv").set_index(["model", "cell"])
        pd.testing.assert_series_equal(member["dnll"], whole.loc[member.index, "dnll"])
        # What the rest of the grid would have given is unknown to a member, so it may only be stricter.
        assert (member["p_holm"].dropna() >= whole.loc[member.index, "p_holm"].dropna()).all()


@pytest.mark.slow
def test_probe_in_looks_gives_the_same_bytes_stopped_resumed_by_two_processes_and_from_members_of_a_sweep(trained):
    settings = PROBE.replace("probe.attribution=true", "statistics.looks=[2,4] probe.controls=none")
    tables = ("effects.csv", "mass.parquet", "cells.csv", "contrasts.csv", "motifs.csv")

    def probed_in(name: str, *more: str, multirun: str = "") -> list[Path]:
        words = multirun + settings.replace("{tmp}/runs ", f"{{tmp}}/{name} ", 1)
        run_warm(trained, "probe.py", words, *more)
        return sorted((trained / name).glob("probe_*"))

    (alone,) = probed_in("looks")
    effects = pd.read_csv(alone / "effects.csv")
    registered = json.loads((alone / "preregistration.json").read_text())
    looks = [look["documents"] for look in registered["splits"]["looks"]["confirm"]]
    assert looks[:2] == [2, 4] and registered["statistics"]["looks"] == looks
    documents = effects[effects["split"] == "confirm"].groupby(["model", "cell"])["document"].nunique()
    assert {2} < set(documents) <= set(looks)  # something was decided at once, something went on

    words = settings.replace("{tmp}/runs ", "{tmp}/killed ").format(tmp=trained).split()
    probe = start_command(["probe.py", *words], trained / "log")
    while probe.is_alive() and not list((trained / "killed").glob("probe_*/parts/*/*.confirm.*.effects.*")):
        time.sleep(0.05)
    os.kill(probe.pid, signal.SIGKILL)
    exit_code(probe)
    (killed,), (shared,) = probed_in("killed"), probed_in("shared_looks", "device=cpu", "devices=2")
    for name in tables:
        for other in (killed, shared):
            assert (other / name).read_bytes() == (alone / name).read_bytes(), name

    members = probed_in("swept", "probe.families=embedding,current,recent,older", multirun="-m ")
    assert len(members) == 4
    out = trained / "combined"
    assert rejudge([*map(str, members), "--out", str(out)]) == 0
    keys = ["model", "cell", "window"]
    ours, whole = (pd.read_csv(folder / "effects.csv").set_index(keys).sort_index() for folder in (out, alone))
    pd.testing.assert_frame_equal(ours, whole, check_exact=True)
    assert rejudge([str(alone)]) == rejudge([str(out)]) == 0


def test_probe_without_a_baseline_names_the_command_that_makes_one(trained):
    (vanilla,) = (trained / "runs").glob("vanilla_tiny-*")
    hidden = vanilla.rename(trained / "hidden")
    try:
        done = run_warm(trained, "probe.py", PROBE, code=2)
        assert "python train.py +experiment=vanilla_tiny" in done.stderr
    finally:
        hidden.rename(vanilla)


def test_probe_of_a_damaged_checkpoint_falls_back_loudly(trained):
    (folder,) = (trained / "runs").glob("attnres_tiny-*")
    weights = folder / "checkpoints" / "step_00000006" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = run_warm(
            trained, "probe.py", PROBE, "probe.families=embedding", "probe.sublayers=mlp", "probe.bands=early"
        )
        assert "CORRUPT CHECKPOINT" in done.stderr
        run_warm(trained, "probe.py", PROBE, f"ckpt={weights.parent}", code=4)
    finally:
        weights.write_bytes(whole)
