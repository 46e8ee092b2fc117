"""Figures of reinforcement learning draw the means that they are given."""

import subprocess
import sys

from ironlogic.data.problems import make_tasks
from ironlogic.show.grpo import plot_pass, plot_rewards

import numpy as np
import pytest


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def lines(steps: int, reward) -> list[dict]:
    """Two prompts a step, the second sampled three times as often as the first."""
    return [
        {
            "step": s,
            "prompt": p,
            "completion": "<think>a</think>" if p == "p" else "a",
            "tokens": s,
            "right": reward(s),
        }
        for s in range(1, steps + 1)
        for p in ("p", "q", "q", "q")
    ]


def test_rewards_are_means_over_prompts_and_steps():
    figure = plot_rewards({"GRPO": lines(10, lambda s: s / 10)}, reward="right", window=5)
    reward, thinks, tokens = figure.axes
    assert np.allclose(curve(reward, "GRPO"), ([3, 8], [0.3, 0.8]))
    assert np.allclose(curve(thinks, "GRPO"), ([3, 8], [0.5, 0.5]))  # by prompt, not by completion
    assert np.allclose(curve(tokens, "GRPO"), ([3, 8], [3, 8]))


def test_the_last_window_may_be_short_and_what_was_not_scored_is_left_out():
    given = lines(7, lambda s: s / 10)
    given += [{"step": 7, "prompt": "r", "completion": "a", "tokens": 1000, "right": None}]
    reward, _, tokens = plot_rewards({"GRPO": given}, reward="right", window=5).axes
    assert np.allclose(curve(reward, "GRPO"), ([3, 6.5], [0.3, 0.65]))
    assert np.allclose(curve(tokens, "GRPO"), ([3, 6.5], [3, 6.5]))


def test_pass_at_k_rises_and_the_share_that_thinks_is_a_bar():
    from ironlogic.training.grpo import Samples

    correct = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    thinks = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    samples = Samples(tuple(make_tasks(2)), (), correct, thinks, np.ones((2, 4)))
    left, right = plot_pass({"before": samples}).axes
    assert np.allclose(curve(left, "before"), ([1, 2, 3, 4], [0.625, 0.75, 0.875, 1.0]))
    assert right.patches[0].get_width() == 0.375


@pytest.mark.slow
def test_drawing_needs_no_torch():
    code = "import ironlogic.show.grpo, ironlogic.show.rlvr_widget, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
