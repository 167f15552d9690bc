"""One spelling of a hash of plain values, and one of a file."""

import hashlib
import json
from pathlib import Path
from typing import Any


def content_hash(plain: Any, spaced: bool = False) -> str:
    """sha256, in hex, of the JSON of plain containers with sorted keys: equal values have equal hashes.

    Args:
        spaced: with a space behind `,` and `:`, as the corpora on disk were named; else without.
    """
    separators = None if spaced else (",", ":")
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=separators).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
