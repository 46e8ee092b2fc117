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
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import Any

from ironlogic.data.chat_forms import (
    FIELDS,
    ChatError,
    Format,
    check_chat,
    image_parts,
    read_extras,
    read_row,
    say_where,
    short,
)
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes, resolve_picture

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

__all__ = ["ChatError", "Rejected", "check_chat", "describe_rejected", "load_chats", "split_chats"]

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

    A hash of the user turns and their pictures decides for each chat by itself: chats with the same questions are
    never on both sides, and new rows move no old one. Raises ChatError unless 0 <= holdout < 1.
    """
    if not 0 <= holdout < 1:
        raise ChatError(f"holdout is {holdout}; expected a share of the chats, from 0 to below 1")
    sides: tuple[list[int], list[int]] = ([], [])
    columns = [name for name in ("messages", "images") if name in dataset.column_names]
    batches = dataset.with_format(None).select_columns(columns).iter(1000)  # three times as fast as by row
    rows = chain.from_iterable(zip(*(batch[name] for name in columns), strict=True) for batch in batches)
    for row, (messages, *images) in enumerate(rows):
        asked = [turn["content"] for turn in messages if turn["role"] == "user"]
        content = blake2b(json.dumps([seed, asked], sort_keys=True).encode(), digest_size=8)
        for picture in chain.from_iterable(some or () for some in images):
            content.update(picture or b"")
        sides[int.from_bytes(content.digest(), "big") < holdout * 2**64].append(row)
    return dataset.select(sides[False]), dataset.select(sides[True])


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
