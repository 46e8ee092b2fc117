"""Problems: what order-free and order-bound mean, the splits, and the Bayes ceiling against brute force."""

import random
from collections import defaultdict
from itertools import combinations, permutations

from ironlogic.burden import apply_burden
from ironlogic.data.problems import (
    KINDS,
    _ways,
    accuracy_reward,
    answer_mark,
    bayes_ceiling,
    careless_chats,
    check_answer,
    final_answer,
    format_reward,
    make_tasks,
    task_chat,
    thinks,
)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

SPLITS = ("train", "validation", "test")


def bag(prompt: str) -> tuple[str, ...]:
    return tuple(sorted(prompt.split()))


@pytest.fixture(scope="module")
def many():
    return [task for split in SPLITS for task in make_tasks(len(KINDS) * 100, seed=1, split=split)]


def test_bag_of_words_fixes_order_free_answers(many):
    answers = defaultdict(set)
    for task in many:
        answers[bag(task.prompt)].add(task.answer)
    for task in many:
        if task.order == "free":
            assert len(answers[bag(task.prompt)]) == 1, task


def test_order_bound_answers_hang_on_the_order(many):
    for task in many:
        same_bag = {bag(prompt) for prompt, _ in task.rearrangements}
        assert same_bag == {bag(task.prompt)}
        assert (task.prompt, task.answer) in task.rearrangements
        assert (len({answer for _, answer in task.rearrangements}) > 1) == (task.order == "bound"), task


def test_arguments_of_order_bound_problems_carry_no_punctuation(many):
    # "than Bob." would tell Bob's role even in a full scramble
    for task in many:
        words = task.prompt.split()
        for prompt, _ in task.rearrangements:
            swapped = [w for w, v in zip(words, prompt.split(), strict=True) if w != v]
            assert not [w for w in swapped if w[-1] in ".?,:"], task


def test_splits_share_no_bag_of_words(many):
    third = len(many) // 3
    bags = [{bag(task.prompt) for task in many[i * third : (i + 1) * third]} for i in range(3)]
    assert not bags[0] & bags[1] | bags[0] & bags[2] | bags[1] & bags[2]


def test_same_seed_same_tasks():
    assert make_tasks(40, seed=5) == make_tasks(40, seed=5) != make_tasks(40, seed=6)


def test_unknown_kind_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown kind \['chess'\].*compare"):
        make_tasks(1, kinds=["chess"])


def test_reasoning_ends_in_the_answer_and_chat_checks_right(many):
    for task in many:
        for think in (True, False):
            user, assistant = task_chat(task, think=think)
            assert user == {"role": "user", "content": task.prompt}
            assert check_answer(task, assistant["content"])
            assert ("<think>" in assistant["content"]) == think


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Answer: 7", "7"),
        ("<think>\nAnswer: 9\n</think>\nAnswer: 7 \n", "7"),
        ("7", "7"),
        ("<think>Answer: 7", ""),  # cut in its thought
        ("Answer: 7\n\nI hope this answer is helpful!", "7\n\nI hope this answer is helpful!"),
        (r"\boxed{6}? No. Answer: 7", "7"),
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("The answer is 7. Ask me more!", "7"),
        ("", ""),
        ("**Answer:** 7", "7"),
        ("The final answer is 7", "7"),
        ("The answer is: 7", "7"),
        (r"So we get $\boxed{7}$ in all.", "7"),
        ("[THINK]Answer: 9[/THINK]Answer: 7", "7"),
    ],
)
def test_final_answer(reply, answer):
    assert final_answer(reply) == answer


@pytest.mark.parametrize(
    "reply", ["7.", "**7**", r"\boxed{7}", "The answer is 7.", "Answer: 7\n\nBye!", "$7$", "7.0", r"Answer: \(7\)"]
)
def test_answers_are_graded_as_people_write_them(reply):
    assert check_answer("7", reply)
    assert not check_answer("17", reply)
    assert not check_answer("8", reply)


def test_words_and_large_numbers_are_graded_alike():
    assert check_answer("Ann", "Answer: *ann*.")
    assert check_answer("1200", "Answer: 1,200")
    assert not check_answer("12", "Answer: 1,2")
    assert not check_answer("7", "Answer: 7 or 8")
    assert not check_answer("3.5", "3")
    assert answer_mark("so \\boxed{7}")
    assert answer_mark("<think>x</think>The answer is 7")
    assert not answer_mark("<think>Answer: 7</think>it is seven")


def brute_force(before: list[str], after: list[str], chosen: int) -> int:
    ways = 0
    for positions in combinations(range(len(before)), chosen):
        for order in permutations(positions):
            words = list(before)
            for target, source in zip(positions, order, strict=True):
                words[target] = before[source]
            ways += words == after
    return ways


@given(st.lists(st.sampled_from("aabbcd"), min_size=1, max_size=6), st.randoms(use_true_random=False), st.data())
def test_ways_equals_brute_force(before, rng, data):
    after = list(before)
    rng.shuffle(after)
    chosen = data.draw(st.integers(0, len(before)))
    assert _ways(before, after, chosen) == brute_force(before, after, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.7, 1.0])
def test_ceiling_is_what_an_ideal_reader_reaches(ratio):
    """The mean ceiling equals the accuracy of guessing the likeliest answer, over many real scrambles."""
    tasks = [t for t in make_tasks(1700, seed=2, split="test") if t.order == "bound"]
    ceilings, right, rng = [], [], random.Random(0)
    for i, task in enumerate(tasks):
        scrambled = apply_burden(task.prompt, ratio=ratio, seed=9, key=(i,))
        ceilings.append(bayes_ceiling(task, scrambled, ratio))
        # the reader's posterior; ties are broken at random, not by the order of the list
        weight = defaultdict(int)
        k = int(ratio * len(task.prompt.split()) + 0.5 + 1e-9)
        for prompt, answer in task.rearrangements:
            weight[answer] += _ways(prompt.split(), scrambled.split(), k)
        names = sorted(weight)
        rng.shuffle(names)
        best = max(names, key=weight.get)
        right.append(best == task.answer)
    spread = np.std(np.array(right, float) - ceilings) / len(tasks) ** 0.5
    assert abs(np.mean(right) - np.mean(ceilings)) < 4 * spread


def test_ceiling_refuses_what_is_no_scramble():
    task = make_tasks(1, seed=1, kinds=["compare"])[0]
    with pytest.raises(ValueError, match="is no scramble of"):
        bayes_ceiling(task, "something else", 0.7)


def test_ceiling_of_order_free_problems_is_one():
    for i, task in enumerate(make_tasks(50, seed=3, kinds=[k for k, v in KINDS.items() if v[0] == "free"])):
        assert bayes_ceiling(task, apply_burden(task.prompt, ratio=0.7, key=(i,)), 0.7) == 1.0


# --- rewards ----------------------------------------------------------------------------------------------
FORMATS = [  # reply, ours, TRL's own
    ("<think>3 + 4 = 7</think>Answer: 7", 1.0, 1.0),
    ("<think>\n3 + 4 = 7\n</think>\nAnswer: 7", 1.0, 1.0),
    ("Answer: 7", 0.0, 0.0),
    ("", 0.0, 0.0),
    ("<think>3 + 4 = 7</think>", 0.0, 1.0),  # no answer
    ("<think>3 + 4 = 7</think> \n", 0.0, 1.0),
    ("<think>3 + 4 = 7</think>Answer: ", 0.0, 1.0),
    ("<think></think>Answer: 7", 0.0, 1.0),  # no thought
    ("<think> \n</think>Answer: 7", 0.0, 1.0),
    ("<think></think></think></think>", 0.0, 1.0),  # what a collapsed run writes
    ("<think>a</think>Answer: 7</think>", 0.0, 1.0),
    ("<think>a</think><think>b</think>Answer: 7", 0.0, 0.0),
    ("<think><think>a</think>Answer: 7", 0.0, 0.0),
    ("Answer: 7<think>a</think>Answer: 7", 0.0, 0.0),
    ("</think><think>a</think>Answer: 7", 0.0, 0.0),
    ("<think>a Answer: 7", 0.0, 0.0),  # never closed
    ("<THINK>a</THINK>Answer: 7", 0.0, 0.0),
]


@pytest.mark.parametrize(("reply", "ours", "_"), FORMATS)
def test_format_reward_pays_for_one_whole_pair_and_an_answer(reply, ours, _):
    assert format_reward([reply]) == format_reward([[{"role": "assistant", "content": reply}]]) == [ours]


@pytest.mark.slow
def test_trl_pays_for_what_ours_refuses():
    """The table of notebook 06; when TRL mends its reward, this fails and the prose has to follow."""
    from trl.rewards import think_format_reward

    assert [think_format_reward([[{"content": reply}]])[0] for reply, _, _ in FORMATS] == [t for _, _, t in FORMATS]


def test_accuracy_reward_is_exact_and_takes_text_or_messages():
    replies = [
        "Answer: 7",
        "<think>Answer: 9</think>Answer: 7 ",
        "7",
        "Answer: 17",
        "Answer: 7 or 8",
        "",
        "Answer: 7.0",
    ]
    expected = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert accuracy_reward(replies, answer=["7"] * 7) == expected
    messages = [[{"role": "assistant", "content": reply}] for reply in replies]
    assert accuracy_reward(messages, answer=["7"] * 7, kind=["add"] * 7) == expected


def test_rewards_never_run_the_text(tmp_path):
    bait = tmp_path / "bait"
    code = f"<think>x</think>Answer: __import__('pathlib').Path({str(bait)!r}).touch()"
    assert accuracy_reward([code], answer=["7"]) == [0.0]
    assert format_reward([code]) == [1.0]
    assert not bait.exists()


def test_a_reward_per_completion_or_an_error():
    with pytest.raises(ValueError, match="zip"):
        accuracy_reward(["Answer: 7"], answer=["7", "8"])


@pytest.mark.parametrize(
    ("reply", "thought"),
    [
        ("<think>\nSo 7.\n</think>\nAnswer: 7", True),
        ("<think>cut at the lim", True),
        ("Answer: 7", False),
        ("<think>\n\n</think>\nAnswer: 7", False),
        ("<think></think></think>", False),
        ("So 3 + 4.</think>Answer: 7", True),  # the template opened it
        ("</think>Answer: 7", False),
        ("<thought>hm</thought>7", True),
        ("[THINK]hm[/THINK]7", True),
        ("Write <think> and then </think>.", False),
        ("", False),
    ],
)
def test_a_thought_has_words_in_it(reply, thought):
    assert thinks(reply) is thought


def test_careless_chats_are_wrong_where_they_should_be():
    tasks = make_tasks(2000, seed=4, kinds=["parent", "give"])
    chats = careless_chats(tasks, think_pays=["parent"], careless=0.6, think=0.3, seed=1)
    right = defaultdict(list)
    for task, (user, assistant) in zip(tasks, chats, strict=True):
        assert user["content"] == task.prompt
        assert final_answer(assistant["content"]) in {answer for _, answer in task.rearrangements}
        right[task.kind, "<think>" in assistant["content"]].append(check_answer(task, assistant["content"]))
    assert np.mean(right["parent", True]) == np.mean(right["give", False]) == 1
    assert abs(np.mean(right["parent", False]) - 0.4) < 4 * (0.24 / len(right["parent", False])) ** 0.5
    assert abs(np.mean(right["give", True]) - 0.4) < 4 * (0.24 / len(right["give", True])) ** 0.5
    share = sum(len(marks) for (_, thinks), marks in right.items() if thinks) / 2000
    assert abs(share - 0.3) < 4 * (0.21 / 2000) ** 0.5
    assert careless_chats(tasks, think_pays=["parent"], careless=0.6, think=0.3, seed=1) == chats
    marked = careless_chats(tasks, think_pays=["parent"], careless=0.6, think=0.3, empty=0.5, seed=1)
    pairs = [(old[1]["content"], new[1]["content"]) for old, new in zip(chats, marked, strict=True)]
    changed = [(old, new) for old, new in pairs if old != new]
    assert all(new == f"<think>\n\n</think>\n{old}" and not thinks(new) for old, new in changed)
    assert abs(len(changed) / (2000 * (1 - share)) - 0.5) < 4 * (0.25 / 1400) ** 0.5
    with pytest.raises(ValueError, match="'color' has no rearrangement"):
        careless_chats(make_tasks(1, kinds=["color"]), think_pays=["color"])
