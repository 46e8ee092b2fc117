"""Intervals for what was measured, over items and over repeated trainings. SciPy underneath."""

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

__all__ = ["Interval", "bootstrap_interval", "difference_interval", "entropy", "js_divergence"]


@dataclass(frozen=True)
class Interval:
    """A mean with the two ends of its interval (95 % unless asked otherwise)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    if repeats > 1:  # few repeats: the bootstrap alone is too narrow, so never below Student's t over repeats
        half = stats.sem(table.mean(axis=1)) * stats.t.ppf((1 + level) / 2, repeats - 1)
        low, high = min(low, table.mean() - half), max(high, table.mean() + half)
    return Interval(float(table.mean()), float(low), float(high))


def difference_interval(ours, theirs, **options) -> Interval:
    """Interval of the mean of ours - theirs, paired by position: same items, same repeats."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"difference_interval: shapes {a.shape} and {b.shape} differ; the two must be paired")
    return bootstrap_interval(a - b, **options)


def entropy(probabilities) -> np.ndarray:
    """Entropy in nats over the last axis, which sums to 1.

    >>> print(f"{entropy([0.5, 0.5]):.4f}")  # ln 2
    0.6931
    """
    p = np.asarray(probabilities, dtype=float)
    if p.size == 0 or (p < 0).any() or not np.allclose(p.sum(axis=-1), 1, atol=1e-3):
        raise ValueError("entropy: expected probabilities that sum to 1 over the last axis")
    return special.entr(p).sum(axis=-1)


def js_divergence(ours, theirs) -> np.ndarray:
    """Jensen-Shannon divergence in nats over the last axis: 0 if equal, ln 2 if nothing is shared (Lin 1991).

    >>> print(f"{js_divergence([1, 0], [0, 1]):.4f}")  # ln 2
    0.6931
    """
    p, q = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if p.shape != q.shape:
        raise ValueError(f"js_divergence: shapes {p.shape} and {q.shape} differ")
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)
