"""What a probe leaves in its folder for the report: read, checked, typed. No table is computed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet

from attnres.errors import ConfigError, DataError
from attnres.files.redaction import redact_values
from attnres.files.whole_files import read_object
from attnres.tables.roles import Roles

_CELL = ("family", "sublayer", "band")
_WINDOW = ("window", "document", "split")
REQUIRED: dict[str, tuple[str, ...]] = {
    "cells.csv": (
        "model",
        "cell",
        "intervention",
        *_CELL,
        "eligible",
        "reason",
        "eligible_reads",
        "mean_sources",
        "documents",
        "windows",
        "mass",
        "mass_lo",
        "mass_hi",
        "uniform_share",
        "appreciable",
        "norm_share",
        "displacement",
        "dnll",
        "dnll_lo",
        "dnll_hi",
        "p_holm",
        "tost_p",
        "kl",
        "kl_lo",
        "kl_hi",
        "flips",
        "verdict",
        "documents_needed",
    ),
    "contrasts.csv": (
        "baseline",
        "cell",
        *_CELL,
        "documents",
        "diff",
        "diff_lo",
        "diff_hi",
        "p_holm",
        "trained_dnll",
        "baseline_dnll",
        "verdict",
    ),
    "routing.csv": (
        "model",
        "read",
        "layer",
        "sublayer",
        "source",
        "num_sources",
        "weight",
        "analytic",
        "role",
    ),
    "effects.parquet": ("model", "cell", *_WINDOW),
    "mass.parquet": ("model", *_WINDOW),
}
_TEXT = frozenset({"model", "baseline", "cell", "intervention", *_CELL, "reason", "verdict", "role", "split"})
_FLAGS = frozenset({"eligible", "appreciable"})
DISCOVERY = ("p_fdr", "p_bh")
_LISTS = ("models", "checks", "claims", "dissociation", "spearman", "motifs", "plan_notes", "attribution")
_OBJECTS = ("grid", "statistics", "recency", "provenance", "permuted_labels", "attribution_rank", "judged_anew")
_JSON_NAMES = {list: "list", dict: "JSON object"}
_MARGIN = 0.005  # nats/token, where the summary does not say
# A table compresses: a file of a few bytes may claim any number of rows.
_MOST_ROWS = 100_000_000
_AGAIN = "run the probe again, or name the folder that it wrote"


@dataclass(frozen=True)
class Tables:
    """What a probe leaves in its folder for its report; the columns are those of `REQUIRED`, maybe more."""

    cells: pd.DataFrame
    contrasts: pd.DataFrame
    routing: pd.DataFrame
    effects: pd.DataFrame
    mass: pd.DataFrame
    preregistration: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of summary.json; any that only a table knows follow."""
        named = [str(m.get("name", "")) for m in self.summary.get("models", [])]
        probed = list(dict.fromkeys(self.cells["model"]))
        return [m for m in named if m in probed] + [m for m in probed if m not in named]

    @property
    def trained(self) -> str:
        """The model under study: the first that is no baseline of a contrast."""
        baselines = set(self.contrasts["baseline"])
        return next((m for m in self.models if m not in baselines), self.models[0])

    @property
    def margin(self) -> float:
        """The equivalence margin in nats/token."""
        return float(self.summary["statistics"].get("margin", _MARGIN))

    @property
    def interventions(self) -> list[str]:
        """The interventions that were run, without the control that changes nothing if there is any other."""
        kinds = list(dict.fromkeys(self.cells["intervention"]))
        return [k for k in kinds if k != "noop"] or kinds

    @property
    def intervention(self) -> str:
        """The intervention that the figures over all models show: `mask` if it was run, else the first."""
        return "mask" if "mask" in self.interventions else self.interventions[0]

    @property
    def primary(self) -> pd.DataFrame:
        """The cells of `intervention`."""
        return self.cells[self.cells["intervention"] == self.intervention]

    @property
    def primary_contrasts(self) -> pd.DataFrame:
        """The contrasts of `intervention`."""
        return self.contrasts[self.contrasts["cell"].isin(self.primary["cell"])]

    @property
    def discovery_column(self) -> str:
        """The column of p-values after Benjamini and Hochberg; empty where a run has none."""
        return next((c for c in DISCOVERY if c in self.cells and self.cells[c].notna().any()), "")

    @property
    def baselines(self) -> list[str]:
        """Names of the models that the trained one is compared with."""
        return [m for m in self.models if m != self.trained]

    @property
    def roles(self) -> Roles:
        """What each of them is to the trained model."""
        known = {str(row.get("name", "")): row for row in self.summary.get("models", [])}
        return Roles.of([{"name": name} | dict(known.get(name, {})) for name in self.models], self.trained)

    @property
    def against_baselines(self) -> pd.DataFrame:
        """The contrasts with models whose routing was not trained, nulls left out."""
        return self.contrasts[self.contrasts["baseline"].isin(self.roles.baselines)]


def read_tables(folder: Path) -> Tables:
    """Reads and checks the tables of a probe.

    Raises:
        ConfigError: the folder does not exist.
        DataError: a file or a column is missing or cannot be read; the message names it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no probe folder at {folder}: {_AGAIN}")
    frames = {name: _read_frame(folder / name, columns) for name, columns in REQUIRED.items()}
    if frames["cells.csv"].empty:
        raise DataError(f"{folder / 'cells.csv'} holds no cell: {_AGAIN}")
    return Tables(
        frames["cells.csv"],
        frames["contrasts.csv"],
        frames["routing.csv"],
        frames["effects.parquet"],
        frames["mass.parquet"],
        _read_json(folder / "preregistration.json"),
        _read_summary(folder / "summary.json"),
    )


def _read_frame(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path} is missing: {_AGAIN}")
    try:
        if path.suffix == ".parquet":
            present = set(parquet.read_schema(path).names)
            if (rows := parquet.read_metadata(path).num_rows) > _MOST_ROWS:
                raise ValueError(f"{rows:,} rows, at most {_MOST_ROWS:,} are read")
            frame = pd.read_parquet(path, columns=[c for c in columns if c in present])
        else:
            # A model may be called NA: only an empty field and nan are missing values.
            frame = pd.read_csv(path, keep_default_na=False, na_values=["", "nan", "NaN"], low_memory=False)
    except (ValueError, OSError) as error:  # pandas' parser errors and pyarrow's are ValueErrors
        raise DataError(f"{path} cannot be read ({one_line(error)}): {_AGAIN}") from error
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise DataError(f"{path} lacks the column '{missing[0]}': {_AGAIN}")
    for column in columns:
        if column in _TEXT:
            frame[column] = frame[column].astype(object).where(frame[column].notna(), "").map(str)
        elif column in _FLAGS:
            frame[column] = frame[column].map(lambda v: str(v).strip().lower() in ("true", "1", "1.0"))
        else:
            try:
                frame[column] = pd.to_numeric(frame[column])
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}: column '{column}' holds something that is not a number: {_AGAIN}") from error
    return frame


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {_AGAIN}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): {_AGAIN}") from error


def _read_summary(path: Path) -> Mapping[str, Any]:
    """summary.json with its parts in the types that the report relies on; a part that is absent is empty."""
    summary = dict(redact_values(_read_json(path)))
    for kind, names in ((list, _LISTS), (dict, _OBJECTS)):
        for name in names:
            summary[name] = kind() if summary.get(name) is None else summary[name]
            if not isinstance(summary[name], kind):
                raise DataError(f"{path}: '{name}' is not a {_JSON_NAMES[kind]}: {_AGAIN}")
    for name in _LISTS:
        if name != "plan_notes" and not all(isinstance(row, dict) for row in summary[name]):
            raise DataError(f"{path}: an entry of '{name}' is not an object: {_AGAIN}")
    margin = summary["statistics"].get("margin", _MARGIN)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < float("inf"):
        raise DataError(f"{path}: the margin is {margin!r}, not a positive number of nats/token: {_AGAIN}")
    return summary


def one_line(error: Exception) -> str:
    """The message of an error of another library, fit to stand inside one of ours."""
    return " ".join(str(error).split())[:160]
