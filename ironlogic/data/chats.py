"""Conversations: read from a file, the hub or memory, checked row by row, split; bad rows are reported one by one.

Four forms are understood, row by row, so that a file may mix them:

* `messages`: `{"messages": [{"role": "user", "content": "..."}, ...]}`, content a string or a list of typed parts;
* ShareGPT: `{"conversations": [{"from": "human", "value": "..."}, ...]}`, LLaVA's with `image` beside it;
* Alpaca: `{"instruction": "...", "output": "..."}`, optionally with `input` and `history`;
* the Cauldron: `{"images": [...], "texts": [{"user": "...", "assistant": "..."}, ...]}`.

Each may have a field `system`. Two turns of one role in a row are allowed; some chat templates refuse them later.
A picture becomes an image part of a user turn: where the row has one, where the text says `<image>`, else in front.
"""

import codecs
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes, resolve_picture

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

__all__ = [
    "ChatError",
    "Chats",
    "Rejected",
    "RejectedRows",
    "check_chat",
    "load_chats",
    "make_chats",
    "picture_turn",
]


# --- errors -----------------------------------------------------------------------------------------------------
def _sentence(field: str, value: str, reason: str) -> str:
    return f"{field} is {value}; {reason}" if value else f"{field} {reason}".strip()


class ChatError(IronLogicError, ValueError):
    """A source, chat or template that can't be used. `field` says where, and `value` what came, if known."""

    def __init__(self, reason: str, *, field: str = "", value: str = ""):
        super().__init__(_sentence(field, value, reason))
        self.reason, self.field, self.value = reason, field, value


@dataclass(frozen=True)
class Rejected:
    """One row that was left out. Prints as `data/x.jsonl:17: messages[1].role is 'bot'; expected ...`."""

    file: str  # "" for rows that were already in memory
    line: int  # 1-based: the line of a JSONL file, else the row
    field: str  # such as messages[1].role
    value: str  # what came, as a shortened repr; "" where there is nothing to show
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file else f"row {self.line}"
        return f"{where}: {_sentence(self.field, self.value, self.reason)}"


class RejectedRows(tuple[Rejected, ...]):
    """The rows that were left out. Prints as a summary: how many, and the reasons by frequency with their lines.

    >>> print(RejectedRows(Rejected("x.jsonl", line, "messages", "", "has no user turn") for line in (3, 8)))
    2 rows left out
      2 x messages has no user turn (line 3, 8)
    """

    def __str__(self) -> str:
        groups: dict[str, list[Rejected]] = {}
        for row in self:
            field, reason = re.sub(r"\d+", "#", row.field), re.sub(r"\S*[\d/.]\S*", "#", row.reason)
            kind = f"{field} {reason}"  # without what differs from row to row: numbers and files
            groups.setdefault(kind, []).append(row)
        lines = [f"{len(self)} row{'s' * (len(self) != 1)} left out"]
        for group in sorted(groups.values(), key=len, reverse=True)[:5]:
            first = ", ".join(str(row.line) for row in group[:3]) + ", ..." * (len(group) > 3)
            example = _sentence(group[0].field, group[0].value, group[0].reason)
            lines.append(f"  {len(group)} x {example} (line {first})")
        if len(groups) > 5:
            lines.append(f"  and {len(groups) - 5} more reasons")
        return "\n".join(lines)


# --- conversations ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, repr=False)
class Chats:
    """Conversations that were checked on loading. `len`, `for`, `chats[0]` and `chats[:8]` work as on a list.

    A conversation is a list of turns `{"role", "content"}`. A content is a string or, in a turn with pictures, a
    list of parts: `{"type": "text", "text"}` and `{"type": "image", "image"}` with the picture's path or bytes.
    """

    rows: Dataset  # columns: messages, source_row (1-based), images where pictures came as bytes, further scalars
    rejected: RejectedRows = field(default_factory=RejectedRows)
    source: str = ""  # the file or hub dataset; "" for rows that were in memory

    def __repr__(self) -> str:
        return f"<Chats: {len(self)} conversations from {self.source or 'memory'}>"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[dict]]:
        return (plain_turns(row["messages"], row.get("images")) for row in self._stored())

    def __getitem__(self, index: int | slice) -> "list[dict] | Chats":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = self.rows[index]
        return plain_turns(row["messages"], row.get("images"))

    def _stored(self) -> Dataset:
        return self.rows.select_columns([name for name in ("messages", "images") if name in self.rows.column_names])

    def select(self, indices: Iterable[int]) -> "Chats":
        """The rows of these indices, in this order."""
        return replace(self, rows=self.rows.select(indices))

    def split(self, holdout: float = 0.1, *, seed: int = 0) -> "tuple[Chats, Chats]":
        """(train, test), about a share `holdout` of the chats in the second.

        A hash of its first picture, without one of its user turns, decides for each chat by itself: chats about one
        picture, or with the same questions, are never on both sides, and new rows move no old one. Raises ChatError
        unless 0 <= holdout < 1.
        """
        if not 0 <= holdout < 1:
            raise ChatError(f"holdout is {holdout}; expected a share of the chats, from 0 to below 1")
        train, test = [], []
        for index, row in enumerate(self._stored()):
            digest = blake2b(json.dumps([seed, _subject(row)], sort_keys=True).encode(), digest_size=8)
            held_out = int.from_bytes(digest.digest(), "big") < holdout * 2**64
            (test if held_out else train).append(index)
        return self.select(train), self.select(test)

    def reject(self, index: int, error: ChatError) -> Rejected:
        """What to say of a row that turned out unusable: it names the file and line that the row came from."""
        return Rejected(self.source, self.rows[index]["source_row"], error.field, error.value, error.reason)

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes all columns as JSON Lines."""
        self.rows.to_json(path, force_ascii=False)


def _subject(row: Mapping[str, Any]) -> Any:
    """What a chat of `Chats.rows` is about: its first picture, without one what the user says."""
    for part in image_parts(plain_turns(row["messages"], row.get("images")))[:1]:
        picture = part.get("image")
        if isinstance(picture, bytes):
            return blake2b(picture).hexdigest()
        if picture:
            return Path(picture).parts[-2:]  # where those folders lie differs between machines
    return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]


def plain_turns(messages: list[dict], images: Iterable[bytes | None] | None = None) -> list[dict]:
    """The turns of a row of `Chats.rows`: a copy without null fields, text alone as a string, pictures in place."""
    turns = []
    for turn in messages:
        content = turn["content"]
        if not isinstance(content, str):
            content = [{name: value for name, value in part.items() if value is not None} for part in content]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
        turns.append({"role": turn["role"], "content": content})
    for part, image in zip(image_parts(turns), images or (), strict=False):
        if image is not None:
            part["image"] = image
    return turns


def image_parts(messages: list[dict]) -> list[dict]:
    """The image parts of all turns, in their order; not copies."""
    lists = [turn["content"] for turn in messages if not isinstance(turn["content"], str)]
    return [part for part in chain.from_iterable(lists) if part["type"] == "image"]


def picture_turn(picture: Any, question: str) -> dict[str, Any]:
    """A turn of the user: a picture (whatever `read_picture` reads), then a question about it."""
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}


def make_chats(conversations: Iterable[Sequence[Mapping]]) -> Chats:
    """Chats from conversations in memory, each a list of turns. Raises ChatError naming the first bad one.

    >>> chats = make_chats([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]])
    >>> len(chats), chats[0][1]["content"]
    (1, 'Hello.')
    """
    chats = load_chats([{"messages": turns} for turns in conversations])
    if chats.rejected:
        raise ChatError(str(chats.rejected[0]))
    return chats


def load_chats(
    source: str | os.PathLike | list | Dataset, *, split: str = "train", images: str | os.PathLike | None = None
) -> Chats:
    """Chats from a .jsonl, .json or .parquet file, a folder of `save_to_disk`, a hub dataset "org/name", or memory.

    In memory they are a list of dicts, or a `Dataset`. `split` is for the hub, where "org/name/configuration" takes
    one of several parts, such as "HuggingFaceM4/the_cauldron/ai2d".

    `rows` of the result has the columns `messages`, `source_row` (1-based: the line of a JSONL file, else the row)
    and each further column of scalars of one type (at most 64; missing ones are null). A content is a string; if
    any row holds an image, every content is a list of `{"type", "text", "image"}`.

    A picture that came as a path stays one: `image` of its part, absolute, and inside the folder `images` (by
    default that of the file; paths in memory are left as they are unless `images` is given). One that came as bytes
    or from memory is in the further column `images`: for every image part of the row its bytes, or null. Every
    picture is opened, so that a missing, damaged or huge one is a `Rejected`.

    >>> chats = load_chats([{"instruction": "Add 2 and 2.", "output": "4"}, {"instruction": "Why?"}])
    >>> [turn["content"] for turn in chats[0]]
    ['Add 2 and 2.', '4']
    >>> print(chats.rejected[0])
    row 2: row has the fields instruction; expected messages, or conversations (ShareGPT), or ...

    Raises ChatError if the source can't be read or has no usable row; a bad row beside good ones is a `Rejected`.
    """
    name = ""
    if isinstance(source, str | os.PathLike):
        source = name = os.path.expanduser(source)
    if images is not None:
        images = os.path.expanduser(images)
    elif os.path.isfile(name):
        images = Path(source).parent
    rows, bad = [], []
    try:
        for line, row in _open_source(source, split):
            try:
                messages = _read_row(row)
                pictures = _take_pictures(messages, images)
            except ChatError as error:
                bad.append(Rejected(name, line, error.field, error.value, error.reason))
            else:
                rows.append(_read_scalars(row) | {"messages": messages, "source_row": line, "images": pictures})
    except (OSError, pa.ArrowException) as error:
        raise ChatError(f"{name}: can't be read ({error}); check its path, rights and size") from error
    rejected = RejectedRows(bad)
    if not rows:
        why = rejected if rejected else "it is empty; expected an object with a chat per row"
        raise ChatError(f"{name or 'the rows'}: nothing to train on: {why}")
    return Chats(_to_dataset(rows), rejected, name)


# --- one row of any form -> its turns ---------------------------------------------------------------------------
_FORMS = (("messages",), ("conversations",), ("instruction", "output"), ("texts",))  # the fields they are known by
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_KEYS = {  # of a turn's role: of its content, roles, those that are expected
    "role": ("content", _ROLES, "user or assistant"),
    "from": ("value", _ROLES | {"human": "user", "gpt": "assistant"}, "human or gpt"),
}
# What a row or turn may say beside its texts: to drop it would train answers about what the model never sees.
_UNSEEN = dict.fromkeys(("video", "videos", "audio", "audios"), "is not seen by any model here")
_REFUSED = _UNSEEN | dict.fromkeys(
    "tool_calls function_call reasoning_content reasoning reasoning_details thinking thought refusal".split(),
    "is not read; put it into the text",
)
_REFUSED |= dict.fromkeys(
    ("image", "images"), "is not read in a turn; expected a part of its content of type image"
)
_MARKS = ("weight", "train", "training", "trainable", "loss")  # whether a turn is trained
_SURROGATE = re.compile("[\ud800-\udfff]")
_IMAGE = re.compile(r"\n?<image>\n?")  # LLaVA's mark for a picture, with the newline that keeps it apart
_FILM = re.compile(r"(?:\A|\n)<(video|audio)>(?:\n|\Z)")  # and for a film or sound, where it is no HTML


def check_chat(messages: Any) -> list[dict]:
    """A copy in plain form: role and content only, lists of text parts joined. Raises ChatError naming the turn."""
    return _check_order(_read_turns(messages, "messages"))


def _read_row(row: Any) -> list[dict]:
    """The turns of a row; each of its pictures is in an image part. Raises ChatError."""
    if isinstance(row, ChatError):  # it could not be read
        raise row
    if not isinstance(row, Mapping):
        raise ChatError("expected an object", field="row", value=_short(row))
    _refuse(row, _UNSEEN, "")
    field = _detect_form(row)
    if field == "instruction":
        turns = _alternate(_read_alpaca(row))
    elif field == "texts":
        turns = _alternate(_read_cauldron(row["texts"]))
    else:
        turns = _read_turns(row[field], field)
    _place_pictures(turns, row, field)
    if row.get("system") and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _read_text(row["system"], "system")})
    return _check_order(turns)


def _detect_form(row: Mapping) -> str:
    """The first field of its form."""
    filled = [name for name in row if row[name] is not None]  # columns of a mixed table may be null
    for names in (filled, row):
        for fields in _FORMS:
            if all(field in names for field in fields):
                return fields[0]
    names = ", ".join(_short(name).strip("'") for name in list(row)[:8]) or "nothing"
    expected = "expected messages, or conversations (ShareGPT), or instruction and output (Alpaca), or texts"
    raise ChatError(f"has the fields {names}; {expected}", field="row")


def _refuse(fields: Mapping, reasons: Mapping[str, str], prefix: str) -> None:
    for name, reason in reasons.items():
        if fields.get(name):
            raise ChatError(reason, field=prefix + name, value=_short(fields[name]))


def _alternate(texts: Iterable[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def _read_alpaca(row: Mapping) -> Iterator[str]:
    """The pairs of the history, then instruction and input (a blank line between them) -> output."""
    history = row.get("history") or []
    for index, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ChatError("expected [question, answer]", field=f"history[{index}]", value=_short(pair))
        for side, text in enumerate(pair):
            yield _read_text(text, f"history[{index}][{side}]")
    question = _read_text(row["instruction"], "instruction")
    if row.get("input") is not None:
        context = _read_text(row["input"], "input", empty=True)
        question += f"\n\n{context}" if context.strip() else ""
    yield question
    yield _read_text(row["output"], "output")


def _read_cauldron(pairs: Any) -> Iterator[str]:
    """All its questions and answers, about the same pictures."""
    if not isinstance(pairs, list | tuple) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
        raise ChatError("expected a list of objects with user and assistant", field="texts", value=_short(pairs))
    for index, pair in enumerate(pairs):
        for role in ("user", "assistant"):
            yield _read_text(pair.get(role), f"texts[{index}].{role}")


def _read_turns(turns: Any, field: str) -> list[dict]:
    if not isinstance(turns, list | tuple) or not turns:
        raise ChatError("expected a list of turns", field=field, value=_short(turns))
    return [_read_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def _read_turn(turn: Any, field: str) -> dict:
    if not isinstance(turn, Mapping):
        raise ChatError("expected an object with role and content", field=field, value=_short(turn))
    role_key = "from" if turn.get("role") is None and "from" in turn else "role"
    content_key, roles, expected = _KEYS[role_key]
    came = turn.get(role_key)
    if not isinstance(came, str) or came not in roles:
        raise ChatError(f"expected system, {expected}", field=f"{field}.{role_key}", value=_short(came))
    role = roles[came]
    _refuse(turn, _REFUSED, f"{field}.")
    for name in _MARKS:
        _check_mark(turn.get(name), f"{field}.{name}", role)
    content = _read_content(turn.get(content_key), f"{field}.{content_key}", empty=role == "system")
    return {"role": role, "content": content}


def _check_mark(mark: Any, field: str, role: str) -> None:
    """Answers are trained and nothing else is: a mark that says so is obeyed, any other can't be."""
    is_answer = role == "assistant"
    if mark is None or (mark in (0, 1) and bool(mark) == is_answer):
        return
    reason = "no turn of this role is trained; expected 0 or false"
    if is_answer:
        reason = "every answer of a row is trained; leave the row out, or end it before this turn"
    raise ChatError(reason, field=field, value=_short(mark))


def _read_content(content: Any, field: str, *, empty: bool) -> str | list[dict]:
    if not isinstance(content, list | tuple):
        return _read_text(content, field, empty=empty)
    parts = [_read_part(part, f"{field}[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return _read_text("".join(part["text"] for part in parts), field, empty=empty)
    return parts


def _read_part(part: Any, field: str) -> dict:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _read_text(part.get("text"), f"{field}.text", empty=True)}
    if kind != "image":
        raise ChatError("expected a part of type text or image", field=field, value=_short(part))
    image = part.get("image")
    if image is None:  # only its place; the picture comes by another way
        return {"type": "image"}
    if isinstance(image, str | bool | int | float | list):
        image = _read_text(image, f"{field}.image")
    return {"type": "image", "image": image}  # else bytes or a picture in memory: `pictures` checks it


def _read_text(text: Any, field: str, *, empty: bool = False) -> str:
    if not isinstance(text, str) or not (empty or text.strip()):
        raise ChatError("expected text", field=field, value=_short(text))
    if _SURROGATE.search(text):
        raise ChatError("holds half a surrogate pair, which is not Unicode text", field=field)
    if "\0" in text:
        raise ChatError("holds a NUL character, a sign of UTF-16 or binary data", field=field)
    return text


def _place_pictures(turns: list[dict], row: Mapping, field: str) -> None:
    """Puts the row's pictures into its image parts, in their order; if it has no part, before the first question.

    In a text of the user `<image>` stands for a part, if the row has pictures or is in LLaVA's form.
    """
    came = row.get("image") if row.get("images") is None else row["images"]
    pictures = list(came) if isinstance(came, list | tuple) else [] if came in (None, "") else [came]
    questions = [turn for turn in turns if turn["role"] == "user"]
    for turn in questions:
        text = turn["content"]
        if not isinstance(text, str):
            continue
        if (film := _FILM.search(text)) and f"</{film[1]}>" not in text:
            raise ChatError(f"holds the mark <{film[1]}>, which is not seen by any model here", field=field)
        if (pictures or field == "conversations") and _IMAGE.search(text):
            turn["content"] = _split_marks(text)
    parts = image_parts(turns)
    if pictures and not parts and questions:
        parts = [{"type": "image"} for _ in pictures]
        questions[0]["content"] = [*parts, {"type": "text", "text": questions[0]["content"]}]
    if (pictures or any("image" not in part for part in parts)) and len(pictures) != len(parts):
        reason = f"holds {len(parts)} places for pictures (<image>), but the row has {len(pictures)} pictures"
        raise ChatError(reason, field=field)
    for number, (part, picture) in enumerate(zip(parts, pictures, strict=False), 1):
        if picture is not None:
            part["image"] = picture
        elif "image" not in part:
            raise ChatError("is null", field=f"picture {number}")


def _split_marks(text: str) -> list[dict]:
    first, *others = _IMAGE.split(text)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"].strip()]


def _check_order(messages: list[dict]) -> list[dict]:
    roles = [turn["role"] for turn in messages]
    for role in ("user", "assistant"):
        if role not in roles:
            raise ChatError(f"has no {role} turn", field="messages")
    if roles[-1] != "assistant":
        raise ChatError(f"ends with a {roles[-1]} turn; expected assistant", field="messages")
    if roles.index("assistant") < roles.index("user"):
        raise ChatError("has an assistant turn before the first user turn", field="messages")
    return messages


def _take_pictures(messages: list[dict], folder: str | os.PathLike | None) -> list[bytes | None] | None:
    """Checks every picture and makes paths absolute; the bytes of those that are no paths, if there are any."""
    contents: list[bytes | None] = []
    for index, part in enumerate(image_parts(messages)):
        image, content = part.pop("image", None), None
        try:
            if isinstance(image, str) and not image.startswith("data:"):
                if folder is not None:
                    image = str(resolve_picture(image, folder=folder))
                    check_picture(image)
                part["image"] = image
            elif image is not None:
                content = picture_bytes(image, folder=folder)
                check_picture(content)
        except PictureError as error:
            raise ChatError(str(error), field=f"picture {index + 1}") from error
        contents.append(content)
    return contents if any(contents) else None


def _short(value: object) -> str:
    """A repr of at most 80 characters, also of deep, endless and strange values."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


# --- rows -> one table ------------------------------------------------------------------------------------------
_OWN = {*"messages conversations instruction input output system history source_row texts image images".split()}
_MAX_COLUMNS = 64  # further ones: rows whose keys are data would make a table as wide as it is long
_BATCH = 2**25  # characters and bytes; far below the 2 GiB that one Arrow array of strings can hold
_PART = pa.struct({"type": pa.string(), "text": pa.string(), "image": pa.string()})
_SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


def _read_scalars(row: Mapping) -> dict[str, Any]:
    """The fields of the row that are no part of the chat; ... for a value that a column can't hold."""
    scalars = {}
    for name, value in row.items():
        if not isinstance(name, str) or name in _OWN or _SURROGATE.search(name) or value is None:
            continue
        fits = type(value) in _SCALARS
        if isinstance(value, str):
            fits = not _SURROGATE.search(value) and "\0" not in value
        elif type(value) is int:
            fits = -(2**63) <= value < 2**63
        scalars[name] = value if fits else ...
    return scalars


def _further_columns(rows: list[dict]) -> dict[str, type]:
    """Their names and types; one of mixed types is left out."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _OWN and (name in kinds or len(kinds) < _MAX_COLUMNS):
                kinds.setdefault(name, set()).add(type(value))
    columns = {}
    for name, types in kinds.items():
        if types == {int, float}:
            columns[name] = float
        elif len(types) == 1 and types <= set(_SCALARS):
            columns[name] = types.pop()
    return columns


def _to_dataset(rows: list[dict]) -> Dataset:
    content = pa.string()
    turns = [turn for row in rows for turn in row["messages"]]
    if any(isinstance(turn["content"], list) for turn in turns):
        content = pa.list_(_PART)
        for turn in turns:
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
    columns = {"messages": pa.list_(pa.struct({"role": pa.string(), "content": content})), "source_row": pa.int64()}
    if any(row["images"] for row in rows):
        columns["images"] = pa.list_(pa.binary())
    further = _further_columns(rows)
    for row in rows:
        row.update((name, kind(row[name])) for name, kind in further.items() if name in row)
    schema = pa.schema(columns | {name: _SCALARS[kind] for name, kind in further.items()})
    return Dataset(pa.concat_tables(pa.Table.from_pylist(batch, schema=schema) for batch in _batches(rows)))


def _batches(rows: list[dict]) -> Iterator[list[dict]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(str(row["messages"])) + sum(len(image or b"") for image in row["images"] or ())
        if len(batch) == 1000 or size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- sources ----------------------------------------------------------------------------------------------------
Rows = Iterator[tuple[int, Any]]  # numbered; one that can't be read is the ChatError that says why
_MAX_LINE = 32 * 2**20  # bytes in one line of JSONL; a longer one is no chat but a damaged file


def _open_source(source: Any, split: str) -> Rows:
    if isinstance(source, Dataset):
        return _read_tables(source.with_format("arrow").iter(100))
    if isinstance(source, list | tuple):
        return enumerate(source, 1)
    if not isinstance(source, str | os.PathLike):
        raise ChatError(f"the source is a {type(source).__name__}; expected a path, hub name, list or Dataset")
    path = Path(source)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():  # of Dataset.save_to_disk
        return _read_tables(Dataset.load_from_disk(str(path)).with_format("arrow").iter(100))
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _READERS)[:5]
        raise ChatError(f"{path} is a directory; name one file in it ({', '.join(files) or 'it has no data file'})")
    if path.suffix.lower() in _READERS:
        return _READERS[path.suffix.lower()](path)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", str(source))
    if hub and not os.path.exists(hub[1]):
        return _read_hub(*hub.groups(), split)
    raise ChatError(f"{path}: not a kind of file that is read here; expected {', '.join(_READERS)}")


def _read_jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for line in count(1):
            raw = file.readline(_MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > _MAX_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_MAX_LINE)
                yield line, ChatError(f"is longer than {_MAX_LINE >> 20} MiB", field="line")
            elif raw.removeprefix(codecs.BOM_UTF8).strip():
                yield line, _parse(raw.rstrip())


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of 5,000 digits
        came, reason = _short(raw.decode(errors="replace").strip()), str(error).replace("line 1 column", "column")
        return ChatError(f"expected JSON in UTF-8: {reason}", field="line", value=came)


def _read_json(path: Path) -> Rows:
    rows = _parse(path.read_bytes())
    if isinstance(rows, ChatError):
        hint = " (one object per line is JSON Lines: name the file .jsonl)" * ("Extra data" in rows.reason)
        raise ChatError(f"{path}: {rows.reason}{hint}")
    if not isinstance(rows, list):
        raise ChatError(f"{path}: holds {_short(rows)}; expected an array of objects")
    return enumerate(rows, 1)


def _read_tables(tables: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    number = count(1)
    for table in tables:
        for index in range(table.num_rows):
            try:
                row = table.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond all calendars
                row = ChatError(f"can't be read ({error})", field="row")
            yield next(number), row


def _read_hub(name: str, configuration: str | None, split: str) -> Rows:
    try:
        dataset = load_dataset(name, configuration, split=split)
    except Exception as error:  # whatever the hub, the network, a cache or a loader has to say
        tried = f"no such file here, and the split {split!r} of a hub dataset of this name could not be loaded"
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "check the name (org/name, or org/name/configuration), or give the path of a local file"
        if datasets.config.HF_HUB_OFFLINE:
            advice = "the hub is switched off here, set HF_HUB_OFFLINE=0 before the first cell"
        raise ChatError(f"{name}: {tried} ({why}); {advice}") from error
    return _read_tables(dataset.with_format("arrow").iter(100))


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: _read_tables(pq.ParquetFile(path).iter_batches(100)),
}
