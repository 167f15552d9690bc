"""Tables of a small grid, one sublayer and two bands, whose values are computed by hand; and what is judged of them."""

import numpy as np
import pandas as pd

from attnres.statistics.cells import cell_table
from attnres.statistics.config import StatisticsConfig
from attnres.statistics.contrasts import contrast_table
from attnres.statistics.design import Design
from attnres.tables.names import Model

QUICK = StatisticsConfig(sign_flips=999, bootstrap=100)
SLICES = [(family, "mlp", band) for family in ("embedding", "current", "older") for band in ("early", "late")]
EXCLUDED = ("older", "mlp", "early")
ELIGIBLE = [piece for piece in SLICES if piece != EXCLUDED]
DOCUMENTS = 40


def noise(seed: int, documents: int = DOCUMENTS) -> np.ndarray:
    """Mean 0 and standard deviation 1 exactly, symmetric: what is tested on it can be computed by hand."""
    half = np.random.default_rng(seed).normal(size=documents // 2)
    column = np.concatenate([half, -half])
    return column / column.std(ddof=1)


def name(piece) -> str:
    return "mask:{}@{}.{}".format(*piece)


def tables(effects_by_cell, models=("attnres", "uniform"), windows=2, documents=DOCUMENTS):
    """Effects, mass and eligibility; `effects_by_cell[model, slice]` = (dnll [documents], kl [documents])."""
    document = np.repeat(np.arange(documents) + 100, windows)
    window = np.arange(documents * windows) + 1000
    within = np.tile(np.linspace(-1, 1, windows), documents) * 0.003  # averages out within a document
    effects, mass, eligibility = [], [], []
    for model in models:
        for position, piece in enumerate(SLICES):
            where = dict(zip(("family", "sublayer", "band"), piece, strict=True)) | {"model": model}
            eligible = piece != EXCLUDED
            reason = "" if eligible else "empty at every read of the band"
            eligibility.append(
                where
                | {
                    "intervention": "mask",
                    "cell": name(piece),
                    "eligible": eligible,
                    "reason": reason,
                    "eligible_reads": 3 * eligible,
                    "reads": 3,
                    "mean_sources": 3.5,
                }
            )
            rows = where | {"window": window, "document": document, "split": "confirm"}
            if eligible:
                weight = 0.2 + 0.1 * position + 0.01 * noise(90 + position, documents).repeat(windows)
                shares = {"uniform_share": 0.35, "norm_share": weight / 2, "displacement": weight * 3}
                mass.append(pd.DataFrame(rows | {"mass": weight} | shares))
            if (model, piece) in effects_by_cell:
                dnll, kl = (values.repeat(windows) + within for values in effects_by_cell[model, piece])
                measured = {"cell": name(piece), "intervention": "mask", "dnll": dnll, "kl": kl, "flips": 0.25}
                effects.append(pd.DataFrame(rows | measured))
    return (pd.concat(effects, ignore_index=True), pd.concat(mass, ignore_index=True), pd.DataFrame(eligibility))


def flat(dnll: float, kl: float, deviation: float = 0.0, seed: int = 0, documents: int = DOCUMENTS):
    return dnll + deviation * noise(seed, documents), np.full(documents, kl)


def random_tables(seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    cells = {
        (model, piece): (rng.normal(0.002, 0.01, DOCUMENTS), rng.gamma(1.0, 0.003, DOCUMENTS))
        for model in ("attnres", "uniform")
        for piece in ELIGIBLE
    }
    return tables(cells, **options)


def renamed(tables, intervention, bands=None):
    """The same tables as if another intervention, or the same at other places, had given them."""
    out = []
    for table in tables:
        band = table["band"].map(bands) if bands else table["band"]
        cell = intervention + ":" + table["family"] + "@" + table["sublayer"] + "." + band
        out.append(table.assign(intervention=intervention, band=band, cell=cell))
    return out


def cells_of(effects, mass, eligibility, config=QUICK):
    """The table of cells."""
    return cell_table(Design.of(effects, mass, eligibility), config)


def contrasts_of(effects, eligibility, config=QUICK, mass=None, trained=Model.TRAINED):
    """The table of contrasts, without mass where none is given."""
    return contrast_table(Design.of(effects, pd.DataFrame() if mass is None else mass, eligibility), config, trained)
