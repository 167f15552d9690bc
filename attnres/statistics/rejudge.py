"""The judged tables again from what a probe measured, and one judgement over the members of a swept grid.

No model is loaded: `effects.parquet`, `mass.parquet`, `eligibility.csv` and `preregistration.json` are enough.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.config import build
from attnres.errors import ConfigError, DataError, StorageError
from attnres.files import formats
from attnres.files.provenance import git_state
from attnres.files.whole_files import whole_file, write_json, write_text
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.design import EFFECT_MEASURES, MASS_MEASURES, OF_EFFECT, OF_MASS
from attnres.statistics.judged import Judged
from attnres.statistics.judgement import findings, judge
from attnres.statistics.open_questions import replayed
from attnres.tables import columns
from attnres.tables.folder import (
    PREREGISTRATION,
    SUMMARY,
    VIEWER,
    Measured,
    read_measured,
    registered_as,
    write_table,
)

# Of the models, and so the same in every member of a grid.
_OF_MODELS = (columns.ROUTING.name, VIEWER)
# What a probe leaves of its models, and what was fixed before: everything that no judgement changes.
_MEASURED = (PREREGISTRATION, columns.EFFECTS_AS_TEXT.name, VIEWER, *(table.name for table in columns.MEASURED))
# Largest difference, in nats/token or of a share, between two measurements of one thing: rounding on other machines.
OVERLAP_LIMIT = 1e-5
# Lists of a preregistration that the members of a grid share out among them.
_SHARED_OUT = ("cells", "exclusions", "eligibility", "interventions", "families", "sublayers", "earlier_looks")


def recompute(measured: Measured) -> tuple[Judged, list[str]]:
    """The judged tables, and the names of those that the folder lacks or has otherwise."""
    judged = judge(
        measured.effects, measured.mass, measured.eligibility, _statistics(measured), measured.summary["models"]
    )
    differing = []
    for name, text in judged.texts().items():
        path = measured.folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            differing.append(name)
    return judged, differing


def judge_anew(measured: Measured, out: Path) -> None:
    """What a probe measured, as this version of the code judges it: the folder again at `out`, without a report.

    Raises:
        StorageError: `out` cannot be written.
    """
    judged, _ = recompute(measured)
    summary = dict(measured.summary) | _findings(judged, measured, measured.attribution)
    summary[formats.KEY] = formats.PROBE_VERSION
    command = f"python -m attnres.commands.rejudge {measured.folder} --out {out}"
    summary["judged_anew"] = {"command": command, "git": git_state()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _MEASURED:
            if (measured.folder / name).is_file() and measured.folder.resolve() != out.resolve():
                with whole_file(out / name) as temporary:
                    shutil.copyfile(measured.folder / name, temporary)
        judged.write(out)
        write_json(out / SUMMARY, summary)
    except OSError as error:
        raise _not_written(out, error) from error


def combine(folders: Sequence[Path], out: Path, agreeing: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Judge the members of one swept grid as the one grid that they are, and write it like a probe, without a report.

    Args:
        folders: the members, in the order in which their cells are listed.
        out: the folder to write, which must not be one of them.
        agreeing: those settings of a probe, of all that it registered, in which members agree.

    Raises:
        ConfigError: fewer than two members, or members that do not belong together.
        DataError: a member that cannot be read, or members that measured one thing differently.
        StorageError: `out` cannot be written.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in (*folders, out)}) != len(folders) + 1:
        raise ConfigError("members: expected two or more different folders, and --out naming another one")
    members = [read_measured(folder) for folder in folders]
    for member in members[1:]:
        _belong_together(members[0], member, agreeing)
    grid, first = _joined(members), members[0]
    if "look" in grid.effects:
        models, config = first.summary["models"], _statistics(first)
        effects, mass = replayed(grid.effects, grid.mass, grid.eligibility, models, config)
        grid = replace(grid, effects=effects, mass=mass)
    judged = judge(grid.effects, grid.mass, grid.eligibility, _statistics(first), first.summary["models"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PREREGISTRATION, _registered(members))
        write_table(out, columns.EFFECTS, grid.effects)
        write_table(out, columns.EFFECTS_AS_TEXT, grid.effects)
        write_table(out, columns.MASS, grid.mass)
        write_table(out, columns.ELIGIBILITY, grid.eligibility)
        if len(grid.attribution):
            write_table(out, columns.ATTRIBUTION, grid.attribution)
        judged.write(out)
        for name in _OF_MODELS:
            if (first.folder / name).is_file():
                write_text(out / name, (first.folder / name).read_text(encoding="utf-8"))
        write_json(out / SUMMARY, _summary(members, out, grid) | _findings(judged, first, grid.attribution))
    except OSError as error:
        raise _not_written(out, error) from error


def _statistics(measured: Measured) -> StatisticsConfig:
    return build(StatisticsConfig, dict(measured.registered["statistics"]), "statistics")


def _findings(judged: Judged, measured: Measured, attribution: pd.DataFrame) -> dict[str, Any]:
    summary = measured.summary
    return findings(judged, summary.get("checks", []), _statistics(measured), summary["models"], attribution)


def _not_written(out: Path, error: OSError) -> StorageError:
    return StorageError(f"{out}: cannot be written ({error.strerror}); free space or name another --out")


def _belong_together(
    first: Measured, member: Measured, agreeing: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    ours, theirs = first.registered, member.registered
    compared: dict[str, tuple[Any, Any]] = {
        "hashes (data, tokenizer, checkpoints)": (ours["hashes"], theirs["hashes"]),
        "statistics": (ours["statistics"], theirs["statistics"]),
        "splits": (ours["splits"], theirs["splits"]),
        "models": (ours.get("models"), theirs.get("models")),
        "probe settings": (agreeing(ours["probe"]), agreeing(theirs["probe"])),
    }
    for name, (mine, other) in compared.items():
        if mine != other:
            raise ConfigError(
                f"{member.folder} is not a member of the grid of {first.folder}: their {name} differ; combine probes "
                "that differ in their share of the grid alone"
            )


@dataclass(frozen=True)
class _Grid:
    """What the members of a grid measured, as one probe would have."""

    effects: pd.DataFrame
    mass: pd.DataFrame
    eligibility: pd.DataFrame
    attribution: pd.DataFrame


def _joined(members: Sequence[Measured]) -> _Grid:
    """The tables of all members; what several of them measured is taken from the first.

    Raises:
        DataError: members differ in what both measured.
    """

    def merged(name: str, key: list[str], values: list[str]) -> pd.DataFrame:
        table = pd.concat([getattr(member, name) for member in members], ignore_index=True)
        if table.empty or not table.duplicated(key).any():
            return table
        grouped = table.groupby(key, sort=False)[values]
        spread = grouped.max() - grouped.min()
        differing = spread.index[(spread > OVERLAP_LIMIT).any(axis=1)]
        if len(differing):
            where = ", ".join(map(str, differing[0]))
            raise DataError(f"members differ in the {name} of {where}: measure it again with one of them")
        return table.drop_duplicates(key, ignore_index=True)

    effects = merged("effects", [*OF_EFFECT, "window"], EFFECT_MEASURES)
    mass = merged("mass", [*OF_MASS, "window"], MASS_MEASURES)
    attribution = merged("attribution", [*OF_EFFECT, "window"], ["estimate"])
    eligibility = pd.concat([member.eligibility for member in members], ignore_index=True)
    verdicts = eligibility.drop_duplicates([*OF_EFFECT, "eligible", "reason"])
    twice = verdicts[verdicts.duplicated(OF_EFFECT)]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"{row['cell']} of {row['model']} is eligible in one member and not in another: they do not fit"
        )
    return _Grid(effects, mass, eligibility.drop_duplicates(OF_EFFECT, ignore_index=True), attribution)


def _registered(members: Sequence[Measured]) -> dict[str, Any]:
    def united(key: str) -> list[Any]:
        values = [value for member in members for value in member.registered.get(key, [])]
        return [value for place, value in enumerate(values) if value not in values[:place]]

    kept = [registered_as(member.folder / PREREGISTRATION) | {"folder": member.folder.name} for member in members]
    return dict(members[0].registered) | {key: united(key) for key in _SHARED_OUT} | {"parts": kept}


def _summary(members: Sequence[Measured], out: Path, measured: _Grid) -> dict[str, Any]:
    """The first member's summary, with the grid, command and preregistration of them all."""
    first, eligibility = members[0], measured.eligibility
    run_cells = int(eligibility["cell"].nunique())
    candidates = _statistics(first).grid_cells or run_cells
    grid = dict(first.summary.get("grid", {})) | {
        "candidate_cells": candidates,
        "run_cells": run_cells,
        "complete": run_cells >= candidates,
        "families": sorted(set(eligibility["family"])),
        "sublayers": sorted(set(eligibility["sublayer"])),
        "bands": sorted(set(eligibility["band"])),
        "note": f"Combined from {len(members)} members: {', '.join(member.folder.name for member in members)}.",
    }
    folders = (str(member.folder) for member in members)
    return dict(first.summary) | {
        "grid": grid,
        "command": " ".join(["python -m attnres.commands.rejudge", *folders, f"--out {out}"]),
        "preregistration": registered_as(out / PREREGISTRATION),
        "parts": [{"folder": member.folder.name, "command": member.summary.get("command")} for member in members],
    }
