"""Intervals and tests for what was measured, over items and over repeated trainings.

SciPy and statsmodels underneath. Knows no model and no claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = [
    "Interval",
    "adjusted_effect",
    "bootstrap_interval",
    "calibration_error",
    "curve_area",
    "difference_interval",
    "equivalent",
    "holm",
    "paired_test",
    "samples_worth",
    "smallest_detectable",
]


@dataclass(frozen=True)
class Interval:
    """A mean with the two ends of its interval (95 % unless asked otherwise)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """`f"{interval:+}"` shows the sign of every number."""
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def bootstrap_interval(values, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Interval of the mean of `values`, of shape (item,) or (repeat, item).

    Both repeats and items are drawn anew with replacement, as a training seed and a test item are both one
    sample of many (two-way bootstrap, Owen 2007, arXiv 0712.1111). With one repeat only items are drawn: the
    interval then says nothing about another training run.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"bootstrap_interval: values have shape {table.shape}; expected (item,) or (repeat, item)")
    if not np.isfinite(table).all():
        raise ValueError("bootstrap_interval: some values are not finite")
    rng = np.random.default_rng(seed)
    repeats, items = table.shape
    # multinomial counts are the weights of a draw with replacement: one matrix product per draw, no copies
    of_repeats = rng.multinomial(repeats, np.full(repeats, 1 / repeats), size=draws) / repeats
    of_items = rng.multinomial(items, np.full(items, 1 / items), size=draws) / items
    means = np.einsum("dr,ri,di->d", of_repeats, table, of_items, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    least, most = _student(table.mean(axis=1) if repeats > 1 else table[0], level)
    return Interval(float(table.mean()), float(min(low, least)), float(max(high, most)))


def _student(of_repeats: np.ndarray, level: float) -> tuple[float, float]:
    """Student's t over repeats (of one: over items): with few of them the bootstrap alone is too narrow."""
    if len(of_repeats) == 1:
        return float("inf"), float("-inf")
    half = stats.sem(of_repeats) * stats.t.ppf((1 + level) / 2, len(of_repeats) - 1)
    return of_repeats.mean() - half, of_repeats.mean() + half


def difference_interval(ours, theirs, **options) -> Interval:
    """Interval of the mean of ours - theirs, paired by position: same items, same repeats."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"difference_interval: shapes {a.shape} and {b.shape} differ; the two must be paired")
    return bootstrap_interval(a - b, **options)


def equivalent(ours, theirs, *, margin: float, **options) -> bool:
    """Whether the mean of ours - theirs is shown to lie within +-`margin`: two one-sided tests at 5 % (TOST).

    By inclusion of the 90 % interval, which is the same test (Schuirmann 1987).
    """
    difference = difference_interval(ours, theirs, level=0.90, **options)
    return -margin < difference.low and difference.high < margin


def paired_test(ours, theirs) -> float:
    """Exact p-value of McNemar's test: two readers of the same items, right or wrong, of shape (item,).

    It knows items, not trainings: two trainings by one recipe differ "significantly" often enough.

    >>> paired_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])  # five discordant items, all one way: 2 / 2^5
    0.0625
    """
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or a.ndim != 1 or not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError(f"paired_test: expected two vectors of 0 and 1, one length; got {a.shape} and {b.shape}")
    table = [[np.sum((a == x) & (b == y)) for y in (1, 0)] for x in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having looked at all of them (Holm 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04])]
    [0.02, 0.04]
    """
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def smallest_detectable(interval: Interval, *, level: float = 0.95, power: float = 0.80) -> float:
    """The effect that data as noisy as those behind `interval` would have shown in `power` of all repetitions."""
    z = stats.norm.ppf((1 + level) / 2)
    return float((interval.high - interval.low) / 2 / z * (z + stats.norm.ppf(power)))


def adjusted_effect(outcome, group, covariate) -> Interval:
    """By how much `outcome` (0 or 1) is likelier in `group` (0 or 1) at equal `covariate`; all of shape (item,).

    A linear probability model with robust errors (HC3): it exists where the group alone decides, a logistic one
    does not.
    """
    import statsmodels.api as sm

    y, g, x = (np.asarray(values, dtype=float) for values in (outcome, group, covariate))
    if len(set(g.tolist())) < 2:
        raise ValueError("adjusted_effect: every item is in one group; there is nothing to compare")
    columns = [np.ones_like(y), g] + ([(x - x.mean()) / x.std()] if x.std() > 0 else [])
    fit = sm.OLS(y, np.column_stack(columns)).fit(cov_type="HC3")
    low, high = fit.conf_int()[1]
    return Interval(float(fit.params[1]), float(low), float(high))


def calibration_error(confidence, correct, *, bins: int = 10) -> float:
    """Expected calibration error: how far stated confidence is from accuracy, over bins of equal width.

    >>> calibration_error([0.9] * 10, [1] * 9 + [0])
    0.0
    """
    p, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    error = 0.0
    for b in np.unique(bin_of):
        inside = bin_of == b
        error += abs(p[inside].mean() - right[inside].mean()) * inside.mean()
    return round(float(error), 12)


def curve_area(ratios: Sequence[float], values) -> np.ndarray:
    """Mean height of a curve over its ratios: the area under it (trapezoid) by its width; values (ratio, ...)."""
    x = np.asarray(ratios, dtype=float)
    return np.trapezoid(np.asarray(values, dtype=float), x, axis=0) / (x[-1] - x[0])


def samples_worth(
    sizes: Sequence[int], ours, theirs, *, at: int, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """How many control samples one of ours is worth: the control's size that reaches our loss at `at`, over `at`.

    `ours` and `theirs` are losses of shape (size, repeat, item), lower is better. The control's curve is made to
    fall, then read backwards, straight between sizes on a logarithmic axis. Beyond its ends the answer is the end:
    `sizes[-1] / at` means "at least", `sizes[0] / at` "at most". Drawn as in `bootstrap_interval`.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.ndim != 3 or len(sizes) != len(a) or at not in sizes:
        raise ValueError(f"samples_worth: shapes {a.shape} and {b.shape}; expected two of ({len(sizes)}, R, I)")
    rng = np.random.default_rng(seed)
    logs, start = np.log(np.asarray(sizes, float)), list(sizes).index(at)
    _, repeats, items = a.shape

    def log_worth(of_repeats: np.ndarray, of_items: np.ndarray) -> float:
        """ln of the worth where repeats and items have these weights."""
        target = np.einsum("r,ri,i->", of_repeats, a[start], of_items)
        curve = np.minimum.accumulate(np.einsum("r,sri,i->s", of_repeats, b, of_items))
        return float(np.interp(-target, -curve, logs) - logs[start])

    drawn = []
    for _ in range(draws):
        of_repeats = rng.multinomial(repeats, [1 / repeats] * repeats) / repeats
        of_items = rng.multinomial(items, [1 / items] * items) / items
        drawn.append(log_worth(of_repeats, of_items))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    every_item = np.full(items, 1 / items)
    least, most = _student(np.array([log_worth(repeat, every_item) for repeat in np.eye(repeats)]), level)
    ends = np.clip([min(low, least), max(high, most)], logs[0] - logs[start], logs[-1] - logs[start])
    mean = log_worth(np.full(repeats, 1 / repeats), every_item)
    return Interval(*(float(np.exp(value)) for value in (mean, *ends)))
