"""Problems of reasoning-gym (Apache-2.0): twenty kinds that a small language model can learn, ten of each sort.

The problem is the package's own sentence; instructions and examples around it go, as a scramble would mix them into
the question. *Order-free*: a reader of the sorted words can answer (`test_gym.py` does, kind by kind).
*Order-bound*: the same words in another order have another answer; punctuation stands alone there, or the word that
carries the full stop would give its place away. Imports reasoning-gym when it is first used.
"""

import importlib.util
import random
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ironlogic import IronLogicError

__all__ = ["KINDS", "SYSTEM", "GymError", "Kind", "Problem", "draw_problems"]

SYSTEM = "End your reply with `Answer: ` and the answer alone."
_ATTEMPTS = 400  # to find a problem that was not there before


class GymError(IronLogicError, ImportError):
    """reasoning-gym is not installed; the message says how to."""


def _question(entry: dict[str, Any]) -> str:
    """The sentence that states the problem, on one line."""
    text = re.sub(r"^.*\bNow, (\w)", lambda found: found[1].upper(), entry["question"], flags=re.DOTALL)
    text = re.sub(r"\s*\(example: [^)]*\)|\s*\(using ASCII/Unicode ordering\)", "", text)
    return " ".join(_INSTRUCTION.sub("", text).split())


_INSTRUCTION = re.compile(
    r"\s*(?:"
    r"Please follow the instruction below:.*"
    r"|Solve the following problem\.\s*Provide you answer as [^.]*\."
    r"|(?:Give only|Provide) the [^.]*\."
    r"|\(?(?:Please )?(?:Answer|Respond|Reply|Express the result) [^.?]*[.)]"
    r"| and return them as a comma-separated list"
    r")",
    re.DOTALL | re.IGNORECASE,
)


class Problem(NamedTuple):
    """One problem with its answer."""

    kind: str
    order: Literal["free", "bound"]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Kind:
    """One kind of problem: a dataset of reasoning-gym with its settings, its sort, and how its entries are read."""

    order: Literal["free", "bound"]
    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: Callable[[dict[str, Any]], str] = _question
    answer: Callable[[dict[str, Any]], str] = lambda entry: entry["answer"]
    keep: Callable[[str], bool] = lambda prompt: True  # which prompts are of that sort
    yes_or_no: bool = False  # as many of each


def _arithmetic(order: Literal["free", "bound"], sign: str, terms: int, digits: int) -> Kind:
    settings = {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": digits, "operators": [sign]}
    settings |= {"allow_negation": False, "allow_parentheses": False, "whitespace": "space"}
    return Kind(order, "basic_arithmetic", settings, keep=_no_two_alike)


def _no_two_alike(prompt: str) -> bool:
    """Whether all numbers of the problem differ: with two alike, another order may be the same problem."""
    numbers = re.findall(r"\d+", prompt)
    return len(numbers) == len(set(numbers))


def _fits_either_base(prompt: str) -> bool:
    """Whether the number could be one of the target base too: else its digits tell which base is the source."""
    number, target = re.search(r"number (\d+) to base-(\d)", prompt).groups()
    return max(number) < target


def _sorted_numbers(entry: dict[str, Any]) -> str:
    return ", ".join(number.removesuffix(".0") for number in entry["metadata"]["sorted_numbers"])


def _spiral(entry: dict[str, Any]) -> str:
    rows = " / ".join(" ".join(map(str, row)) for row in entry["metadata"]["matrix"])
    return f"What is the list of elements in spiral order of the matrix {rows} ?"


KINDS = {
    "sum": _arithmetic("free", "+", terms=2, digits=2),
    "sum_of_three": _arithmetic("free", "+", terms=3, digits=1),
    "common_multiple": Kind("free", "lcm", {"max_value": 20}),
    "sort_words": Kind("free", "word_sorting", {"min_words": 3, "max_words": 3}),
    "sort_numbers": Kind(
        "free",
        "number_sorting",
        {"min_numbers": 3, "max_numbers": 3, "min_value": 0, "max_value": 99, "min_decimals": 0, "max_decimals": 0},
        prompt=lambda entry: _question(entry).replace(".0", ""),
        answer=_sorted_numbers,
        keep=_no_two_alike,
    ),
    "spell_backward": Kind("free", "spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    "leap_year": Kind("free", "calendar_arithmetic", {"tasks": ["is_leap_year"]}, yes_or_no=True),
    "restore_order": Kind("free", "sentence_reordering", {"min_words_in_sentence": 3, "max_words_in_sentence": 4}),
    "time_between": Kind("free", "time_intervals", {"task_types": ["time"]}),  # the later time is always the end
    "simplify_fraction": Kind(
        "free",
        "fraction_simplification",
        {"min_value": 1, "max_value": 12, "min_factor": 2, "max_factor": 9, "styles": ["plain"]},
    ),
    "difference": _arithmetic("bound", "-", terms=2, digits=2),
    "sum_and_difference": Kind(
        "bound",
        "chain_sum",
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "allow_negation": False},
        keep=lambda prompt: _no_two_alike(prompt) and "-" in prompt,
    ),
    "reverse_words": Kind("bound", "word_sequence_reversal", {"min_words": 3, "max_words": 3}),
    "family": Kind("bound", "family_relationships", {"min_family_size": 4, "max_family_size": 4}),
    "syllogism": Kind("bound", "syllogism", yes_or_no=True),
    "who_does": Kind("bound", "needle_haystack", {"min_num_statements": 2, "max_num_statements": 3}),
    "legs": Kind(
        "bound", "leg_counting", {"min_animals": 2, "max_animals": 2, "max_instances": 9}, keep=_no_two_alike
    ),
    "siblings": Kind("bound", "aiw", {"task_type_weights": [1.0, 0.0, 0.0]}, keep=_no_two_alike),
    "spiral": Kind("bound", "spiral_matrix", {"min_n": 2, "max_n": 2}, prompt=_spiral, keep=_no_two_alike),
    "base": Kind(
        "bound",
        "base_conversion",
        {"min_base": 3, "max_base": 9, "min_value": 1, "max_value": 99},
        keep=_fits_either_base,
    ),
}


def draw_problems(
    n: int, *, seed: int | str, belongs: Callable[[str], bool], kinds: Sequence[str] | None = None
) -> list[Problem]:
    """`n` problems, the kinds in equal shares, in random order; only prompts that `belongs` takes.

    Prompts repeat only when a kind runs out. Raises `GymError` where reasoning-gym is not installed.
    """
    rng, names = random.Random(f"gym-{seed}"), list(kinds or KINDS)
    problems: list[Problem] = []
    for place, name in enumerate(names):
        wanted = len(range(place, n, len(names)))
        problems += _draw_kind(name, wanted, belongs, first=rng.getrandbits(31))
    rng.shuffle(problems)
    return problems


def _draw_kind(name: str, count: int, belongs: Callable[[str], bool], *, first: int) -> list[Problem]:
    """`first`: the seed of the first entry that is looked at; the next has the next one."""
    # its zebra puzzles alone use pycosat, which has to be compiled: a name is enough for the others
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        requirements = Path(__file__).parents[1] / "requirements-smollm2.txt"
        raise GymError(
            f"these problems need reasoning-gym ({error}). Run: {sys.executable} -m pip install --no-deps -r "
            f"{requirements}"
        ) from error

    kind, problems, seen, looked_at = KINDS[name], [], set(), 0
    entries = create_dataset(kind.dataset, seed=first, size=2**31 - 1, **kind.settings)
    while len(problems) < count:
        may_repeat = looked_at >= _ATTEMPTS * count
        entry = entries[looked_at]
        looked_at += 1
        prompt, answer = kind.prompt(entry), kind.answer(entry)
        if kind.order == "bound":
            prompt = re.sub(r"(?<=\S)([.,:?])(?=\s|$)", r" \1", prompt)
        expected = ("Yes", "No")[len(problems) % 2]
        if not belongs(prompt) or not kind.keep(prompt) or (kind.yes_or_no and answer != expected):
            continue
        if prompt not in seen or may_repeat:
            seen.add(prompt)
            problems.append(Problem(name, kind.order, prompt, answer))
    return problems
