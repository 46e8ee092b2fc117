"""The forms in which a row can hold a chat, each read into the same plain messages.

`messages`, `sharegpt` (LLaVA's rows too: `image` beside `conversations`), `alpaca` and `cauldron` (`images` beside
`texts`, as in the_cauldron). What this module does not know: files (`chats`), how a picture is opened (`pictures`).
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from ironlogic import IronLogicError

__all__ = [
    "FIELDS",
    "ChatError",
    "Format",
    "check_chat",
    "image_parts",
    "read_extras",
    "read_row",
    "say_where",
    "short",
]

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
