"""A world of small pictures: one real hand-written digit, coloured, in one of four places on a noisy canvas.

The digits are the 1,797 scans that come with scikit-learn (Alpaydin and Kaynak 1998, UCI), split by scan, so that
no test picture shows a scan that training saw. Knows what is in a picture and how one asks about it; no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ironlogic.data.chats import picture_turn

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

__all__ = [
    "COLORS",
    "HELD_OUT_KINDS",
    "KINDS",
    "PLACES",
    "SIZE",
    "Scene",
    "make_scenes",
    "scene_chats",
]

SIZE, _DIGIT = 32, 14  # pixels: the canvas, a scan on it
COLORS = {
    "red": (255, 60, 60),
    "green": (60, 220, 80),
    "blue": (80, 110, 255),
    "yellow": (245, 225, 60),
    "white": (245, 245, 245),
    "purple": (200, 80, 230),
}
# Whose corner it is: nano speaks names as one token, but cannot say "top left".
PLACES = {"top left": "Ann", "top right": "Bob", "bottom left": "Cid", "bottom right": "Dan"}
KINDS = ("number", "color", "place")
HELD_OUT_KINDS = ("next", "larger")  # need a thought beyond seeing; never trained
_SPLITS = {"train": slice(0, 1200), "val": slice(1200, 1400), "test": slice(1400, None)}  # of the shuffled scans


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture and what it shows."""

    image: np.ndarray  # (32, 32, 3), or larger by `tiles`; uint8
    scan: int  # which of the 1,797
    number: int  # 0 to 9
    color: str
    place: str

    @property
    def caption(self) -> str:
        """Whose it is, its colour, its number."""
        return f"{PLACES[self.place]} {self.color} {self.number}"

    def ask(self, kind: str) -> tuple[str, str]:
        """The question of that kind, and its answer, in words that nano knows."""
        # The projector can move the first word of a frozen model's reply most, and the number is hardest to see:
        # with the caption's own order some trainings never learned it.
        number_first = " ".join(reversed(self.caption.split()))
        question, answer = {
            "caption": ("What is it please?", number_first),
            "number": ("Which number is it please?", self.number),
            "color": ("Which color is it please?", self.color),
            "place": ("Who has it now please?", PLACES[self.place]),
            "next": ("What is the sum of it and 1 please?", self.number + 1),
            "larger": ("Which number is the largest in this list: it 5 please?", max(self.number, 5)),
        }[kind]
        return question, f"Answer: {answer}"


@cache
def _scans() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scans as opacity (1797, 14, 14) in 0 to 1, their digits (1797,), and the order that splits them."""
    digits = load_digits()
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(scan).resize((_DIGIT, _DIGIT), Image.Resampling.BILINEAR) for scan in small]
    order = np.random.default_rng(1234).permutation(len(small))
    return np.stack(large).astype(np.float32) / 255, digits.target, order


def make_scenes(
    count: int, *, seed: int, split: Literal["train", "val", "test"] = "train", first: int = 0, tiles: int = 1
) -> list[Scene]:
    """Scenes `first` to `first + count`; each depends on (seed, split, its index) alone.

    `tiles`: the canvas is so many times as wide and as high, the scan as large as ever: seen at the size of one
    canvas it can't be read. Raises `ValueError` for another split.
    """
    if split not in _SPLITS:
        raise ValueError(f"make_scenes: no split {split!r}; expected one of {', '.join(_SPLITS)}")
    key = list(_SPLITS).index(split)
    numbers = range(first, first + count)
    return [_draw(np.random.default_rng([seed, key, index]), split, tiles) for index in numbers]


def _draw(rng: np.random.Generator, split: str, tiles: int) -> Scene:
    opacity, digit, order = _scans()
    scan, color, place = int(rng.choice(order[_SPLITS[split]])), rng.choice(list(COLORS)), int(rng.integers(4))
    canvas = 18 + rng.normal(0, 6, (SIZE * tiles, SIZE * tiles, 3))
    half = SIZE // 2
    corners = (tiles * part + (rng.integers(tiles) if tiles > 1 else 0) for part in divmod(place, 2))
    top, left = (half * corner + 1 + rng.integers(-1, 2) for corner in corners)  # a pixel of jitter
    ink = opacity[scan][..., None]
    spot = canvas[top : top + _DIGIT, left : left + _DIGIT]
    spot[:] = spot * (1 - ink) + ink * np.array(COLORS[color])
    image = canvas.clip(0, 255).astype(np.uint8)
    return Scene(image, scan, int(digit[scan]), str(color), list(PLACES)[place])


def scene_chats(
    count: int,
    folder: Path,
    *,
    kinds: Sequence[str] = KINDS,
    seed: int,
    split: Literal["train", "val", "test"] = "train",
    tiles: int = 1,
) -> list[list[dict[str, Any]]]:
    """Conversations about that many scenes of `make_scenes`: a picture, a question (`kinds` in turn), its answer.

    The pictures are written into the folder as `00000.png`, ... "caption" is what stage 1 of a splice trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chats = []
    for index, scene in enumerate(make_scenes(count, seed=seed, split=split, tiles=tiles)):
        picture = folder / f"{index:05}.png"
        Image.fromarray(scene.image).save(picture, compress_level=1)
        question, answer = scene.ask(kinds[index % len(kinds)])
        chats.append([picture_turn(str(picture), question), {"role": "assistant", "content": answer}])
    return chats
