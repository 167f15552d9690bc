"""What W&B's files of a run hold, read without W&B's own reader, which its newer versions keep to themselves.

A file is a header of 7 bytes and blocks of 32 KiB of records; a record is `crc (4), length (2), kind (1), bytes`, whole
(kind 1) or in pieces of which the last is of kind 4.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _WHOLE, _LAST = 7, 32 * 2**10, 1, 4


def segments(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    """The folder and the logged rows of each life of a run, oldest life first."""
    return {path.parent: list(_rows(path)) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def _records(data: bytes) -> Iterator[bytes]:
    at, content = _HEADER, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_WHOLE, _LAST):
            yield content
            content = b""
