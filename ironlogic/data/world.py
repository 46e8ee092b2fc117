"""The small world behind nano: its words, its facts and the kinds of problems that it makes.

A kind drafts a problem as (prompt, answer, reasoning, rearrangements): `rearrangements` are the (prompt, answer)
pairs among which those with the same bag of words are to be found. What a problem is for, is `tasks`.
"""

import random
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Literal

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
]

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


_Draft = tuple[str, str, str, list[tuple[str, str]]]  # prompt, answer, reasoning, rearrangements


# --- order-free -------------------------------------------------------------------------------------------
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
    "first_or_last": ("bound", False, _first_or_last),
    "chain": ("bound", True, _chain),
    "steps": ("bound", True, _steps),
}
