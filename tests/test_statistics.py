"""Intervals: against closed forms, coverage by simulation, and refusals."""

import numpy as np
import pytest
from scipy import stats

from ironlogic.statistics import bootstrap_interval, difference_interval, entropy, js_divergence


def test_one_repeat_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=2000)
    found = bootstrap_interval(values)
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_interval_covers_the_truth_over_repeats_and_items():
    """Repeat effects as large as item effects: an interval over items alone would cover far less."""
    rng, hits, items_only = np.random.default_rng(2), 0, 0
    for trial in range(200):
        table = rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.5, (5, 60))
        found = bootstrap_interval(table, draws=400, seed=trial)
        hits += found.low <= 0 <= found.high
        alone = bootstrap_interval(table.mean(axis=0), draws=400, seed=trial)
        items_only += alone.low <= 0 <= alone.high
    assert hits >= 184  # 95 % of 200 is 190; 184 is two standard deviations below
    assert items_only < hits


def test_paired_difference_removes_what_both_share():
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 5, 400)
    ours, theirs = hardness + 0.2 + rng.normal(0, 0.1, 400), hardness + rng.normal(0, 0.1, 400)
    found = difference_interval(ours, theirs)
    assert 0.15 < found.low < 0.2 < found.high < 0.25


def test_same_seed_same_interval():
    values = np.random.default_rng(4).random(20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_refusals():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        bootstrap_interval(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        difference_interval([1, 2, 3], [1, 2])


def test_entropy_and_divergence_agree_with_scipy():
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy as of_scipy

    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), size=(2, 5))
    assert entropy(p) == pytest.approx(of_scipy(p, axis=-1))
    assert js_divergence(p, q) == pytest.approx(jensenshannon(p, q, axis=-1) ** 2)
    assert js_divergence(p, p) == pytest.approx(0, abs=1e-12)
    assert entropy(np.full(1000, 1e-3)) == pytest.approx(np.log(1000))


def test_what_is_no_distribution_is_refused():
    for values in ([0.5, 0.6], [1.5, -0.5], []):
        with pytest.raises(ValueError, match="sum to 1"):
            entropy(values)
    with pytest.raises(ValueError, match="differ"):
        js_divergence([1.0], [0.5, 0.5])
