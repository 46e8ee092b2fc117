"""Intervals and tests for what was measured: over trainings, over items, over kinds of items.

SciPy and statsmodels underneath. Knows no model and no claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

__all__ = [
    "Interval",
    "adjusted_effect",
    "calibration_error",
    "curve_area",
    "difference_interval",
    "holm",
    "mean_interval",
    "p_value",
    "samples_worth",
    "share_interval",
    "smallest_detectable",
]

FEWEST_KINDS = 5  # with fewer kinds of items an interval over them says nothing


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


def mean_interval(values, kinds=None, *, level: float = 0.95) -> Interval:
    """Interval of the mean of `values`, of shape (item,) or (training, item).

    A training and an item are both one sample of many: their variances are estimated apart (two-way analysis of
    variance) and each is widened by its own Student's t (Banerjee 1960), for there are few trainings. `kinds`, of
    shape (item,): the kind of each item. With five kinds or more, kinds are drawn instead of items, as items of one
    kind succeed and fail together (clustered errors, Miller 2024, arXiv 2411.00640). With one training the interval
    says nothing about another one.

    >>> mean_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    mean, parts = _variances(values, kinds)
    half = _half_width(parts, 1 - level)
    return Interval(mean, mean - half, mean + half)


def share_interval(values, kinds=None, *, level: float = 0.95) -> Interval:
    """`mean_interval` within the bounds of a share, 0 and 1, which Student's t knows nothing of."""
    interval = mean_interval(values, kinds, level=level)
    return Interval(interval.mean, max(interval.low, 0.0), min(interval.high, 1.0))


def difference_interval(ours, theirs, kinds=None, *, level: float = 0.95) -> Interval:
    """Interval of the mean of ours - theirs, paired by position: same trainings, same items."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"difference_interval: shapes {a.shape} and {b.shape} differ; the two must be paired")
    return mean_interval(a - b, kinds, level=level)


def p_value(values, kinds=None, *, nothing: float = 0.0) -> float:
    """Two-sided p-value of the mean being `nothing`: 1 minus the level at which `mean_interval` just reaches it."""
    mean, parts = _variances(values, kinds)
    gap, least = abs(mean - nothing), 1e-12
    if gap == 0:
        return 1.0
    if _half_width(parts, least) <= gap:
        return least
    return float(optimize.brentq(lambda p: _half_width(parts, p) - gap, least, 1.0))


def _variances(values, kinds) -> tuple[float, list[tuple[float, int]]]:
    """(mean, parts): the parts of the mean's variance, each with its degrees of freedom."""
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"mean_interval: values have shape {table.shape}; expected (item,) or (training, item)")
    if not np.isfinite(table).all():
        raise ValueError("mean_interval: some values are not finite")
    mean = float(table.mean())
    if kinds is not None and len(set(kinds)) >= FEWEST_KINDS:
        table = _by_kind(table, np.asarray(kinds))
    trainings, items = table.shape
    of_trainings, of_items = table.mean(axis=1), table.mean(axis=0)
    across = float(of_items.var(ddof=1)) / items if items > 1 else 0.0
    parts = [(across, items - 1)]
    if trainings > 1:
        rest = table - of_trainings[:, None] - of_items + table.mean()
        noise = float((rest**2).sum()) / max(1, (trainings - 1) * (items - 1)) / table.size
        # the scatter of the trainings' means holds the noise of their items once more
        parts.append((max(0.0, float(of_trainings.var(ddof=1)) / trainings - noise), trainings - 1))
    return mean, parts


def _by_kind(table: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(training, kind): each kind's share of the mean, so that the mean over kinds is that over items."""
    names, of_item, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    if len(of_item) != table.shape[1]:
        raise ValueError(f"mean_interval: {len(of_item)} kinds for {table.shape[1]} items")
    mean = table.mean()
    sums = np.stack([np.bincount(of_item, weights=row - mean, minlength=len(names)) for row in table])
    return mean + sums * len(names) / counts.sum()


def _half_width(parts: Sequence[tuple[float, int]], p: float) -> float:
    known = [(variance, freedom) for variance, freedom in parts if variance > 0]
    return float(np.sqrt(sum(variance * stats.t.ppf(1 - p / 2, freedom) ** 2 for variance, freedom in known)))


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
    sizes: Sequence[int],
    ours,
    control,
    *,
    at: int,
    kinds=None,
    draws: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """How many control samples one of ours is worth: the control's size that does as well as ours, over ours.

    Of accuracies. `control`: its learning curve, of shape (size, training, item); `ours`: (training, item), at `at`
    rows. The curve is made to rise by isotonic regression, then read backwards, straight between sizes on a
    logarithmic axis. Beyond its ends the answer is the end: `sizes[-1] / at` means "at least", `sizes[0] / at` "at
    most". Trainings and items (or kinds of them) are drawn anew with replacement; where Student's t over the
    trainings is wider, it counts.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(control, dtype=float)
    if b.ndim != 3 or a.shape != b.shape[1:] or len(sizes) != len(b):
        raise ValueError(f"samples_worth: shapes {a.shape} and {b.shape}; expected (R, I) and ({len(sizes)}, R, I)")
    rng, logs = np.random.default_rng(seed), np.log(np.asarray(sizes, float))
    trainings, items = a.shape
    _, of_item = np.unique(np.arange(items) if kinds is None else kinds, return_inverse=True)
    groups = of_item.max() + 1

    def log_worth(of_trainings: np.ndarray, of_groups: np.ndarray) -> float:
        """ln of the worth where trainings and kinds have these weights."""
        of_items = of_groups[of_item] / of_groups[of_item].sum()
        target = of_trainings @ a @ of_items
        curve = optimize.isotonic_regression(np.einsum("r,sri,i->s", of_trainings, b, of_items)).x
        reached = np.searchsorted(curve, target)  # the first size that does as well
        if reached in (0, len(curve)):
            return float(logs[min(reached, len(curve) - 1)] - np.log(at))
        share = (target - curve[reached - 1]) / (curve[reached] - curve[reached - 1])
        return float(logs[reached - 1] + share * (logs[reached] - logs[reached - 1]) - np.log(at))

    all_groups, drawn = np.ones(groups), []
    for _ in range(draws):
        of_trainings = rng.multinomial(trainings, np.full(trainings, 1 / trainings)) / trainings
        drawn.append(log_worth(of_trainings, rng.multinomial(groups, np.full(groups, 1 / groups)).astype(float)))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    if trainings > 1:
        each = mean_interval([log_worth(alone, all_groups) for alone in np.eye(trainings)], level=level)
        low, high = min(low, each.low), max(high, each.high)
    ends = np.clip([low, high], logs[0] - np.log(at), logs[-1] - np.log(at))
    mean = log_worth(np.full(trainings, 1 / trainings), all_groups)
    return Interval(*(float(np.exp(value)) for value in (mean, *ends)))
