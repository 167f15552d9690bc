"""The safetensors files of a Hugging Face folder, and which tensor is taken from which of them."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath

import safetensors
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from attnres.errors import CheckpointError
from attnres.files.whole_files import read_object

# model.VARIANT.safetensors, and model.safetensors.index.VARIANT.json, which names model.VARIANT-00001-of-00002...
_VARIANT = re.compile(r"model\.(?:safetensors\.index\.(.+)\.json|((?:(?!-\d{5}-of-\d{5}).)+)\.safetensors)")

# Of a causal language model, in a checkpoint: the two that a configuration may tie.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def head_differs(weights: Mapping[str, Tensor]) -> bool:
    """Whether a head stands beside the embedding and is another: they are not tied then, whatever a configuration says.

    Source: what `from_pretrained` of transformers does since 5.0.
    """
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    return head.dtype != embedding.dtype or not torch.equal(head, embedding)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that decide the weights of a folder: one safetensors file, or an index and what it names.

    What the index does not name is no part. An index whose files are gone does not count beside a single file.

    Args:
        variant: of transformers' `save_pretrained(variant=...)`; "" for the files without one. None takes those, or,
            where there are none, the only variant.

    Returns:
        Empty where the folder has no weights.

    Raises:
        CheckpointError: an index that cannot be followed, or one beside a single file; several variants alone.
    """
    entry = _entry(folder, variant)
    if entry is None or entry.suffix != ".json":
        return [] if entry is None else [entry]
    return [entry, *sorted(set(_by_index(entry).values()))]


def weight_shapes(folder: Path, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor, from the headers alone.

    Raises:
        CheckpointError: as `weight_files`, or an index that does not agree with its files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, names in _holders(folder, variant).items():
        with safetensors.safe_open(path, "pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
    return shapes


def read_weights(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Every stored tensor; one without dimensions becomes `[1]`, which FSDP2 can shard.

    Raises:
        CheckpointError: as `weight_shapes`.
    """
    weights: dict[str, Tensor] = {}
    for path, names in _holders(folder, variant).items():
        with safetensors.safe_open(path, "pt") as file:
            weights.update({name: file.get_tensor(name) for name in names})
    return {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in weights.items()}


def held_twice(folder: Path, variant: str | None = None) -> bool:
    """Whether two files of an index hold one tensor. Transformers then takes the last file's, whatever the index says.

    Raises:
        CheckpointError: as `weight_shapes`.
    """
    held = [name for path in _holders(folder, variant) for name in _names(path)]
    return len(held) > len(set(held))


def _entry(folder: Path, variant: str | None) -> Path | None:
    """The single file, or the index, that a folder's weights begin with."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if variant is None and not single.is_file() and not index.is_file():
        variants = sorted(
            {match[1] or match[2] for path in folder.iterdir() if (match := _VARIANT.fullmatch(path.name))}
        )
        if len(variants) > 1:
            raise CheckpointError(f"{folder}: holds the variants {', '.join(variants)} alone; keep one of them")
        variant = variants[0] if variants else None
    if variant:
        single, index = (path.with_suffix(f".{variant}{path.suffix}") for path in (single, index))
    if not single.is_file():
        return index if index.is_file() else None
    # Saving shards over a single file leaves that file, saving a single file over shards leaves their index alone.
    try:
        beside = set(_by_index(index).values()) - {single} if index.is_file() else set()
    except CheckpointError:
        return single
    if beside:
        raise CheckpointError(
            f"{folder}: {single.name} and the files of {index.name} may be two models; remove what is not meant"
        )
    return single


def _by_index(index: Path) -> dict[str, Path]:
    """Tensor -> the file that an index takes it from.

    Raises:
        CheckpointError: it is no index, or names what is no file inside its folder.
    """
    try:
        places = read_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: unreadable ({error}); copy the checkpoint again") from error
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: no weight_map of tensors to files; copy the checkpoint again")
    for name in set(places.values()):
        # By its parts and not by where a link leads: the hub's cache links every file of a snapshot.
        outside = PurePath(name).is_absolute() or ".." in PurePath(name).parts
        if outside or not (index.parent / name).is_file():
            what = "is outside its folder" if outside else "is no file"
            raise CheckpointError(f"{index}: {name!r}, which it names, {what}; copy the checkpoint again")
    return {tensor: index.parent / name for tensor, name in places.items()}


def _holders(folder: Path, variant: str | None) -> dict[Path, list[str]]:
    """File -> names of the tensors that are taken from it.

    Raises:
        CheckpointError: the index and its files do not hold the same tensors.
    """
    entry = _entry(folder, variant)
    if entry is None:
        return {}
    places = _by_index(entry) if entry.suffix == ".json" else {}
    holders: dict[Path, list[str]] = {}
    for path in sorted(set(places.values())) or [entry]:
        stored = _names(path)
        listed = {name for name, place in places.items() if place == path}
        if places and (differing := (listed - set(stored)) | (set(stored) - places.keys())):
            raise CheckpointError(
                f"{entry}: it and {path.name} do not agree about {min(differing)}; copy the checkpoint again"
            )
        holders[path] = [name for name in stored if name in listed or not places]
    return holders


def _names(path: Path) -> list[str]:
    """Of the tensors in a safetensors file."""
    with safetensors.safe_open(path, "pt") as file:
        return list(file.keys())
