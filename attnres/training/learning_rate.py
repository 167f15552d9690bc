"""The learning-rate schedule: linear warm-up, then a cosine down to a floor at the last step.

`trainer.max_steps` sets its length (`conf/scale/0p6b.yaml`: 20,000 steps); `optim.lr`, `optim.warmup_steps` and
`optim.min_lr_ratio` set its height, its warm-up and its floor.
"""

import math
from collections.abc import Callable

from attnres.training.config import OptimConfig


def lr_multiplier(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on `config.lr` for the optimizer step with 0-based index `step`.

    During the warm-up the factor rises linearly from `1 / warmup_steps` to 1. After it the factor is
    `r + (1 - r) (1 + cos(pi x)) / 2` with `r = min_lr_ratio`. There x is 0 at the first step behind the warm-up and 1
    at the last step, which uses exactly r.
    """

    def multiplier(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        span = max_steps - 1 - config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / span) if span > 0 else 1.0
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return multiplier
