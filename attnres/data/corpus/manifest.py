"""`manifest.json` of a corpus: names, versions and digests of its files, and the digest of itself.

Format 1 is a small corpus of `preparation`: one shard per split, its table of documents written at once. Format 2 is a
folder of `make_shards`, of any size: several shards per split, a table in row groups that also holds `content`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from attnres.errors import DataError
from attnres.files.hashes import content_hash
from attnres.files.whole_files import read_object, write_text

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.parquet"
# A change to the layout of these files, or to how documents are grouped and split, needs a new number.
FORMAT = 1
SHARDED_FORMAT = 2


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in a manifest but this digest itself."""
    return content_hash({key: value for key, value in manifest.items() if key != "sha256_of_the_rest"}, spaced=True)


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a corpus, unchanged since it was written, and what to do about damage in the folder.

    Raises:
        DataError: It is missing, damaged, of another format, or names files outside the folder.
    """
    path = folder / MANIFEST
    remedy = f"delete {folder} and run the same command again to rebuild it"
    try:
        manifest = read_object(path)
        intact = manifest["sha256_of_the_rest"] == manifest_sha256(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is missing or unreadable ({error!r}); {remedy}") from error
    if command := manifest.get("command"):
        # As it is called today; corpora that were made before the commands had one home name it otherwise.
        command = str(command).replace("attnres.data.make_shards", "attnres.commands.make_shards")
        remedy = f"delete {folder} and make it again with: {command}"
    if not intact:
        raise DataError(f"{path} was changed after it was written; {remedy}")
    if (version := manifest.get("format")) not in (FORMAT, SHARDED_FORMAT):
        raise DataError(f"{path} has format {version!r}, expected {FORMAT} or {SHARDED_FORMAT}; {remedy}")
    root = folder.resolve()
    shards = [name for counts in manifest["splits"].values() for name in counts.get("shards", ())]
    for name in {*manifest["files"], *shards}:
        if not (folder / name).resolve().is_relative_to(root):
            raise DataError(f"{path} names {name!r}, which lies outside the corpus; do not use it")
    return manifest, remedy


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest with its own digest, whole or not at all."""
    signed = {**manifest, "sha256_of_the_rest": manifest_sha256(manifest)}
    write_text(folder / MANIFEST, json.dumps(signed, indent=1))


def fingerprint(folder: Path, files: Mapping[str, Mapping[str, Any]], shards: Sequence[str]) -> str:
    """Hash of what a model can see: tokens, boundaries, splits and tokenizer, but no names or versions.

    Args:
        folder: The corpus, but for its manifest.
        shards: Names of the token files, split after split.
    """
    sha256 = hashlib.sha256()
    for name in (*shards, TOKENIZER):
        sha256.update(bytes.fromhex(files[name]["sha256"]))
    with pq.ParquetFile(folder / DOCUMENTS) as table:
        for column in ("split", "start", "tokens"):
            for batch in table.iter_batches(columns=[column]):
                sha256.update(batch.column(0).to_numpy().astype("<i8").tobytes())
    return sha256.hexdigest()
