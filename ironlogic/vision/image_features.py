"""What a frozen vision tower says of pictures, computed once and kept on disk.

Features are named by the picture's bytes and by everything else they depend on: the tower's weights and layer and
the preparation of pictures. So epochs, seeds, arms and both training stages share them. Knows neither text nor
loss.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ironlogic.data.pictures import check_picture, picture_bytes, picture_key, read_picture
from ironlogic.models import LoadedModel, ModelError
from ironlogic.training.runs import RunError, no_room
from ironlogic.vision.splice_parts import bare, tower_name, tower_of

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = ["Features", "Pictures", "cached_tower", "look_at", "tower_key"]

_SHARD = 256  # pictures in one file of features


class Pictures:
    """Pictures by their key (`picture_key`): paths, or bytes in memory."""

    def __init__(self) -> None:
        self._sources: dict[str, str | bytes] = {}
        self._keys: dict[str, str] = {}  # of paths that were read already

    def add(self, source: Any) -> str:
        """Its key. Raises PictureError when it can't be read."""
        path = str(source) if isinstance(source, str | os.PathLike) else ""
        if path and path in self._keys:
            return self._keys[path]
        content = picture_bytes(source)
        key = picture_key(content)
        if key not in self._sources:
            check_picture(content)
            self._sources[key] = path or content
        if path:
            self._keys[path] = key
        return key

    def open(self, key: str) -> Image.Image:
        return read_picture(self._sources[key])


def tower_key(loaded: LoadedModel) -> str:
    """Names everything that a feature depends on but the picture: the tower's weights, its layer, the processor."""
    tower, config = tower_of(loaded.model), loaded.model.config
    said = {
        "tower": tower.config.to_dict(),
        "layer": getattr(config, "vision_feature_layer", None),
        "pictures": loaded.processor.image_processor.to_dict(),
        "device": loaded.device.type,
    }
    content = blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


class Features:
    """What a frozen tower says of pictures, (N, D) each, by key; in files that are whole or not there."""

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


def look_at(
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
        made: dict[str, torch.Tensor] = {}
        for first in range(0, len(shard), batch_size):
            batch = shard[first : first + batch_size]
            full = batch + batch[-1:] * (batch_size - len(batch))
            seen = _run_tower(loaded, [pictures.open(key) for key in full])
            made |= {key: one.clone() for key, one in zip(batch, seen, strict=False)}
            if not begin and not first and _too_many(seen[0], len(missing), folder):
                return None
        features.add(made)
    return features


def _too_many(one: torch.Tensor, count: int, folder: Path) -> bool:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = one.nbytes * count, shutil.disk_usage(there).free
    if needed > free / 2:
        print(
            f"the features of {count:,} pictures would take {needed / 2**30:,.1f} GiB, more than half of what is "
            f"free in {there} ({free / 2**30:,.1f} GiB): not kept, the tower runs at every step"
        )
    return needed > free / 2


def _run_tower(loaded: LoadedModel, images: list[Image.Image]) -> torch.Tensor:
    tower, config = tower_of(loaded.model), loaded.model.config
    pixels = loaded.processor.image_processor([[image] for image in images], return_tensors="pt")["pixel_values"]
    one = next(tower.parameters())
    training = tower.training
    tower.eval()
    with torch.inference_mode():
        pixels = pixels.reshape(len(images), *pixels.shape[-3:]).to(one.device, one.dtype)
        said = tower(pixel_values=pixels, output_hidden_states=True, return_dict=True)
        seen = said.last_hidden_state
        if hasattr(config, "vision_feature_layer"):
            if not isinstance(config.vision_feature_layer, int):
                raise ModelError(f"vision_feature_layer is {config.vision_feature_layer}; expected one layer")
            seen = said.hidden_states[config.vision_feature_layer]
    tower.train(training)
    return seen.cpu()


class _Seen(torch.nn.Module):
    """In the tower's place: gets features where the tower gets pixels, and hands them on."""

    def __init__(self, layer: int | None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pixel_values, **_):
        seen = pixel_values.squeeze(1) if pixel_values.dim() == 4 else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=seen, hidden_states={self.layer: seen})


@contextlib.contextmanager
def cached_tower(model: Any) -> Iterator[None]:
    """Inside, `pixel_values` are features of `look_at`, and the tower is not run; all else is as it was."""
    plain = bare(model)
    name = tower_name(plain)
    tower = getattr(plain.model, name)
    setattr(plain.model, name, _Seen(getattr(plain.config, "vision_feature_layer", None)))
    try:
        yield
    finally:
        setattr(plain.model, name, tower)
