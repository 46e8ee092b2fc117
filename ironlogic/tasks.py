"""Small problems with a checkable answer, of two sorts, and how well any reader can do when scrambled.

*Order-free*: the bag of words fixes the answer (`What is the sum of 3 and 4?`); a scramble destroys nothing
that matters. *Order-bound*: only the word order tells the roles (`Ann is taller than Bob`), so a scramble
destroys information, and no reader can beat the Bayes ceiling computed here. `hard` problems deserve
reasoning, the others a direct answer. Knows no model and no tokenizer.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ironlogic.world import KINDS

__all__ = [
    "KINDS",
    "Task",
    "bayes_ceiling",
    "check_answer",
    "final_answer",
    "make_tasks",
    "task_chat",
]


@dataclass(frozen=True)
class Task:
    """One problem. `rearrangements` holds every (prompt, answer) the world makes from the same bag of words,
    the problem itself included; order-free problems have one answer among them."""

    kind: str
    order: Literal["free", "bound"]
    hard: bool
    prompt: str
    answer: str
    reasoning: str
    rearrangements: tuple[tuple[str, str], ...]


def _held_out(prompt: str) -> bool:
    """One bag of words in eight is for testing; by bag, so no rearrangement of one is trained on."""
    bag = " ".join(sorted(prompt.split()))
    return hashlib.blake2b(bag.encode(), digest_size=2).digest()[0] % 8 == 0


def make_task(kind: str, rng: random.Random, split: Literal["train", "test"] = "train") -> Task:
    """One random problem of that kind from that split."""
    order, hard, draft = KINDS[kind]
    while True:
        prompt, answer, reasoning, candidates = draft(rng)
        if _held_out(prompt) == (split == "test"):
            break
    bag = sorted(prompt.split())
    same_bag = dict.fromkeys(pair for pair in candidates if sorted(pair[0].split()) == bag)
    return Task(kind, order, hard, prompt, answer, reasoning, tuple(same_bag))


def make_tasks(
    n: int,
    *,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    kinds: Sequence[str] | None = None,
) -> list[Task]:
    """`n` problems, the kinds in equal shares, in random order; prompts repeat only when a kind runs out.

    The two splits share no bag of words.

    >>> task = make_tasks(1, seed=1, split="test", kinds=["compare"])[0]
    >>> task.order, len(task.rearrangements)
    ('bound', 2)
    """
    unknown = set(kinds or ()) - set(KINDS)
    if unknown:
        raise ValueError(f"make_tasks: unknown kind {sorted(unknown)}; expected some of {', '.join(KINDS)}")
    rng, names = random.Random(f"{split}-{seed}"), list(kinds or KINDS)
    tasks: list[Task] = []
    seen: set[str] = set()
    for i in range(n):
        for _ in range(30):
            task = make_task(names[i % len(names)], rng, split)
            if task.prompt not in seen:
                break
        seen.add(task.prompt)
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks


def task_chat(task: Task, *, think: bool | None = None) -> list[dict[str, str]]:
    """The problem as a conversation: reasoning inside <think> if `think` (default: on hard problems)."""
    think = task.hard if think is None else think
    reply = f"Answer: {task.answer}"
    if think:
        reply = f"<think>\nSo {task.reasoning}\n</think>\n{reply}"
    return [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": reply}]


def final_answer(text: str) -> str:
    """What a reply answers: the text after the last `</think>` and the last `Answer:`, stripped."""
    return text.rsplit("</think>", 1)[-1].rsplit("Answer:", 1)[-1].strip()


def check_answer(expected: str | Task, reply: str) -> bool:
    """Exact match of the final answer; blanks at the ends do not count.

    >>> check_answer("7", "<think>3 + 4 = 7</think> Answer: 7")
    True
    """
    return final_answer(reply) == (expected.answer if isinstance(expected, Task) else expected)


def _ways(before: list[str], after: list[str], chosen: int) -> int:
    """In how many ways choosing `chosen` positions and permuting their words turns `before` into `after`.

    Positions that differ must be chosen. Of the positions that agree, any may join; where words repeat, equal
    words can change places unseen. The polynomial in x counts positions chosen, word by word: a word that
    stands `moved` times where the texts differ and `kept` times where they agree contributes
    sum_j C(kept, j) (moved + j)! x^(moved + j).
    """
    if Counter(before) != Counter(after):
        return 0
    moved = Counter(a for a, b in zip(before, after, strict=True) if a != b)
    kept = Counter(a for a, b in zip(before, after, strict=True) if a == b)
    polynomial = [1] + [0] * chosen
    for word in moved.keys() | kept.keys():
        product = [0] * (chosen + 1)
        for j in range(kept[word] + 1):
            size, ways = moved[word] + j, math.comb(kept[word], j) * math.factorial(moved[word] + j)
            for i, count in enumerate(polynomial[: max(0, chosen + 1 - size)]):
                product[i + size] += count * ways
        polynomial = product
    return polynomial[chosen]


def bayes_ceiling(task: Task, scrambled: str, ratio: float) -> float:
    """The chance that an ideal reader answers right, given the scrambled prompt.

    The reader knows the kind, the wording and the ratio, and weighs all problems with this bag of words by
    the number of ways in which `burden.apply_burden(unit="word")` could have turned them into `scrambled`. No
    reader, human or model, does better on average. 1.0 for order-free problems.

    >>> task = make_tasks(1, seed=1, split="test", kinds=["compare"])[0]
    >>> bayes_ceiling(task, task.prompt, 0.0)
    1.0
    """
    words = scrambled.split()
    chosen = math.floor(ratio * len(words) + 0.5 + 1e-9)
    weight: Counter[str] = Counter()
    for prompt, answer in task.rearrangements:
        weight[answer] += _ways(prompt.split(), words, chosen)
    total = sum(weight.values())
    if not total:
        raise ValueError(f"bayes_ceiling: {scrambled!r} is no scramble of {task.prompt!r} at ratio {ratio}")
    return max(weight.values()) / total
