"""Environments of their own for the long tests: the Python that runs them, the Makefile's TORCH, a package index."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "cache", "results", "__pycache__", ".*_cache", "*.egg-info")


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the copy of this repository that is run in it."""

    folder: Path
    sources: Path

    @classmethod
    def new(cls, folder: Path, sources: Path, below: "Environment | None" = None) -> "Environment":
        """An empty environment; it sees the packages of the environment `below`, and pip counts them as installed."""
        made = cls(folder, sources)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if below is not None:
            (made.packages / "below.pth").write_text(f"{below.packages}\n")
        return made

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def python(self, *words: str | Path, **variables: str) -> str:
        """What `python words...` prints in the copy of the repository; a failure ends the test with its output."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": "1", **variables}
        command = [str(self.folder / "bin" / "python"), *map(str, words)]
        done = subprocess.run(command, cwd=self.sources, env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{shlex.join(command)} ended with {done.returncode}\n{(done.stdout + done.stderr)[-8000:]}")
        return done.stdout

    def install(self, *words: str | Path) -> None:
        self.python("-m", "pip", "install", "-q", "--disable-pip-version-check", *words)


def torch_options(version: str | None = None) -> list[str]:
    """What the Makefile gives to pip for torch; with another version where one is named."""
    words = shlex.split(os.environ.get("TORCH") or "torch==2.13.0")
    return [f"torch=={version}" if version and word.startswith("torch==") else word for word in words]
