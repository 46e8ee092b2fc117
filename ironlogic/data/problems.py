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
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ironlogic.data.world import KINDS

__all__ = [
    "KINDS",
    "Task",
    "accuracy_reward",
    "bayes_ceiling",
    "careless_chats",
    "check_answer",
    "final_answer",
    "format_reward",
    "make_tasks",
    "task_chat",
    "thinks",
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


def careless_chats(
    tasks: Sequence[Task],
    *,
    think_pays: Collection[str],
    careless: float = 0.6,
    think: float = 0.5,
    empty: float = 0.0,
    seed: int = 0,
) -> list[list[dict[str, str]]]:
    """Conversations of which the truth about thinking is known: a start for reinforcement learning.

    A share `think` of the replies reasons first; of the others, a share `empty` opens and closes a thought without
    a word in it, as Qwen3 does when it is told not to think. In the kinds of `think_pays` the replies *without*
    reasoning end in a wrong answer with probability `careless`; in all other kinds, those *with* it do. The wrong
    answer is one that another order of the same words would have, so order-bound problems are expected.
    """
    rng, chats = random.Random(f"careless-{seed}"), []
    for task in tasks:
        wrong = sorted({answer for _, answer in task.rearrangements} - {task.answer})
        if not wrong:
            raise ValueError(f"careless_chats: {task.kind!r} is order-free; no rearrangement has a wrong answer")
        reasons, slips, marked = rng.random() < think, rng.random() < careless, rng.random() < empty
        careful = reasons == (task.kind in think_pays)
        told = task if careful or not slips else replace(task, answer=rng.choice(wrong))
        chats.append(task_chat(told, think=reasons))
        if marked and not reasons:
            chats[-1][-1]["content"] = f"<think>\n\n</think>\n{chats[-1][-1]['content']}"
    return chats


def thinks(reply: str) -> bool:
    """Whether a reply holds a thought. An empty pair of tags is none."""
    return bool(reply.partition("<think>")[2].partition("</think>")[0].strip())


def final_answer(text: str) -> str:
    """What a reply answers: the text after the last `</think>` and the last `Answer:`, stripped."""
    return text.rsplit("</think>", 1)[-1].rsplit("Answer:", 1)[-1].strip()


def check_answer(expected: str | Task, reply: str) -> bool:
    """Exact match of the final answer; blanks at the ends do not count.

    >>> check_answer("7", "<think>3 + 4 = 7</think> Answer: 7")
    True
    """
    return final_answer(reply) == (expected.answer if isinstance(expected, Task) else expected)


# --- rewards: trl.GRPOTrainer calls them with all completions of a step and every column of the rows ----------
def accuracy_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 for the exact final answer, else 0.0. Compares text; nothing a model wrote is ever run.

    `completions` are texts or, as TRL gives them, lists that hold one assistant message.
    """
    return [float(check_answer(a, _text(c))) for c, a in zip(completions, answer, strict=True)]


def format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for one non-empty `<think>` pair at the start and an answer after it, else 0.0.

    Stricter than TRL's `think_format_reward`, which also pays for `<think></think>` and for closing tags said
    again and again. It can't tell reasoning from filler: never use it without a reward for the answer.

    >>> format_reward(["<think>3 + 4 = 7</think>Answer: 7", "<think></think>Answer: 7", "Answer: 7"])
    [1.0, 0.0, 0.0]
    """
    return [float(_well_formed(_text(completion))) for completion in completions]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _well_formed(reply: str) -> bool:
    before, opened, rest = reply.partition("<think>")
    thought, closed, after = rest.partition("</think>")
    again = "<think>" in rest or "</think>" in after
    return bool(opened and closed and not before.strip() and thought.strip() and final_answer(after) and not again)


# --- the Bayes ceiling ------------------------------------------------------------------------------------
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
