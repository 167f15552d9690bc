"""JSON objects from files that may come from anywhere: bounded in size and depth, and never anything but data."""

import json
from pathlib import Path
from typing import Any

# No file of ours comes near it; parsed, it is some ten times as large.
MOST_BYTES = 32 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, too deeply nested, not JSON, or not an object.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("not a regular file")
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes, at most {MOST_BYTES:,} are read")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
