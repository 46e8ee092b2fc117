"""Asking a vision-language model about pictures, and the controls that show whether it looks at them."""

import contextlib
import random
import re
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

from ironlogic.data.chats import ChatError, Chats, Rejected, RejectedRows, load_chats
from ironlogic.data.masking import IGNORED
from ironlogic.models import LoadedModel, inference
from ironlogic.training.picture_rows import PictureBatches, PictureReader
from ironlogic.training.runs import run_folder
from ironlogic.vision.features import cached_tower, compute_features

from jinja2 import TemplateError
from PIL import Image

__all__ = ["answer_pictures", "control_rows", "control_tests", "last_question", "load_questions"]

_EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>")  # Qwen3's template has it trained


def answer_pictures(
    loaded: LoadedModel,
    rows: Iterable[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> list[str]:
    """Greedy answers to conversations, one a row in their order; an answer that a row ends with is not shown.

    A picture is whatever `read_picture` reads. `cache`: a folder of features, in the results folder unless it is a
    path.
    Raises `ChatError` naming the row whose picture or text can't be used.
    """
    reader, asked = PictureReader(loaded), []
    for number, messages in enumerate(rows, 1):
        try:
            asked.append(_prompt(messages, reader, loaded.max_length))
        except ChatError as error:
            raise ChatError(f"row {number}: {error}") from error
    features = None
    if cache is not None:
        keys = [key for row in asked for key in row["picture_keys"]]
        features = compute_features(loaded, reader, keys, run_folder(cache))
    batches, answers = PictureBatches(reader, features, side="left"), [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda row: asked[row]["length"])
    with inference(loaded) as model, cached_tower(model) if features else contextlib.nullcontext():
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            batch = batches([asked[row] for row in numbers])
            del batch["labels"]
            batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].to(model.get_input_embeddings().weight.dtype)
            out = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=reader.tokenizer.pad_token_id,
            )
            new = out[:, batch["input_ids"].shape[1] :]
            for row, text in zip(
                numbers, reader.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                answers[row] = _EMPTY_THOUGHT.sub("", text).strip()
    return answers


def load_questions(
    source: Any, *, train: int, test: int, images: str | Path | None = None, seed: int = 0
) -> tuple[Chats, Chats]:
    """(rows to train on, held-out rows that have a picture) of what `load_chats` takes, at most so many of each.

    `images` as in `load_chats`. Says how many rows there are and what was left out. Raises `ChatError` when there
    are too few.
    """
    rows = load_chats(source, images=images)
    print(f"{len(rows)} rows. {rows.rejected}")
    kept, apart = rows.split(seed=seed)
    pictured = (index for index, row in enumerate(apart) if last_question(row)[0] is not None)
    held_out = apart.select(list(islice(pictured, test)))
    if not (len(kept) and len(held_out)):
        raise ChatError(f"{source}: {len(rows)} rows are too few to hold out one with a picture; bring 20 or more")
    return kept[:train], held_out


def last_question(row: Sequence[dict[str, Any]]) -> tuple[Any, str, str]:
    """(picture, question, reply) of a conversation: its last user turn, the last picture up to there (None: there
    is none), and the text of the turn that ends it."""
    last = max(index for index, turn in enumerate(row) if turn["role"] == "user")
    images = [part.get("image") for turn in row[: last + 1] for part in _image_parts(turn)]
    reply = _text(row[-1]) if len(row) > last + 1 else ""
    return images[-1] if images else None, _text(row[last]), reply


def _prompt(messages: Sequence[dict[str, Any]], reader: PictureReader, max_length: int) -> dict[str, Any]:
    """A row of `PictureBatches` that ends where the answer begins."""
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    keys = reader.take(messages)
    parts = [dict(turn, content=_parts(turn["content"])) for turn in messages]
    try:
        ids = reader.tokenizer.apply_chat_template(parts, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise ChatError(f"the chat template refuses these turns ({error})") from error
    reader.check(ids, keys)
    length = len(ids) + sum(len(reader.block(key)) - 1 for key in keys)
    if length >= max_length:
        raise ChatError(f"needs {length} tokens and room to answer; max_length is {max_length}")
    return {"input_ids": ids, "labels": [IGNORED] * len(ids), "picture_keys": keys, "length": length}


def control_rows(
    rows: Iterable[Sequence[dict[str, Any]]],
    control: Literal["image", "blank", "shuffled", "none"],
    *,
    seed: int = 0,
) -> list[list[dict]]:
    """The same conversations with their own pictures, grey ones, another row's, or none at all.

    Whatever is answered rightly without the right picture was not seen. Shuffled: the rows with pictures in one
    random circle, so that each takes those of the next and none keeps its own (two pictures may look alike).
    """
    chats = [_copy(messages) for messages in rows]
    parts = [[part for turn in chat for part in _image_parts(turn)] for chat in chats]
    if control == "blank":
        grey = Image.new("RGB", (64, 64), (127, 127, 127))
        for part in chain.from_iterable(parts):
            part["image"] = grey
    elif control == "shuffled":
        circle = [row for row, own in enumerate(parts) if own]
        random.Random(seed).shuffle(circle)
        given = {row: [part["image"] for part in parts[row]] for row in circle}
        for row, other in zip(circle, circle[1:] + circle[:1], strict=True):
            for part, image in zip(parts[row], cycle(given[other]), strict=False):
                part["image"] = image
    elif control == "none":
        for turn in chain.from_iterable(chats):
            turn["content"] = _text(turn)
    elif control != "image":
        raise ValueError(f"control_rows: control is {control!r}; expected image, blank, shuffled or none")
    return chats


def control_tests(
    loaded: LoadedModel, rows: Iterable[Sequence[dict[str, Any]]], *, seed: int = 0
) -> dict[str, list[list[dict]]]:
    """The same questions with "the right picture", with "a grey picture" and with "another row's picture".

    A row that `answer_pictures` would refuse in one of them is left out of all, and printed with its reason. Raises
    `ChatError` when none is left.
    """
    controls = {"the right picture": "image", "a grey picture": "blank", "another row's picture": "shuffled"}
    tests = {name: control_rows(rows, control, seed=seed) for name, control in controls.items()}
    reader, refused = PictureReader(loaded), {}
    for number, messages in chain.from_iterable(enumerate(test, 1) for test in tests.values()):
        try:
            _prompt(messages, reader, loaded.max_length)
        except ChatError as error:
            refused.setdefault(number, Rejected("", number, error.field, error.value, error.reason))
    told = RejectedRows(refused[number] for number in sorted(refused))
    kept = {name: [row for i, row in enumerate(test, 1) if i not in refused] for name, test in tests.items()}
    if not all(kept.values()):
        raise ChatError(f"no question is left to ask: {told}")
    if told:
        print(f"held-out questions: {told}")
    return kept


def _copy(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New turns and parts; the pictures are shared."""
    copies = [dict(turn) for turn in messages]
    for turn in copies:
        if not isinstance(turn["content"], str):
            turn["content"] = [dict(part) for part in turn["content"]]
    return copies


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(turn: dict) -> str:
    if isinstance(turn["content"], str):
        return turn["content"]
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def _image_parts(turn: dict) -> list[dict]:
    return [] if isinstance(turn["content"], str) else [p for p in turn["content"] if p["type"] == "image"]
