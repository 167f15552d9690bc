"""From the tables that were measured to everything that is judged, without a model.

The probe calls `judge` on what its runner measured; `attnres.statistics.rejudge` calls it on what a folder holds, and
gets the same tables to the last digit.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attnres.statistics.cells import cell_table
from attnres.statistics.claims import baseline_disagreements, study_claims
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.contrasts import contrast_table
from attnres.statistics.design import Design
from attnres.statistics.dissociation import dissociation_table
from attnres.statistics.judged import Judged
from attnres.statistics.motifs import motif_table, permutation_null
from attnres.statistics.rank_correlation import against_exact, spearman_table, which_predicts
from attnres.statistics.rescues import rescue_table
from attnres.tables.roles import TRAINED, Roles


def judge(
    effects: pd.DataFrame,
    mass: pd.DataFrame,
    eligibility: pd.DataFrame,
    config: StatisticsConfig,
    models: Sequence[Mapping[str, Any]],
) -> Judged:
    """Every table of verdicts.

    Args:
        effects, mass, eligibility: as measured; see `Design.of`, which says what is refused.
        models: rows of a summary; see `Roles.of`.
    """
    design = Design.of(effects, mass, eligibility, config=config)
    cells, contrasts = cell_table(design, config), contrast_table(design, config)
    spearman = spearman_table(design, config)
    return Judged(
        design=design,
        cells=cells,
        contrasts=contrasts,
        dissociation=dissociation_table(design, spearman, config),
        spearman=spearman,
        motifs=motif_table(design, cells, contrasts, config, Roles.of(models).uniform),
        rescues=rescue_table(design, config),
    )


def findings(
    judged: Judged,
    checks: Sequence[Mapping[str, Any]],
    config: StatisticsConfig,
    models: Sequence[Mapping[str, Any]],
    attribution: pd.DataFrame,
) -> dict[str, Any]:
    """What `summary.json` says of the tables: claims, dissociation, what predicts effect, nulls, and how estimates from
    gradients, where there are any, stand to the exact effects.

    `models` are the summary's own rows, which say of a control what was trained in it.
    """
    roles = Roles.of(models)
    said = {
        "claims": study_claims(judged, checks, config, roles),
        "baselines": baseline_disagreements(judged.contrasts, roles),
        "dissociation": _dissociation_rows(judged.dissociation),
        "spearman": records(judged.spearman),
        "motifs": records(judged.motifs),
        "rescues": records(judged.rescues),
        "predicts": which_predicts(judged.spearman, config.alpha),
    }
    if config.permutations:
        said["permuted_labels"] = permutation_null(judged.design, judged.cells, config)
    if len(attribution):
        said |= against_exact(attribution, judged.design, config)
    return said


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain containers, NaN as None."""
    return json.loads(frame.to_json(orient="records"))


def _dissociation_rows(dissociation: pd.DataFrame) -> list[dict[str, Any]]:
    rows = records(dissociation[dissociation["model"] == TRAINED])
    for row in rows:
        row |= {"largest_mass": row["mass_cell"], "largest_effect": row["effect_cell"], "detail": row["reason"] or ""}
    return rows
