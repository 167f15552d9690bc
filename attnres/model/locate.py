"""From the paths in a configuration, `ckpt=` and `baseline=`, to verified Hugging Face folders."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.errors import CheckpointError, ConfigError
from attnres.files.hashes import sha256_of
from attnres.files.run_folder import CHECKPOINTS, COMPLETE, MANIFEST, MODEL_FOLDER, latest, verify
from attnres.files.whole_files import read_object
from attnres.model.weights import weight_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Located:
    """A checkpoint: where it is, and what is known of it.

    Attributes:
        folder: its Hugging Face folder.
        run: name of the run it belongs to, or of the folder.
        verified: whether a manifest vouches for its bytes.
        finished: whether its run was completed; None where there is no run.
        digest: sha256 over its weights and configuration.
        data: `data.json` (corpus and tokenizer), empty where there is none.
        training: `training.json`, empty where there is none.
    """

    folder: Path
    run: str
    verified: bool
    finished: bool | None
    digest: str
    data: Mapping[str, Any]
    training: Mapping[str, Any]


def model_folder(path: str | Path) -> Path:
    """The Hugging Face folder behind a path, as it is: `locate` also verifies it.

    Args:
        path: a Hugging Face folder, a checkpoint (`.../checkpoints/step_N`, or the `training.ckpt` in it), a run folder
            (its newest checkpoint), or a hub id `owner/name` where no such path exists (this downloads).

    Raises:
        CheckpointError: where there is nothing to load.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if (folder / "config.json").is_file():
        return folder
    if (folder / MODEL_FOLDER / "config.json").is_file():
        return folder / MODEL_FOLDER
    steps = sorted(folder.glob(f"{CHECKPOINTS}/step_*/{MODEL_FOLDER}/config.json"))
    if steps:
        return steps[-1].parent
    if folder.exists():
        raise CheckpointError(
            f"checkpoint {path}: no config.json and no checkpoints/step_* inside; name a run or a model folder"
        )
    # Anything that is not `owner/name` is a path and never leads to a download.
    if re.fullmatch(r"[^/.~][^/]*/[^/]+", str(path)) and not folder.parent.exists():
        return _download(str(path))
    raise CheckpointError(
        f"checkpoint {path}: no such file or folder; train one with `python train.py`, or check the path"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    log.info("downloading %s from the Hugging Face hub", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {hub_id}: no such path, and the hub did not give it ({type(error).__name__}); check the name"
        ) from error


def locate(path: str) -> Located:
    """Find and verify a checkpoint.

    Args:
        path: see `model_folder`; a run folder may be named without its hash, and the newest of
            several is taken.

    Raises:
        CheckpointError: where there is nothing, or its bytes are not those that were written.
    """
    given = Path(path)
    if not given.exists():
        runs = sorted(given.parent.glob(f"{given.name}-*/{CHECKPOINTS}"), key=lambda place: place.stat().st_mtime)
        if runs:
            given = runs[-1].parent
            log.info("%s: taking %s%s", path, given, f", the newest of {len(runs)}" if len(runs) > 1 else "")
    if (given / CHECKPOINTS).is_dir():
        step = latest(given)
        if step is None:
            raise CheckpointError(f"{given}: the run holds no checkpoint yet; train it with `python train.py`")
        folder = step / MODEL_FOLDER
    else:
        folder = model_folder(given if given.exists() else path)
    verified = (folder.parent / MANIFEST).is_file() and folder.name == MODEL_FOLDER
    if verified:
        verify(folder.parent)
    else:
        log.warning("%s: no manifest, so its bytes are unverified; the report says so", folder)
    run = folder.parents[2] if verified and folder.parents[1].name == CHECKPOINTS else None
    digests = [sha256_of(file) for file in (*weight_files(folder), folder / "config.json")]
    return Located(
        folder,
        run.name if run else folder.name,
        verified,
        (run / COMPLETE).is_file() if run else None,
        "-".join(digest[:16] for digest in digests),
        _read_object(folder / "data.json"),
        _read_object(folder / "training.json"),
    )


def locate_baseline(path: str | None, trained: Located) -> Located:
    """The vanilla baseline: what was named, or the run beside the checkpoint that saw the same data.

    Raises:
        ConfigError: where none is named and none matches.
        CheckpointError: as `locate`.
    """
    if path is not None:
        return locate(path)
    remedy = (
        "name one with baseline=PATH, or train it: python train.py +experiment=vanilla_tiny "
        "(or the vanilla_* of your experiment)"
    )
    beside = trained.folder.parents[3] if trained.finished is not None else None
    if beside is None:
        raise ConfigError(
            f"baseline: {trained.folder} is not inside a runs folder, so no vanilla run is beside it; {remedy}"
        )
    shape = _read_object(trained.folder / "config.json")
    matches = vanilla_runs(beside, trained.data, shape, trained.training.get("seed"))
    if not matches:
        raise ConfigError(
            f"baseline: no vanilla run in {beside} has the data, tokenizer and shape of {trained.run}; {remedy}"
        )
    if len(matches) > 1:
        log.info("baseline: %d vanilla runs match; taking the newest, %s", len(matches), matches[-1])
    return locate(str(matches[-1]))


def vanilla_runs(beside: Path, data: Mapping[str, Any], shape: Mapping[str, Any], seed: int | None) -> list[Path]:
    """Run folders in `beside` that hold a vanilla Qwen3 of the same data, tokenizer, shape and seed, oldest first.

    Args:
        data: `fingerprint` and `tokenizer_sha256`, as in `data.json`.
        shape: `num_hidden_layers` and `hidden_size`, as in `config.json`.
        seed: of the training.
    """
    matches = []
    for run in sorted(beside.glob(f"*/{CHECKPOINTS}"), key=lambda place: place.stat().st_mtime):
        models = sorted(run.glob(f"*/{MODEL_FOLDER}"))
        if not models:
            continue
        stored, config = _read_object(models[-1] / "data.json"), _read_object(models[-1] / "config.json")
        same_data = all(stored.get(key) == data.get(key) for key in ("fingerprint", "tokenizer_sha256"))
        same_shape = all(config.get(key) == shape.get(key) for key in ("num_hidden_layers", "hidden_size"))
        same_seed = _read_object(models[-1] / "training.json").get("seed") == seed
        if config.get("model_type") == "qwen3" and same_data and same_shape and same_seed:
            matches.append(run.parent)
    return matches


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); copy the checkpoint again") from error
