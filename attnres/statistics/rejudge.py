"""The judged tables again from what a probe measured, and one judgement over the parts of a swept grid.

    python -m attnres.commands.rejudge DIR                      say which tables differ from those in DIR
    python -m attnres.commands.rejudge DIR --out OUT            the probe judged anew: tables, claims, report
    python -m attnres.commands.rejudge DIR DIR ... --out OUT    one grid from parts, corrected over all of it

No model is loaded: `effects.parquet`, `mass.parquet`, `eligibility.csv` and `preregistration.json` are enough.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.config import build
from attnres.errors import ConfigError, DataError, StorageError
from attnres.files.provenance import git_state
from attnres.files.whole_files import whole_file, write_json, write_text
from attnres.statistics.cells import EFFECTS, MASSES, SLICE
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.judgement import Judged, findings, judge
from attnres.tables.folder import Measured, read_measured, registered_as

# Settings of a probe that say which part of the grid it runs; parts must agree in all the others.
PART_KEYS = ("families", "sublayers", "bands", "intervention", "interventions", "controls", "places", "cells")
EXECUTION_KEYS = ("batch_size", "cells_per_pass")
# What a probe leaves of its models, and what was fixed before: everything that no judgement changes.
MEASURED = ("preregistration.json", "effects.parquet", "effects.csv", "mass.parquet", "eligibility.csv", "routing.csv",
            "viewer.json", "attribution.parquet")  # fmt: skip
# Largest difference, in nats/token or of a share, between two measurements of one thing: rounding on other machines.
OVERLAP_LIMIT = 1e-5
_AGAIN = "run the probe again, or name the folder that it wrote"


def _statistics(measured: Measured) -> StatisticsConfig:
    return build(StatisticsConfig, dict(measured.registered["statistics"]), "statistics")


def recompute(measured: Measured) -> tuple[Judged, list[str]]:
    """The judged tables, and the names of those that the folder lacks or has otherwise."""
    models = measured.summary["models"]
    judged = judge(measured.effects, measured.mass, measured.eligibility, _statistics(measured), models)
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
    summary = dict(measured.summary) | findings(
        judged,
        measured.effects,
        measured.summary.get("checks", []),
        _statistics(measured),
        measured.summary["models"],
        measured.attribution,
    )
    git = git_state()
    summary["judged_anew"] = {
        "command": f"python -m attnres.commands.rejudge {measured.folder} --out {out}",
        "git": git,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in MEASURED:
            if (measured.folder / name).is_file() and measured.folder.resolve() != out.resolve():
                with whole_file(out / name) as part:
                    shutil.copyfile(measured.folder / name, part)
        judged.write(out)
        write_json(out / "summary.json", summary)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}); free space or name another --out") from error


def combine(folders: Sequence[Path], out: Path) -> None:
    """Judge the parts of one swept grid as the one grid that they are, and write it like a probe, without a report.

    Args:
        folders: the parts, in the order in which their cells are listed.
        out: the folder to write, which must not be one of them.

    Raises:
        ConfigError: fewer than two parts, or parts that do not belong together.
        DataError: a part that cannot be read, or parts that measured one thing differently.
        StorageError: `out` cannot be written.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in (*folders, out)}) != len(folders) + 1:
        raise ConfigError("parts: expected two or more different folders, and --out naming another one")
    parts = [read_measured(folder) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        _belong_together(first, part)
    effects = _merged(parts, "effects", ["model", "cell", "window"], EFFECTS)
    mass = _merged(parts, "mass", ["model", *SLICE, "window"], MASSES)
    attribution = pd.concat([part.attribution for part in parts], ignore_index=True)
    if len(attribution):
        attribution = _merged(parts, "attribution", ["model", "cell", "window"], ["estimate"])
    eligibility = pd.concat([part.eligibility for part in parts], ignore_index=True)
    said = eligibility.drop_duplicates(["model", "cell", "eligible", "reason"])
    twice = said[said.duplicated(["model", "cell"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(f"{row['cell']} of {row['model']} is eligible in one part and not in another: they do not fit")
    eligibility = eligibility.drop_duplicates(["model", "cell"], ignore_index=True)
    judged = judge(effects, mass, eligibility, _statistics(first), first.summary["models"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "preregistration.json", _registered(parts))
        effects.to_parquet(out / "effects.parquet", index=False)
        effects.to_csv(out / "effects.csv", index=False)
        mass.to_parquet(out / "mass.parquet", index=False)
        if len(attribution):
            attribution.to_parquet(out / "attribution.parquet", index=False)
        judged.write(out)
        write_text(out / "eligibility.csv", eligibility.to_csv(index=False))
        for name in ("routing.csv", "viewer.json"):  # of the models, and so the same in every part
            if (first.folder / name).is_file():
                write_text(out / name, (first.folder / name).read_text(encoding="utf-8"))
        write_json(out / "summary.json", _summary(parts, out, judged, effects, eligibility, attribution))
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}); free space or name another --out") from error


def _belong_together(first: Measured, part: Measured) -> None:
    ours, theirs = first.registered, part.registered
    left_out = (*PART_KEYS, *EXECUTION_KEYS)
    compared: dict[str, tuple[Any, Any]] = {
        "hashes (data, tokenizer, checkpoints)": (ours["hashes"], theirs["hashes"]),
        "statistics": (ours["statistics"], theirs["statistics"]),
        "splits": (ours["splits"], theirs["splits"]),
        "models": (ours.get("models"), theirs.get("models")),
        "probe settings": (_without(ours["probe"], left_out), _without(theirs["probe"], left_out)),
    }
    for name, (mine, other) in compared.items():
        if mine != other:
            raise ConfigError(
                f"{part.folder} is not a part of the grid of {first.folder}: their {name} differ; combine probes that "
                "differ in the part of the grid alone"
            )


def _without(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _merged(parts: Sequence[Measured], name: str, key: list[str], values: list[str]) -> pd.DataFrame:
    """One table of all parts; what several of them measured must agree, and is taken from the first."""
    table = pd.concat([getattr(part, name) for part in parts], ignore_index=True)
    grouped = table.groupby(key, sort=False)[values]
    spread = grouped.max() - grouped.min()
    if table.duplicated(key).any() and (spread > OVERLAP_LIMIT).to_numpy().any():
        where = spread.index[(spread > OVERLAP_LIMIT).any(axis=1)][0]
        raise DataError(
            f"parts differ in the {name} of {', '.join(map(str, where))}: measure it again with one of them"
        )
    return table.drop_duplicates(key, ignore_index=True)


def _registered(parts: Sequence[Measured]) -> dict[str, Any]:
    first = dict(parts[0].registered)
    told = [registered_as(part.folder / "preregistration.json") | {"folder": part.folder.name} for part in parts]

    def united(key: str) -> list[Any]:
        values = [value for part in parts for value in part.registered.get(key, [])]
        return [value for place, value in enumerate(values) if value not in values[:place]]

    lists = ("cells", "exclusions", "eligibility", "interventions", "families", "sublayers", "earlier_looks")
    return first | {key: united(key) for key in lists} | {"parts": told}


def _summary(
    parts: Sequence[Measured],
    out: Path,
    judged: Judged,
    effects: pd.DataFrame,
    eligibility: pd.DataFrame,
    attribution: pd.DataFrame,
) -> dict[str, Any]:
    first = dict(parts[0].summary)
    statistics = _statistics(parts[0])
    run_cells = int(eligibility["cell"].nunique())
    candidates = statistics.grid_cells or run_cells
    grid = dict(first.get("grid", {})) | {
        "candidate_cells": candidates,
        "run_cells": run_cells,
        "complete": run_cells >= candidates,
        "families": sorted(set(eligibility["family"])),
        "sublayers": sorted(set(eligibility["sublayer"])),
        "bands": sorted(set(eligibility["band"])),
        "note": f"Combined from {len(parts)} parts: {', '.join(part.folder.name for part in parts)}.",
    }
    command = " ".join(["python -m attnres.commands.rejudge", *(str(part.folder) for part in parts), f"--out {out}"])
    return (
        first
        | {"grid": grid, "command": command, "preregistration": registered_as(out / "preregistration.json")}
        | {"parts": [{"folder": part.folder.name, "command": part.summary.get("command")} for part in parts]}
        | findings(judged, effects, first.get("checks", []), statistics, first["models"], attribution)
    )
