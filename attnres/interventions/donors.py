"""What interventions borrow: mean weights of the pilot split, other documents' weights and vectors, and seeded noise.

Everything is a function of the seed and the window, never of the batch that a window happens to be in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnres.data import ProbeWindows
from attnres.depth.plan import DepthPlan
from attnres.interventions.ids import DONOR_KINDS, Spec
from attnres.tables.columns import SLICE
from attnres.tables.names import Split

_DONOR_STREAM, _NOISE_STREAM = 11, 12
# Their order is part of the seed.
_SPLITS = (Split.PILOT, Split.CONFIRM)
# A family with more mass than this, on average over a cell, leaves too little outside to match.
MATCHED_LIMIT = 0.5


@dataclass(frozen=True)
class Pilot:
    """What the pilot split says about a model before its grid is run.

    Attributes:
        mean: read -> mean routing weights `[S]` over windows and positions.
        mass: (family, sublayer, band) -> mean mass, every document weighing the same.
    """

    mean: dict[int, Tensor]
    mass: dict[tuple[str, str, str], float]

    @classmethod
    def of(cls, mass: pd.DataFrame, routing: pd.DataFrame) -> "Pilot":
        """From the tables of the pilot split: mass by slice x window, weights by read x source."""
        by_document = mass.groupby([*SLICE, "document"], sort=False)["mass"].mean()
        means = {int(read): torch.tensor(rows["weight"].to_numpy()) for read, rows in routing.groupby("read")}
        return cls(means, by_document.groupby(level=SLICE, sort=False).mean().to_dict())


def reads_of(specs: Iterable[Spec], plan: DepthPlan, kinds: Sequence[str]) -> list[int]:
    """The reads at which interventions of some kinds act."""
    members = {member for spec in specs for member in spec.members if member.kind in kinds}
    return sorted({read for member in members for read in member.cell(plan).reads})


def unavailable(spec: Spec, plan: DepthPlan, pilot: Pilot | None, pilot_windows: ProbeWindows | None) -> str:
    """Why an intervention that the depth plan admits cannot be carried out on this model and this text; else empty."""
    for member in spec.members:
        if member.kind in DONOR_KINDS:
            documents = 0 if pilot_windows is None else len(set(pilot_windows.document_ids.tolist()))
            if documents < 2:
                return f"the pilot split has {documents} document(s), so not every window has another to borrow from"
        elif member.kind == "mean" and pilot is None:
            return "there is no pilot split to take mean weights from"
        elif member.kind == "matched":
            cell = member.cell(plan)
            if pilot is None:
                return "there is no pilot split to measure the family's mass on"
            held = pilot.mass[cell.family, cell.sublayer, cell.band]
            if held > MATCHED_LIMIT:
                return f"the family holds {held:.2f} of the mass on the pilot split: too little outside it to match"
    return ""


def donors(windows: ProbeWindows, split: str, pilot: ProbeWindows, seed: int) -> Tensor:
    """For each window `[N]`, the position in the pilot split of a window of another document, by seed and window."""
    owners, chosen = pilot.document_ids.numpy(), []
    for window, document in zip(windows.window_ids.tolist(), windows.document_ids.tolist(), strict=True):
        others = np.flatnonzero(owners != document)
        rng = np.random.default_rng([seed, _DONOR_STREAM, _SPLITS.index(split), window])
        chosen.append(int(rng.choice(others)))
    return torch.tensor(chosen, dtype=torch.int64)


def noise(window_ids: Sequence[int], split: str, read: int, length: int, num_sources: int, seed: int) -> Tensor:
    """Uniform numbers `[B, T, S]`, drawn by seed, window and read."""
    rows = [
        np.random.default_rng([seed, _NOISE_STREAM, _SPLITS.index(split), window, read]).random((length, num_sources))
        for window in window_ids
    ]
    return torch.from_numpy(np.stack(rows))
