"""A probe's folder: what it measured and what was fixed before, read and checked."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.errors import ConfigError, DataError
from attnres.files.hashes import content_hash
from attnres.files.whole_files import read_object
from attnres.tables import columns

PREREGISTRATION, SUMMARY = "preregistration.json", "summary.json"
_AGAIN = "run the probe again, or name the folder that it wrote"


@dataclass(frozen=True)
class Measured:
    """What a probe measured, and under which preregistration."""

    folder: Path
    effects: pd.DataFrame
    mass: pd.DataFrame
    eligibility: pd.DataFrame
    registered: Mapping[str, Any]
    summary: Mapping[str, Any]
    attribution: pd.DataFrame


def read_measured(folder: Path) -> Measured:
    """Read a probe's folder, and check its tables against its preregistration.

    Raises:
        ConfigError: there is no such folder.
        DataError: a file is missing or unreadable, or holds other windows or cells than were preregistered.
    """
    if not folder.is_dir():
        raise ConfigError(f"no probe folder at {folder}: {_AGAIN}")
    try:
        registered = read_object(folder / PREREGISTRATION)
        summary = read_object(folder / SUMMARY)
        effects, mass = (pd.read_parquet(folder / table.name) for table in (columns.EFFECTS, columns.MASS))
        estimated = folder / columns.ATTRIBUTION.name
        attribution = pd.read_parquet(estimated) if estimated.is_file() else pd.DataFrame()
        # Names may be anything, NA included; an empty reason is none.
        eligibility = pd.read_csv(folder / columns.ELIGIBILITY.name, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be read ({' '.join(str(error).split())[:160]}): {_AGAIN}") from error
    found = Measured(folder, effects, mass, eligibility, registered, summary, attribution)
    _check(found)
    return found


def _check(measured: Measured) -> None:
    registered, folder = measured.registered, measured.folder
    for key in ("statistics", "probe", "splits", "hashes", "cells", "exclusions"):
        if key not in registered:
            raise DataError(f"{folder / PREREGISTRATION} lacks {key!r}: {_AGAIN}")
    for table in (columns.EFFECTS, columns.MASS, columns.ELIGIBILITY, columns.ATTRIBUTION):
        name = Path(table.name).stem
        frame = getattr(measured, name)
        if missing := table.missing(frame) if len(frame) else []:
            raise DataError(f"{folder}: {name} lacks the column {missing[0]!r}: {_AGAIN}")
    for name, table in (("effects", measured.effects), ("mass", measured.mass)):
        drawn = table[["split", "window", "document"]].drop_duplicates()
        for split, expected in registered["splits"].get("sha256", {}).items():
            rows = drawn[drawn["split"] == split]
            if len(rows) and windows_digest(rows["window"].tolist(), rows["document"].tolist()) != expected:
                raise DataError(f"{folder}: {name} of split {split!r} are not of the windows that were preregistered")
    models = measured.summary.get("models")
    if not (isinstance(models, list) and all(isinstance(row, dict) and "name" in row for row in models)):
        raise DataError(f"{folder / SUMMARY} does not name its models: {_AGAIN}")
    unknown = set(measured.effects["cell"]) - set(registered["cells"])
    if unknown:
        raise DataError(f"{folder}: effects of {min(unknown)}, which was not preregistered")
    excluded = {(row["model"], row["cell"]) for row in registered["exclusions"]}
    listed = measured.eligibility.set_index(["model", "cell"])["eligible"]
    for model, cell in excluded:
        if listed.get((model, cell), False):
            raise DataError(f"{folder}: {cell} of {model} is eligible, but was excluded when it was preregistered")


def registered_as(path: Path) -> dict[str, Any]:
    """What results say about their preregistration: its `sha256` and when it was `written`; empty without one."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "written": read_object(path).get("written")}


def windows_digest(windows: Iterable[int], documents: Iterable[int]) -> str:
    """sha256 of which windows of which documents were drawn, whatever their order."""
    pairs = [list(pair) for pair in sorted(zip(windows, documents, strict=True))]
    return content_hash(pairs)
