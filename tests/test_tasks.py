"""Problems: what order-free and order-bound mean, the splits, and the Bayes ceiling against brute force."""

import random
from collections import defaultdict
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ironlogic.burden import apply_burden
from ironlogic.tasks import (
    _ways,
    bayes_ceiling,
    check_answer,
    final_answer,
    make_tasks,
    task_chat,
)
from ironlogic.world import KINDS


def bag(prompt: str) -> tuple[str, ...]:
    return tuple(sorted(prompt.split()))


@pytest.fixture(scope="module")
def many():
    return make_tasks(len(KINDS) * 150, seed=1) + make_tasks(len(KINDS) * 150, seed=1, split="test")


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
    half = len(many) // 2
    assert not {bag(t.prompt) for t in many[:half]} & {bag(t.prompt) for t in many[half:]}


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
        ("<think>Answer: 7", "7"),
        ("", ""),
    ],
)
def test_final_answer(reply, answer):
    assert final_answer(reply) == answer


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
