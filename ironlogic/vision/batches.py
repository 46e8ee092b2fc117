"""Chats with pictures -> batches: token ids with a block of image tokens for each picture, labels, pixels.

Three things cost most when the seeds train: running the frozen tower on the same picture again and again, padding
every row to one length, and logits over 151,936 words where nothing is learned. So the features of the tower are
computed once and kept, rows of similar length share a batch, and `label_loss` makes the logits of a few labels at a
time.
"""

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from ironlogic.data.chats import ChatError, Chats, Rejected, RejectedRows
from ironlogic.data.masking import IGNORED, encode_chats
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes, read_picture
from ironlogic.models import LoadedModel, ModelError
from ironlogic.training.runs import RunError, no_room
from ironlogic.vision.splice import bare, tower_name, tower_of

import torch
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = [
    "Features",
    "PictureBatches",
    "PictureRow",
    "Pictures",
    "batches_for",
    "cached_tower",
    "chat_tokenizer",
    "check_image_tokens",
    "compute_features",
    "encode_pictures",
    "image_length",
    "label_loss",
    "open_head",
    "order_by_length",
    "take_pictures",
    "tower_key",
]

# --- features of a frozen tower, computed once and kept ---------------------------------------------------------
_SHARD = 256  # pictures in one file of features


class Pictures:
    """Pictures by the key of their content (`check_picture`): paths, or bytes in memory."""

    def __init__(self) -> None:
        self._sources: dict[str, str | bytes] = {}

    def add(self, source: Any) -> str:
        """Its key. Raises PictureError when it can't be read."""
        if not isinstance(source, str | os.PathLike):
            source = picture_bytes(source)
        key = check_picture(source)
        self._sources.setdefault(key, source if isinstance(source, bytes) else str(source))
        return key

    def open(self, key: str) -> Image.Image:
        return read_picture(self._sources[key])


def tower_key(loaded: LoadedModel) -> str:
    """Names everything that a feature depends on but the picture: the tower's weights, its layer, the processor."""
    tower, config = tower_of(loaded.model), loaded.model.config
    settings = {
        "tower": tower.config.to_dict(),
        "layer": getattr(config, "vision_feature_layer", None),
        "pictures": loaded.processor.image_processor.to_dict(),
        "device": loaded.device.type,
    }
    content = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


class Features:
    """A frozen tower's features of pictures, (N, D) each, by key; in files that are whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        self._open = lru_cache(maxsize=64)(lambda file: safe_open(file, framework="pt"))
        for file in sorted(folder.glob("*.safetensors")):
            try:
                self._file |= dict.fromkeys(self._open(file).keys(), file)
            except (SafetensorError, OSError):  # damaged later: its pictures are looked at again
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._open(self._file[key]).get_tensor(key)

    def add(self, features: dict[str, torch.Tensor]) -> None:
        """Writes one file beside, then renames it. Raises RunError when there is no room."""
        name = blake2b(" ".join(features).encode(), digest_size=16).hexdigest()
        file = self.folder / f"{name}.safetensors"
        beside = self.folder / f"{name}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(features, beside)
            beside.replace(file)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise RunError(no_room(self.folder, error)) from error
        self._open.cache_clear()
        self._file |= dict.fromkeys(features, file)


def compute_features(
    loaded: LoadedModel, pictures: Pictures, keys: Sequence[str], folder: Path, *, batch_size: int = 32
) -> Features | None:
    """The features of these pictures; those that `folder` doesn't hold yet are computed. None: no room for them.

    Every pass of the tower takes `batch_size` pictures, the last one filled up with its last picture, so that a
    feature depends on its picture alone. No room: they would take more than half of the free disk (seed 003's
    558,128 pictures: 614 GiB), which is printed.
    """
    features = Features(folder / tower_key(loaded))
    missing = [key for key in dict.fromkeys(keys) if key not in features]
    for begin in range(0, len(missing), _SHARD):
        shard = missing[begin : begin + _SHARD]
        computed: dict[str, torch.Tensor] = {}
        for first in range(0, len(shard), batch_size):
            batch = shard[first : first + batch_size]
            full = batch + batch[-1:] * (batch_size - len(batch))
            emitted = _run_tower(loaded, [pictures.open(key) for key in full])
            if begin == first == 0 and not _fits_on_disk(emitted[0].nbytes * len(missing), len(missing), folder):
                return None
            computed |= {key: feature.clone() for key, feature in zip(batch, emitted, strict=False)}
        features.add(computed)
    return features


def _fits_on_disk(needed: int, count: int, folder: Path) -> bool:
    """Whether so many bytes are at most half of what is free; else that is printed."""
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed <= free / 2:
        return True
    print(
        f"the features of {count:,} pictures would take {needed / 2**30:,.1f} GiB, more than half of what is "
        f"free in {disk} ({free / 2**30:,.1f} GiB): not kept, the tower runs at every step"
    )
    return False


def _run_tower(loaded: LoadedModel, images: list[Image.Image]) -> torch.Tensor:
    """(P, N, D), of the layer that the projector reads, on the CPU."""
    tower, config = tower_of(loaded.model), loaded.model.config
    layer = getattr(config, "vision_feature_layer", None)  # SmolVLM has none: it takes the last one
    if layer is not None and not isinstance(layer, int):
        raise ModelError(f"vision_feature_layer is {layer}; expected one layer")
    pixels = loaded.processor.image_processor([[image] for image in images], return_tensors="pt")["pixel_values"]
    weight = next(tower.parameters())
    training = tower.training
    tower.eval()
    with torch.inference_mode():
        pixels = pixels.reshape(len(images), *pixels.shape[-3:]).to(weight.device, weight.dtype)
        output = tower(pixel_values=pixels, output_hidden_states=True, return_dict=True)
    tower.train(training)
    return (output.last_hidden_state if layer is None else output.hidden_states[layer]).cpu()


class _KeptFeatures(torch.nn.Module):
    """In the tower's place: gets features where the tower gets pixels, and hands them on."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values, **_):
        features = pixel_values.squeeze(1) if pixel_values.dim() == 4 else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states={self.layer: features})


@contextlib.contextmanager
def cached_tower(model: Any) -> Iterator[None]:
    """Inside, `pixel_values` are features of `compute_features`, and the tower is not run."""
    plain = bare(model)
    name = tower_name(plain)
    tower = getattr(plain.model, name)
    setattr(plain.model, name, _KeptFeatures(getattr(plain.config, "vision_feature_layer", None)))
    try:
        yield
    finally:
        setattr(plain.model, name, tower)


# --- rows -------------------------------------------------------------------------------------------------------
_LOGITS = 2**24  # in memory at a time: 64 MiB in float32


@dataclass(frozen=True)
class PictureRow:
    """One chat. Image tokens stand once for each picture; the collator writes the whole block."""

    input_ids: list[int]
    labels: list[int]  # IGNORED where not trained, so for every image token
    pictures: tuple[str, ...]  # keys, in the order of their image tokens
    length: int  # tokens with the blocks written out


def image_length(processor: Any) -> int:
    """Image tokens that stand for one picture, asked of the processor. Raises ModelError unless always as many."""
    counts = set()
    for size in ((64, 64), (96, 64)):
        blank = Image.new("RGB", size, "gray")
        ids = processor(text=processor.image_token, images=[[blank]], return_tensors="pt")["input_ids"]
        counts.add(ids.eq(processor.image_token_id).sum().item())
    if len(counts) > 1:
        raise ModelError(
            f"{type(processor).__name__} writes {sorted(counts)} image tokens; expected always as many"
        )
    return counts.pop()


def chat_tokenizer(loaded: LoadedModel) -> Any:
    """The tokenizer with the processor's chat template, the one that knows pictures."""
    tokenizer = copy.copy(loaded.processor.tokenizer)
    tokenizer.chat_template = loaded.processor.chat_template or tokenizer.chat_template
    return tokenizer


def encode_pictures(
    loaded: LoadedModel,
    chats: Chats,
    *,
    max_length: int,
    loss: Literal["assistant", "all"] = "assistant",
    needs_picture: bool = False,
) -> tuple[list[PictureRow], Pictures, RejectedRows]:
    """Chats as rows of tokens, their pictures, and the rows left out, each with its reason.

    A row is cut on the right to `max_length` tokens, but never inside or before a picture's block: such a row is
    left out, and the reason says how many tokens it needs. `needs_picture` leaves out rows of text alone.
    Raises ChatError when no row is left.
    """
    pictures, readable, rejected = Pictures(), [], []
    for index, messages in enumerate(chats):
        try:
            plain, keys = take_pictures(messages, pictures)
            if needs_picture and not keys:
                raise ChatError("holds no picture, and nothing else is trained here", field="messages")
        except ChatError as error:
            rejected.append(chats.reject(index, error))
            continue
        readable.append({"messages": plain, "source_row": chats.rows[index]["source_row"], "pictures": keys})
    rows: list[PictureRow] = []
    if readable:
        block = image_length(loaded.processor)
        readable = Chats(Dataset.from_list(readable), source=chats.source)
        encoded, report = encode_chats(readable, chat_tokenizer(loaded), loss=loss, max_length=2**31 - 1)
        rejected += report.rejected
        for row in encoded:
            try:
                rows.append(_fit(row, loaded.processor, block, max_length))
            except ChatError as error:
                rejected.append(Rejected(chats.source, row["source_row"], error.field, error.value, error.reason))
    if not rows:
        raise ChatError(f"no row is left to train on: {RejectedRows(rejected)}")
    return rows, pictures, RejectedRows(sorted(rejected, key=lambda row: row.line))


def take_pictures(messages: list[dict], pictures: Pictures) -> tuple[list[dict], list[str]]:
    """The messages with bare image parts, every content a list; the keys of their pictures in order.

    Raises ChatError for a picture that is missing or can't be read.
    """
    plain, keys = [], []
    for index, turn in enumerate(messages):
        content = turn["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in content:
            if part["type"] == "image":
                if part.get("image") is None:
                    raise ChatError("is a place for a picture, but no picture came", field=f"messages[{index}]")
                try:
                    keys.append(pictures.add(part["image"]))
                except PictureError as error:
                    raise ChatError(str(error), field=f"messages[{index}]") from error
        parts = [{"type": part["type"], "text": part.get("text")} for part in content]
        plain.append({"role": turn["role"], "content": parts})
    return plain, keys


def _fit(row: dict, processor: Any, block: int, max_length: int) -> PictureRow:
    """The encoded row, cut to `max_length` with its blocks of `block` image tokens written out."""
    ids, keys = row["input_ids"], row["pictures"]
    check_image_tokens(ids, keys, processor)
    image_positions = [position for position, token in enumerate(ids) if token == processor.image_token_id]
    labels = [IGNORED, *row["labels"][1:]]  # nothing predicts the first token
    for position in image_positions:
        labels[position] = IGNORED
    trained = [position for position, label in enumerate(labels) if label != IGNORED]
    written_out = len(keys) * (block - 1)  # tokens that the blocks add
    end = min(len(ids), max_length - written_out)
    first_trained = trained[0] if trained else len(ids) - 1
    last_needed = max([first_trained, *image_positions])
    if not trained or end <= last_needed:
        raise ChatError(
            f"needs at least {last_needed + 1 + written_out} tokens, {len(keys) * block} of them for {len(keys)} "
            f"pictures, but max_length is {max_length}; a picture is never cut",
            field="messages",
        )
    return PictureRow(ids[:end], labels[:end], tuple(keys), end + written_out)


def check_image_tokens(ids: list[int], keys: Sequence[str], processor: Any) -> None:
    """Raises ChatError unless there is one image token for each picture."""
    count = ids.count(processor.image_token_id)
    if count != len(keys):
        cause = "a text holds it" if count > len(keys) else "the chat template left it out"
        reason = f"hold {count} times {processor.image_token!r} for {len(keys)} pictures: {cause}"
        raise ChatError(reason, field="messages")


# --- batches ----------------------------------------------------------------------------------------------------
def order_by_length(lengths: Sequence[int], batch_size: int, *, seed: int, epochs: int = 1) -> list[int]:
    """Row numbers of all epochs: each row once an epoch, in random order, rows of similar length in one batch."""
    order: list[int] = []
    window = batch_size * 32  # rows that are sorted among each other
    for epoch in range(epochs):
        rng, rows = random.Random(f"{seed}-{epoch}"), list(range(len(lengths)))
        rng.shuffle(rows)
        for begin in range(0, len(rows), window):
            nearby = sorted(rows[begin : begin + window], key=lambda row: lengths[row])
            batches = [nearby[i : i + batch_size] for i in range(0, len(nearby), batch_size)]
            rng.shuffle(batches)
            order += [row for batch in batches for row in batch]
    return order


@dataclass(frozen=True)
class PictureBatches:
    """Rows -> `input_ids`, `attention_mask`, `labels` (B, T) and `pixel_values` of the B rows' P pictures in order.

    With `features` these take the place of pixels, (P, N, D), for use inside `cached_tower`.
    """

    processor: Any
    pictures: Pictures
    features: Features | None = None
    side: Literal["left", "right"] = "right"  # left for generating; in training both give the same loss
    nested: bool = False  # the SmolVLM class wants (P, 1, ...)

    def __call__(self, rows: Sequence[PictureRow]) -> dict[str, torch.Tensor]:
        block, image = self._block, self.processor.image_token_id
        longest, pad = max(row.length for row in rows), self.processor.tokenizer.pad_token_id
        ids, mask, labels = [], [], []
        for row in rows:
            times = [block if token == image else 1 for token in row.input_ids]
            space = longest - row.length
            ids.append(self._pad(_repeat(row.input_ids, times), pad, space))
            labels.append(self._pad(_repeat(row.labels, times), IGNORED, space))
            mask.append(self._pad([1] * row.length, 0, space))
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch = {name: torch.tensor(values) for name, values in batch.items()}
        if keys := [key for row in rows for key in row.pictures]:
            batch["pixel_values"] = self._pixels(keys)
        return batch

    @cached_property
    def _block(self) -> int:
        return image_length(self.processor)

    def _pad(self, values: list[int], filler: int, space: int) -> list[int]:
        return [filler] * space + values if self.side == "left" else values + [filler] * space

    def _pixels(self, keys: Sequence[str]) -> torch.Tensor:
        if self.features is not None:
            features = torch.stack([self.features[key] for key in keys])
            return features[:, None, None] if self.nested else features
        images = [[self.pictures.open(key)] for key in keys]  # one a list: what the SmolVLM class needs
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.reshape(len(keys), *([1] * self.nested), *pixels.shape[-3:])


def batches_for(
    loaded: LoadedModel, pictures: Pictures, features: Features | None, **options: Any
) -> PictureBatches:
    """The collator that fits the model's class."""
    nested = bare(loaded.model).config.model_type == "smolvlm"
    return PictureBatches(loaded.processor, pictures, features, nested=nested, **options)


def _repeat(values: Sequence[int], times: Sequence[int]) -> list[int]:
    return [value for value, n in zip(values, times, strict=True) for _ in range(n)]


# --- logits only where something is learned ---------------------------------------------------------------------
@contextlib.contextmanager
def open_head(model: Any) -> Iterator[torch.nn.Module]:
    """Inside, the model's `logits` are the states that the head would read (B, T, D); gives the head."""
    plain = bare(model)
    head, plain.lm_head = plain.lm_head, torch.nn.Identity()
    try:
        yield head
    finally:
        plain.lm_head = head


def label_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: torch.nn.Linear, *, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy in nats of `labels` (B, T, not shifted), from the states (B, T, D) and the frozen head.

    Logits are made where the next token has a label, some of them at a time, and thrown away with their gradient
    taken. Divided by `count`, by default the number of such labels. Raises ValueError if the head is trained.
    """
    if head.weight.requires_grad:
        raise ValueError("label_loss: the head is trained; expected a frozen one")
    trained = labels[:, 1:] != IGNORED
    states, targets = hidden[:, :-1][trained], labels[:, 1:][trained]
    total = _ChunkedLoss.apply(states, targets, head.weight, head.bias)
    return total / (len(targets) if count is None else count)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross entropies; keeps the gradient of the states (M, D), never more than 64 MiB of logits."""

    @staticmethod
    def forward(ctx, states, targets, weight, bias):
        rows = max(1, _LOGITS // len(weight))
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(states, dtype=weight.dtype)
        for begin in range(0, len(states), rows):
            chunk = slice(begin, begin + rows)
            logits = torch.nn.functional.linear(states[chunk].to(weight.dtype), weight, bias).float()
            target = targets[chunk, None]
            # softmax in place: d loss / d logits = probabilities - 1 at the target
            logits -= logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, target)
            sums = logits.exp_().sum(1, keepdim=True)
            total += (sums.log() - target_logits).sum()
            logits /= sums
            logits.scatter_add_(1, target, torch.full_like(target_logits, -1.0))
            gradient[chunk] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient.to(states.dtype))
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
