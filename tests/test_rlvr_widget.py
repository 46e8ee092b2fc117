"""Completions to read: what is shown is what was sampled, and nothing a model writes becomes markup."""

from ironlogic.data.problems import make_tasks
from ironlogic.show.rlvr_widget import completions_table, sample_explorer

import numpy as np
import pytest

TASKS = tuple(make_tasks(3, seed=1))


def samples(text: str, tasks=TASKS):
    from ironlogic.generate import Completion
    from ironlogic.training.grpo import Samples

    answers = tuple((Completion(f"{text} {i}", 2, True, 0.1), Completion("<b>no", 2, True, 0.1)) for i in range(3))
    correct = np.array([[1.0, 0.0]] * 3)
    return Samples(tasks, answers, correct, np.zeros((3, 2)), np.full((3, 2), 2))


def test_explorer_shows_each_arm_s_answers_to_the_problem_picked():
    explorer = sample_explorer({"before": samples("old"), "after": samples("new")})
    assert "✓ old 0" in explorer.text.value
    explorer.controls["problem"].value = 2
    assert "✓ old 2" in explorer.text.value
    assert "✓ new 2" in explorer.text.value
    assert "✗ &lt;b&gt;no" in explorer.text.value
    assert "after: 50% here" in explorer.text.value
    assert TASKS[2].answer in explorer.text.value


def test_explorer_refuses_arms_that_answered_other_problems():
    with pytest.raises(ValueError, match="after answered other problems than before"):
        sample_explorer({"before": samples("old"), "after": samples("new", tuple(make_tasks(3, seed=2)))})


def test_table_shows_the_steps_asked_for():
    lines = [
        {"step": s, "prompt": f"q{s}", "completion": f"<think>{s}</think>{i}", "tokens": 3, "right": 1.0}
        for s in (1, 2, 3)
        for i in range(6)
    ]
    html = completions_table(lines, steps=[1, 3], rewards=["right"], rows=2).data
    assert html.count("<tr>") == 5
    assert "&lt;think&gt;3&lt;/think&gt;1" in html
    assert "q2" not in html
    with pytest.raises(ValueError, match="no completions of step 9; there are those of 1 to 3"):
        completions_table(lines, steps=[9], rewards=["right"])
