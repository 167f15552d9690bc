"""The learning-rate schedule against its closed form."""

import math

import pytest

from attnres.training.config import OptimConfig
from attnres.training.learning_rate import lr_multiplier


def test_lr_multiplier_closed_form() -> None:
    factor = lr_multiplier(OptimConfig(warmup_steps=4, min_lr_ratio=0.1), max_steps=11)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(7) == pytest.approx(0.55)
    assert factor(6) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 3)))
    assert factor(10) == pytest.approx(0.1)
    assert factor(11) == pytest.approx(0.1)


def test_lr_multiplier_without_warmup_or_decay() -> None:
    assert lr_multiplier(OptimConfig(warmup_steps=0), max_steps=1)(0) == pytest.approx(0.1)
    assert lr_multiplier(OptimConfig(warmup_steps=3), max_steps=3)(2) == 1.0
