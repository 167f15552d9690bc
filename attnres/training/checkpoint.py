"""Writes checkpoint folders that are whole and verifiable, or not there, and reads the training state of one.

A folder holds Lightning's state, the exported model and a manifest (layout: `attnres.files.run_folder`). It is written
under a temporary name beside its final one, every file is flushed, and one rename publishes it.
"""

import errno
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from attnres import faults
from attnres.errors import CheckpointError, NumericsError, one_line
from attnres.files import formats
from attnres.files.hashes import sha256_of
from attnres.files.run_folder import (
    CHECKPOINTS,
    MANIFEST,
    MODEL_FOLDER,
    TRAINING_FILE,
    list_steps,
    refuse_unsafe_loading,
)
from attnres.files.whole_files import fsync_path, storage_errors, write_json
from attnres.processes.memory import is_of_the_machine
from attnres.training.export import ExportInfo, export_model

_MARGIN_BYTES = 32 * 2**20
_TEMPORARY, _TRASH = ".tmp-", ".trash-"
_STATE_KEYS = frozenset({"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "attnres"})


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's door to `write_checkpoint`: `trainer.save_checkpoint(folder)` publishes a step folder.

    Args:
        published: called with a folder when it carries its final name.
        background: write in a thread, from a copy in host memory, while training goes on. There is one write at a time;
            the next save, `check` or `wait` raises its error. `storage_options={"wait": True}` waits for the write.
    """

    def __init__(
        self, model: PreTrainedModel, info: ExportInfo, published: Callable[[Path], None], background: bool
    ) -> None:
        self._model = model
        self._info = info
        self._published = published
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        if self._thread is None or (storage_options or {}).get("wait"):
            self._write(Path(path), checkpoint)
        else:
            self._pending = self._thread.submit(self._write, Path(path), host_copy(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_state(Path(path), self._model)

    def check(self) -> None:
        """Raises the error of a write that has failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises the error of the write that it waited for."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, folder: Path, checkpoint: dict[str, Any]) -> None:
        write_checkpoint(folder, checkpoint, self._model, self._info)
        self._published(folder)


def host_copy(value: Any) -> Any:
    """Nested containers with every tensor copied to host memory; what was one tensor stays one (tied weights)."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(item: Any) -> Any:
        if isinstance(item, Tensor):
            key = (item.device, item.data_ptr(), item.dtype, item.shape, item.stride())
            if key not in copies:
                copies[key] = item.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(item, dict):
            return type(item)((k, copy(v)) for k, v in item.items())
        if isinstance(item, list | tuple):
            return type(item)(map(copy, item))
        return deepcopy(item)

    return copy(value)


def write_checkpoint(folder: Path, checkpoint: dict[str, Any], model: PreTrainedModel, info: ExportInfo) -> None:
    """Publishes one step folder atomically; an older folder of the same name is replaced.

    Args:
        folder: final path, `.../checkpoints/step_NNNNNNNN`.
        checkpoint: Lightning's dictionary, with this project's entry under `attnres`.
        model: gives architecture and configuration. Its weights are taken from `checkpoint`, where those of a sharded
            model have been gathered.

    Raises:
        NumericsError: a weight is not finite; nothing is written.
        StorageError: the disk is full or refuses; the temporary folder is removed.
    """
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise NumericsError(f"{folder.name}: weights are not finite ({bad[0]} and {len(bad) - 1} more); not saved")
    if not all(torch.isfinite(tensor).all() for tensor in _tensors(checkpoint.get("optimizer_states"))):
        raise NumericsError(f"{folder.name}: the optimizer's state is not finite; not saved: lower optim.lr")
    remedy = "the checkpoint is not written; free space or fix the folder"
    with storage_errors(folder, remedy, every=True), _published(folder) as temporary:
        _check_space(folder.parent, _tensor_bytes(checkpoint) + _tensor_bytes(weights))
        (temporary / MODEL_FOLDER).mkdir(parents=True)
        faults.point("save.tensors")
        _save_tensors(checkpoint, temporary / TRAINING_FILE)
        faults.point("save.export")
        progress = {name: checkpoint["attnres"][name] for name in ("step", "tokens", "val_loss")}
        export_model(temporary / MODEL_FOLDER, model, weights, info, progress)
        faults.point("save.manifest")
        _write_manifest(temporary)


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A folder that appears under its final name whole, or not at all.

    Yields:
        The temporary path beside it to make and fill. It is renamed at the end, and removed where the disk refuses.
    """
    temporary, trash = _renamed(folder, _TEMPORARY), _renamed(folder, _TRASH)
    try:
        faults.point("save.begin")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        faults.point("save.rename")
        if folder.exists():
            _remove(trash)
            os.replace(folder, trash)
            faults.point("save.replace")
        os.replace(temporary, folder)
        fsync_path(folder.parent)
        faults.point("save.published")
        _remove(trash)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _remove(temporary)
        if isinstance(error, SafetensorError):
            # How safetensors reports a full disk.
            raise OSError(errno.EIO, str(error)) from error
        raise


def read_state(path: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Lightning's state from a verified checkpoint: data alone, no larger than its file, and of this model.

    Raises:
        ConfigError: torch's safe unpickler is turned off.
        CheckpointError: the file is something else.
    """
    refuse_unsafe_loading()
    remedy = "choose another checkpoint"
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        # Torch stores and never compresses; what would unpack to more than the file was not written by it.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise CheckpointError(f"{path}: its records are compressed or overlap, which torch never writes; {remedy}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the archive, the unpickler and the storages each raise types of their own
        if is_of_the_machine(error):
            raise
        # Torch's message goes on to explain how to load it all the same.
        message = one_line(error, most=120)
        raise CheckpointError(f"{path}: not a training state ({type(error).__name__}: {message}); {remedy}") from error
    missing = _STATE_KEYS - state.keys() if isinstance(state, dict) else _STATE_KEYS
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(sorted(missing))}; {remedy}")
    if not _stored_in_full(state):
        raise CheckpointError(f"{path}: holds a tensor larger than its storage; {remedy}")
    wanted = {f"model.{name}": value.shape for name, value in model.state_dict().items()}
    stored = {name: getattr(value, "shape", None) for name, value in dict(state["state_dict"]).items()}
    differing = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if differing:
        raise CheckpointError(
            f"{path}: {len(differing)} weights are not those of this model, {differing[0]} among them; {remedy}"
        )
    return state


def prune(run_folder: Path, newest: int, keep: int, permanent: Callable[[int], bool]) -> None:
    """Removes the oldest step folders until `keep` are left up to `newest`, the step that was just written.

    Steps that are `permanent` stay and do not count. Folders after `newest` (left by a run that fell back to an older
    checkpoint) stay until they are written again.
    """
    steps = list_steps(run_folder)
    older = [step for step in steps if step < newest and not permanent(step)]
    for step in older[: max(0, len(older) - (keep - 1))]:
        # A folder that is half deleted must not carry a final name.
        trash = _renamed(steps[step], _TRASH)
        _remove(trash)
        faults.point("prune.rename")
        os.replace(steps[step], trash)
        faults.point("prune.remove")
        _remove(trash)


def remove_leftovers(run_folder: Path) -> None:
    """Removes what a killed process left under temporary names; only while holding the run's lock."""
    folder = run_folder / CHECKPOINTS
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((_TEMPORARY, _TRASH)):
                _remove(path)


def _renamed(folder: Path, prefix: str) -> Path:
    return folder.with_name(prefix + folder.name)


def _save_tensors(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:
        if is_of_the_machine(error):
            raise
        # How torch's writer reports a full disk.
        raise OSError(errno.EIO, str(error)) from error


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync_path(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_path(path)
    write_json(folder / MANIFEST, {formats.KEY: formats.VERSION, "files": files})


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _stored_in_full(value: Any) -> bool:
    """Whether no tensor repeats its elements: a stride of 0 makes gigabytes of a few bytes once it is copied."""
    return all(t.numel() * t.element_size() <= t.untyped_storage().nbytes() for t in _tensors(value))


def _tensor_bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN_BYTES:
        raise OSError(errno.ENOSPC, f"{(needed + _MARGIN_BYTES) / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
