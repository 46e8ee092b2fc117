"""Figures: they draw what they are given, and a notebook shows them without pyplot."""

import subprocess
import sys

from ironlogic.burden import apply_burden, measure_disorder
from ironlogic.data.problems import make_tasks
from ironlogic.evidence.measure import AnswerLoss, Robustness
from ironlogic.memory import plan_memory
from ironlogic.show.plots import (
    COLORS,
    plot_answer_loss,
    plot_disorder,
    plot_losses,
    plot_memory,
    plot_reached,
    plot_robustness,
)

import numpy as np
import pytest

TASKS = tuple(make_tasks(34, seed=1))


def result(share: float) -> Robustness:
    correct = np.array([[i / 34 < share * (1 - r) for i in range(34)] for r in (0.0, 0.7)], float)
    return Robustness((0.0, 0.7), TASKS, correct, np.ones((2, 34)), ())


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_ydata())


def test_robustness_draws_the_mean_accuracy_of_each_arm():
    repeats = [result(1.0), result(0.5)]
    figure = plot_robustness({"SFT": repeats, "FT": [result(0.9)]})
    for axes, order in zip(figure.axes, ("free", "bound"), strict=True):
        expected = [np.mean([r.pick(ratio, order).mean() for r in repeats]) for ratio in (0.0, 0.7)]
        assert np.allclose(curve(axes, "SFT"), expected)
        assert curve(axes, "ideal reader") == [1.0, 1.0]
    assert figure.axes[0].lines[1].get_color() == COLORS["SFT"]


def test_losses_and_answer_losses():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert curve(plot_losses({"FT": lines}).axes[0], "FT") == [2.0, 1.0]
    loss = AnswerLoss((0.0, 1.0), np.array([[1.0, 3.0], [2.0, 4.0]]), 0)
    assert curve(plot_answer_loss({"FT": loss}).axes[0], "FT") == [2.0, 3.0]


def test_disorder_and_reached():
    text = " ".join(map(str, range(50)))
    points = [(r, measure_disorder(text, apply_burden(text, ratio=r))) for r in (0.0, 0.5, 1.0)]
    figure = plot_disorder(points, movable=50, units=50, marked=0.5)
    assert np.allclose(curve(figure.axes[0], "nominal"), [0, 1])
    figure = plot_reached([5, 50], [0.6, 0.68], ratio=0.7)
    assert curve(figure.axes[0], "rows") == [0.6, 0.68]


def test_memory_bars_add_up():
    plan = plan_memory("24gb", card_gib=24)
    figure = plot_memory({"24gb": plan})
    assert np.isclose(sum(bar.get_width() for bar in figure.axes[0].patches), plan.peak_gib)


def test_a_notebook_shows_a_figure_as_png():
    assert plot_losses({"FT": [{"step": 1, "loss": 2.0}]})._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_drawing_needs_no_torch():
    code = "import ironlogic.show.plots, ironlogic.show.widgets, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
