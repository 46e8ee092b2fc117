"""Intervals: against closed forms, coverage by simulation, and refusals."""

from ironlogic.evidence.statistics import (
    adjusted_effect,
    bootstrap_interval,
    calibration_error,
    curve_area,
    difference_interval,
    equivalent,
    holm,
    paired_test,
    samples_worth,
    smallest_detectable,
)

import numpy as np
import pytest
from scipy import stats


def test_one_repeat_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=2000)
    found = bootstrap_interval(values)
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    skewed = np.exp(values)
    assert bootstrap_interval(skewed, seed=1) == bootstrap_interval(skewed, seed=1)
    assert bootstrap_interval(skewed, seed=1) != bootstrap_interval(skewed, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("of_repeat", [0.05, 0.3])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_interval_covers_the_truth_over_repeats_and_items(repeats, of_repeat):
    """However few the trainings, whether they or the items vary more; an interval over items alone covers less."""
    rng, hits, items_only = np.random.default_rng(2), 0, 0
    for trial in range(200):
        table = rng.normal(0, of_repeat, (repeats, 1)) + rng.normal(0, 0.4, (1, 60))
        table += rng.normal(0, 0.4, (repeats, 60))
        found = bootstrap_interval(table, draws=200, seed=trial)
        hits += found.low <= 0 <= found.high
        alone = bootstrap_interval(table[0], draws=200, seed=trial)
        items_only += alone.low <= 0 <= alone.high
    assert hits >= 182  # 95 % of 200 is 190; 182 is 2.6 standard deviations below
    assert items_only < hits


def test_paired_difference_removes_what_both_share():
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 5, 400)
    ours, theirs = hardness + 0.2 + rng.normal(0, 0.1, 400), hardness + rng.normal(0, 0.1, 400)
    found = difference_interval(ours, theirs)
    assert 0.15 < found.low < 0.2 < found.high < 0.25


def test_refusals():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        bootstrap_interval(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        difference_interval([1, 2, 3], [1, 2])


# -- tests and limits


@pytest.mark.slow
def test_equivalence_agrees_with_statsmodels():
    """TOST by the 90 % interval: against the paired test on values where both are far from the edge."""
    from statsmodels.stats.weightstats import ttost_paired

    rng = np.random.default_rng(5)
    for shift in (-0.06, -0.02, 0.0, 0.02, 0.06):
        ours, theirs = rng.normal(shift, 0.2, 3000), rng.normal(0, 0.2, 3000)
        expected = ttost_paired(ours, theirs, -0.04, 0.04)[0] < 0.05
        assert equivalent(ours, theirs, margin=0.04) == expected, shift


def test_noise_is_no_proof_of_equivalence():
    rng = np.random.default_rng(6)
    assert not equivalent(rng.normal(0, 1, 20), rng.normal(0, 1, 20), margin=0.1)


def test_mcnemar_is_the_binomial_test_of_the_discordant_items():
    rng = np.random.default_rng(7)
    ours, theirs = rng.random(60) < 0.7, rng.random(60) < 0.5
    wins, losses = np.sum(ours & ~theirs), np.sum(~ours & theirs)
    expected = stats.binomtest(int(wins), int(wins + losses)).pvalue
    assert paired_test(ours.astype(int), theirs.astype(int)) == pytest.approx(expected)
    assert paired_test(ours.astype(int), ours.astype(int)) == 1.0
    with pytest.raises(ValueError, match="0 and 1"):
        paired_test([0.5, 1], [0, 1])


def test_holm_by_hand():
    assert holm([0.01, 0.03, 0.04]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_smallest_detectable_effect_is_detected_that_often():
    from statsmodels.stats.power import TTestPower

    values = np.random.default_rng(8).normal(0, 1, 400)
    found = smallest_detectable(bootstrap_interval(values, draws=8000))
    expected = TTestPower().solve_power(nobs=400, power=0.8, alpha=0.05) * values.std(ddof=1)
    assert found == pytest.approx(expected, rel=0.03)


def test_adjusted_effect_takes_the_covariate_out():
    """Outcome decided by length alone: the raw difference is large, the adjusted one none."""
    rng = np.random.default_rng(9)
    group = np.repeat([0, 1], 400)
    length = rng.normal(10 + 6 * group, 3)
    outcome = (rng.random(800) < np.clip((length - 4) / 20, 0, 1)).astype(float)
    assert outcome[group == 1].mean() - outcome[group == 0].mean() > 0.2
    found = adjusted_effect(outcome, group, length)
    assert found.low < 0 < found.high
    assert adjusted_effect(group, group, length).mean == pytest.approx(1)  # the group decides alone
    assert adjusted_effect(group, group, np.ones(800)).mean == pytest.approx(1)  # all of one length
    with pytest.raises(ValueError, match="one group"):
        adjusted_effect([1, 0], [1, 1], [1, 2])


def test_calibration_error_by_hand():
    assert calibration_error([0.95, 0.95, 0.15, 0.15], [1, 0, 0, 0]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.15)
    assert calibration_error([1.0, 1.0], [0, 0]) == 1.0


def test_area_is_the_mean_height():
    assert curve_area((0.0, 0.5, 1.0), [1.0, 0.5, 0.0]) == pytest.approx(0.5)
    assert curve_area((0.2, 0.4), np.full((2, 3), 0.7)) == pytest.approx([0.7] * 3)


def _curve(sizes, worth, rng, repeats=5, items=200):
    """Losses that fall with the logarithm of size x worth, plus noise of repeat and item."""
    level = 3 - 0.3 * np.log(np.asarray(sizes) * worth)
    return level[:, None, None] + rng.normal(0, 0.01, (1, repeats, 1)) + rng.normal(0, 0.2, (1, 1, items))


@pytest.mark.slow
def test_a_known_multiplier_is_found():
    sizes, rng = (10, 30, 100, 300, 1000), np.random.default_rng(10)
    theirs = _curve(sizes, 1, rng)
    ours = theirs - 0.3 * np.log(5) + rng.normal(0, 0.02, theirs.shape)
    found = samples_worth(sizes, ours, theirs, at=30)
    assert found.low < 5 < found.high
    assert found.high / found.low < 1.5
    assert samples_worth(sizes, theirs, theirs, at=30).mean == pytest.approx(1)
    assert samples_worth(sizes, theirs - 9, theirs, at=30).low == pytest.approx(1000 / 30)  # "at least"
    assert samples_worth(sizes, theirs + 9, theirs, at=30).high == pytest.approx(10 / 30)  # "at most"
    apart = ours - np.log([1, 2, 4, 1, 2]).reshape(1, 5, 1) * 0.3  # trainings that differ: Student's t over five
    found = samples_worth(sizes, apart, theirs, at=30)
    assert found.high / found.low > 3
    with pytest.raises(ValueError, match=r"\(5, R, I\)"):
        samples_worth(sizes, ours[:3], theirs[:3], at=30)
