"""GRPO: rows and rewards used or refused, what is written down, resuming, pass at k, and what is drawn of it."""

from dataclasses import replace
from itertools import combinations

from ironlogic.data.problems import accuracy_reward, check_answer, format_reward, make_tasks, thinks
from ironlogic.generate import Completion
from ironlogic.show.grpo import completions_table, plot_pass, plot_rewards, sample_explorer
from ironlogic.training.grpo import (
    GrpoError,
    GrpoSettings,
    Samples,
    _check_scores,
    _prepare,
    _training_order,
    read_completions,
    rejection_chats,
    sample_answers,
    train_grpo,
)
from ironlogic.training.runs import RunError, open_run, read_steps

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import LORA
from trained import nano as load_nano

slow = pytest.mark.slow
SETTINGS = GrpoSettings(
    steps=4,
    generations=4,
    batch_size=8,
    accumulation=1,
    max_new_tokens=32,
    learning_rate=1e-3,
    save_steps=2,
    lora=LORA,
)
TASKS = make_tasks(6, seed=1, kinds=["minus", "parent"])
THINK = {"role": "system", "content": "Think first."}
ROWS = [
    {"prompt": [THINK, {"role": "user", "content": t.prompt}], "answer": t.answer, "step": "easy", "tokens": -1}
    for t in TASKS
]
REWARDS = [accuracy_reward, format_reward]


@pytest.fixture(scope="module")
def nano():
    return load_nano(four_bit=False, max_length=96)


def train(folder, rows=ROWS, settings=SETTINGS, rewards=REWARDS, **options):
    loaded = load_nano(max_length=96)  # in 4 bit: TRL then makes the adapter bfloat16
    return train_grpo(loaded, rows, settings, run=folder, rewards=rewards, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "a")


def named(name, score=lambda completion: 1.0):
    def reward(completions, **_):
        return [score(completion) for completion in completions]

    reward.__name__ = name
    return reward


# --- rows, settings and rewards -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generations": 1}, "generations is 1; a group needs 2 or more"),
        ({"batch_size": 6}, r"is 6 \* 1 completions a step; it has to be a multiple of generations, 4"),
    ],
)
def test_settings_that_can_t_work(change, message):
    with pytest.raises(GrpoError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"prompt": "What is 1 + 1?"}], r"row 6 has no answer; it has \['prompt'\]"),
        ([{"prompt": "", "answer": ""}], "row 0 has no prompt and no answer"),
        ([*ROWS, "What is 1 + 1?"], "row 6 is a str; expected a Task or a mapping with a prompt"),
        ([{"prompt": 7, "answer": "2"}], "row 0 has a prompt of type int; expected a text or a list of messages"),
        ([{"prompt": ["1 + 1?"], "answer": "2"}], "row 0 has a prompt of type list; expected a text or a list of"),
        ([{"prompt": "1 + 1?", "answer": ["2", "3"]}], "row 0: the answer is .*expected a text or a number"),
        ([{"prompt": "1 + 1?", "completion": "2", "answer": "2"}], "row 0 has a column 'completion', a name that"),
        ([], "none of 0 rows can be used"),
        ([{"prompt": "word " * 100, "answer": "2"}], "none of 1 rows can be used; a prompt may have 64 tokens"),
    ],
)
def test_rows_that_can_t_be_used_name_themselves(nano, rows, message, tmp_path):
    with pytest.raises(GrpoError, match=message):
        train_grpo(nano, rows, SETTINGS, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_rows_keep_their_columns_answers_become_text_and_long_rows_are_counted(nano):
    rows = [{"prompt": "1 + 1?", "answer": answer, "source": "a"} for answer in (2, " 2\n", 2.0, ["2"])]
    kept, left_out = _prepare(nano, [*rows, {"prompt": "word " * 100, "answer": "x"}], SETTINGS, needs_answer=True)
    assert kept == [{"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "source": "a"}] * 4
    assert left_out == 1
    kept, _ = _prepare(nano, [{"prompt": "1 + 1?"}], SETTINGS, needs_answer=False)
    assert kept == [{"prompt": [{"role": "user", "content": "1 + 1?"}]}]


def test_every_pass_goes_through_all_prompts_in_an_order_of_its_own(nano):
    rows, _ = _prepare(nano, TASKS, SETTINGS, needs_answer=True)
    order = _training_order(rows, replace(SETTINGS, steps=9))
    asked = [row["prompt"][-1]["content"] for row in order]
    passes = [asked[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(once) == sorted(task.prompt for task in TASKS) for once in passes)
    assert passes[0] != passes[1]
    assert asked[:8] == [row["prompt"][-1]["content"] for row in _training_order(rows, SETTINGS)]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        *((rewards, "expected functions, each with a name") for rewards in ([], ["accuracy"], [named("a")] * 2)),
        *(([named(name)], f"the reward {name!r} has the name of a column") for name in ("answer", "step")),
    ],
)
def test_rewards_have_names_of_their_own_and_never_write_over_the_record(nano, rewards, message, tmp_path):
    with pytest.raises(GrpoError, match=message):
        train_grpo(nano, ROWS, SETTINGS, run=tmp_path / "r", rewards=rewards)


@pytest.mark.parametrize(
    "returned",
    [[0.0, 1.0], (0, True), np.arange(2), list(np.arange(2, dtype="float32")), torch.arange(2), map(float, "01")],
)
def test_numbers_of_every_kind_are_scores(returned):
    assert _check_scores("mine", returned, ["p", "p"], ["a", "b"]) == [0.0, 1.0]
    assert _check_scores("mine", [None, 1], ["p", "p"], ["a", "b"]) == [None, 1.0]


@pytest.mark.parametrize(
    "returned", [[1.0], 1.0, None, torch.tensor(1), ["1", "1"], [1, float("nan")], [np.inf, 0], [[1], [1]]]
)
def test_what_is_no_score_is_refused_with_the_completion(returned):
    with pytest.raises(GrpoError, match=r"reward mine returned(.|\n)*prompt: 'p'\n  completion: '[ab]'"):
        _check_scores("mine", returned, ["p", "p"], ["a", "b"])


# --- training -----------------------------------------------------------------------------------------------
@slow
def test_a_run_that_no_reward_could_teach_stops_or_says_so(tmp_path, capsys):
    short = {"settings": replace(SETTINGS, steps=1, max_new_tokens=4)}
    silent = named("silent", lambda completion: None)
    with pytest.raises(
        GrpoError, match=r"no completion of the first step got a reward: silent returned None(.|\n)*p"
    ):
        train(tmp_path / "silent", rewards=[silent], **short)
    run = train(tmp_path / "flat", rewards=[named("flat")], **short)
    assert "NOTHING WAS LEARNED" in run.record["data"]
    assert "NOTHING WAS LEARNED" in capsys.readouterr().out


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_gib")} for line in lines]


@slow
def test_a_run_writes_down_what_was_rewarded(finished):
    lines = read_completions(finished)
    assert len(lines) == 4 * 8
    for line in lines:
        assert line["accuracy_reward"] == float(check_answer(line["answer"], line["completion"]))
        assert line["format_reward"] == format_reward([line["completion"]])[0]
        assert line["prompt"] in {task.prompt for task in TASKS}
        assert 0 < line["tokens"] <= 32
        assert (line["row_step"], line["row_tokens"]) == ("easy", -1)
    # were they special tokens, TRL would drop them, and every format reward with them
    assert sum("<think>" in line["completion"] for line in lines) > 24
    assert sum(line["format_reward"] for line in lines) > 24
    for metric in finished.metrics:
        mine = [line for line in lines if line["step"] == metric["step"]]
        assert np.isclose(metric["rewards/accuracy_reward/mean"], np.mean([m["accuracy_reward"] for m in mine]))
        assert np.isclose(metric["reward"], np.mean([m["accuracy_reward"] + m["format_reward"] for m in mine]))
        assert np.isclose(metric["completions/mean_length"], np.mean([m["tokens"] for m in mine]))
        assert np.isclose(metric["think_rate"], np.mean([thinks(m["completion"]) for m in mine]))
    assert finished.record["stage"] == "grpo"
    assert finished.record["settings"]["rewards"] == ["accuracy_reward", "format_reward"]
    assert finished.record["data"] == "6 prompts"
    tensors = load_file(finished.adapter / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert open_run(finished.folder).load_model().max_length == 96


@slow
def test_the_same_run_is_not_trained_twice_and_another_is_refused(finished):
    seen = []
    again = train(finished.folder, watch=seen.append)
    assert again.loaded is None
    assert without_times(seen[0]) == without_times(finished.metrics)
    with pytest.raises(RunError, match="differs in settings"):
        train(finished.folder, rewards=REWARDS[:1])
    with pytest.raises(RunError, match="differs in rows .*data_sha256"):
        train(finished.folder, ROWS[1:])


@slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    def interrupt(lines):
        if lines[-1]["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", watch=interrupt)
    path = tmp_path / "cut" / "completions.jsonl"
    assert {line["step"] for line in read_steps(path)} == {1, 2, 3}
    half = '{"step": 4, "prompt": {"a": "}ä'.encode()[:-1]  # a kill may leave half a line, and half a letter
    path.write_bytes(path.read_bytes() + half)
    resumed = train(tmp_path / "cut")
    assert read_completions(resumed) == read_completions(finished)
    assert without_times(resumed.metrics) == without_times(finished.metrics)
    ours, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (resumed, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- samples ------------------------------------------------------------------------------------------------
def samples(correct, text="") -> Samples:
    marks = np.array(correct, float)
    tasks = tuple(make_tasks(len(marks), seed=1))
    answers = tuple(
        tuple(Completion(f"{text}{i}.{j}", 1, True, 0) for j in range(len(row))) for i, row in enumerate(marks)
    )
    return Samples(tasks, answers, marks, np.zeros(marks.shape), np.ones(marks.shape))


def test_pass_at_k_equals_all_choices_of_k():
    for right in range(6):
        marks = [1] * right + [0] * (5 - right)
        for k in range(1, 6):
            expected = np.mean([any(choice) for choice in combinations(marks, k)])
            assert np.allclose(samples([marks]).pass_at(k), expected)
    with pytest.raises(ValueError, match="pass at 3 was asked for, but every problem was answered 2 times"):
        samples([[1, 0]]).pass_at(3)


def test_rejection_keeps_the_right_answers_only():
    sampled = samples([[1, 0], [0, 0], [1, 1]])
    kept = [(user["content"], assistant["content"]) for user, assistant in rejection_chats(sampled)]
    first, _, third = (task.prompt for task in sampled.tasks)
    assert kept == [(first, "0.0"), (third, "2.0"), (third, "2.1")]


def test_sampled_answers_are_checked_one_by_one(nano):
    sampled = sample_answers(nano, TASKS, samples=3, temperature=2.0, max_new_tokens=16, seed=2)
    assert sampled.correct.shape == sampled.thinks.shape == sampled.tokens.shape == (6, 3)
    for task, answers, marks in zip(sampled.tasks, sampled.answers, sampled.correct, strict=True):
        assert [float(check_answer(task, answer.text)) for answer in answers] == list(marks)
    assert sampled.thinks.sum() == 0  # nano answers at once, unless it is told to think
    assert len({answer.text for answers in sampled.answers for answer in answers}) > 6


# --- figures and tables -------------------------------------------------------------------------------------
def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def lines(steps: int, reward) -> list[dict]:
    """Two prompts a step, the second sampled three times as often as the first."""
    texts = {"p": "<think>a</think>", "q": "a"}
    return [
        {"step": step, "prompt": prompt, "completion": texts[prompt], "tokens": step, "right": reward(step)}
        for step in range(1, steps + 1)
        for prompt in "pqqq"
    ]


def test_rewards_are_means_over_prompts_and_steps_without_what_was_passed_over():
    figure = plot_rewards({"GRPO": lines(10, lambda s: s / 10)}, reward="right", window=5)
    reward, thoughts, tokens = figure.axes
    assert np.allclose(curve(reward, "GRPO"), ([3, 8], [0.3, 0.8]))
    assert np.allclose(curve(thoughts, "GRPO"), ([3, 8], [0.5, 0.5]))  # by prompt, not by completion
    assert np.allclose(curve(tokens, "GRPO"), ([3, 8], [3, 8]))
    given = lines(7, lambda s: s / 10)  # the last window is short
    given += [{"step": 7, "prompt": "r", "completion": "a", "tokens": 1000, "right": None}]
    reward, _, tokens = plot_rewards({"GRPO": given}, reward="right", window=5).axes
    assert np.allclose(curve(reward, "GRPO"), ([3, 6.5], [0.3, 0.65]))
    assert np.allclose(curve(tokens, "GRPO"), ([3, 6.5], [3, 6.5]))
    flat = plot_rewards({"GRPO": lines(5, lambda s: 0)}, reward="right").axes[0]
    assert flat.lines[0].get_label() == "GRPO (always 0: nothing to learn)"


def test_pass_at_k_rises_and_the_share_that_thinks_is_a_bar():
    marks = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    thoughts = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    left, right = plot_pass({"before": [replace(samples(marks), thinks=thoughts)]}).axes
    assert np.allclose(curve(left, "before"), ([1, 2, 3, 4], [0.625, 0.75, 0.875, 1.0]))
    assert right.patches[0].get_width() == 0.375


def test_explorer_shows_each_arm_s_answers_to_the_problem_picked():
    arms = {"before": samples([[1, 0]] * 3, "old <b>"), "after": samples([[1, 0]] * 3, "new ")}
    explorer = sample_explorer(arms)
    assert "✓ old &lt;b&gt;0.0" in explorer.text.value
    explorer.controls["problem"].value = 2
    for shown in ("✓ old &lt;b&gt;2.0", "✓ new 2.0", "✗ new 2.1", "after: 50% here", arms["after"].tasks[2].answer):
        assert shown in explorer.text.value
    with pytest.raises(ValueError, match="after answered other problems than before"):
        sample_explorer(arms | {"after": samples([[1, 0]] * 2)})


def test_table_shows_the_first_completions_of_each_step_and_no_markup_of_a_model():
    html = completions_table(lines(3, lambda s: s), steps=[1, 3], rewards=["right"], rows=2).data
    assert html.count("<tr>") == 5
    assert "&lt;think&gt;a&lt;/think&gt;" in html
    with pytest.raises(ValueError, match="no completions of step 9; there are those of 1 to 3"):
        completions_table(lines(3, lambda s: s), steps=[9], rewards=["right"])
