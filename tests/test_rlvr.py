"""GRPO: rows and rewards refused or used, what is written down, resuming, and pass at k against brute force."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

from ironlogic.data.problems import accuracy_reward, check_answer, format_reward, make_tasks, thinks
from ironlogic.generate import Completion
from ironlogic.models import load_model
from ironlogic.presets import LoraSettings
from ironlogic.training.grpo import (
    GrpoSettings,
    Samples,
    _prepare,
    _training_order,
    read_completions,
    rejection_chats,
    sample_answers,
    train_grpo,
)
from ironlogic.training.runs import RunError, open_run

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SETTINGS = GrpoSettings(
    steps=4,
    generations=4,
    batch_size=8,
    accumulation=1,
    max_new_tokens=32,
    learning_rate=1e-3,
    save_steps=2,
    lora=LoraSettings(rank=4, alpha=8),
)
TASKS = make_tasks(6, seed=1, kinds=["minus", "parent"])
THINK = {"role": "system", "content": "Think first."}
ROWS = [{"prompt": [THINK, {"role": "user", "content": t.prompt}], "answer": t.answer} for t in TASKS]


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False, max_length=96)


# --- what is refused ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generations": 1}, "generations is 1; a group needs 2 or more"),
        ({"batch_size": 6}, r"is 6 \* 1 completions a step; it has to be a multiple of generations, 4"),
    ],
)
def test_settings_that_can_t_work(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"prompt": "What is 1 + 1?"}], r"row 6 has no answer; it has \['prompt'\]"),
        ([{"answer": "2", "question": "1 + 1?"}], r"row 0 has no prompt; it has \['answer', 'question'\]"),
        ([{"prompt": "", "answer": ""}], "row 0 has no prompt and no answer"),
        ([*ROWS, "What is 1 + 1?"], "row 6 is a str; expected a Task or a mapping with a prompt"),
        ([{"prompt": 7, "answer": "2"}], "row 0 has a prompt of type int; expected a text or a list of messages"),
        ([{"prompt": ["1 + 1?"], "answer": "2"}], "row 0 has a prompt of type list; expected a text or a list of"),
        ([], "none of 0 rows can be used"),
        ([{"prompt": "word " * 100, "answer": "2"}], "none of 1 rows can be used; a prompt may have 64 tokens"),
    ],
)
def test_rows_that_can_t_be_used_name_themselves(nano, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_grpo(nano, rows, SETTINGS, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("rewards", [[], ["accuracy"], [accuracy_reward, accuracy_reward]])
def test_rewards_need_names_of_their_own(nano, rewards, tmp_path):
    with pytest.raises(ValueError, match="expected functions, each with a name of its own"):
        train_grpo(nano, ROWS, SETTINGS, run=tmp_path / "r", rewards=rewards)


# --- rows ---------------------------------------------------------------------------------------------------
def test_rows_keep_their_columns_and_long_ones_are_counted(nano):
    rows = [{"prompt": "1 + 1?", "answer": 2, "source": "a"}, {"prompt": "word " * 100, "answer": "x"}]
    kept, left_out = _prepare(nano, rows, SETTINGS, needs_answer=True)
    assert kept == [{"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "source": "a"}]
    assert left_out == 1
    kept, _ = _prepare(nano, [{"prompt": "1 + 1?"}], SETTINGS, needs_answer=False)
    assert kept == [{"prompt": [{"role": "user", "content": "1 + 1?"}]}]


def test_every_pass_goes_through_all_prompts_in_an_order_of_its_own(nano):
    rows, _ = _prepare(nano, TASKS, SETTINGS, needs_answer=True)
    order = _training_order(rows, replace(SETTINGS, steps=9))
    asked = [row["prompt"][-1]["content"] for row in order]
    assert len(asked) == 9 * 2
    passes = [asked[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(once) == sorted(task.prompt for task in TASKS) for once in passes)
    assert passes[0] != passes[1]
    assert asked[:8] == [row["prompt"][-1]["content"] for row in _training_order(rows, SETTINGS)]


# --- samples ------------------------------------------------------------------------------------------------
def samples(correct) -> Samples:
    marks = np.array(correct, float)
    tasks = tuple(make_tasks(len(marks), seed=1))
    answers = tuple(
        tuple(Completion(f"{i}.{j}", 1, True, 0) for j in range(len(row))) for i, row in enumerate(marks)
    )
    return Samples(tasks, answers, marks, np.zeros(marks.shape), np.ones(marks.shape))


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_equals_all_choices_of_k(right, k):
    marks = [1] * right + [0] * (5 - right)
    expected = np.mean([any(choice) for choice in combinations(marks, k)])
    assert np.allclose(samples([marks]).pass_at(k), expected)


def test_pass_at_more_than_was_sampled_is_refused():
    with pytest.raises(ValueError, match="pass at 3 was asked for, but every problem was answered 2 times"):
        samples([[1, 0]]).pass_at(3)


def test_rejection_keeps_the_right_answers_only():
    found = samples([[1, 0], [0, 0], [1, 1]])
    kept = [(user["content"], assistant["content"]) for user, assistant in rejection_chats(found)]
    assert kept == [(found.tasks[0].prompt, "0.0"), (found.tasks[2].prompt, "2.0"), (found.tasks[2].prompt, "2.1")]


def test_sampled_answers_are_checked_one_by_one(nano):
    found = sample_answers(nano, TASKS, samples=3, max_new_tokens=16, seed=2)
    assert found.correct.shape == found.thinks.shape == found.tokens.shape == (6, 3)
    for task, answers, marks in zip(found.tasks, found.answers, found.correct, strict=True):
        assert [float(check_answer(task, answer.text)) for answer in answers] == list(marks)
    assert found.thinks.sum() == 0  # nano answers at once, unless it is told to think
    assert len({answer.text for answers in found.answers for answer in answers}) > 6


# --- training -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a"
    loaded = load_model("nano", max_length=96)  # in 4 bit: TRL then makes the adapter bfloat16
    return train_grpo(loaded, ROWS, SETTINGS, run=run, rewards=[accuracy_reward, format_reward])


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_gib")} for line in lines]


@pytest.mark.slow
def test_a_run_writes_down_what_was_rewarded(finished):
    lines = read_completions(finished)
    assert len(lines) == 4 * 8
    for line in lines:
        assert line["accuracy_reward"] == float(check_answer(line["answer"], line["completion"]))
        assert line["format_reward"] == format_reward([line["completion"]])[0]
        assert line["prompt"] in {task.prompt for task in TASKS}
        assert 0 < line["tokens"] <= 32
    # special tokens of nano: TRL alone drops them, and every format reward with them
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
    again = open_run(finished.folder).model()
    assert again.max_length == 96


@pytest.mark.slow
def test_the_same_run_is_not_trained_twice_and_another_is_refused(finished):
    seen, nano = [], load_model("nano", max_length=96)
    again = train_grpo(
        nano, ROWS, SETTINGS, run=finished.folder, rewards=[accuracy_reward, format_reward], watch=seen.append
    )
    assert again.loaded is None
    assert without_times(seen[0]) == without_times(finished.metrics)
    with pytest.raises(RunError, match="differs in settings"):
        train_grpo(nano, ROWS, SETTINGS, run=finished.folder)
    with pytest.raises(RunError, match="differs in rows, data_sha256"):
        train_grpo(nano, ROWS[1:], SETTINGS, run=finished.folder, rewards=[accuracy_reward, format_reward])


KILLED = """
import os, signal
from ironlogic.models import load_model
from tests.test_rlvr import ROWS, SETTINGS
from ironlogic.training.grpo import train_grpo
from ironlogic.data.problems import accuracy_reward, format_reward

def watch(lines):
    if lines[-1]["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

loaded = load_model("nano", max_length=96)
train_grpo(loaded, ROWS, SETTINGS, run={run!r}, rewards=[accuracy_reward, format_reward], watch=watch)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    run = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED.format(run=str(run))], capture_output=True, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not json.loads((run / "run.json").read_text())["finished"]
    assert {line["step"] for line in read_completions(run)} == {1, 2, 3}
    loaded = load_model("nano", max_length=96)
    resumed = train_grpo(loaded, ROWS, SETTINGS, run=run, rewards=[accuracy_reward, format_reward])
    assert read_completions(resumed) == read_completions(finished)
    assert without_times(resumed.metrics) == without_times(finished.metrics)
    ours, theirs = (load_file(r.adapter / "adapter_model.safetensors") for r in (resumed, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_what_is_paid_for_becomes_likelier(tmp_path):
    """On problems seen again and again; with advantages of the wrong sign, or none, it fails."""
    settings = replace(SETTINGS, steps=16, generations=8, batch_size=32, max_new_tokens=8, learning_rate=5e-3)
    loaded = load_model("nano", four_bit=False, max_length=96)
    run = train_grpo(loaded, make_tasks(4, seed=3, kinds=["minus", "add"]), settings, run=tmp_path / "r")
    paid = [metric["reward"] for metric in run.metrics]
    assert np.mean(paid[:3]) < 0.6
    assert np.mean(paid[-3:]) > np.mean(paid[:3]) + 0.25
