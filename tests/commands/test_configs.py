"""Every file under conf/ composes, validates and describes something that can be built."""

import runpy
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from attnres.config import build, differences, to_plain
from attnres.probe.config import ProbeConfig
from attnres.training.config import TrainConfig, run_folder
from attnres.training.models import KINDS, model_config

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose(name: str, *overrides: str) -> dict:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return OmegaConf.to_container(hydra.compose(name, list(overrides)), resolve=True)


def parameters(config: TrainConfig) -> int:
    described = model_config(config.model, 256, 0, config.data.sequence_length)
    model_class = next(model for cls, model in KINDS.values() if type(described) is cls)
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(described).parameters())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_and_instantiates(experiment):
    config = build(TrainConfig, compose("train", f"+experiment={experiment}"))
    assert config.name == experiment
    assert parameters(config) > 0


def test_experiments_of_the_project_are_there():
    wanted = {f"{kind}_{size}" for kind in ("attnres", "vanilla") for size in ("tiny", "small", "0p6b")}
    assert wanted <= set(EXPERIMENTS)


def test_default_run_is_the_tiny_experiment():
    default, named = (build(TrainConfig, compose("train", *o)) for o in ([], ["+experiment=attnres_tiny"]))
    assert run_folder(default) == run_folder(named)


@pytest.mark.parametrize("size", ["tiny", "small", "0p6b"])
def test_both_arms_of_an_experiment_differ_in_the_model_alone(size):
    attnres, vanilla = (compose("train", f"+experiment={kind}_{size}") for kind in ("attnres", "vanilla"))
    for arm in (attnres, vanilla):
        arm.pop("name")
    model, other = attnres.pop("model"), vanilla.pop("model")
    assert attnres == vanilla
    kept = {key: value for key, value in model.items() if not key.startswith("attnres_")}
    assert kept | {"kind": "vanilla"} == other


def holds_own_values(command: str, config: type, option: str, *overrides: str) -> bool:
    """Whether what is built with an option, such as `+scale=small`, is what the option's own file says."""
    group, name = option.lstrip("+").split("=")
    path = CONF / group / f"{name}.yaml"
    own = OmegaConf.load(path)
    own.pop("defaults", None)
    own = own if path.read_text(encoding="utf-8").startswith("# @package _global_") else {group: own}
    composed = compose(command, option, *overrides)
    said = OmegaConf.to_container(OmegaConf.merge(composed, own), resolve=True)
    return build(config, composed) == build(config, said)


def options(*groups: str) -> list[str]:
    files = ((group, path) for group in groups for path in sorted((CONF / group.lstrip("+")).glob("*.yaml")))
    return [f"{group}={path.stem}" for group, path in files]


@pytest.mark.parametrize("option", options("model", "data", "optim", "trainer", "logger", "+scale", "+control"))
def test_every_option_of_a_training_group_holds_its_own_values(option):
    # These have no text of their own.
    given = ["data.paths=[text]"] if option in ("data=files", "data=prepared") else []
    assert holds_own_values("train", TrainConfig, option, *given)


@pytest.mark.parametrize(
    ("command", "config", "given"), [("train", TrainConfig, ("model", "name")), ("probe", ProbeConfig, ("ckpt",))]
)
def test_conf_shows_every_key_with_the_default_of_the_dataclass(command, config, given):
    shown = compose(command)
    default = to_plain(build(config, {name: shown[name] for name in given}))
    assert differences(to_plain(build(config, shown)), default) == []

    def keys(plain):
        return {name: keys(value) if isinstance(value, dict) else None for name, value in plain.items()}

    # No key is missing from the files, where its comment stands and the command line finds it.
    assert keys(shown) == keys(default)


@pytest.mark.parametrize("option", options("data", "probe", "statistics"))
def test_every_option_of_a_probe_group_holds_its_own_values(option):
    assert holds_own_values("probe", ProbeConfig, option)


@pytest.mark.parametrize(
    ("given", "read"),
    [("null", None), ("[runs/a,runs/b-1]", ("runs/a", "runs/b-1")), ("{one:runs/a-0}", {"one": "runs/a-0"})],
)
def test_controls_of_a_probe_are_a_list_or_a_mapping_on_the_command_line(given, read):
    assert build(ProbeConfig, compose("probe", f"controls={given}")).controls == read


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `train.py` or `probe.py` as their own process would, in this one: exit code, stdout, stderr."""

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", [script, *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.py", "trainer.max_step=3"], 2, "did you mean 'trainer.max_steps'"),
        (["train.py", "+optim.learning_rate=3"], 2, "unknown key 'optim.learning_rate'"),
        (["train.py", "+experiment=attnres_0p7b"], 2, "did you mean 'experiment.attnres_0p6b'"),
        (["train.py", "optim.lr=fast"], 2, "optim.lr"),
        (
            ["train.py", "+experiment=attnres_0p6b"],
            3,
            "make it with: python -m attnres.commands.make_shards --out",
        ),
        (["train.py", "data=files", "data.paths=[nowhere/*.txt]"], 3, "nowhere"),
        (["probe.py", "probe.familes=older"], 2, "did you mean 'probe.families'"),
        (["probe.py", "probe.families=newest"], 2, "probe.families"),
        (["probe.py", "ckpt=runs/no_such_run"], 4, "no such file or folder"),
        (["probe.py", "--experimental-rerun", "config.pickle"], 2, "pickle"),
    ],
)
def test_command_says_a_mistake_in_one_line_with_its_exit_code(command, arguments, code, message):
    ended, _, stderr = command(*arguments)
    assert ended == code, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in stderr


def test_train_prints_the_resolved_configuration_of_the_cluster_run(command):
    code, stdout, _ = command("train.py", "+experiment=attnres_0p6b", "--cfg", "job")
    assert code == 0
    printed = OmegaConf.to_container(OmegaConf.create(stdout))
    assert printed == compose("train", "+experiment=attnres_0p6b")
