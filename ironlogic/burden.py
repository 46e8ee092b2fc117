"""Fragmented Training's input noise: some words of the prompt change places, the answer stays as it is.

Pure text, no torch. `ratio` of the units (words, characters, tokens, sentences) of the chosen roles are drawn
and put into each other's places. Whitespace stays where it is, blank for blank and line for line; so do code,
URLs, LaTeX, tags and tables, and every unit that touches one. Units change places only with their own kind (words
with words, Chinese and Japanese characters with such characters, closed sentences with closed ones): no two
of them grow together.

A draw is a pure function of (seed, epoch, row, message): the same bytes for any batch size, order of rows,
number of processes and platform. What a unit is stands in `units`.
"""

import hashlib
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ironlogic.units import (
    PROTECTED,
    BurdenError,
    Disorder,
    Unit,
    check_share,
    check_unit,
    chosen_count,
    expected_disorder,
    kind_of,
    measure_disorder,
    movable_places,
    moved_units,
    pieces_of,
    pooled_disorder,
    protected_spans,
)

import numpy as np

if TYPE_CHECKING:
    from ironlogic.data.chats import Chats

__all__ = [
    "PROTECTED",
    "Burden",
    "BurdenError",
    "Disorder",
    "apply_burden",
    "burden_messages",
    "expected_disorder",
    "measure_disorder",
    "moved_units",
    "seed_burden",
]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_REACHED = ("displaced", "kendall_tau", "bigrams_kept")  # columns that `Burden.apply` adds, beside row and epoch


@dataclass(frozen=True)
class Burden:
    """How conversations are burdened. `Burden(unit="seed", redraw=False)` is what seed 001 does.

    Raises `BurdenError` for a value out of range, an unknown name or a wrong type.
    """

    ratio: float = 0.7  # share of the units drawn; the disorder reached is lower (`expected_disorder`)
    unit: Unit = "word"
    mix: float = 1.0  # share of the rows that are burdened at all
    redraw: bool = True  # a fresh draw every epoch; False: the seed's one shuffle for all of them
    protect: tuple[str, ...] = PROTECTED  # kinds of spans that stay; unit "seed" knows none
    roles: tuple[str, ...] = ("user",)  # whose messages

    def __post_init__(self):
        _check("Burden", self.ratio, self.unit, self.protect)
        check_share("Burden", "mix", self.mix)
        _check_names("Burden", "roles", self.roles, _ROLES)
        if not isinstance(self.redraw, bool):
            raise BurdenError(f"Burden: redraw is {self.redraw!r}; expected True or False")
        object.__setattr__(self, "protect", tuple(self.protect))  # a list, when read back from run.json
        object.__setattr__(self, "roles", tuple(self.roles))

    def apply(
        self, chats: "Chats", *, epochs: int = 1, seed: int = 0, num_proc: int | None = None, tokenizer=None
    ) -> "Chats":
        """`epochs` times the chats, one epoch after the other, in their order, each with a draw of its own.

        Columns of its `rows`: `messages` burdened; `row`, the key of the row, which is a column of that name in the
        data where it names every row, else the index; `epoch`; the disorder reached in the burdened turns
        (`displaced`, `kendall_tau`, `bigrams_kept`); all others as they were. Raises `BurdenError`.
        """
        import datasets  # two seconds; nothing else here needs it

        rows = getattr(chats, "rows", None)
        if not isinstance(rows, datasets.Dataset):
            raise BurdenError(
                f"Burden.apply: got a {type(chats).__name__}; expected Chats (load_chats, make_chats)"
            )
        if taken := {"epoch", *_REACHED} & set(rows.column_names):
            raise BurdenError(
                f"Burden.apply: the data has columns {', '.join(sorted(taken))}; is it burdened already?"
            )
        for name, value in (("epochs", epochs), ("num_proc", 1 if num_proc is None else num_proc)):
            if type(value) is not int or value < 1:
                raise BurdenError(f"Burden.apply: {name} is {value!r}; expected a whole number from 1")
        if not len(rows):
            raise BurdenError("Burden.apply: the data has no rows")

        keys = rows["row"][:] if "row" in rows.column_names else []
        if any(type(key) not in (int, str) for key in keys) or len(set(keys)) < len(keys):
            rows = rows.remove_columns("row")  # a column of the user's that names no row
        made = {"epoch": datasets.Value("int64"), **dict.fromkeys(_REACHED, datasets.Value("float64"))}
        burdened = datasets.concatenate_datasets([rows] * epochs).map(
            _burden_row,
            with_indices=True,
            fn_kwargs={"burden": self, "seed": seed, "rows": len(rows), "tokenizer": tokenizer},
            features=datasets.Features({"row": datasets.Value("int64")} | rows.features | made),
            num_proc=num_proc,
            load_from_cache_file=False,
            desc="Burden",
        )
        return replace(chats, rows=burdened)


def _check_names(where: str, name: str, value, known: tuple[str, ...]) -> None:
    if not isinstance(value, (tuple, list)) or any(item not in known for item in value):
        raise BurdenError(f"{where}: {name} is {value!r}; expected a tuple of names out of {', '.join(known)}")


def _check(where: str, ratio, unit, protect) -> None:
    check_share(where, "ratio", ratio)
    check_unit(where, unit)
    _check_names(where, "protect", protect, PROTECTED)


# --------------------------------------------------------------------------------------------------- one text
def draw(n: int, number: int, ratio: float) -> np.ndarray:
    """`chosen_count` of the positions 0..n-1 in a uniform random order, (k,): the first by 36 bits and position.

    The bits are splitmix64's (Steele, Lea and Flood 2014): good from any state, the same on every platform.
    """
    x = np.arange(n, dtype=np.uint64) * 0xD1342543DE82EF95 + number + 0x9E3779B97F4A7C15  # wraps by definition
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    scores = (x ^ (x >> 31)) >> 28
    return np.argsort(scores, kind="stable")[: chosen_count(n, ratio)]


def _number(seed: int, key: Iterable[int | str]) -> int:
    """64 bits that stand for (seed, *key). A field says its type and length, so that none runs into the next."""
    data = b""
    try:
        for field in (seed, *key):
            if isinstance(field, str):
                raw = field.encode("utf-8", "surrogatepass")
                data += b"s%d:%b" % (len(raw), raw)
            else:
                data += b"i%d;" % operator.index(field)
    except TypeError:
        message = f"seed is {seed!r} and key {key!r}; expected a whole number and a tuple of them or of strings"
        raise BurdenError(message) from None
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def apply_burden(
    text: str,
    *,
    ratio: float = 0.7,
    unit: Unit = "word",
    seed: int = 0,
    key: tuple[int | str, ...] = (),
    protect: Sequence[str] = PROTECTED,
    tokenizer=None,
) -> str:
    """`text` with `ratio` of its movable units in each other's places; unchanged where fewer than two can move.

    `key` is (epoch, row, message). Of n movable units k = ratio * n (rounded, halves up) are drawn, and
    permuted uniformly among those of their kind. `unit="token"` needs a fast `tokenizer`, and moves the text
    that each token stands for, so that no character is lost where several tokens make one. `unit="seed"` is
    `seed_burden`. Raises `BurdenError`.

    >>> apply_burden("Why is the sky blue,\\n  and `the sea` too?", key=(0, 0, 0))
    'sky is too? Why the\\n  and `the sea` blue,'
    """
    _check("apply_burden", ratio, unit, protect)
    if not isinstance(text, str):
        raise BurdenError(f"apply_burden: text is {text!r}; expected a string")
    number = _number(seed, key)
    if unit == "seed":
        return seed_burden(text, ratio, random.Random(number))
    pieces = pieces_of(text, unit, tokenizer)
    places = movable_places(pieces, protected_spans(text, protect))
    drawn = places[draw(len(places), number, ratio)]
    moved = list(pieces)
    kinds = np.array([kind_of(pieces[place], unit) for place in drawn.tolist()])
    for kind in np.unique(kinds):
        # Places in random order, and in the order of the text the units that go there.
        group = drawn[kinds == kind]
        for place, source in zip(group.tolist(), np.sort(group).tolist(), strict=True):
            moved[place] = pieces[source]
    return "".join(moved)


def seed_burden(text: str, ratio: float, rng: random.Random) -> str:
    """Seed 001's `apply_burden`, call for call, drawing from `rng` in place of the global generator.

    Units are what lies between single blanks; int(n * ratio) of them move, and none where there are three or
    fewer.
    """
    words = text.split(" ")
    if not text or len(words) <= 3:
        return text
    places = rng.sample(range(len(words)), int(len(words) * ratio))
    moved = [words[place] for place in places]
    rng.shuffle(moved)
    for place, word in zip(places, moved, strict=True):
        words[place] = word
    return " ".join(words)


# ------------------------------------------------------------------------------------- messages and data sets
def burden_messages(
    messages: Sequence[Mapping],
    burden: Burden,
    *,
    seed: int = 0,
    epoch: int = 0,
    row: int | str = 0,
    tokenizer=None,
) -> list[dict]:
    """A copy of one conversation with the turns of `burden.roles` burdened; of a content list, the text parts.

    The key of a text is (epoch, row, index of its message); the second and later text parts of a list add
    their index. All other fields and parts are kept. Raises `BurdenError`.
    """
    if not isinstance(messages, (list, tuple)):
        raise BurdenError(f"row {row}: messages is a {type(messages).__name__}; expected a list of messages")
    copy = [_copy_message(message, f"row {row}, message {index}") for index, message in enumerate(messages)]
    epoch = epoch if burden.redraw else 0
    if _number(seed, ("mix", epoch, row)) >= burden.mix * 2**64:
        return copy
    for holder, field, place in _texts(copy, burden.roles, row):
        holder[field] = apply_burden(
            holder[field],
            ratio=burden.ratio,
            unit=burden.unit,
            seed=seed,
            key=(epoch, row, *place),
            protect=burden.protect,
            tokenizer=tokenizer,
        )
    return copy


def _copy_message(message, where: str) -> dict:
    """A copy whose content is a string, or a list of copied parts. Raises `BurdenError` for another message."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BurdenError(f"{where} is {message!r}; expected a dict with role and content")
    copy = dict(message)
    content = copy.get("content")
    if isinstance(content, (list, tuple)):
        copy["content"] = [dict(part) if isinstance(part, Mapping) else part for part in content]
    return copy


def _texts(messages: Sequence[Mapping], roles: Sequence[str], row) -> Iterator[tuple[dict, str, tuple[int, ...]]]:
    """(dict, field, place) of every text of these roles. Raises `BurdenError` where there is none."""
    for index, message in enumerate(messages):
        if message["role"] not in roles:
            continue
        holders, field, expected = [message], "content", "a string or a list of parts"
        if isinstance(message.get("content"), list):
            parts = [part for part in message["content"] if isinstance(part, dict)]
            holders, field, expected = [part for part in parts if part.get("type") == "text"], "text", "a string"
        for number, holder in enumerate(holders):
            if not isinstance(holder.get(field), str):
                came = f"{field} is {holder.get(field)!r}"
                raise BurdenError(f"row {row}, message {index}: {came}; expected {expected}")
            yield holder, field, (index, number) if number else (index,)


def _burden_row(line: dict, index: int, *, burden: Burden, seed: int, rows: int, tokenizer) -> dict:
    epoch, row = divmod(index, rows)
    row = line.get("row", row)
    before = line["messages"]
    after = burden_messages(before, burden, seed=seed, epoch=epoch, row=row, tokenizer=tokenizer)
    old, new = (
        [holder[field] for holder, field, _ in _texts(turns, burden.roles, row)] for turns in (before, after)
    )
    reached = pooled_disorder(list(zip(old, new, strict=True)), unit=burden.unit, tokenizer=tokenizer)
    return {"messages": after, "row": row, "epoch": epoch, **asdict(reached)}
