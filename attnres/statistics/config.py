"""What is fixed of the statistics before any result is seen."""

import math
from dataclasses import dataclass
from typing import Literal

from attnres.config import key
from attnres.errors import ConfigError

# Most random flips of one test: 1,000 tables of 512 documents fit in a second.
_MOST_FLIPS = 1_000_000


@dataclass(frozen=True)
class StatisticsConfig:
    """What is fixed before results are seen.

    Attributes:
        margin: equivalence margin on dNLL, and bound on KL, in nats/token.
        alpha: level of every test; intervals cover 1 - alpha.
        sign_flips: random sign flips (B); the smallest p is 1 / (1 + B).
        bootstrap: BCa resamples.
        seed: seed of flips and resamples.
        grid_cells: candidate cells of one model in the whole preregistered grid: excluded ones too, and those that
            other members of a swept grid run. None: a probe counts and registers the cells of its interventions,
            controls, places and `cells`, over all families, sublayers and bands, whichever of these it runs; where
            tables are judged without a registered number, the candidates in them are the whole grid.
        power: power at which `documents_needed` is computed.
        looks: after how many confirmatory documents the tests are read; what is decided is measured no further. Looks
            above the number of documents are left out, and the last look is all of them: a probe registers the looks
            that are left. None: one look at all documents.
        spending: how the level is spent over the looks, see `attnres.statistics.looks`.
        rank_look: rank correlations keep their cells open up to so many documents, and are computed on the last look
            within them.
        permutations: tables with permuted family labels, to measure how often they give a motif; 0 leaves it out.

    Raises:
        ConfigError: a value is out of range.
    """

    margin: float = 0.005
    alpha: float = 0.05
    sign_flips: int = 9999
    bootstrap: int = 2000
    seed: int = 0
    grid_cells: int | None = None
    power: float = 0.9
    permutations: int = 0
    looks: tuple[int, ...] | None = key(None, as_before=None)
    spending: Literal["linear", "pocock"] = key("linear", as_before="linear")
    rank_look: int = key(64, as_before=64)

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, expected: str) -> None:
            if not valid:
                raise ConfigError(f"statistics.{name}={getattr(self, name)}: expected {expected}")

        require(math.isfinite(self.margin) and self.margin > 0, "margin", "a positive number of nats/token, e.g. 0.005")
        require(0 < self.alpha < 0.5, "alpha", "a level between 0 and 0.5, e.g. 0.05")
        require(self.sign_flips >= 999, "sign_flips", "at least 999 (9999 for results that are reported)")
        require(self.bootstrap >= 100, "bootstrap", "at least 100 resamples (2000 for results that are reported)")
        require(self.seed >= 0, "seed", "a non-negative integer")
        require(self.permutations >= 0, "permutations", "0 or more permuted tables, e.g. 200")
        require(self.alpha < self.power < 1, "power", "a probability between alpha and 1, e.g. 0.9")
        require(self.grid_cells is None or self.grid_cells >= 1, "grid_cells", "a positive number of cells, or null")
        for name, numbers in (("looks", self.looks or (2,)), ("rank_look", (self.rank_look,))):
            ascending = all(after > before for before, after in zip((1, *numbers), numbers, strict=False))
            require(ascending, name, "numbers of documents, 2 or more, each larger than the one before")
        if self.grid_cells is not None:
            self.require_resolution(self.grid_cells)

    def flips_at(self, share: float) -> int:
        """Sign flips at a look that spends this share of the level: as many as the whole grid needs to be resolved."""
        if share == 1 or self.grid_cells is None:
            return self.sign_flips
        needed = math.ceil(self.grid_cells / (self.alpha * share)) - 1
        if needed > _MOST_FLIPS:
            raise ConfigError(
                f"statistics.looks={list(self.looks or ())}: a look that spends {share:.3g} of the level needs "
                f"{needed:,} sign flips to reach alpha={self.alpha} after Holm over {self.grid_cells} cells, and at "
                f"most {_MOST_FLIPS:,} are taken: leave out the first look, or set looks to null"
            )
        return max(self.sign_flips, needed)

    def require_resolution(self, family_size: int) -> None:
        """Raises ConfigError if no p of these flips could survive Holm over `family_size` tests."""
        if (1 + self.sign_flips) * self.alpha < family_size:
            needed = math.ceil(family_size / self.alpha)
            raise ConfigError(
                f"statistics.sign_flips={self.sign_flips} cannot reach alpha={self.alpha} after Holm over "
                f"{family_size} cells: set it to at least {needed}"
            )
