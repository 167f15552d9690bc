"""What a report needs of a probe's folder: its tables, and which model and intervention lead; no table is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.errors import DataError
from attnres.files.redaction import redact_values
from attnres.statistics.config import StatisticsConfig
from attnres.tables import columns
from attnres.tables.folder import AGAIN, PREREGISTRATION, SUMMARY, read_described, read_table, require_folder
from attnres.tables.names import MASK
from attnres.tables.roles import Roles

# p after Benjamini and Hochberg, where many places were tested.
DISCOVERY = "p_fdr"
_WINDOW = ("model", "window", "document", "split", "look")
_LISTS = ("models", "checks", "claims", "dissociation", "spearman", "motifs", "rescues", "plan_notes", "attribution")
_OBJECTS = ("grid", "statistics", "recency", "provenance", "permuted_labels", "attribution_rank", "judged_anew")
_JSON_NAMES = {list: "list", dict: "JSON object"}


@dataclass(frozen=True)
class Tables:
    """What a probe leaves in its folder for its report.

    Attributes:
        cells, contrasts, routing: in the columns of `attnres.tables.columns`.
        effects, mass: what names a model, a window and, of an effect, a cell; the values are in `cells`.
        preregistration, summary: secrets are masked.
    """

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
        return float(self.summary["statistics"].get("margin", StatisticsConfig.margin))

    @property
    def alpha(self) -> float:
        """The level of the tests."""
        return self.summary["statistics"].get("alpha", StatisticsConfig.alpha)

    @property
    def interventions(self) -> list[str]:
        """The interventions that were run, without the control that changes nothing if there is any other."""
        kinds = list(dict.fromkeys(self.cells["intervention"]))
        return [k for k in kinds if k != "noop"] or kinds

    @property
    def intervention(self) -> str:
        """The intervention that the figures over all models show: `mask` if it was run, else the first."""
        return MASK if MASK in self.interventions else self.interventions[0]

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
        """`DISCOVERY` where this run has such p-values, else empty."""
        return DISCOVERY if DISCOVERY in self.cells and self.cells[DISCOVERY].notna().any() else ""

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
    require_folder(folder)
    summary = _read_summary(folder)  # first: it names the version of the tables
    cells = read_table(folder, columns.CELLS)
    if cells.empty:
        raise DataError(f"{folder / columns.CELLS.name} holds no cell: {AGAIN}")
    return Tables(
        cells=cells,
        contrasts=read_table(folder, columns.CONTRASTS),
        routing=read_table(folder, columns.ROUTING),
        effects=read_table(folder, columns.EFFECTS, only=("cell", *_WINDOW)),
        mass=read_table(folder, columns.MASS, only=_WINDOW),
        preregistration=redact_values(read_described(folder, PREREGISTRATION)),
        summary=summary,
    )


def _read_summary(folder: Path) -> Mapping[str, Any]:
    """The summary with its entries in the types that the report relies on; an entry that is absent is empty."""
    path, summary = folder / SUMMARY, dict(redact_values(read_described(folder, SUMMARY)))
    for kind, names in ((list, _LISTS), (dict, _OBJECTS)):
        for name in names:
            summary[name] = kind() if summary.get(name) is None else summary[name]
            if not isinstance(summary[name], kind):
                raise DataError(f"{path}: '{name}' is not a {_JSON_NAMES[kind]}: {AGAIN}")
    for name in _LISTS:
        if name != "plan_notes" and not all(isinstance(row, dict) for row in summary[name]):
            raise DataError(f"{path}: an entry of '{name}' is not an object: {AGAIN}")
    margin = summary["statistics"].get("margin", StatisticsConfig.margin)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < float("inf"):
        raise DataError(f"{path}: the margin is {margin!r}, not a positive number of nats/token: {AGAIN}")
    return summary
