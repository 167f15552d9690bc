"""How many documents would decide a cell that is inconclusive."""

import numpy as np
from statsmodels.stats.power import normal_sample_size_one_tail

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.inference import Floats


def documents_needed(dnll: Floats, kl: Floats, family_size: int, config: StatisticsConfig) -> Floats:
    """Documents with which an inconclusive cell would get a verdict, with probability `config.power`.

    Supposes that the observed means and standard deviations (m, s of dNLL; m_k, s_k of KL) are the true ones.
    The smaller of two normal-theory sizes, each `((z_test + z_power) * s / distance)^2`:

    * detect: distance |m| at level alpha / family_size, two-sided (the strictest step of Holm); or, where m_k
      exceeds the margin, distance m_k - margin at alpha / family_size, one-sided;
    * show equivalence, where |m| and m_k are below the margin: the larger of distance margin - |m| (z_power
      at 1 - (1 - power) / 2, as both sides have to pass) and distance margin - m_k, at level alpha.

    At least one document more than there are, and enough for a sign-flip test to reach alpha / family_size at
    all (2^(1 - n) <= alpha / family_size). An estimate as noisy as the means it starts from.

    Args:
        dnll: [documents, columns], nats/token.
        kl: [documents, columns], nats/token.
        family_size: tests in the Holm family.

    Returns:
        Whole numbers [columns], inf where a billion documents would not do.
    """

    def size(distance: Floats, deviation: Floats, alpha: float, power: float) -> Floats:
        reachable = distance > 1e-9 * config.margin  # nearer than that, the distance is rounding
        needed = normal_sample_size_one_tail(np.where(reachable, distance, 1.0), power, alpha, deviation)
        return np.where(reachable & (needed < 1e9), needed, np.inf)

    strict = config.alpha / family_size
    mean, deviation = np.abs(dnll.mean(axis=0)), dnll.std(axis=0, ddof=1)
    kl_mean, kl_deviation = kl.mean(axis=0), kl.std(axis=0, ddof=1)
    detect = np.minimum(
        size(mean, deviation, strict / 2, config.power),
        size(kl_mean - config.margin, kl_deviation, strict, config.power),
    )
    equivalent = np.maximum(
        size(config.margin - mean, deviation, config.alpha, (1 + config.power) / 2),
        size(config.margin - kl_mean, kl_deviation, config.alpha, config.power),
    )
    floor = max(len(dnll) + 1, int(np.ceil(1 + np.log2(1 / strict))))
    return np.maximum(np.ceil(np.minimum(detect, equivalent)), floor)
