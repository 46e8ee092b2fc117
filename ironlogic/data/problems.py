"""Small problems with a checkable answer, of two sorts, and how well any reader can do when scrambled.

*Order-free*: the bag of words fixes the answer (`What is the sum of 3 and 4?`); a scramble destroys nothing
that matters. *Order-bound*: only the word order tells the roles (`Ann is taller than Bob`), so a scramble
destroys information, and no reader can beat the Bayes ceiling computed here. `hard` problems deserve
reasoning, the others a direct answer. Knows no model and no tokenizer.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from numbers import Real
from typing import Any, Literal

from ironlogic.data import gym

__all__ = [
    "ANIMALS",
    "COLOR",
    "GOODS",
    "GROUPS",
    "GROUP_OF",
    "KINDS",
    "NAMES",
    "OBJECTS",
    "OPPOSITE",
    "SUPERLATIVE",
    "WORLDS",
    "Task",
    "accuracy_reward",
    "answer_mark",
    "bayes_ceiling",
    "careless_chats",
    "check_answer",
    "final_answer",
    "format_reward",
    "make_tasks",
    "normal_answer",
    "task_chat",
    "thinks",
]

# --- nano's small world: words, facts, kinds of problems --------------------------------------------------------
NAMES = "Ann Bob Cid Dan Eva Fay Gus Hal Ida Jon Kim Leo Mia Ned Oda Pam Ron Sue Tom Una Vic Wes Zoe Max".split()
_ANIMALS = (  # name, sound, colour
    "fox yip red,cow moo brown,dog woof brown,cat meow black,duck quack white,frog ribbit green,"
    "pig oink pink,sheep baa white,owl hoot gray,lion roar yellow,bee buzz yellow,crow caw black,"
    "wolf howl gray,mouse squeak gray,horse neigh brown,snake hiss green"
)
_FRUITS = (
    "apple red,banana yellow,plum blue,lemon yellow,cherry red,lime green,pear green,grape purple,peach pink,"
    "fig purple,mango orange,melon green"
)
_TOOLS = (
    "hammer gray,saw gray,lamp white,cup white,chair brown,spoon gray,rope brown,brush black,drum red,"
    "bell yellow,wheel black,ladder brown"
)
ANIMALS = {name: (sound, colour) for name, sound, colour in map(str.split, _ANIMALS.split(","))}
FRUITS, TOOLS = dict(map(str.split, _FRUITS.split(","))), dict(map(str.split, _TOOLS.split(",")))
GROUPS = {"animals": list(ANIMALS), "fruits": list(FRUITS), "tools": list(TOOLS)}
GROUP_OF = {word: group for group, words in GROUPS.items() for word in words}
COLOR = {**{word: colour for word, (_, colour) in ANIMALS.items()}, **FRUITS, **TOOLS}
_PAIRS = (
    "hot cold,big small,fast slow,old young,wet dry,hard soft,light dark,high low,rich poor,early late,"
    "full empty,loud quiet,near far,open closed"
)
OPPOSITE = {a: b for pair in _PAIRS.split(",") for a, b in (pair.split(), pair.split()[::-1])}
GOODS = "apples pens coins books cards shells stamps eggs".split()
OBJECTS = "book lamp ball coin drum hat key map".split()
SUPERLATIVE = {"taller": "tallest", "older": "oldest", "faster": "fastest", "stronger": "strongest"}


Split = Literal["train", "validation", "test"]
WORLDS = ("problems", "reasoning-gym")  # where problems are made: nano's own, those of `data.gym`
_Draft = tuple[str, str, str, list[tuple[str, str]]]  # prompt, answer, reasoning, rearrangements


# --- order-free ----------------------------------------------------------------------------------------
def _free(prompt: str, answer: str, reasoning: str) -> _Draft:
    return prompt, answer, reasoning, [(prompt, answer)]


def _add(rng: random.Random) -> _Draft:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    (n, m), goods = rng.sample(NAMES, 2), rng.choice(GOODS)
    prompt = rng.choice(
        [
            f"Today {n} has {a} {goods} and {m} has {b} {goods}. How many {goods} do they have together?",
            f"How many {goods} are there if {n} finds {a} and {m} finds {b} {goods}?",
            f"What is the sum of {a} and {b} please?",
        ]
    )
    return _free(prompt, str(a + b), f"{a} + {b} = {a + b}.")


def _add_three(rng: random.Random) -> _Draft:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    goods = rng.choice(GOODS)
    prompt = rng.choice(
        [
            f"One box holds {a} {goods} and one box holds {b} {goods} and one box holds {c} {goods}. "
            f"How many {goods} are in all the boxes?",
            f"Add the numbers {a} and {b} and {c} and give me the total.",
        ]
    )
    return _free(prompt, str(a + b + c), f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}.")


def _extreme(rng: random.Random) -> _Draft:
    numbers = rng.sample(range(1, 60), rng.randint(3, 4))
    word, pick = rng.choice([("largest", max), ("smallest", min)])
    prompt = f"Which number is the {word} in this list: {' '.join(map(str, numbers))} please?"
    return _free(prompt, str(pick(numbers)), f"The {word} is {pick(numbers)}.")


def _sort(rng: random.Random) -> _Draft:
    numbers = rng.sample(range(1, 60), rng.randint(3, 4))
    up = [str(number) for number in sorted(numbers)]
    prompt = f"Sort the numbers {' '.join(map(str, numbers))} from small to large."
    return _free(prompt, " ".join(up), "Smallest first: " + ", then ".join(up) + ".")


def _odd_one_out(rng: random.Random) -> _Draft:
    group, other = rng.sample(list(GROUPS), 2)
    same, odd = rng.sample(GROUPS[group], 3), rng.choice(GROUPS[other])
    words = [*same, odd]
    rng.shuffle(words)
    prompt = f"Which word does not belong with the others: {' '.join(words)} please?"
    kept = ", ".join(word for word in words if word != odd)
    return _free(prompt, odd, f"{kept} are {group}. {odd} is one of the {other}.")


def _count(rng: random.Random) -> _Draft:
    group = rng.choice(list(GROUPS))
    k = rng.randint(1, 4)
    others = [word for name in GROUPS if name != group for word in GROUPS[name]]
    words = rng.sample(GROUPS[group], k) + rng.sample(others, rng.randint(max(k, 3), 5) - k)
    rng.shuffle(words)
    prompt = f"How many {group} are in this list: {' '.join(words)} please?"
    found = ", ".join(word for word in words if GROUP_OF[word] == group)
    return _free(prompt, str(k), f"{group}: {found}. That makes {k}.")


def _color(rng: random.Random) -> _Draft:
    word = rng.choice(list(COLOR))
    prompt = rng.choice(
        [
            f"What is the color of the {word} please?",
            f"Tell me which color the {word} has.",
            f"Please name the color of a {word} for me.",
        ]
    )
    return _free(prompt, COLOR[word], f"The {word} is {COLOR[word]}.")


def _sound(rng: random.Random) -> _Draft:
    word = rng.choice(list(ANIMALS))
    prompt = rng.choice(
        [
            f"What sound does the {word} make now?",
            f"Tell me which sound a {word} makes.",
            f"Please name the sound of the {word} for me.",
        ]
    )
    return _free(prompt, ANIMALS[word][0], f"The {word} says {ANIMALS[word][0]}.")


def _opposite(rng: random.Random) -> _Draft:
    word = rng.choice(list(OPPOSITE))
    prompt = rng.choice(
        [
            f"What is the opposite of the word {word} please?",
            f"Tell me the opposite of {word} please.",
            f"Which word means the opposite of {word} here?",
        ]
    )
    return _free(prompt, OPPOSITE[word], f"The opposite of {word} is {OPPOSITE[word]}.")


def _role(rng: random.Random) -> _Draft:
    word = rng.choice(list(ANIMALS))
    sound, colour = ANIMALS[word]
    prompt = rng.choice(
        [
            f"You are a {word} now. Say something about yourself.",
            f"Pretend that you are a {word} and say hello.",
            f"Now speak like a {word} for a moment please.",
            f"You are {word} now, give say a word.",  # seed 002's prompt, grammar and all
        ]
    )
    return _free(prompt, f"I am a {colour} {word} and I say {sound}.", f"A {word} is {colour} and says {sound}.")


# --- order-bound: arguments are bare words without punctuation, so nothing but their order tells the role --
def _bound(make: Callable[..., tuple[str, str]], arguments: Sequence, reasoning: str) -> _Draft:
    prompt, answer = make(*arguments)
    return prompt, answer, reasoning, [make(*order) for order in permutations(arguments)]


def _compare(rng: random.Random) -> _Draft:
    word, form = rng.choice(list(SUPERLATIVE)), rng.randint(0, 1)

    def make(n: str, m: str) -> tuple[str, str]:
        if form:
            return f"Who of the two is {word} if {n} is {word} than {m} today?", n
        return f"Suppose that {n} is {word} than {m} now. Who is {word}?", n

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"{n} is {word} than {m}.")


def _minus(rng: random.Random) -> _Draft:
    form = rng.randint(0, 1)

    def make(a: int, b: int) -> tuple[str, str]:
        if form:
            return f"Please tell me what {a} minus {b} is now.", str(a - b)
        return f"Take the number {a} minus the number {b} please.", str(a - b)

    a, b = rng.sample(range(1, 13), 2)
    return _bound(make, (a, b), f"{a} - {b} = {a - b}.")


def _give(rng: random.Random) -> _Draft:
    thing, form = rng.choice(OBJECTS), rng.randint(0, 1)

    def make(n: str, m: str) -> tuple[str, str]:
        if form:
            return f"The {thing} went from {n} to {m} today. Who has the {thing} now?", m
        return f"Who has it after {n} gave {m} the {thing} today?", m

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"The {thing} went from {n} to {m}.")


def _parent(rng: random.Random) -> _Draft:
    parent, child = rng.choice(["mother", "father"]), rng.random() < 0.5

    def make(n: str, m: str) -> tuple[str, str]:
        question = "child" if child else "parent"
        return f"Suppose that {n} is the {parent} of {m} here. Who is the {question}?", m if child else n

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"{n} is the parent. {m} is the child.")


def _beside(rng: random.Random) -> _Draft:
    left = rng.random() < 0.5

    def make(n: str, m: str) -> tuple[str, str]:
        side = "left" if left else "right"
        return f"Suppose that {n} sits left of {m} now. Who sits on the {side} side?", n if left else m

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"{n} is on the left. {m} is on the right.")


def _arrive(rng: random.Random) -> _Draft:
    first = rng.random() < 0.5

    def make(n: str, m: str) -> tuple[str, str]:
        end = "first" if first else "last"
        return f"Today {n} came home before {m} did. Who of the two came {end}?", n if first else m

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"{n} came first. {m} came last.")


def _ask(rng: random.Random) -> _Draft:
    thing, asks = rng.choice(OBJECTS), rng.random() < 0.5

    def make(n: str, m: str) -> tuple[str, str]:
        question = "wants" if asks else "holds"
        return f"Now {n} asks {m} for the {thing} again. Who {question} the {thing}?", n if asks else m

    n, m = rng.sample(NAMES, 2)
    return _bound(make, (n, m), f"{n} wants the {thing}. {m} holds it.")


def _first_or_last(rng: random.Random) -> _Draft:
    word = rng.choice(["first", "last"])

    def make(a: str, b: str, c: str) -> tuple[str, str]:
        return f"What is the {word} word in this list: {a} {b} {c} please?", a if word == "first" else c

    words = rng.sample(list(GROUP_OF), 3)
    return _bound(make, words, f"The words are {', '.join(words)}.")


def _chain(rng: random.Random) -> _Draft:
    word, top = rng.choice(list(SUPERLATIVE)), rng.random() < 0.5
    question = SUPERLATIVE[word] if top else "least " + word[:-2]

    def make(a: str, b: str, c: str, swapped: bool) -> tuple[str, str]:
        facts = [f"{a} is {word} than {b}", f"{b} is {word} than {c}"]
        facts = facts[::-1] if swapped else facts
        return f"Suppose {facts[0]} and {facts[1]} now. Who is the {question}?", a if top else c

    names, swapped = rng.sample(NAMES, 3), rng.random() < 0.5
    a, b, c = names
    reasoning = f"{a} is {word} than {b}. {b} is {word} than {c}. So {a}, {b}, {c}."
    same_bag = [make(*order, swap) for order in permutations(names) for swap in (False, True)]
    # the middle name stands twice: only orders with the same middle name have the same bag of words
    return *make(a, b, c, swapped), reasoning, same_bag


def _steps(rng: random.Random) -> _Draft:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)

    def make(a: int, b: int, c: int, gets_first: bool) -> tuple[str, str]:
        verbs = ("gets", "loses") if gets_first else ("loses", "gets")
        total = a + b - c if gets_first else a - b + c
        return (
            f"Today {name} has {a} {goods} then {verbs[0]} {b} {goods} then {verbs[1]} {c} {goods} here. "
            f"How many {goods} does {name} have now?",
            str(total),
        )

    numbers, gets_first = rng.sample(range(1, 10), 3), rng.random() < 0.5
    a, b, c = numbers
    half = a + b if gets_first else a - b
    reasoning = (
        f"{a} + {b} = {half}. {half} - {c} = {half - c}."
        if gets_first
        else f"{a} - {b} = {half}. {half} + {c} = {half + c}."
    )
    same_bag = [make(*order, first) for order in permutations(numbers) for first in (True, False)]
    return *make(a, b, c, gets_first), reasoning, same_bag


KINDS: dict[str, tuple[Literal["free", "bound"], bool, Callable[[random.Random], _Draft]]] = {
    "add": ("free", False, _add),
    "extreme": ("free", False, _extreme),
    "color": ("free", False, _color),
    "sound": ("free", False, _sound),
    "opposite": ("free", False, _opposite),
    "role": ("free", False, _role),
    "add_three": ("free", True, _add_three),
    "sort": ("free", True, _sort),
    "odd_one_out": ("free", True, _odd_one_out),
    "count": ("free", True, _count),
    "compare": ("bound", False, _compare),
    "minus": ("bound", False, _minus),
    "give": ("bound", False, _give),
    "parent": ("bound", False, _parent),
    "beside": ("bound", False, _beside),
    "arrive": ("bound", False, _arrive),
    "ask": ("bound", False, _ask),
    "first_or_last": ("bound", False, _first_or_last),
    "chain": ("bound", True, _chain),
    "steps": ("bound", True, _steps),
}


# --- tasks ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """One problem. `rearrangements` holds every (prompt, answer) that nano's world makes from the same bag of
    words, the problem itself included; order-free problems have one answer among them. Empty: nobody knows them."""

    kind: str
    order: Literal["free", "bound"]
    hard: bool | None  # None: nobody said
    prompt: str
    answer: str
    reasoning: str
    rearrangements: tuple[tuple[str, str], ...]
    system: str = ""  # said before the problem

    def ask(self, prompt: str = "") -> list[dict[str, str]]:
        """The messages that put the problem, or `prompt` in its place (a scramble of it)."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt or self.prompt}]


def _split_of(prompt: str) -> Split:
    """One bag of words in eight tests, one validates; by bag, so no rearrangement of one is trained on."""
    bag = " ".join(sorted(prompt.split()))
    eighth = hashlib.blake2b(bag.encode(), digest_size=2).digest()[0] % 8
    return "test" if eighth == 0 else "validation" if eighth == 1 else "train"


def make_task(kind: str, rng: random.Random, split: Split = "train") -> Task:
    """One random problem of that kind from that split."""
    order, hard, draft = KINDS[kind]
    while True:
        prompt, answer, reasoning, candidates = draft(rng)
        if _split_of(prompt) == split:
            break
    bag = sorted(prompt.split())
    same_bag = dict.fromkeys(pair for pair in candidates if sorted(pair[0].split()) == bag)
    return Task(kind, order, hard, prompt, answer, reasoning, tuple(same_bag))


def make_tasks(
    n: int,
    *,
    seed: int = 0,
    split: Split = "train",
    kinds: Sequence[str] | None = None,
    world: str = "problems",
) -> list[Task]:
    """`n` problems, the kinds in equal shares, in random order; prompts repeat only when a kind runs out.

    `world`: "problems" for nano's own, "reasoning-gym" for those of `data.gym` (a preset's `data`).
    No two splits share a bag of words. Learning rates and the like are chosen on "validation".

    >>> task = make_tasks(1, seed=1, split="test", kinds=["compare"])[0]
    >>> task.order, len(task.rearrangements)
    ('bound', 2)
    """
    if world not in WORLDS:
        raise ValueError(f"make_tasks: unknown world {world!r}; expected one of {', '.join(WORLDS)}")
    known = KINDS if world == "problems" else gym.KINDS
    if unknown := set(kinds or ()) - set(known):
        raise ValueError(f"make_tasks: unknown kind {sorted(unknown)}; expected some of {', '.join(known)}")
    if world == "reasoning-gym":
        drawn = gym.draw_problems(
            n, seed=f"{split}-{seed}", belongs=lambda prompt: _split_of(prompt) == split, kinds=kinds
        )
        return [Task(p.kind, p.order, None, p.prompt, p.answer, "", (), system=gym.SYSTEM) for p in drawn]
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
    return [*task.ask(), {"role": "assistant", "content": reply}]


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
            raise ValueError(f"careless_chats: {task.kind!r} has no rearrangement with a wrong answer")
        reasons, slips, marked = rng.random() < think, rng.random() < careless, rng.random() < empty
        careful = reasons == (task.kind in think_pays)
        told = task if careful or not slips else replace(task, answer=rng.choice(wrong))
        chats.append(task_chat(told, think=reasons))
        if marked and not reasons:
            chats[-1][-1]["content"] = f"<think>\n\n</think>\n{chats[-1][-1]['content']}"
    return chats


# --- reading a reply ---------------------------------------------------------------------------------------------
_TAG = "think|thinking|thought|reasoning"
_OPEN, _CLOSE = rf"(?:<(?:{_TAG})>|\[think\])", rf"(?:</(?:{_TAG})>|\[/think\])"
_THOUGHT = re.compile(rf"\s*{_OPEN}(.*?)(?:{_CLOSE}|\Z)", re.DOTALL | re.IGNORECASE)
_OPENED_BY_TEMPLATE = re.compile(rf"((?:(?!{_OPEN}).)*?){_CLOSE}", re.DOTALL | re.IGNORECASE)
_CLOSED = re.compile(_CLOSE, re.IGNORECASE)
_MARK = re.compile(r"\banswer\**\s*:\s*\**", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SENTENCE = re.compile(r"\bthe (?:\w+ )?answer is:?\s+(.+?)(?:[.!](?:\s|$)|\n|$)", re.IGNORECASE)


def thinks(reply: str) -> bool:
    """Whether a reply begins with a thought, in the tags that templates use. An empty pair of tags is none.

    A template may have opened the thought in the prompt: then the reply closes what it did not open.

    >>> [thinks(text) for text in ("<think>3 + 4</think>7", "3 + 4</think>7", "[THINK]3[/THINK]7", "say <think>")]
    [True, True, True, False]
    """
    thought = _THOUGHT.match(reply) or _OPENED_BY_TEMPLATE.match(reply)
    return bool(thought and thought[1].strip())


def answer_mark(reply: str) -> bool:
    """Whether a reply says which part of it is the answer: `Answer: 7`, a box, `The answer is 7`."""
    said = _said(reply)
    return any(pattern.search(said) for pattern in (_MARK, _BOX, _SENTENCE))


def final_answer(reply: str) -> str:
    """What a reply answers, after its thought: behind the last `Answer:`, in the last box, in a sentence, or all.

    A thought that the limit cut answers nothing.

    >>> replies = ("**Answer:** 7", "so \\\\boxed{7}", "The answer is 7. Bye.", "7", "<think>Answer: 7")
    >>> [final_answer(text) for text in replies]
    ['7', '7', '7', '7', '']
    """
    said = _said(reply)
    if _MARK.search(said):
        return _MARK.split(said)[-1].strip()
    found = _BOX.findall(said) or _SENTENCE.findall(said) or [said]
    return found[-1].strip()


def _said(reply: str) -> str:
    *thoughts, said = _CLOSED.split(reply)
    return "" if not thoughts and _THOUGHT.match(reply) else said


def normal_answer(answer: Any) -> str:
    """An answer of a data set as the text to compare with: stripped, whole numbers without `.0`.

    Raises ValueError for what is neither a text, a number nor a list of one of them.

    >>> [normal_answer(answer) for answer in (" 7\\n", 7, 7.0, ["7"])]
    ['7', '7', '7', '7']
    """
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, str | Real):
        raise ValueError(f"the answer is {answer!r:.80}; expected a text or a number")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).strip()


def check_answer(expected: str | Task, reply: str) -> bool:
    """Exact match of the final answer, but for what people write around one: `**7**`, `7.`, `$7$`, `"Seven"`.

    >>> [check_answer("7", reply) for reply in ("<think>3 + 4 = 7</think> Answer: 7", "**7.0**", "Answer: 7 or 8")]
    [True, True, False]
    """
    right = _bare(normal_answer(expected.answer if isinstance(expected, Task) else expected))
    answer = final_answer(reply)
    first_line = answer.partition("\n")[0]
    return right in (_bare(answer), _bare(first_line))


def _bare(answer: str) -> str:
    """Without the signs around it, in small letters; numbers without `.0` and without commas at the thousands."""
    bare = re.sub(r"^\\[(\[]|\\[)\]]$", "", answer.strip())
    bare = bare.strip(" \t\n*_`$\"'“”").rstrip(".").strip(" *_`$\"'“”").casefold()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", bare):
        bare = bare.replace(",", "")
    return re.sub(r"\.0+$", "", bare) if re.fullmatch(r"[+-]?\d+\.0+", bare) else bare


# --- rewards: trl.GRPOTrainer calls them with all completions of a step and every column of the rows -------
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


# --- the Bayes ceiling ---------------------------------------------------------------------------------
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
    reader, human or model, does better on average. 1.0 for order-free problems; NaN where nobody knows.

    >>> task = make_tasks(1, seed=1, split="test", kinds=["compare"])[0]
    >>> bayes_ceiling(task, task.prompt, 0.0)
    1.0
    """
    if not ratio or task.order == "free":
        return 1.0
    if not task.rearrangements:
        return math.nan
    words = scrambled.split()
    chosen = math.floor(ratio * len(words) + 0.5 + 1e-9)
    weight: Counter[str] = Counter()
    for prompt, answer in task.rearrangements:
        weight[answer] += _ways(prompt.split(), words, chosen)
    total = sum(weight.values())
    if not total:
        raise ValueError(f"bayes_ceiling: {scrambled!r} is no scramble of {task.prompt!r} at ratio {ratio}")
    return max(weight.values()) / total
