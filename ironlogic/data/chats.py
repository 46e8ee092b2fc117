"""Conversations: read them, check them, report the bad rows, split them.

Four forms are understood, row by row, so that a file may mix them:

* `messages`: `{"messages": [{"role": "user", "content": "..."}, ...]}`, content a string or a list of typed parts;
* `sharegpt`: `{"conversations": [{"from": "human", "value": "..."}, ...]}`, LLaVA's with `image` beside it;
* `alpaca`: `{"instruction": "...", "output": "..."}`, optionally with `input` and `history`;
* `cauldron`: `{"images": [...], "texts": [{"user": "...", "assistant": "..."}, ...]}`.

Each may have a field `system`. Two turns of one role in a row are allowed; some chat templates refuse them later.
A picture becomes an image part of a user turn: where the row has one, where the text says `<image>`, else in front.
What this module does not know: tokens and templates (`masking`), whether an answer is right (`tasks`).
"""

import codecs
import json
import os
import re
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from ironlogic import IronLogicError
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes, resolve_picture

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

__all__ = [
    "FIELDS",
    "ChatError",
    "Format",
    "Rejected",
    "check_chat",
    "describe_rejected",
    "image_parts",
    "load_chats",
    "read_extras",
    "read_row",
    "say_where",
    "short",
    "split_chats",
]

# --- the forms in which a row can hold a chat -------------------------------------------------------------------
Format = Literal["auto", "messages", "sharegpt", "alpaca", "cauldron"]
FIELDS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output"],
    "cauldron": ["texts"],
}
_TAKEN = {"messages", "conversations", "instruction", "input", "output", "system", "history", "source_row"}
_TAKEN |= {"texts", "image", "images"}
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"} | _ROLES
_CARRIERS = ("tool_calls", "function_call", "reasoning_content", "thinking")  # to drop one is a silent loss
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = re.compile(r"\n?<image>\n?")  # LLaVA's place for a picture, with the newline that keeps it apart


def say_where(field: str, value: str, reason: str) -> str:
    return f"{field} is {value}; {reason}" if value else f"{field} {reason}".strip()


class ChatError(IronLogicError, ValueError):
    """A source, chat or template that can't be used. `field` and `value` name the place where there is one."""

    def __init__(self, reason: str, *, field: str = "", value: str = ""):
        super().__init__(say_where(field, value, reason))
        self.reason, self.field, self.value = reason, field, value


def check_chat(messages: Any) -> list[dict]:
    """A copy in plain form: role and content only, lists of text parts joined. Raises ChatError naming the turn."""
    return _check_order(_read_turns(messages, "messages"))


def short(value: object) -> str:
    """A repr of at most 80 characters, also of deep, endless and strange values."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def read_row(row: Any, format: Format) -> list[dict]:
    """Its messages; every picture of the row is in an image part of a user turn. Raises ChatError."""
    if not isinstance(row, Mapping):
        raise row if isinstance(row, ChatError) else ChatError("expected an object", field="row", value=short(row))
    form = _detect_form(row) if format == "auto" else format
    field = FIELDS[form][0]
    if form == "alpaca":
        turns = _read_alpaca(row)
    else:
        turns = _read_cauldron(row) if form == "cauldron" else _read_turns(row.get(field), field)
        _place_images(turns, _row_images(row), field, marked=form == "sharegpt")
    if row.get("system") and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _read_text(row["system"], "system")})
    return _check_order(turns)


def image_parts(messages: list[dict]) -> list[dict]:
    """The image parts of all turns, in their order; not copies."""
    lists = [turn["content"] for turn in messages if not isinstance(turn["content"], str)]
    return [part for parts in lists for part in parts if part["type"] == "image"]


def _row_images(row: Mapping) -> list:
    """Pictures that the row holds beside its turns."""
    given = row.get("images") if row.get("images") is not None else row.get("image")
    if given is None or (isinstance(given, str) and not given):
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _place_images(turns: list[dict], images: list, field: str, *, marked: bool) -> None:
    """Each of `images` into its place: an image part, or where a user's text says `<image>`.

    Without any place they stand in front of the first user turn. `marked`: `<image>` without a picture is an error,
    not a text.
    """
    for turn in turns:
        if (images or marked) and turn["role"] == "user" and isinstance(turn["content"], str):
            pieces = _MARK.split(turn["content"])
            if len(pieces) > 1:
                turn["content"] = [{"type": "text", "text": pieces[0]}]
                for piece in pieces[1:]:
                    turn["content"] += [{"type": "image"}, {"type": "text", "text": piece}]
                turn["content"] = [p for p in turn["content"] if p["type"] == "image" or p["text"].strip()]
    places = image_parts(turns)
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if images and not places and first is not None:
        text = (
            [{"type": "text", "text": first["content"]}] if isinstance(first["content"], str) else first["content"]
        )
        first["content"] = [{"type": "image"} for _ in images] + text
        places = image_parts(turns)
    if (images or (marked and any("image" not in part for part in places))) and len(images) != len(places):
        reason = f"holds {len(places)} places for pictures (<image>), but the row has {len(images)} pictures"
        raise ChatError(reason, field=field)
    for part, image in zip(places, images, strict=False):
        if image is not None:
            part["image"] = image


def _read_cauldron(row: Mapping) -> list[dict]:
    """All its questions and answers, about the same pictures."""
    texts = row["texts"]
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(one, Mapping) for one in texts):
        raise ChatError("expected a list of objects with user and assistant", field="texts", value=short(texts))
    turns = []
    for index, one in enumerate(texts):
        for role in ("user", "assistant"):
            turns.append({"role": role, "content": _read_text(one.get(role), f"texts[{index}].{role}")})
    return turns


def _detect_form(row: Mapping) -> str:
    for given in ([name for name in row if row[name] is not None], row):  # columns of a mixed table may be null
        for form, fields in FIELDS.items():
            if all(field in given for field in fields):
                return form
    names = ", ".join(short(name).strip("'") for name in list(row)[:8]) or "nothing"
    expected = "expected messages, or conversations (ShareGPT), or instruction and output (Alpaca), or texts"
    raise ChatError(f"has the fields {names}; {expected}", field="row")


def _read_turns(turns: Any, field: str) -> list[dict]:
    if not isinstance(turns, list | tuple) or not turns:
        raise ChatError("expected a list of turns", field=field, value=short(turns))
    return [_read_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def _read_turn(turn: Any, field: str) -> dict:
    if not isinstance(turn, Mapping):
        raise ChatError("expected an object with role and content", field=field, value=short(turn))
    sharegpt = turn.get("role") is None and "from" in turn
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    roles, expected = (_SHAREGPT_ROLES, "human or gpt") if sharegpt else (_ROLES, "user or assistant")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise ChatError(f"expected system, {expected}", field=f"{field}.{role_key}", value=short(role))
    for key in _CARRIERS:
        if turn.get(key):
            raise ChatError("is not read; put it into the text", field=f"{field}.{key}", value=short(turn[key]))
    content = _read_content(turn.get(content_key), f"{field}.{content_key}", empty=roles[role] == "system")
    return {"role": roles[role], "content": content}


def _read_content(content: Any, field: str, *, empty: bool) -> str | list[dict]:
    if not isinstance(content, list | tuple):
        return _read_text(content, field, empty=empty)
    parts = [_read_part(part, f"{field}[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return _read_text("".join(part["text"] for part in parts), field, empty=empty)
    return parts


def _read_part(part: Any, field: str) -> dict:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image"):
        raise ChatError("expected a part of type text or image", field=field, value=short(part))
    if kind == "image" and part.get("image") is None:  # only its place; the picture comes by another way
        return {"type": "image"}
    if kind == "image" and not isinstance(part["image"], str | bool | int | float | list):
        return {"type": "image", "image": part["image"]}  # bytes, a picture in memory: `pictures` knows
    return {"type": kind, kind: _read_text(part.get(kind), f"{field}.{kind}", empty=kind == "text")}


def _read_text(text: Any, field: str, *, empty: bool = False) -> str:
    if not isinstance(text, str) or not (empty or text.strip()):
        raise ChatError("expected text", field=field, value=short(text))
    if _SURROGATE.search(text):
        raise ChatError("holds half a surrogate pair, which is not Unicode text", field=field)
    if "\0" in text:
        raise ChatError("holds a NUL character, a sign of UTF-16 or binary data", field=field)
    return text


def _read_alpaca(row: Mapping) -> list[dict]:
    """The pairs of the history, then instruction and input (a blank line between them) -> output."""
    texts = []
    history = row.get("history") or []
    for index, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ChatError("expected [question, answer]", field=f"history[{index}]", value=short(pair))
        texts += [_read_text(text, f"history[{index}][{side}]") for side, text in enumerate(pair)]
    question = _read_text(row.get("instruction"), "instruction")
    if row.get("input") is not None and (further := _read_text(row["input"], "input", empty=True)).strip():
        question += "\n\n" + further
    texts += [question, _read_text(row.get("output"), "output")]
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


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


def read_extras(row: Mapping) -> dict[str, Any]:
    """The scalars of the row that are not part of the chat; [] stands for a value that is none."""
    extras = {}
    for name, value in row.items():
        if not isinstance(name, str) or name in _TAKEN or _SURROGATE.search(name):
            continue
        if isinstance(value, str):
            extras[name] = [] if _SURROGATE.search(value) or "\0" in value else value
        elif value is not None:
            fits = type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63)
            extras[name] = value if fits else []
    return extras


# --- reading, checking, splitting -------------------------------------------------------------------------------
_Row = tuple[
    int, str, dict, list
]  # line, chat as JSON (a million are held once, and not as objects), extras, bytes
Rows = Iterator[tuple[int, Any]]  # numbered; one that can't be read is the ChatError that says why
_MAX_LINE = 32 * 2**20  # bytes in one line of JSONL; a longer one is no chat but a damaged file
_MAX_COLUMNS = 64  # further columns: rows whose keys are data would make a table as wide as it is long
_CHUNK = 2**25  # characters; far below the 2 GiB that one Arrow array of strings can hold
_TEXT = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_PART = pa.struct({"type": pa.string(), "text": pa.string(), "image": pa.string()})
_PARTS = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(_PART)}))
_SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


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
        return f"{where}: {say_where(self.field, self.value, self.reason)}"


def load_chats(
    source: str | os.PathLike | list | Dataset,
    *,
    format: Format = "auto",
    split: str = "train",
    images: str | os.PathLike | None = None,
) -> tuple[Dataset, list[Rejected]]:
    """Chats from a .jsonl, .json or .parquet file, a hub dataset "org/name", a list of dicts or a `Dataset`.

    The dataset has the columns `messages`, `source_row` (1-based: the line of a JSONL file, else the row) and each
    further column of scalars of one type (at most 64; missing ones are null). A content is a string; if any row
    holds an image, every content is a list of `{"type", "text", "image"}`. `split` is for the hub.

    A picture that came as a path stays one: `image` of its part, absolute, and inside the folder `images` (by
    default that of the file; paths in memory are left as they are unless `images` is given). One that came as bytes
    or from memory is in the further column `images`: for every image part of the row its bytes, or null. Every
    picture is opened, so that a missing, damaged or huge one is a `Rejected`.

    >>> chats, rejected = load_chats([{"instruction": "Add 2 and 2.", "output": "4"}, {"instruction": "Why?"}])
    >>> [turn["content"] for turn in chats[0]["messages"]]
    ['Add 2 and 2.', '4']
    >>> print(rejected[0])
    row 2: row has the fields instruction; expected messages, or conversations (ShareGPT), or ...

    Raises ChatError if the source can't be read or has no usable row; a bad row beside good ones is a `Rejected`.
    """
    if format != "auto" and format not in FIELDS:
        raise ChatError(f"format {format!r} is unknown; expected auto, {', '.join(FIELDS)}")
    name = str(source) if isinstance(source, str | os.PathLike) else ""
    if images is None and os.path.isfile(name):
        images = Path(source).parent
    waiting: deque[_Row] = deque()
    rejected, parts = [], False
    try:
        for line, row in _open_source(source, split):
            try:
                messages, extras = read_row(row, format), read_extras(row)
                blobs = _take_pictures(messages, images)
            except ChatError as error:
                rejected.append(Rejected(name, line, error.field, error.value, error.reason))
                continue
            parts = parts or any(isinstance(turn["content"], list) for turn in messages)
            waiting.append((line, json.dumps(messages, ensure_ascii=False), extras, blobs))
    except (OSError, pa.ArrowException) as error:
        raise ChatError(f"{name}: can't be read ({error}); check its path, rights and size") from error
    if not waiting:
        why = describe_rejected(rejected) if rejected else "it is empty; expected an object with a chat per row"
        raise ChatError(f"{name or 'the rows'}: nothing to train on: {why}")
    return _to_dataset(waiting, parts), rejected


def _take_pictures(messages: list[dict], folder: str | os.PathLike | None) -> list[bytes | None]:
    """Checks every picture; paths become absolute, all else is taken out. [] where nothing was."""
    blobs: list[bytes | None] = []
    for index, part in enumerate(image_parts(messages)):
        image, blob = part.pop("image", None), None
        try:
            if isinstance(image, str) and not image.startswith("data:"):
                path = image
                if folder is not None:
                    path = str(resolve_picture(image, folder=folder))
                    check_picture(path)
                part["image"] = path
            elif image is not None:
                blob = picture_bytes(image, folder=folder)
                check_picture(blob)
        except PictureError as error:
            raise ChatError(str(error), field=f"picture {index + 1}") from error
        blobs.append(blob)
    return blobs if any(blobs) else []


def describe_rejected(rejected: list[Rejected]) -> str:
    """A short summary: how many rows were left out, the reasons by frequency, each with its first lines.

    >>> print(describe_rejected([Rejected("x.jsonl", n, "messages", "", "has no user turn") for n in (3, 8)]))
    2 rows left out
      2 x messages has no user turn (line 3, 8)
    """
    groups: dict[str, list[Rejected]] = {}
    for one in rejected:
        groups.setdefault(re.sub(r"\d+", "#", f"{one.field} {one.reason}"), []).append(one)
    lines = [f"{len(rejected)} row{'s' * (len(rejected) != 1)} left out"]
    for group in sorted(groups.values(), key=len, reverse=True)[:5]:
        example, first = group[0], ", ".join(str(one.line) for one in group[:3]) + ", ..." * (len(group) > 3)
        sentence = say_where(example.field, example.value, example.reason)
        lines.append(f"  {len(group)} x {sentence} (line {first})")
    return "\n".join(lines + [f"  and {len(groups) - 5} more reasons"] * (len(groups) > 5))


def split_chats(dataset: Dataset, *, holdout: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(train, test), about a share `holdout` of the chats in the second.

    A hash of the user turns and their pictures (of files the name: folders differ between machines) decides for
    each chat by itself: chats with the same questions are never on both sides, and new rows move no old one. Raises
    ChatError unless 0 <= holdout < 1.
    """
    if not 0 <= holdout < 1:
        raise ChatError(f"holdout is {holdout}; expected a share of the chats, from 0 to below 1")
    sides: tuple[list[int], list[int]] = ([], [])
    columns = [name for name in ("messages", "images") if name in dataset.column_names]
    batches = dataset.with_format(None).select_columns(columns).iter(1000)  # three times as fast as by row
    rows = chain.from_iterable(zip(*(batch[name] for name in columns), strict=True) for batch in batches)
    for row, (messages, *images) in enumerate(rows):
        asked = [_without_folders(turn["content"]) for turn in messages if turn["role"] == "user"]
        content = blake2b(json.dumps([seed, asked], sort_keys=True).encode(), digest_size=8)
        for picture in chain.from_iterable(some or () for some in images):
            content.update(picture or b"")
        sides[int.from_bytes(content.digest(), "big") < holdout * 2**64].append(row)
    return dataset.select(sides[False]), dataset.select(sides[True])


def _without_folders(content: Any) -> Any:
    """The content of a turn with the bare names of its pictures' files."""
    if not isinstance(content, list | tuple):
        return content
    parts = [dict(part) for part in content]
    for part in parts:
        if isinstance(part.get("image"), str):
            part["image"] = Path(part["image"]).name
    return parts


def _open_source(source: Any, split: str) -> Rows:
    if isinstance(source, Dataset):
        return _read_tables(source.with_format("arrow").iter(100))
    if isinstance(source, list | tuple):
        return enumerate(source, 1)
    if not isinstance(source, str | os.PathLike):
        raise ChatError(f"the source is a {type(source).__name__}; expected a path, hub name, list or Dataset")
    path, suffix = Path(source), Path(source).suffix.lower()
    if path.is_dir():
        files = sorted(one.name for one in path.iterdir() if one.suffix.lower() in _READERS)[:5]
        raise ChatError(f"{path} is a directory; name one file in it ({', '.join(files) or 'it has no data file'})")
    if suffix in _READERS:
        return _READERS[suffix](path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.exists():
        return _read_hub(str(source), split)
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
        came, reason = short(raw.decode(errors="replace").strip()), str(error).replace("line 1 column", "column")
        return ChatError(f"expected JSON in UTF-8: {reason}", field="line", value=came)


def _read_json(path: Path) -> Rows:
    rows = _parse(path.read_bytes())
    if isinstance(rows, ChatError):
        hint = " (one object per line is JSON Lines: name the file .jsonl)" * ("Extra data" in rows.reason)
        raise ChatError(f"{path}: {rows.reason}{hint}")
    if not isinstance(rows, list):
        raise ChatError(f"{path}: holds {short(rows)}; expected an array of objects")
    return enumerate(rows, 1)


def _read_tables(tables: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    number = count(1)
    for table in tables:
        for index in range(table.num_rows):
            try:
                row = table.slice(index, 1).to_pylist()[0]
            except ValueError as error:  # such as text that is not UTF-8
                row = ChatError(f"can't be read ({error})", field="row")
            yield next(number), row


def _read_hub(name: str, split: str) -> Rows:
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network, a cache or a loader has to say
        tried = f"no such file here, and the split {split!r} of a hub dataset of this name could not be loaded"
        why = f"{type(error).__name__}: {short(str(error))}"
        advice = "check the name, or give the path of a local file"
        if datasets.config.HF_HUB_OFFLINE:
            advice = "the hub is switched off here, set HF_HUB_OFFLINE=0 before the first cell"
        raise ChatError(f"{name}: {tried} ({why}); {advice}") from error
    return _read_tables(dataset.with_format("arrow").iter(100))


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: _read_tables(pq.ParquetFile(path).iter_batches(100)),
}


def _to_dataset(waiting: deque[_Row], parts: bool) -> Dataset:
    """The rows in Arrow; `waiting` is emptied on the way. A column of mixed types is left out."""
    kinds: dict[str, set[type]] = {}
    for _, _, extras, _ in waiting:
        for name, value in extras.items():
            if name in kinds or len(kinds) < _MAX_COLUMNS:
                kinds.setdefault(name, set()).add(type(value))
    tables, digest, seen = [], blake2b(digest_size=8), any(blobs for *_, blobs in waiting)
    while waiting:
        rows, size = [], 0
        while waiting and len(rows) < 1000 and size < _CHUNK:
            line, text, extras, blobs = waiting.popleft()
            size += len(text) + sum(len(blob or b"") for blob in blobs)
            rows.append((line, text, extras, blobs))
            digest.update(repr((line, text, extras)).encode())
            for blob in blobs:
                digest.update(blob or b"-")
        chats = [json.loads(text) for _, text, _, _ in rows]
        for turn in chain.from_iterable(chats if parts else []):
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        arrays = {"messages": pa.array(chats, _PARTS if parts else _TEXT)}
        arrays["source_row"] = pa.array([line for line, *_ in rows], pa.int64())
        if seen:
            arrays["images"] = pa.array([blobs or None for *_, blobs in rows], pa.list_(pa.binary()))
        for name, types in kinds.items():
            kind = float if types == {int, float} else next(iter(types)) if len(types) == 1 else list
            if kind in _SCALARS:
                values = [None if one.get(name) is None else kind(one[name]) for _, _, one, _ in rows]
                arrays[name] = pa.array(values, _SCALARS[kind])
        tables.append(pa.table(arrays))
    return Dataset(pa.concat_tables(tables), fingerprint=digest.hexdigest())  # else made from a copy of it all
