"""How a run folder is laid out, and how a checkpoint in it is verified: what training writes and the probe reads.

runs/<name>-<hash>/checkpoints/step_00000200/
    training.ckpt     Lightning's state
    model/            Hugging Face folder with tokenizer, data.json and training.json
    manifest.json     sha256 and size of every other file and the version of the format, written last
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from attnres.errors import CheckpointError, ConfigError
from attnres.files.formats import check_format
from attnres.files.hashes import sha256_of
from attnres.files.whole_files import read_object

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TRAINING_FILE = "training.ckpt"
MODEL_FOLDER = "model"
MANIFEST = "manifest.json"
COMPLETE = "complete.json"
LOCK = ".lock"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_ITS_VERSION = "read it with the version of attnres that wrote it (the run's provenance.json names the commit)"


class OtherFormat(CheckpointError):
    """A checkpoint of another format: nothing is wrong with it, so no older one is taken in its place."""


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def list_steps(run_folder: Path) -> dict[int, Path]:
    """Step folders of a run by step, ascending, verified or not."""
    folder = run_folder / CHECKPOINTS
    if not folder.is_dir():
        return {}
    named = ((_STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def refuse_links(folder: Path) -> None:
    """What is written to a run folder must stay in it.

    Raises:
        ConfigError: an entry of the folder is a link that leads out of it.
    """
    root = folder.resolve()
    for path in (*folder.iterdir(), *folder.glob(f"{CHECKPOINTS}/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ConfigError(f"{path} is a link out of the run folder; remove it, or move the whole folder instead")


def refuse_unsafe_loading() -> None:
    """Torch lets an environment variable turn its safe unpickler off.

    Raises:
        ConfigError: it is set.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise ConfigError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD makes loading checkpoints unsafe; unset it")


def verify(folder: Path) -> dict[str, Any]:
    """Checks every file of a step folder against its manifest, before anything in it is used.

    Returns:
        The manifest.

    Raises:
        CheckpointError: no manifest, another format, a missing, altered or unlisted file, or a file that lies outside
            the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = read_object(path)
        check_format(manifest, path, OtherFormat, _ITS_VERSION)
        files = {str(name): (entry["sha256"], int(entry["bytes"])) for name, entry in manifest["files"].items()}
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("its end is missing")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so not a complete checkpoint; choose another") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: unreadable manifest ({error}); choose another checkpoint") from error
    if TRAINING_FILE not in files:
        raise CheckpointError(f"{path}: does not list {TRAINING_FILE}; choose another checkpoint")
    root = folder.resolve()
    for name, (sha256, size) in files.items():
        file = folder / name
        try:
            if not file.resolve().is_relative_to(root):
                raise CheckpointError(f"{path}: names {name!r}, which lies outside the checkpoint; do not use it")
            # Size and type first: a device or a pipe has no end.
            intact = file.stat().st_size == size and file.is_file() and sha256_of(file) == sha256
        except (OSError, ValueError) as error:
            message = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{file}: {message}; choose another checkpoint") from error
        if not intact:
            raise CheckpointError(f"{file}: size or sha256 differs from the manifest; choose another checkpoint")
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_symlink() or file.is_file()}
    if strays := sorted(name for name in present - files.keys() - {MANIFEST} if not _hidden(name)):
        raise CheckpointError(f"{folder / strays[0]}: not in the manifest; remove it or choose another checkpoint")
    return manifest


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None if the run has none at all.

    Falls back to older ones, with a warning for each that it passes over.

    Raises:
        CheckpointError: there are checkpoints and none is intact, so that starting afresh is the user's decision; or
            the newest intact one is of another format.
    """
    steps = list_steps(run_folder)
    for step in reversed(steps):
        try:
            verify(steps[step])
        except OtherFormat:
            raise
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
    objects = []
    for name in ("training.json", "data.json"):
        path = folder / MODEL_FOLDER / name
        try:
            objects.append(read_object(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: unreadable ({error}); choose another checkpoint") from error
    return objects[0], objects[1]
