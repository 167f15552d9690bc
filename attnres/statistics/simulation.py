"""Tables whose truth is known, and what the probe's tests say of them: the outcomes that `error_rates.py` counts.

Each function returns an `Outcome`: (rng, replicates, config) -> whether it happened, [replicates]. Values are in
nats/token; the tests are the probe's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attnres.statistics.config import StatisticsConfig
from attnres.statistics.dissociation import paired_differences, pick_cells
from attnres.statistics.inference import Floats, adjust_p, bca_interval, margin_tests, sign_flip_p
from attnres.statistics.looks import Looks
from attnres.statistics.motifs import less_elsewhere
from attnres.statistics.rank_correlation import bootstrapped_spearman, document_resamples, percentile_test
from attnres.statistics.verdicts import cell_verdicts
from attnres.tables.names import Measure, Verdict

Outcomes = NDArray[np.bool_]
Outcome = Callable[[np.random.Generator, int, StatisticsConfig], Outcomes]

CELLS, SUBLAYER_CELLS, FAMILY_CELLS = 24, 12, 6
# Wide enough that equivalence, which is judged first, cannot hide a false positive.
_WIDE, _NARROW = 0.5, 0.02  # nats/token, standard deviation over documents
# See `flip_p`: Holm over a grid decides near .05 / 24, over two sublayer types up to .05.
_GRID_STAGES = ((99, 0.06), (999, 0.01))
_PAIR_STAGES = ((299, 0.1),)
_FEW_RESAMPLES = 999  # of the percentile tests, which the level does not feel


Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]
# Mean 0 and standard deviation 1 each.
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy-tailed (t, 3 df)": lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3),
    "skewed (exponential)": lambda rng, shape: rng.exponential(size=shape) - 1,
    "skewed to the left": lambda rng, shape: 1 - rng.exponential(size=shape),
}


def flip_p(
    values: Floats,
    config: StatisticsConfig,
    stages: Sequence[tuple[int, float]],
    alternative: Literal["two-sided", "greater"] = "two-sided",
    also: Floats | None = None,
) -> Floats:
    """`sign_flip_p` with all of the flips where fewer do not yet show that p is too large to matter.

    Args:
        values: [documents, columns].
        stages: (flips, limit): columns whose p from these flips is at most the limit go on to the next stage. Limits
            have to be several standard errors above the p at which decisions fall.
        also: of the same shape; p is then the larger of the two (an intersection-union test).
    """
    p = np.ones(values.shape[1])
    near = np.arange(values.shape[1])
    for flips, limit in (*stages, (config.sign_flips, 0.0)):
        if len(near):
            p[near] = sign_flip_p(values[:, near], flips, config.seed, alternative)
            if also is not None:
                p[near] = np.maximum(p[near], sign_flip_p(also[:, near], flips, config.seed, alternative))
            near = near[p[near] <= limit]
    return p


def verdicts(dnll: Floats, kl: Floats, cells: int, config: StatisticsConfig) -> NDArray[np.str_]:
    """Verdicts of grids as `cells.csv` gives them: [grids, cells] from [documents, grids * cells]."""
    tests = margin_tests(dnll, kl, config.margin)
    adjusted = _holm(flip_p(dnll, config, _GRID_STAGES), cells), _holm(tests.kl_lower_p, cells)
    return cell_verdicts(tests.tost_p, tests.kl_upper_p, *adjusted, config.alpha).reshape(-1, cells)


@dataclass(frozen=True)
class Stopped:
    """Grids that were measured in looks: each cell up to the look at which its verdict stood.

    Attributes:
        verdicts: [grids, cells].
        documents: on which each cell was measured: [grids * cells].
        mean: of dNLL on these documents: [grids * cells].
    """

    verdicts: NDArray[np.str_]
    documents: NDArray[np.int64]
    mean: Floats


def in_looks(dnll: Floats, kl: Floats, cells: int, looks: Sequence[int], config: StatisticsConfig) -> Stopped:
    """Verdicts of grids under looks, by the rule of `open_questions`: a cell goes on until no other verdict can follow.

    Args:
        dnll, kl: [documents, grids * cells].
        looks: after how many documents each is taken; the last is all.
    """
    count = dnll.shape[1]
    p = {name: np.ones(count) for name in ("p", "kl_lower", "tost", "kl_upper")}
    documents, going = np.zeros(count, dtype=np.int64), np.arange(count)
    words = np.full(count, Verdict.INCONCLUSIVE.value)
    for number, share in zip(looks, Looks.of(looks, config.spending).shares, strict=True):
        seen, seen_kl = dnll[:number, going], kl[:number, going]
        tests = margin_tests(seen, seen_kl, config.margin)
        here = {
            "p": flip_p(seen, config, _GRID_STAGES), "kl_lower": tests.kl_lower_p,
            "tost": tests.tost_p, "kl_upper": tests.kl_upper_p,
        }  # fmt: skip
        for name, values in here.items():
            p[name][going] = np.minimum(p[name][going], values / share)
        documents[going] = number
        adjusted = _holm(p["p"], cells), _holm(p["kl_lower"], cells)
        words = cell_verdicts(p["tost"], p["kl_upper"], *adjusted, config.alpha)
        causal = going[words[going] == Verdict.CAUSAL]
        beyond = np.zeros(count, dtype=bool)
        if len(causal):
            level = 1 - config.alpha * share
            low, high = bca_interval(dnll[:number, causal], config.bootstrap, level, config.seed)
            kl_low, _ = bca_interval(kl[:number, causal], config.bootstrap, level, config.seed)
            beyond[causal] = (low > config.margin) | (high < -config.margin) | (kl_low > config.margin)
        going = going[~((words[going] == Verdict.NEGLIGIBLE) | beyond[going])]
        if not len(going):
            break
    mean = np.array([dnll[:number, column].mean() for column, number in enumerate(documents.tolist())])
    return Stopped(words.reshape(-1, cells), documents, mean)


def _holm(p: Floats, cells: int) -> Floats:
    return np.concatenate([adjust_p(grid, cells) for grid in p.reshape(-1, cells)])


@dataclass(frozen=True)
class NoEffect:
    """How values vary in a grid without effects.

    Attributes:
        shared: share of the variance that is common: to the cells of a document, or, where there are several windows,
            to the windows of a document.
        windows: of each document.
        unit: what the tests take as one observation; "window" is the mistake that the probe avoids.
        kl_at_margin: KL is exactly the margin in every cell (and skewed), the largest that is no effect.
        varies: whether dNLL does; otherwise it is zero.
    """

    shared: float = 0.0
    windows: int = 1
    unit: Literal["document", "window"] = "document"
    kl_at_margin: bool = False
    varies: bool = True


def family_wise(draw: Draw, documents: int, truth: NoEffect = NoEffect(), looks: Sequence[int] = ()) -> Outcome:
    """Any "causal" verdict in a grid without effects; `draw` is the distribution over documents."""

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        columns = replicates * CELLS
        common, own = np.sqrt(truth.shared), np.sqrt(1 - truth.shared)
        if truth.windows > 1:
            of_document = common * draw(rng, (documents, 1, columns))
            by_window = of_document + own * draw(rng, (documents, truth.windows, columns))
            values = by_window.mean(axis=1) if truth.unit == "document" else by_window.reshape(-1, columns)
        else:
            of_document = common * draw(rng, (documents, replicates, 1))
            by_cell = of_document + own * draw(rng, (documents, replicates, CELLS))
            values = by_cell.reshape(documents, columns)
        kl = config.margin * rng.exponential(size=values.shape) if truth.kl_at_margin else np.zeros_like(values)
        return (_verdicts(_WIDE * truth.varies * values, kl, looks, config) == Verdict.CAUSAL).any(axis=1)

    return outcomes


def detection(draw: Draw, documents: int, looks: Sequence[int] = ()) -> Outcome:
    """The one cell of a grid that has an effect, of d = 0.2 standard deviations, is called causal."""

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        values = draw(rng, (documents, replicates, CELLS))
        values[:, :, 0] += 0.2
        flat = _WIDE * values.reshape(documents, -1)
        return _verdicts(flat, np.zeros_like(flat), looks, config)[:, 0] == Verdict.CAUSAL

    return outcomes


def _verdicts(dnll: Floats, kl: Floats, looks: Sequence[int], config: StatisticsConfig) -> NDArray[np.str_]:
    """Verdicts of grids of `CELLS`, in looks where there are any."""
    if looks:
        return in_looks(dnll, kl, CELLS, looks, config).verdicts
    return verdicts(dnll, kl, CELLS, config)


def stopped_interval_misses(draw: Draw, documents: int, looks: Sequence[int], effect: float) -> Outcome:
    """The interval that is reported of a cell, at the look at which it stopped, does not hold its true mean.

    Args:
        effect: mean dNLL of every cell, in standard deviations over documents.
    """

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        values = _WIDE * (draw(rng, (documents, replicates)) + effect)
        stopped = in_looks(values, np.zeros_like(values), 1, looks, config)
        shares = dict(zip(looks, Looks.of(looks, config.spending).shares, strict=True))
        misses = np.zeros(replicates, dtype=bool)
        for number, share in shares.items():
            mine = np.flatnonzero(stopped.documents == number)
            if len(mine):
                level = 1 - config.alpha * share
                low, high = bca_interval(values[:number, mine], config.bootstrap, level, config.seed)
                misses[mine] = (low > _WIDE * effect) | (high < _WIDE * effect)
        return misses

    return outcomes


def stopping_bias(draw: Draw, documents: int, looks: Sequence[int], effect: float, replicates: int, seed: int) -> float:
    """Mean of what is reported of a cell less its true mean, as a share of the true mean."""
    rng = np.random.default_rng([seed, documents])
    values = _WIDE * (draw(rng, (documents, replicates)) + effect)
    stopped = in_looks(values, np.zeros_like(values), 1, looks, StatisticsConfig(seed=seed))
    return float(stopped.mean.mean() / (_WIDE * effect) - 1)


def negligible_at_margin(
    draw: Draw, documents: int, where: Literal["dnll", "kl"] = "dnll", looks: Sequence[int] = ()
) -> Outcome:
    """The verdict "negligible" of a cell whose mean dNLL, or whose mean KL, is exactly the margin."""

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        shape = (documents, replicates)
        if where == "dnll":
            dnll = config.margin + _NARROW * draw(rng, shape)
            kl: Floats = np.zeros(shape)
        else:
            dnll = 0.1 * _NARROW * rng.normal(size=shape)
            kl = config.margin * (1 + draw(rng, shape))
        if looks:
            return in_looks(dnll, kl, 1, looks, config).verdicts[:, 0] == Verdict.NEGLIGIBLE
        tests = margin_tests(dnll, kl, config.margin)
        never = np.ones(replicates)  # the other tests come later in the order of verdicts
        return cell_verdicts(tests.tost_p, tests.kl_upper_p, never, never, config.alpha) == Verdict.NEGLIGIBLE

    return outcomes


def dissociation(draw: Draw, documents: int, pilot: int = 128, effect: float = 0.0) -> Outcome:
    """Any sublayer type of a model (of two) is called dissociated.

    Cell 0 has the larger mass by one, and cell 1 the larger effect by `effect`, both in standard deviations of a
    difference of two cells over documents; the other cells have neither.
    """

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        differences, tested = [], []
        scale = np.sqrt(2)
        for replicate in range(replicates):
            for sublayer in range(2):
                values = {}
                for split, count in (("pilot", pilot), ("confirm", documents)):
                    masses = 0.2 + 0.05 * draw(rng, (count, SUBLAYER_CELLS))
                    masses[:, 0] += 0.05 * scale
                    effects = _WIDE * (1 + draw(rng, (count, SUBLAYER_CELLS)))
                    effects[:, 1] += _WIDE * scale * effect
                    values[split] = masses, effects
                picks = pick_cells(*(value.mean(axis=0) for value in values["pilot"]))
                if picks is not None and picks[0] != picks[1]:
                    differences.append(paired_differences(*values["confirm"], *picks))
                    tested.append(2 * replicate + sublayer)
        p = np.ones(2 * replicates)
        if tested:
            p[tested] = (
                flip_p(np.concatenate(differences, axis=1), config, _PAIR_STAGES, "greater").reshape(-1, 2).max(axis=1)
            )
        return np.any(_holm(p, 2).reshape(-1, 2) <= config.alpha, axis=1)

    return outcomes


def motif(draw: Draw, documents: int, where: Literal["alike", "controlled", "planted"]) -> Outcome:
    """Any motif in a grid whose cells are all causal beyond doubt; with `where="planted"`, the planted one.

    Where the cells are "alike", none exceeds its family elsewhere, and no control does anything; "controlled": one of
    each family exceeds it by far, and its control does as much; "planted": one exceeds both by d = 0.2. Cell and
    control share half of the variance of a document.
    """

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        shape = (documents, replicates, CELLS)
        shared = np.sqrt(0.5) * draw(rng, (documents, replicates, 1))
        effects, controls = (shared + np.sqrt(0.5) * draw(rng, shape) for _ in range(2))
        effects += 2.0
        controls += {"alike": 0.0, "controlled": 2.0, "planted": 2.0}[where]
        if where == "controlled":
            effects[:, :, ::FAMILY_CELLS] += 2.0
            controls[:, :, ::FAMILY_CELLS] += 2.0
        elif where == "planted":
            effects[:, :, 0] += 0.2
        by_family = effects.reshape(documents, -1, FAMILY_CELLS)
        elsewhere = np.stack(
            [less_elsewhere(family, cell) for family in by_family.swapaxes(0, 1) for cell in range(FAMILY_CELLS)],
            axis=1,
        )
        matched = (effects - controls).reshape(documents, -1)
        p = flip_p(elsewhere, config, _GRID_STAGES, "greater", also=matched)
        stands_out = _holm(p, CELLS).reshape(-1, CELLS) <= config.alpha
        return stands_out[:, 0] if where == "planted" else np.any(stands_out, axis=1)

    return outcomes


def ranking(draw: Draw, documents: int, noise: float = 1.0, better: bool = False) -> Outcome:
    """A measure is said to predict the ranks of effects better, or worse, than mass does.

    True effects of a sublayer's cells are equally spaced. The ranks of mass are those of effect disturbed, those of
    the other two measures are that disturbance mirrored and inverted: all three have one rank correlation with
    effect. With `better`, the other two have the true ranks.

    Args:
        noise: standard error of the other measures' means in steps of rank; that of effect and mass is 1.
        better: whether the others predict better.
    """

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        few = replace(config, bootstrap=_FEW_RESAMPLES)
        truth = np.arange(CELLS, dtype=float)
        differs = np.zeros(replicates, dtype=bool)
        for replicate in range(replicates):
            order = (truth + 6 * rng.normal(size=CELLS)).argsort()
            mass = order.argsort()
            others = (truth, truth) if better else (CELLS - 1 - mass[::-1], order)
            means = {name: np.asarray(mean, dtype=float) for name, mean in zip(Measure, (mass, *others), strict=True)}
            errors = dict.fromkeys(Measure, noise) | {Measure.MASS: 1.0}

            def by_document(mean: Floats, error: float) -> Floats:
                return mean + error * np.sqrt(documents) * draw(rng, (documents, CELLS))

            effect = by_document(truth, 1.0)
            resamples = document_resamples(documents, replace(few, seed=config.seed + replicate))
            rho = {
                name: bootstrapped_spearman(effect, by_document(means[name], errors[name]), resamples)
                for name in Measure
            }
            p = [
                percentile_test(rho[name] - rho[Measure.MASS], config.alpha).p
                for name in Measure
                if name != Measure.MASS
            ]
            differs[replicate] = adjust_p(p, len(p)).min() <= config.alpha
        return differs

    return outcomes


def interval_misses(draw: Draw, documents: int) -> Outcome:
    """A 95% BCa interval does not hold the true mean."""

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        low, high = bca_interval(draw(rng, (documents, replicates)), config.bootstrap, 1 - config.alpha, config.seed)
        return np.logical_or(low > 0, high < 0)

    return outcomes


def student_family_wise(draw: Draw, documents: int) -> Outcome:
    """Any p of Student's t at most alpha after Holm in a grid without effects."""

    def outcomes(rng: np.random.Generator, replicates: int, config: StatisticsConfig) -> Outcomes:
        p = stats.ttest_1samp(draw(rng, (documents, replicates * CELLS)), 0.0).pvalue
        return np.any(_holm(p, CELLS).reshape(-1, CELLS) <= config.alpha, axis=1)

    return outcomes
