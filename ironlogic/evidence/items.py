"""What an evaluation asks: questions with reference replies, and ways to damage a question.

Made problems of nano's world, a user's own items with checkable answers (JSONL), or plain conversations without.
Pure text: knows no model. Draws are a pure function of (seed, item).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironlogic.burden import apply_burden
from ironlogic.data.chats import ChatError, Rejected, RejectedRows
from ironlogic.data.problems import Split, Task, make_tasks, normal_answer, task_chat
from ironlogic.evidence.statistics import FEWEST_KINDS

import numpy as np

__all__ = [
    "ANSWER_FORM",
    "RATIOS",
    "WORST",
    "Items",
    "delete_words",
    "items_of_chats",
    "load_items",
    "made_items",
    "scramble",
    "shuffle_answers",
    "substitute_words",
]

RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
ANSWER_FORM = "End your reply with `Answer: ` and the answer alone."
WORST = 0.7  # where one ratio has to do: the seeds'


def scramble(text: str, ratio: float, *, seed: int, item: int) -> str:
    """The test scramble of one prompt; its key is apart from the keys that training uses."""
    return apply_burden(text, ratio=ratio, seed=seed, key=("test", item))


def substitute_words(text: str, ratio: float, words: Sequence[str], *, seed: int, item: int) -> str:
    """As many words as a scramble moves, each replaced by one drawn from `words`: the floor without their content.

    (Cao et al. 2023, Scrambled Bench, measure against such a floor.)
    """
    rng, spoken = random.Random(f"substitute-{seed}-{item}"), text.split()
    for place in rng.sample(range(len(spoken)), round(ratio * len(spoken))):
        spoken[place] = rng.choice(words)
    return " ".join(spoken)


def delete_words(messages: Sequence[dict[str, Any]], ratio: float, *, seed: int, row: int) -> list[dict[str, Any]]:
    """The conversation with that share of the words of each user turn left out: noise that keeps the order."""
    rng, kept = random.Random(f"delete-{seed}-{row}"), []
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            words = message["content"].split()
            chosen = sorted(rng.sample(range(len(words)), len(words) - int(ratio * len(words))))
            message = message | {"content": " ".join(words[i] for i in chosen)}
        kept.append(dict(message))
    return kept


def shuffle_answers(chats: Sequence[Sequence[dict[str, Any]]], *, seed: int) -> list[list[dict[str, Any]]]:
    """The conversations, each with the last turn of another one: form and vocabulary stay, the truth goes."""
    ring = random.Random(f"answers-{seed}").sample(range(len(chats)), len(chats))
    last = {row: chats[other][-1] for row, other in zip(ring, [*ring[1:], ring[0]], strict=True)}
    return [[*chat[:-1], last[row]] for row, chat in enumerate(chats)]


# --- what is asked ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Items:
    """Questions with their reference conversations. `checkable`: an answer is right or wrong by exact match."""

    tasks: tuple[Task, ...]  # order "free", "bound" or "unknown"; hard True, False or None where nobody said
    chats: tuple[list[dict[str, Any]], ...]  # question and reference reply
    checkable: bool = True
    system: str = ""  # said before every question
    form: str = ""  # said after every question: how to write the answer
    ratios: tuple[float, ...] = RATIOS  # of the scrambles that are asked; 0, WORST and 1 among them
    shots: tuple[dict[str, Any], ...] = ()  # solved examples, as turns, before every question

    def __len__(self) -> int:
        return len(self.tasks)

    def among(self, which: str) -> np.ndarray:
        """Which items are order-"free" or "bound", "hard" or "easy", or "all", as booleans of shape (item,)."""
        chosen = {
            "all": lambda t: True,
            "free": lambda t: t.order == "free",
            "bound": lambda t: t.order == "bound",
            "hard": lambda t: t.hard is True,
            "easy": lambda t: t.hard is False,
        }[which]
        return np.array([chosen(task) for task in self.tasks], dtype=bool)

    def kinds(self, among: np.ndarray) -> np.ndarray | None:
        """The kinds of those items; None where they are too few for an interval over kinds."""
        kinds = np.array([task.kind for task in self.tasks])[among]
        return kinds if len(set(kinds)) >= FEWEST_KINDS else None

    def ask(self, question: str) -> list[dict[str, str]]:
        """The messages that put a question, scrambled or not: all that stands round it stays whole."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": f"{question}\n\n{self.form}" if self.form else question}
        return [*system, *self.shots, user]


def made_items(n: int, *, seed: int, split: Split = "test", world: str = "problems") -> Items:
    """Problems that no training sees; those of "validation" are for choosing a learning rate. As `make_tasks`."""
    tasks = tuple(make_tasks(n, seed=seed, split=split, world=world))
    return Items(tasks, tuple(task_chat(task)[-2:] for task in tasks), system=tasks[0].system)


def items_of_chats(chats: Sequence[Sequence[dict[str, Any]]]) -> Items:
    """Conversations without checkable answers: the first question of each, and the reply to it."""
    kept = []
    for messages in chats:
        turns = [m for m in messages if m["role"] in ("user", "assistant")][:2]
        if [m["role"] for m in turns] == ["user", "assistant"] and all(
            isinstance(m["content"], str) for m in turns
        ):
            kept.append([{"role": m["role"], "content": m["content"]} for m in turns])
    if not kept:
        raise ChatError(f"{len(chats)} conversations, none begins with a question and a reply in text")
    tasks = tuple(Task("chat", "unknown", None, chat[0]["content"], "", "", ()) for chat in kept)
    return Items(tasks, tuple(kept), checkable=False)


def load_items(path: str | Path, *, system: str = "", form: str = "") -> tuple[Items, RejectedRows]:
    """Your own items with checkable answers: JSONL rows {"prompt", "answer"} and, if you know, more about each.

    `order` is "free" (the bag of words fixes the answer) or "bound" (the word order decides), `hard` true where
    reasoning is due, `kind` what sort of task it is (with five kinds, intervals are over kinds); `reply` may hold a
    whole reference reply. `system` is said before every question, `form` after it (`ANSWER_FORM`, say). Answers are
    graded by `check_answer`. A bad row, or a prompt that stood before, is reported and left out. Raises `ChatError`
    when none is left.
    """
    tasks, chats, rejected, first_line = [], [], [], {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"{path}: can't be read ({error}); expected a text file, one JSON object a line") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            rejected.append(Rejected(str(path), number, "row", "", f"is no JSON ({error})"))
            continue
        if fault := _item_fault(row):
            rejected.append(Rejected(str(path), number, *fault))
            continue
        before = first_line.setdefault(row["prompt"].strip(), number)
        if before != number:
            rejected.append(
                Rejected(str(path), number, "prompt", row["prompt"][:60], f"stands in line {before} too")
            )
            continue
        answer = normal_answer(row["answer"])
        reply = row.get("reply") or f"Answer: {answer}"
        order, kind = row.get("order") or "unknown", row.get("kind") or "item"
        tasks.append(Task(kind, order, row.get("hard"), row["prompt"], answer, "", ()))
        chats.append([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": reply}])
    if not tasks:
        raise ChatError(f"{path}: no usable item. {RejectedRows(rejected)}")
    return Items(tuple(tasks), tuple(chats), system=system, form=form), RejectedRows(rejected)


def _is_whole(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def _item_fault(row: Any) -> tuple[str, str, str] | None:
    """(field, value, reason) of what is wrong with a row, None if nothing is."""
    if not isinstance(row, dict):
        return "row", repr(row)[:60], "expected an object with prompt and answer"
    for field, types in (("prompt", str), ("answer", str | int | float)):
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, types) or not str(value).strip():
            return field, repr(value)[:60], "expected text"
        if not _is_whole(str(value)):
            return field, ascii(value)[:60], "holds half a character (a lone surrogate)"
    if row.get("order") not in (None, "free", "bound", "unknown"):
        return "order", repr(row["order"])[:60], "expected one of free, bound, unknown, or nothing"
    if row.get("hard") is not None and not isinstance(row["hard"], bool):
        return "hard", repr(row["hard"])[:60], "expected true or false, or nothing"
    for field in ("reply", "kind"):
        if not isinstance(row.get(field) or "", str) or not _is_whole(row.get(field) or ""):
            return field, ascii(row[field])[:60], "expected text, or nothing"
    return None
