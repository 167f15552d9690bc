"""Where a result came from: code, versions, hardware, seeds and the command. Nothing secret."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnres.files.redaction import redact

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "lightning",
    "hydra-core",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "statsmodels",
    "wandb",
)


def git_state() -> dict[str, Any]:
    """`{"sha": ..., "dirty": ...}` of the repository that holds this package; both None without git."""
    here = Path(__file__).resolve().parents[1]
    sha = _git(here, "rev-parse", "HEAD")
    # A package installed inside somebody else's repository is not described by that repository's commit.
    if sha is None or not _git(here, "ls-files", "--", "files/provenance.py"):
        return {"sha": None, "dirty": None}
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": None if status is None else bool(status)}


def source_digest(rooms: Sequence[str]) -> str:
    """sha256 over the modules of some rooms, in the order of their paths: the code that runs, committed or not.

    Args:
        rooms: folders of the package, e.g. `"ops"`, `"data/windows"`.
    """
    here, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for room in rooms for path in (here / room).rglob("*.py")):
        digest.update(f"{path.relative_to(here)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def collect(
    command: str, hardware: Mapping[str, Any], seeds: Mapping[str, int], hashes: Mapping[str, str | None]
) -> dict[str, Any]:
    """One record of where a result came from, as plain containers.

    Args:
        command: the command line; values of arguments whose names look like secrets are masked.
        hardware: see `attnres.processes.hardware`.
        seeds: every seed that was used, by name.
        hashes: fingerprints of configuration, data, tokenizer, checkpoint, by name.
    """
    return {
        "command": redact(command),
        "git": git_state(),
        "versions": versions(),
        "hardware": dict(hardware),
        "seeds": dict(seeds),
        "hashes": dict(hashes),
    }


def command_line() -> str:
    """The command that started this process, without secrets."""
    return redact(" ".join([Path(sys.executable).name, *sys.argv]))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
