"""Conversations with pictures -> rows of token ids, and batches with pixels, as each kind of model takes them.

A row holds one image token for each picture; the collator writes out the block that stands for it. How long a block
is and what a picture becomes is asked of transformers' own processor. Known are the classes that `splice` makes
(LLaVA's and SmolVLM's, a picture whole or in tiles), Qwen3-VL and Gemma 3.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ironlogic.data.chats import ChatError, Chats, Rejected, RejectedRows, image_parts
from ironlogic.data.masking import IGNORED, encode_chats
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes, read_picture
from ironlogic.models import LoadedModel, ModelError, bare

import torch
from datasets import List, Value
from PIL import Image

__all__ = ["PictureBatches", "PictureReader", "encode_pictures"]

# what the model wants to be told of each token: is it of a picture (1) or of the text (0)?
_TYPES = {"llava": None, "smolvlm": None, "qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}


class PictureReader:
    """Pictures by the key of their content, and what one model's processor makes of them.

    Raises ModelError for a model that takes no pictures, or in a way that is not known here.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        model = bare(loaded.model)
        self.kind = model.config.model_type
        if loaded.processor is None or self.kind not in _TYPES:
            raise ModelError(f"{type(model).__name__} takes no pictures here; known are {', '.join(_TYPES)}")
        self.processor = loaded.processor
        self.tokenizer = copy.copy(self.processor.tokenizer)
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        self.image_id = self.processor.image_token_id  # stands once in a row for each picture
        if self.kind == "gemma3":
            # its template writes one token, around which the processor puts more; blanks there may join the text's
            begin, end = self.tokenizer.boi_token, self.tokenizer.eoi_token
            whole = rf"\n\n{begin}{self.tokenizer.image_token}{end}\n\n"
            self.tokenizer.chat_template = self.tokenizer.chat_template.replace(begin, whole)
            self.image_id = self.tokenizer.image_token_id
        self._sources: dict[str, str | bytes] = {}
        self._counts: dict[str, Any] = {}  # by key; and by these
        self._blocks: dict[Any, list[int]] = {}

    @property
    def tiled(self) -> bool:
        """Whether a picture may be cut into several views."""
        return bool(getattr(self.processor.image_processor, "do_image_splitting", False))

    def add(self, source: Any) -> str:
        """The key of a picture. Raises PictureError when it can't be read."""
        if not isinstance(source, str | os.PathLike):
            source = picture_bytes(source)
        key = check_picture(source)
        self._sources.setdefault(key, source if isinstance(source, bytes) else str(source))
        return key

    def open(self, key: str) -> Image.Image:
        return read_picture(self._sources[key])

    def take(self, messages: list[dict]) -> list[str]:
        """The keys of a conversation's pictures, in order. Raises ChatError where one can't be read."""
        keys = []
        for number, part in enumerate(image_parts(messages), 1):
            if part.get("image") is None:
                raise ChatError("is a place for a picture, but no picture came", field=f"picture {number}")
            try:
                keys.append(self.add(part["image"]))
            except PictureError as error:
                raise ChatError(str(error), field=f"picture {number}") from error
        return keys

    def block(self, key: str) -> list[int]:
        """The token ids that stand for a picture."""
        if key not in self._counts:
            self._counts[key] = self._count(key)
        count = self._counts[key]
        if count not in self._blocks:
            self._blocks[count] = self._block_of(count)
        return self._blocks[count]

    def _count(self, key: str) -> Any:
        """What its block depends on: patches, (views, rows, columns), or nothing where all are alike."""
        if self.kind != "qwen3_vl" and not self.tiled:
            return None
        width, height = self.open(key).size
        return self.processor.image_processor.get_number_of_image_patches(height, width)

    def _block_of(self, count: Any) -> list[int]:
        if count is None:
            return self._same_for_all()
        if self.kind == "qwen3_vl":
            return [self.image_id] * (count // self.processor.image_processor.merge_size**2)
        _, rows, columns = count
        text = self.processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _same_for_all(self) -> list[int]:
        counts = set()
        for size in ((64, 64), (96, 64)):
            inputs = self.processor.image_processor([[Image.new("RGB", size, "gray")]], return_tensors="pt")
            text = self.processor.replace_image_token(inputs, 0)
            counts.add(self.tokenizer.encode(text, add_special_tokens=False).count(self.image_id))
        if len(counts) > 1:
            name = type(self.processor).__name__
            raise ModelError(f"{name} writes {sorted(counts)} image tokens; expected always as many")
        return [self.image_id] * counts.pop()

    def pixels(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Pixels of these pictures as the model takes them; of a splice (V, 3, H, W), all views in a row."""
        made = [self.processor.image_processor([[self.open(key)]], return_tensors="pt") for key in keys]
        pixels = [one["pixel_values"] for one in made]
        if self.kind == "qwen3_vl":  # patches of all pictures in a row, and how many there are in each
            return {
                "pixel_values": torch.cat(pixels),
                "image_grid_thw": torch.cat([o["image_grid_thw"] for o in made]),
            }
        return {"pixel_values": torch.cat([one.reshape(-1, *one.shape[-3:]) for one in pixels])}

    def check(self, ids: list[int], keys: Sequence[str]) -> None:
        """Raises ChatError unless there is one image token for each picture."""
        count = max(ids.count(self.image_id), ids.count(self.processor.image_token_id))
        if count != len(keys):
            cause = "a text holds it" if count > len(keys) else "the chat template left it out"
            reason = f"hold {count} times {self.processor.image_token!r} for {len(keys)} pictures: {cause}"
            raise ChatError(reason, field="messages")


def encode_pictures(
    loaded: LoadedModel,
    chats: Chats,
    *,
    max_length: int,
    loss: Literal["assistant", "all"] = "assistant",
    needs_picture: bool = False,
    most: int = 0,
) -> tuple[list[dict[str, Any]], PictureReader, RejectedRows]:
    """Chats as rows of tokens, the reader of their pictures, and the rows left out, each with its reason.

    A row has `input_ids`, `labels` (IGNORED where not trained, so for every image token), `picture_keys` in the
    order of its image tokens, `length` (tokens, the blocks written out) and the further columns of the chats. It is
    cut on the right to `max_length` tokens, but never inside or before a picture's block: such a row is left out,
    and the reason says how many tokens it needs. `needs_picture` leaves out rows of text alone, `most` those with
    more pictures (0: any number). Raises ChatError when no row is left.
    """
    reader, keys, rejected = PictureReader(loaded), {}, []
    for index, messages in enumerate(chats):
        try:
            keys[index] = reader.take(messages)
            _check_count(len(keys[index]), needs_picture, most)
        except ChatError as error:
            keys.pop(index, None)
            rejected.append(chats.reject(index, error))
    rows: list[dict[str, Any]] = []
    if keys:
        readable = chats.select(keys)
        columns = readable.rows.remove_columns([n for n in ("images",) if n in readable.rows.column_names])
        columns = columns.add_column("picture_keys", list(keys.values()), feature=List(Value("string")))
        readable = Chats(columns, source=chats.source)
        encoded, report = encode_chats(readable, reader.tokenizer, loss=loss, max_length=2**31 - 1)
        rejected += report.rejected
        for row in encoded:
            try:
                rows.append(row | _fit(row, reader, max_length))
            except ChatError as error:
                rejected.append(Rejected(chats.source, row["source_row"], error.field, error.value, error.reason))
    if not rows:
        raise ChatError(f"no row is left to train on: {RejectedRows(rejected)}")
    return rows, reader, RejectedRows(sorted(rejected, key=lambda row: row.line))


def _check_count(count: int, needs_picture: bool, most: int) -> None:
    if needs_picture and not count:
        raise ChatError("holds no picture, and nothing else is trained here", field="messages")
    if most and count > most:
        raise ChatError(f"holds {count} pictures; the most that are taken here is {most}", field="messages")


def _fit(row: dict[str, Any], reader: PictureReader, max_length: int) -> dict[str, Any]:
    """The row's columns when it is cut to `max_length` with its blocks written out."""
    ids, keys = row["input_ids"], row["picture_keys"]
    reader.check(ids, keys)
    places = [position for position, token in enumerate(ids) if token == reader.image_id]
    labels = [IGNORED, *row["labels"][1:]]  # nothing predicts the first token
    for position in places:
        labels[position] = IGNORED
    blocks = sum(len(reader.block(key)) for key in keys)
    added = blocks - len(keys)  # tokens that the blocks add
    trained = [position for position, label in enumerate(labels) if label != IGNORED]
    end = min(len(ids), max_length - added)
    last_needed = max([trained[0] if trained else len(ids) - 1, *places])
    if not trained or end <= last_needed:
        raise ChatError(
            f"needs at least {last_needed + 1 + added} tokens, {blocks} of them for {len(keys)} pictures, but "
            f"max_length is {max_length}; a picture is never cut",
            field="messages",
        )
    return {"input_ids": ids[:end], "labels": labels[:end], "length": end + added}


@dataclass(frozen=True)
class PictureBatches:
    """Rows -> `input_ids`, `attention_mask`, `labels` (B, T), and the pixels of their pictures in order.

    `features` of a splice's tower, by key, take the place of pixels, for use inside `cached_tower`.
    """

    reader: PictureReader
    features: Any = None
    side: Literal["left", "right"] = "right"  # left for generating; in training both give the same loss

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        reader, pad = self.reader, self.reader.tokenizer.pad_token_id
        keys = [key for row in rows for key in row["picture_keys"]]
        written = [self._write_out(row) for row in rows]
        longest = max(len(ids) for ids, _ in written)
        batch = {
            "input_ids": torch.tensor([self._pad(ids, pad, longest) for ids, _ in written]),
            "attention_mask": torch.tensor([self._pad([1] * len(ids), 0, longest) for ids, _ in written]),
            "labels": torch.tensor([self._pad(labels, IGNORED, longest) for _, labels in written]),
        }
        if types := _TYPES[reader.kind]:
            batch[types] = (batch["input_ids"] == reader.image_id).long()
        if not keys:
            return batch
        if self.features is None:
            batch |= reader.pixels(keys)
        else:
            batch["pixel_values"] = torch.cat([self.features[key] for key in keys])
        if reader.kind == "smolvlm":  # wants (picture, view, ...), and takes as many pictures as there are views
            seen = batch["pixel_values"][:, None]
            batch["pixel_values"] = seen if self.features is None else seen[:, None]
            if self.features is not None:  # else it looks for patches of pixels in them
                batch["pixel_attention_mask"] = torch.ones(len(seen), 1, 64, 64, dtype=torch.bool)
        return batch

    def _write_out(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids and labels with the pictures' blocks."""
        ids, labels, keys = [], [], iter(row["picture_keys"])
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            block = self.reader.block(next(keys)) if token == self.reader.image_id else [token]
            ids += block
            labels += [label] * len(block)
        return ids, labels

    def _pad(self, values: list[int], filler: int, length: int) -> list[int]:
        space = [filler] * (length - len(values))
        return space + values if self.side == "left" else values + space
