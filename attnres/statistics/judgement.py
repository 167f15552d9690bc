"""From the tables that were measured to every table that is judged, without a model.

The probe calls `judge` on what its runner measured; `attnres.statistics.rejudge` calls it on what a folder holds, and
gets the same tables to the last digit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from attnres.files.whole_files import write_text
from attnres.statistics.cells import cell_table, contrast_table
from attnres.statistics.claims import baseline_disagreements, study_claims
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.dissociation import against_exact, dissociation_table, spearman_table, which_predicts
from attnres.statistics.motifs import motif_table, permutation_null
from attnres.tables.roles import TRAINED, Roles


@dataclass(frozen=True)
class Judged:
    """Tables of verdicts; each is written as `<name>.csv`."""

    cells: pd.DataFrame
    contrasts: pd.DataFrame
    dissociation: pd.DataFrame
    spearman: pd.DataFrame
    motifs: pd.DataFrame

    def texts(self) -> dict[str, str]:
        """File name -> its text."""
        return {f"{field.name}.csv": getattr(self, field.name).to_csv(index=False) for field in fields(self)}

    def write(self, folder: Path) -> None:
        for name, text in self.texts().items():
            write_text(folder / name, text)


def judge(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    statistics: StatisticsConfig,
    models: Sequence[Mapping[str, Any]],
) -> Judged:
    """Every table of verdicts; see `cell_table`, `contrast_table`, `dissociation_table`, `spearman_table` and
    `motif_table` for the arguments and for what is refused, and `Roles.of` for `models`.
    """
    cells = cell_table(effects, mass, eligibility, statistics)
    contrasts = contrast_table(effects, eligibility, statistics, TRAINED, mass=mass)
    return Judged(
        cells,
        contrasts,
        dissociation_table(effects, mass, eligibility, statistics),
        spearman_table(effects, mass, eligibility, statistics),
        motif_table(effects, cells, contrasts, statistics, TRAINED, Roles.of(models).uniform),
    )


def findings(
    judged: Judged,
    effects: pd.DataFrame,
    checks: Sequence[Mapping[str, Any]],
    statistics: StatisticsConfig,
    models: Sequence[Mapping[str, Any]],
    attribution: pd.DataFrame,
) -> dict[str, Any]:
    """The parts of `summary.json` that are judged: claims, dissociation, what predicts effect, nulls, and how estimates
    from gradients, where there are any, stand to the exact effects.

    `models` are the summary's own rows, which say of a control what was trained in it.
    """
    roles = Roles.of(models)
    found = {
        "claims": study_claims(
            judged.cells,
            judged.contrasts,
            judged.dissociation,
            judged.motifs,
            judged.spearman,
            [dict(check) for check in checks],
            statistics,
            roles,
        ),
        "baselines": baseline_disagreements(judged.contrasts, roles),
        "dissociation": _dissociation_rows(judged.dissociation),
        "spearman": records(judged.spearman),
        "motifs": records(judged.motifs),
        "predicts": which_predicts(judged.spearman, statistics.alpha, TRAINED),
    }
    if statistics.permutations:
        found["permuted_labels"] = permutation_null(effects, judged.cells, statistics, statistics.permutations)
    if len(attribution):
        found |= against_exact(attribution, effects, statistics)
    return found


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain containers, NaN as None."""
    return json.loads(frame.to_json(orient="records"))


def _dissociation_rows(dissociation: pd.DataFrame) -> list[dict[str, Any]]:
    rows = records(dissociation[dissociation["model"] == TRAINED])
    for row in rows:
        row |= {"largest_mass": row["mass_cell"], "largest_effect": row["effect_cell"], "detail": row["reason"] or ""}
    return rows
