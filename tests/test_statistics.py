"""Intervals: against closed forms, coverage by simulation, and refusals."""

from ironlogic.evidence.statistics import (
    adjusted_effect,
    calibration_error,
    curve_area,
    difference_interval,
    holm,
    mean_interval,
    p_value,
    samples_worth,
    smallest_detectable,
)

import numpy as np
import pytest
from scipy import stats


def test_one_training_has_students_interval_over_items():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=200)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert p_value(values, nothing=2.0) == pytest.approx(stats.ttest_1samp(values, 2.0).pvalue)
    twenty = np.arange(200) % 20
    means = values.reshape(10, 20).mean(axis=0)
    by_kind = mean_interval(values, twenty)
    assert (by_kind.low, by_kind.high) == pytest.approx(stats.t.interval(0.95, 19, means.mean(), stats.sem(means)))
    assert mean_interval(values, np.arange(200) % 4) == found  # four kinds are too few


CASES = {  # standard deviations of training, kind, kind x training, item, rest
    "as shipped": (0.01, 0, 0, 0.2, 0.3),
    "trainings differ": (0.05, 0, 0, 0.2, 0.3),
    "trainings dominate": (0.3, 0, 0, 0.1, 0.1),
    "items alone": (0, 0, 0, 0.4, 0),
    "rest alone": (0, 0, 0, 0, 0.4),
    "the effect differs by kind": (0.02, 0.2, 0, 0.2, 0.3),
    "by kind and training": (0.02, 0.2, 0.1, 0.2, 0.3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainings", [2, 3, 5])
def test_interval_covers_the_truth(trainings, case):
    """95 % intervals hold the truth in 93 to 97 % of worlds, give or take 1.5 % for the 600 worlds drawn here."""
    of_training, of_kind, of_both, of_item, rest = CASES[case]
    rng, kinds, hits, blind = np.random.default_rng(2), np.arange(100) % 10, 0, 0
    for _ in range(600):
        table = rng.normal(0, of_training, (trainings, 1)) + rng.normal(0, of_item, (1, 100))
        table = table + rng.normal(0, rest, (trainings, 100)) + rng.normal(0, of_kind, 10)[kinds]
        table += rng.normal(0, of_both, (trainings, 10))[:, kinds]
        found = mean_interval(table, kinds if of_kind else None)
        hits += found.low <= 0 <= found.high
        without = mean_interval(table)
        blind += without.low <= 0 <= without.high
    assert 0.915 <= hits / 600 <= 0.985
    if of_kind:
        assert blind < hits - 60  # kinds ignored


def test_unequal_kinds_keep_the_mean_of_the_items():
    rng = np.random.default_rng(4)
    kinds = np.repeat(np.arange(8), [1, 2, 3, 5, 9, 17, 33, 60])
    table = rng.normal(0, 1, (3, len(kinds))) + rng.normal(0, 1, 8)[kinds]
    assert mean_interval(table, kinds).mean == pytest.approx(table.mean())
    assert mean_interval(table, kinds).low < mean_interval(table).low
    with pytest.raises(ValueError, match="8 kinds for 130 items"):
        mean_interval(table, np.arange(8))


def test_p_reaches_five_hundredths_where_the_interval_reaches_nothing():
    table = np.random.default_rng(5).normal(0.1, 1, (4, 80))
    found = mean_interval(table)
    assert p_value(table, nothing=found.low) == pytest.approx(0.05)
    assert p_value(table, nothing=found.high) == pytest.approx(0.05)
    assert p_value(table, nothing=found.mean) == 1.0
    assert p_value(np.ones(9)) < 1e-9  # always the same: certain


def test_paired_difference_removes_what_both_share():
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 5, 400)
    ours, theirs = hardness + 0.2 + rng.normal(0, 0.1, 400), hardness + rng.normal(0, 0.1, 400)
    found = difference_interval(ours, theirs)
    assert 0.15 < found.low < 0.2 < found.high < 0.25


def test_refusals():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        mean_interval(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        difference_interval([1, 2, 3], [1, 2])


# -- tests and limits


def test_holm_by_hand():
    assert holm([0.01, 0.03, 0.04]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_smallest_detectable_effect_is_detected_that_often():
    from statsmodels.stats.power import TTestPower

    values = np.random.default_rng(8).normal(0, 1, 400)
    found = smallest_detectable(mean_interval(values))
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


def _curve(sizes, worth, rng, trainings=5, items=200):
    """Accuracies that rise with the logarithm of size x worth, plus noise of training and item."""
    level = 0.2 + 0.1 * np.log(np.asarray(sizes) * worth / 10)
    return level[:, None, None] + rng.normal(0, 0.005, (1, trainings, 1)) + rng.normal(0, 0.2, (1, 1, items))


@pytest.mark.slow
def test_a_known_multiplier_is_found():
    sizes, rng = (10, 30, 100, 300, 1000), np.random.default_rng(10)
    theirs = _curve(sizes, 1, rng)
    ours = theirs[1] + 0.1 * np.log(5) + rng.normal(0, 0.02, theirs[1].shape)
    found = samples_worth(sizes, ours, theirs, at=30)
    assert found.low < 5 < found.high
    assert found.high / found.low < 1.5
    assert samples_worth(sizes, theirs[1], theirs, at=30).mean == pytest.approx(1)
    kinds = np.arange(200) % 10
    assert samples_worth(sizes, ours, theirs, at=30, kinds=kinds).mean == pytest.approx(found.mean)
    assert samples_worth(sizes, theirs[1] + 9, theirs, at=30).low == pytest.approx(1000 / 30)  # "at least"
    assert samples_worth(sizes, theirs[1] - 9, theirs, at=30).high == pytest.approx(10 / 30)  # "at most"
    apart = ours + np.log([1, 2, 4, 1, 2]).reshape(5, 1) * 0.1  # trainings that differ: Student's t over five
    found = samples_worth(sizes, apart, theirs, at=30)
    assert found.high / found.low > 3
    with pytest.raises(ValueError, match=r"\(5, R, I\)"):
        samples_worth(sizes, ours, theirs[:3], at=30)


def test_a_curve_that_dips_is_not_biased_by_its_lowest_point():
    """Isotonic regression pools what dips; a running extreme would read a worth off one lucky point."""
    sizes, rng, worths = (10, 30, 100, 300, 1000), np.random.default_rng(11), []
    for _ in range(40):
        theirs = _curve(sizes, 1, rng) + rng.normal(0, 0.05, (5, 1, 1))
        ours = _curve(sizes, 1, rng)[1] * 0 + 0.2 + 0.1 * np.log(3)
        worths.append(np.log(samples_worth(sizes, ours, theirs, at=30, draws=2).mean))
    assert abs(np.mean(worths)) < 0.25
