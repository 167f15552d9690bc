"""Writes checkpoint folders that are whole and verifiable, or not there (layout: `attnres.run_folder`).

A folder is written under a temporary name beside its final one, every file is flushed, and one rename
publishes it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from attnres.errors import NumericsError, StorageError
from attnres.provenance import fsync_path, write_json
from attnres.run_folder import (
    CHECKPOINTS,
    MANIFEST,
    MODEL_FOLDER,
    TRAINING_FILE,
    list_steps,
    sha256_of,
)

_MARGIN_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ExportInfo:
    """What a checkpoint says about its run, so that the probe needs no training YAML.

    `training` becomes `training.json` (step, tokens and val_loss are added), `data` becomes `data.json`.
    """

    tokenizer_path: Path
    eos_id: int
    training: dict[str, Any]
    data: dict[str, Any]


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's door to `write_checkpoint`: `trainer.save_checkpoint(folder)` publishes a step folder."""

    def __init__(self, model: PreTrainedModel, info: ExportInfo) -> None:
        self.model = model
        self.info = info

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(Path(path), checkpoint, self.model, self.info)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


def write_checkpoint(folder: Path, checkpoint: dict[str, Any], model: PreTrainedModel, info: ExportInfo) -> None:
    """Publishes one step folder atomically; an older folder of the same name is replaced.

    Args:
        folder: final path, `.../checkpoints/step_NNNNNNNN`.
        checkpoint: Lightning's dictionary, with this project's entry under `attnres`.
        model: gives architecture and configuration; its weights are taken from `checkpoint`, where a sharded
        model's
            have been gathered.
        info: see `ExportInfo`.

    Raises:
        NumericsError: a weight is not finite; nothing is written.
        StorageError: the disk is full or refuses; the temporary folder is removed.
    """
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise NumericsError(f"{folder.name}: weights are not finite ({bad[0]} and {len(bad) - 1} more); not saved")
    parent = folder.parent
    temporary = parent / f".tmp-{folder.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _check_space(parent, _tensor_bytes(checkpoint) + _tensor_bytes(weights))
        _remove(temporary)
        (temporary / MODEL_FOLDER).mkdir(parents=True)
        _save_tensors(checkpoint, temporary / TRAINING_FILE)
        training = info.training | {k: checkpoint["attnres"][k] for k in ("step", "tokens", "val_loss")}
        export_model(temporary / MODEL_FOLDER, model, weights, info, training)
        _write_manifest(temporary)
        if folder.exists():
            trash = parent / f".trash-{folder.name}"
            _remove(trash)
            os.replace(folder, trash)
        os.replace(temporary, folder)
        fsync_path(parent)
        _remove(parent / f".trash-{folder.name}")
    # safetensors reports a full disk as its own type.
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _remove(temporary)
        raise StorageError(f"{folder}: cannot write the checkpoint ({error}); free space or fix the folder") from error


def export_model(
    folder: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    info: ExportInfo,
    training: dict[str, Any],
) -> None:
    """Writes a Hugging Face folder: model, tokenizer, and where they came from."""
    with _without_progress_bar():
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="100GB")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(info.tokenizer_path))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(info.eos_id)
    tokenizer.model_max_length = int(model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    write_json(folder / "data.json", info.data)
    write_json(folder / "training.json", training)


def prune(run_folder: Path, newest: int, keep: int) -> None:
    """Removes the oldest step folders until `keep` are left up to `newest`, the step that was just written.

    Folders after `newest` (left by a run that fell back) stay until they are written again.
    """
    steps = list_steps(run_folder)
    older = [step for step in steps if step < newest]
    for step in older[: max(0, len(older) - (keep - 1))]:
        # A folder that is half deleted must not carry a final name.
        trash = steps[step].with_name(f".trash-{steps[step].name}")
        _remove(trash)
        os.replace(steps[step], trash)
        _remove(trash)


def clean(run_folder: Path) -> None:
    """Removes what a killed process left under temporary names; only while holding the run's lock."""
    folder = run_folder / CHECKPOINTS
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".tmp-", ".trash-")):
                _remove(path)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _save_tensors(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # How torch's writer reports a full disk.
        raise OSError(str(error)) from error


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync_path(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_path(path)
    write_json(folder / MANIFEST, {"files": files})


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(item) for item in value)
    return 0


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN_BYTES:
        raise OSError(f"{(needed + _MARGIN_BYTES) / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
