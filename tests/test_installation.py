"""One way to install: the Makefile's lines are the Dockerfile's, and they work in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALL = ("-m venv", "-m pip install")


def docker_lines() -> list[str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    return [line for line in lines if any(part in line for part in INSTALL)]


def makefile_lines() -> list[str]:
    names = {"$(PYTHON)": "python3", "$(PY)": ".venv/bin/python", "$(TORCH)": "$TORCH"}
    lines = []
    for line in (ROOT / "Makefile").read_text().splitlines():
        if line.startswith("\t") and any(part in line for part in INSTALL):
            for name, value in names.items():
                line = line.replace(name, value)
            lines.append(line.strip())
    return lines


def test_makefile_and_dockerfile_install_with_the_same_lines():
    assert docker_lines() == makefile_lines()
    assert len(docker_lines()) == 4


def test_lock_holds_hashes_and_no_torch_or_cuda():
    names = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert {"transformers", "lightning", "hydra-core", "triton", "scipy", "pytest"} <= set(names)
    assert not [name for name in names if name == "torch" or name.startswith(("nvidia", "cuda"))]
    assert (ROOT / "requirements.lock").read_text().count("--hash=sha256:") > len(names)


def test_default_torch_is_the_same_everywhere():
    found = re.findall(r"torch==[0-9.]+", "".join((ROOT / n).read_text() for n in ("Makefile", "Dockerfile")))
    assert set(found) == {"torch==2.13.0"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_three_sizes_of_tests_split_the_suite():
    """`make test` and `make test-rest` share no test; together they are `make test-all`, and the rest is long."""

    def runs(target: str, slow: bool, long: bool) -> bool:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        (expression,) = re.findall(r"-m pytest .*-m \"?((?:not |and |slow ?|long ?)+)", done.stdout)
        return bool(eval(expression, {}, {"slow": slow, "long": long}))

    for slow, long in product((False, True), repeat=2):
        sizes = {name: runs(name, slow, long) for name in ("test", "test-rest", "test-all", "test-long")}
        assert sizes["test-all"] == (sizes["test"] ^ sizes["test-rest"])
        assert sizes["test-long"] == (not sizes["test-all"]) == long
        assert sizes["test"] <= (not slow)
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test", "make test-rest"]


@pytest.mark.long
def test_dockerfile_python_lines_work_in_a_fresh_environment(tmp_path):
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "attnres", tmp_path / "attnres", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.setdefault("TORCH", "torch==2.13.0")
    for line in docker_lines():
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    check = (
        "import attnres, attnres.commands.hydra_door, attnres.training.fit, attnres.probe.runner;"
        "print(attnres.__file__)"
    )
    done = subprocess.run(
        [".venv/bin/python", "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: this one, and fast-attnres by its metadata."""
    shutil.copytree(ROOT / "attnres", tmp_path / "attnres", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fast_attnres-2.1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: fast-attnres\nVersion: 2.1.0\n"
    (tmp_path / "fast_attnres-2.1.0.dist-info" / "METADATA").write_text(metadata)
    return tmp_path


def command(site: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", "from attnres.commands.door import run_command; exit(run_command(lambda: 0))"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(words, cwd=site, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("init", ["__all__ = ['attention_residuals']\n", None])
def test_command_says_that_fast_attnres_replaced_this_package(site: Path, init: str | None) -> None:
    """Installed over this package it replaces `attnres/__init__.py`, and takes it away when it is uninstalled."""
    if init is None:
        (site / "attnres" / "__init__.py").unlink()
        shutil.rmtree(site / "fast_attnres-2.1.0.dist-info")
    else:
        (site / "attnres" / "__init__.py").write_text(init)
    done = command(site)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: attnres/__init__.py is not this package's: fast-attnres")
    assert "install attnres again" in done.stderr


def test_command_warns_of_fast_attnres_beside_this_package(site: Path) -> None:
    assert command(site).stderr.startswith("fast-attnres is installed too and imports as attnres")
    shutil.rmtree(site / "fast_attnres-2.1.0.dist-info")
    assert command(site).stderr == ""
