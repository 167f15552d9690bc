"""What must hold before a result is believed. A failure stops the probe with exit code 5."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from attnres.depth.families import BANDS, SUBLAYERS
from attnres.errors import NumericsError
from attnres.interventions.edits import NO_EDIT
from attnres.interventions.grid import Grid
from attnres.interventions.ids import Intervention, Spec
from attnres.model.state import Trace
from attnres.model.wraps import schedule_weights
from attnres.probe.passes import CleanRun, first_layer, run_clean, run_edited, run_from, run_rows
from attnres.probe.subjects import Subject, Subjects
from attnres.tables.names import Split

SCHEDULE_LIMIT = 1e-6
LOGITS_LIMIT = 1e-5
# Nats/token: rows at other places of a batch may be rounded otherwise.
EFFECT_LIMIT = 1e-5
# Windows that the checks look at; more would say the same more slowly.
CHECK_WINDOWS = 4
DISTANCE = "distance to the unwrapped model"


@dataclass(frozen=True)
class Check:
    """One check: `value` is compared with `limit` (value <= limit passes)."""

    name: str
    model: str
    passed: bool
    value: float
    limit: float | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _bounded(name: str, model: str, value: float, limit: float, detail: str) -> Check:
    # NaN compares false, so a value that is not a number fails.
    return Check(name, model, value <= limit, value, limit, detail)


def check_subjects(subjects: Subjects, grid: Grid) -> tuple[Check, ...]:
    """All checks of all models, every one of them passed.

    Raises:
        NumericsError: a check fails.
    """
    drawn = subjects.text.windows[Split.CONFIRM]
    checks = []
    for subject in subjects.models:
        ids, labels = (tokens[:CHECK_WINDOWS].to(subject.model.device) for tokens in (drawn.input_ids, drawn.labels))
        checks += check_subject(subject, subjects.vanilla, ids, labels, grid.eligible(subject.name))
    require_passed(checks)
    return tuple(checks)


@torch.no_grad()
def check_subject(
    subject: Subject, vanilla: Qwen3ForCausalLM | None, ids: Tensor, labels: Tensor, specs: Sequence[Spec] = ()
) -> list[Check]:
    """All checks of one model on a few windows.

    Args:
        vanilla: the unwrapped model of a wrapped baseline.
        ids, labels: `[B, T]`.
        specs: the grid; the check of doing nothing resumes from every layer where one of these starts.
    """
    plan = subject.plan
    noops = [Intervention("noop", None, sublayer, band) for sublayer in SUBLAYERS for band in BANDS]
    starts = sorted({first_layer(item, plan) for item in (*noops, *specs)})
    traces: list[Trace] = []
    clean = run_clean(subject.model, ids, labels, starts, traces.append)
    fast = subject.model(ids, use_cache=False).logits
    scale = max(1.0, float(fast.abs().max()))
    checks = [
        _bounded(
            "explicit path equals fast path",
            subject.name,
            float((fast - clean.logits).abs().max()) / scale,
            LOGITS_LIMIT,
            "largest difference of logits, over the largest logit",
        ),
        _noop(subject, clean, noops),
        _packed_noop(subject, clean, noops[0]),
        _duplicates(subject, traces),
    ]
    if subject.schedule is not None:
        checks.append(_schedule(subject, traces))
        assert vanilla is not None
        checks.append(_against_vanilla(subject, vanilla, fast, ids))
    return checks


def _noop(subject: Subject, clean: CleanRun, noops: list[Intervention]) -> Check:
    different = [item.id for item in noops if not torch.equal(run_edited(subject.model, clean, item), clean.logits)]
    for start in clean.states:
        if not torch.equal(run_from(subject.model, clean, start, NO_EDIT), clean.logits):
            different.append(f"from layer {start}")
    detail = f"differs: {', '.join(different)}" if different else "every band, and resumed from every start of the grid"
    return Check("noop is bitwise the clean run", subject.name, not different, float(len(different)), 0.0, detail)


def _packed_noop(subject: Subject, clean: CleanRun, noop: Intervention) -> Check:
    """Cells that share a pass are compared with the clean rows beside them: there, nothing must do nothing as well."""
    effects = run_rows(subject.model, clean, [noop, noop])
    worst = max(float(value.abs().max()) for effect in effects for value in effect)
    detail = "largest effect of two rows that are not edited, against the clean rows of their pass"
    return _bounded("noop has no effect in a shared pass", subject.name, worst, EFFECT_LIMIT, detail)


def _duplicates(subject: Subject, traces: list[Trace]) -> Check:
    """The plan's claim about which sources are one vector, against the vectors."""
    wrong = 0
    for trace in traces:
        names = subject.plan.reads[trace.site.read].sources
        for i in range(len(names)):
            for k in range(i):
                wrong += (names[i] == names[k]) != torch.equal(trace.sources[i], trace.sources[k])
    return Check(
        "duplicate sources are those of the plan",
        subject.name,
        wrong == 0,
        float(wrong),
        0.0,
        "pairs of sources that are equal against the plan, or differ against it",
    )


def _schedule(subject: Subject, traces: list[Trace]) -> Check:
    assert subject.schedule is not None
    worst = 0.0
    for trace in traces:
        expected = schedule_weights(trace.log_weights.shape[-1], subject.schedule, subject.recency_bias)
        weights = torch.exp(trace.log_weights)
        worst = max(worst, float((weights - torch.tensor(expected, device=weights.device)).abs().max()))
    return _bounded(
        "content-independent, on schedule",
        subject.name,
        worst,
        SCHEDULE_LIMIT,
        "largest |a - a*| over reads, positions and sources",
    )


def _against_vanilla(subject: Subject, vanilla: Qwen3ForCausalLM, logits: Tensor, ids: Tensor) -> Check:
    reference = vanilla(ids, use_cache=False).logits
    if subject.schedule == "uniform":
        # Rounding grows with the logits themselves, so the limit is relative once they pass 1.
        worst = float((logits - reference).abs().max()) / max(1.0, float(reference.abs().max()))
        return _bounded(
            "equals the unwrapped model",
            subject.name,
            worst,
            LOGITS_LIMIT,
            "largest difference of fp32 logits, over the largest logit where that passes 1",
        )
    log_p, log_q = torch.log_softmax(reference.double(), -1), torch.log_softmax(logits.double(), -1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    detail = f"KL(vanilla || wrapped) in nats/token at b={subject.recency_bias:g}; reported, never a reason to stop"
    return Check(DISTANCE, subject.name, kl == kl, kl, None, detail)


def require_passed(checks: list[Check]) -> None:
    """Raises `NumericsError` naming the first check that failed."""
    for check in checks:
        if not check.passed:
            limit = "" if check.limit is None else f", limit {check.limit:g}"
            raise NumericsError(
                f"check failed for {check.model}: {check.name}: {check.value:.3g}{limit} ({check.detail}); "
                "no result was written, check that the checkpoint and its configuration belong together"
            )
