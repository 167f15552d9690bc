"""What is measured: effects at the logits, and mass, norm-aware share and displacement at a read."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnres.depth.families import family_indices
from attnres.model.measures import norm_share
from attnres.model.state import Trace


class Effects(NamedTuple):
    """Effect of an edit per window: `dnll` and `kl` in nats/token, `flips` a fraction of positions; each `[B]`."""

    dnll: Tensor
    kl: Tensor
    flips: Tensor


@dataclass(frozen=True)
class CleanReadout:
    """What the clean run says at every position: the yardstick of all cells of a batch.

    Attributes:
        labels: `[B, T]`.
        nll: `[B, T]` nats.
        probabilities: `[B, T, V]` fp32.
        cross_entropy: `[B, T]`, of the clean distribution with itself.
        top1: `[B, T]`.
    """

    labels: Tensor
    nll: Tensor
    probabilities: Tensor
    cross_entropy: Tensor
    top1: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "CleanReadout":
        logits = logits.float()
        lse = torch.logsumexp(logits, dim=-1)
        probabilities = torch.exp(logits - lse.unsqueeze(-1))
        return cls(
            labels,
            lse - _at(logits, labels),
            probabilities,
            lse - torch.linalg.vecdot(probabilities, logits),
            logits.argmax(-1),
        )

    def compare(self, logits: Tensor) -> Effects:
        """Effects of a run with these logits `[B, T, V]`; exactly zero where they equal the clean ones bitwise.

        KL(clean || edited) is the cross-entropy less the clean run's with itself, both by the same arithmetic.
        """
        logits = logits.float()
        lse = torch.logsumexp(logits, dim=-1)
        nll = lse - _at(logits, self.labels)
        cross_entropy = lse - torch.linalg.vecdot(self.probabilities, logits)
        flips = (logits.argmax(-1) != self.top1).float()
        return Effects((nll - self.nll).mean(-1), (cross_entropy - self.cross_entropy).mean(-1), flips.mean(-1))


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class Mass(NamedTuple):
    """Measures of one family at one read, per window; each `[B]`.

    Attributes:
        mass: `a_F`, the sum of its routing weights.
        norm_share: `c_F = <sum_F a_i v_i, h> / |h|^2`, which sums to 1 over all sources.
        displacement: `d_F = |RMSNorm(h) - RMSNorm(h_-F)|^2 / (2D)`, with `h_-F` the masked mix.
    """

    mass: Tensor
    norm_share: Tensor
    displacement: Tensor


def measure_mass(trace: Trace, families: tuple[str, ...]) -> dict[str, Mass]:
    """Mass, norm-aware share and displacement of families at a read."""
    weights = torch.exp(trace.log_weights)
    parts = [source.float() * weights[..., i : i + 1] for i, source in enumerate(trace.sources)]
    h = torch.stack(parts).sum(0)
    normed = _rms_norm(h, trace.norm_eps)
    found = {}
    for family in families:
        members = family_indices(family, len(parts))
        others = [i for i in range(len(parts)) if i not in members]
        part = torch.stack([parts[i] for i in members]).sum(0)
        # Summed from the others rather than subtracted from h, which would cancel where the family holds nearly all.
        left = weights[..., others].sum(-1, keepdim=True)
        masked = torch.stack([parts[i] for i in others]).sum(0) / left
        distance = (normed - _rms_norm(masked, trace.norm_eps)).square().mean(-1) / 2
        mass = weights[..., list(members)].sum(-1)
        found[family] = Mass(mass.mean(-1), norm_share(part, h).mean(-1), distance.mean(-1))
    return found


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
