"""How a run folder is laid out, and how a checkpoint in it is verified: what training writes and the probe reads.

runs/<name>-<hash>/checkpoints/step_00000200/
    training.ckpt     Lightning's state
    model/            Hugging Face folder with tokenizer, data.json and training.json
    manifest.json     sha256 and size of every other file, written last
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from attnres.errors import CheckpointError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TRAINING_FILE = "training.ckpt"
MODEL_FOLDER = "model"
MANIFEST = "manifest.json"
COMPLETE = "complete.json"
_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def list_steps(run_folder: Path) -> dict[int, Path]:
    """Step folders of a run by step, ascending, verified or not."""
    folder = run_folder / CHECKPOINTS
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def verify(folder: Path) -> dict[str, Any]:
    """Checks every file of a step folder against its manifest, before anything in it is used.

    Returns:
        The manifest.

    Raises:
        CheckpointError: no manifest, a missing or altered file, or a manifest that names something outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (entry["sha256"], int(entry["bytes"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so not a complete checkpoint; choose another") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable manifest ({error}); choose another checkpoint") from error
    if TRAINING_FILE not in files:
        raise CheckpointError(f"{path}: does not list {TRAINING_FILE}; choose another checkpoint")
    root = folder.resolve()
    for name, (sha256, size) in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: names {name!r}, which lies outside the checkpoint; do not use it")
        try:
            intact = file.stat().st_size == size and sha256_of(file) == sha256
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}; choose another checkpoint") from error
        if not intact:
            raise CheckpointError(f"{file}: size or sha256 differs from the manifest; choose another checkpoint")
    return manifest


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None if the run has none at all.

    Falls back to older ones, with a warning for each that it passes over.

    Raises:
        CheckpointError: there are checkpoints and none is intact. Starting afresh is the user's decision.
    """
    steps = list_steps(run_folder)
    for step in reversed(steps):
        try:
            verify(steps[step])
        except CheckpointError as error:
            log.warning("CORRUPT CHECKPOINT passed over, falling back to an older one: %s", error)
            continue
        return steps[step]
    if steps:
        raise CheckpointError(
            f"{run_folder / CHECKPOINTS}: none of its {len(steps)} checkpoints is intact; move the folder away to start"
            " afresh"
        )
    return None


def read_info(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`training.json` and `data.json` of a verified step folder.

    Raises:
        CheckpointError: they are missing or not JSON objects.
    """
    found = []
    for name in ("training.json", "data.json"):
        path = folder / MODEL_FOLDER / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: unreadable ({error}); choose another checkpoint") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: expected a JSON object; choose another checkpoint")
        found.append(value)
    return found[0], found[1]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
