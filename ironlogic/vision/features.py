"""The features of a splice's tower, computed once and kept; and a loss that makes logits only where labels are.

Three things cost most when the seeds train: running the frozen tower on the same picture again and again, padding
every row to one length, and logits over 151,936 words where nothing is learned. So features are kept, rows of
similar length share a batch, and `label_loss` makes the logits of a few labels at a time. The loss stays the same.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ironlogic.data.masking import IGNORED
from ironlogic.models import LoadedModel, ModelError, bare
from ironlogic.training.picture_rows import PictureReader
from ironlogic.training.runs import RunError, no_room
from ironlogic.vision.splice import tower_name, tower_of

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = [
    "Features",
    "cached_tower",
    "compute_features",
    "label_loss",
    "open_head",
    "order_by_length",
    "tower_key",
]

_LOGITS = 2**24  # in memory at a time: 64 MiB in float32

# --- features of a frozen tower, computed once and kept ---------------------------------------------------------
_SHARD = 256  # pictures in one file of features


def tower_key(loaded: LoadedModel) -> str:
    """Names everything that a feature depends on but the picture: the tower's weights, its layer, the processor."""
    tower, config = tower_of(loaded.model), loaded.model.config
    settings = {
        "tower": tower.config.to_dict(),
        "layer": getattr(config, "vision_feature_layer", None),
        "pictures": loaded.processor.image_processor.to_dict(),
        "device": loaded.device.type,
        "shape": "(views, N, D)",
    }
    content = blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


class Features:
    """A frozen tower's features of pictures, (V, N, D) each for its V views, by key; in files that are whole or not
    there."""

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
    loaded: LoadedModel, reader: PictureReader, keys: Sequence[str], folder: Path, *, batch_size: int = 32
) -> Features | None:
    """The features of these pictures; those that `folder` doesn't hold yet are computed. None: no room for them.

    A feature depends on its picture alone: the tower takes all tiles of one, or `batch_size` whole ones, the last
    batch filled up with its last picture. No room: they would take more than half of the free disk (seed 003's
    558,128 pictures: 614 GiB), which is printed. Of several processes one computes, and the others wait for it.
    """
    place = folder / tower_key(loaded)
    features = Features(place)
    if all(key in features for key in keys):
        return features
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(f"{place}.lock").acquire()  # a killed process leaves none behind
    except OSError as error:
        raise RunError(no_room(folder, error)) from error
    with held:
        features = Features(place)  # with what another process has computed meanwhile
        missing = [key for key in dict.fromkeys(keys) if key not in features]
        return _compute(loaded, reader, missing, features, 1 if reader.tiled else batch_size)


def _compute(
    loaded: LoadedModel, reader: PictureReader, missing: list[str], features: Features, together: int
) -> Features | None:
    """`features` with those of the missing pictures, so many of which the tower takes `together`."""
    for begin in range(0, len(missing), _SHARD):
        shard = missing[begin : begin + _SHARD]
        computed: dict[str, torch.Tensor] = {}
        for first in range(0, len(shard), together):
            batch = shard[first : first + together]
            full = batch + batch[-1:] * (together - len(batch))
            emitted = _run_tower(loaded, reader.pixels(full)["pixel_values"])
            views = emitted.reshape(len(full), -1, *emitted.shape[1:])
            if begin == first == 0 and not _fits_on_disk(
                views[0].nbytes * len(missing), len(missing), features.folder
            ):
                return None
            computed |= {key: feature.clone() for key, feature in zip(batch, views, strict=False)}
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


def _run_tower(loaded: LoadedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(V, N, D) of (V, 3, H, W), of the layer that the projector reads, on the CPU."""
    tower, config = tower_of(loaded.model), loaded.model.config
    layer = getattr(config, "vision_feature_layer", None)  # SmolVLM has none: it takes the last one
    if layer is not None and not isinstance(layer, int):
        raise ModelError(f"vision_feature_layer is {layer}; expected one layer")
    weight = next(tower.parameters())
    training = tower.training
    tower.eval()
    with torch.inference_mode():
        pixels = pixels.to(weight.device, weight.dtype)
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


# --- little padding ---------------------------------------------------------------------------------------------
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
