"""When a checkpoint is written, and which of them stay for good."""

import math
from dataclasses import dataclass

from attnres.training.config import TrainerConfig


@dataclass(frozen=True)
class CheckpointSchedule:
    """Ordinary checkpoints at a fixed distance, of which the newest few are kept, and permanent ones.

    Attributes:
        every: steps between ordinary checkpoints; 0 for none.
        milestone_every: steps between milestones, which are permanent; 0 for none.
        base: permanent checkpoints at the steps `round(base**k)`; 0 for none. A trajectory needs many early steps, in
            which the routing forms, and few late ones.
    """

    every: int
    milestone_every: int
    base: float

    @classmethod
    def of(cls, config: TrainerConfig) -> "CheckpointSchedule":
        # `true` counts as one, which is no base.
        base = 2.0 if config.log_spaced is True else float(config.log_spaced)
        return cls(config.checkpoint_every_steps, config.milestone_every_steps, base)

    def permanent(self, step: int) -> bool:
        """Whether the checkpoint of this step is never removed."""
        return due(step, self.milestone_every) or self._log_spaced(step)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return due(step, self.every) or self.permanent(step)

    def _log_spaced(self, step: int) -> bool:
        if not self.base or step < 1:
            return False
        nearest = round(math.log(step, self.base))
        return any(round(self.base**k) == step for k in range(max(0, nearest - 1), nearest + 2))


def due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never for 0."""
    return every > 0 and step % every == 0
