"""What an implementation returned, held to the golden vectors: which output of which case deviates, and by how much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from safetensors.torch import load_file
from torch import Tensor

from attnres.ops.conformance.vectors import CASES, INPUTS, VARIANTS, VECTORS, Case, expected


@dataclass(frozen=True)
class Check:
    """One output of one case.

    Attributes:
        case: its name.
        output: `mixed`, `weights`, or the gradient of an input (`grad_query`).
        difference: the largest, absolute; infinite where the output is not finite, absent or of another shape.
        tolerance: absolute.
        remark: what is wrong besides the values.
    """

    case: str
    output: str
    difference: float
    tolerance: float
    remark: str = ""

    @property
    def ratio(self) -> float:
        """Difference in tolerances; above 1 it deviates."""
        return self.difference / self.tolerance


@dataclass(frozen=True)
class Judgement:
    """All checks against the read, or against the variant of it that is far nearer.

    Attributes:
        variant: what the implementation computes instead, a subset of `VARIANTS`; empty for the read itself.
        checks: all of them.
        raised: case -> the exception, of cases that did not end.
        not_offered: case -> what the implementation has not.
        absent: outputs that it never returns.
    """

    variant: tuple[str, ...]
    checks: tuple[Check, ...]
    raised: Mapping[str, str]
    not_offered: Mapping[str, str]
    absent: tuple[str, ...]

    @property
    def deviations(self) -> tuple[Check, ...]:
        """The checks that fail."""
        return tuple(check for check in self.checks if check.ratio > 1)

    @property
    def distance(self) -> float:
        """How far off it is: the sum over deviations of the digits that are lost, six at most each."""
        return sum(min(math.log10(check.ratio), 6.0) for check in self.deviations)

    @property
    def agrees(self) -> bool:
        """Whether it computes what is named, the read or its variant, in every case that it offers."""
        return bool(self.checks) and not self.deviations and not self.raised


def judge(
    found: Mapping[str, Tensor],
    raised: Mapping[str, str],
    not_offered: Mapping[str, str],
    variant: tuple[str, ...] | None = None,
) -> Judgement:
    """Holds outputs to the read, or to a variant.

    Args:
        found: `case/output` -> tensor, as `worker.py` writes them.
        raised: case -> exception.
        not_offered: case -> what is missing.
        variant: hold it to this one; None looks for the variant that explains the deviations.

    A variant stands in the answer only where it explains half of the distance or more: a fault of another kind
    resembles none.
    """
    golden = load_file(VECTORS)
    ran = [case for case in CASES if case.name not in raised and case.name not in not_offered]
    absent = () if any(name.endswith("/weights") for name in found) else ("weights",)

    def held_to(one: tuple[str, ...]) -> Judgement:
        checks: list[Check] = []
        for case in ran:
            stored = {name.partition("/")[2]: x for name, x in golden.items() if name.startswith(f"{case.name}/")}
            given = {name: stored.pop(name) for name in INPUTS if name in stored}
            checks += _checks(case, expected(case, given, one) if one else stored, found, absent)
        return Judgement(one, tuple(checks), raised, not_offered, absent)

    if variant is not None:
        return held_to(variant)
    plain = held_to(())
    if not plain.deviations:
        return plain
    others = [held_to(names) for size in (1, 2, 3) for names in combinations(VARIANTS, size)]
    nearest = min(others, key=lambda other: other.distance)
    return nearest if 2 * nearest.distance <= plain.distance else plain


def _checks(
    case: Case, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], absent: Sequence[str]
) -> list[Check]:
    tolerances = dict(case.tolerance)
    checks = []
    for output, exact in wanted.items():
        if output in absent:
            continue
        largest = float(exact.abs().max())
        tolerance = tolerances[output.partition("_")[0]] * (largest or 1.0)
        tensor = found.get(f"{case.name}/{output}")
        if tensor is None:
            # No gradient is the right gradient where it is 0.
            checks.append(Check(case.name, output, largest, tolerance, "none returned" if largest else ""))
        elif tensor.shape != exact.shape:
            remark = f"shape {list(tensor.shape)}, not {list(exact.shape)}"
            checks.append(Check(case.name, output, math.inf, tolerance, remark))
        else:
            finite = bool(torch.isfinite(tensor).all())
            difference = float((tensor.double() - exact).abs().max()) if finite else math.inf
            coarse = torch.finfo(tensor.dtype).eps > torch.finfo(getattr(torch, case.dtype)).eps
            remark = f"returned in {str(tensor.dtype).removeprefix('torch.')}" if coarse else ""
            checks.append(Check(case.name, output, difference, tolerance, remark if finite else "not finite"))
    return checks
