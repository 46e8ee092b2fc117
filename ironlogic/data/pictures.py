"""Pictures: opened safely, from a path, from bytes, from memory; and named by their content.

A picture is refused, with one sentence that says why, when it is missing, damaged, cut off, of an unknown kind, far
too large or far too narrow (image processors scale the *short* side up), or when its path leaves the folder of its
data set.
"""

import base64
import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError

from PIL import ExifTags, Image

__all__ = ["PictureError", "check_picture", "picture_bytes", "read_picture", "resolve_picture"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000  # 150 MB when decoded
MAX_BYTES = 64 * 2**20
MAX_RATIO = 100  # long side to short side
# What undoes how the camera was held, by EXIF's number from 2 on
_UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()


class PictureError(IronLogicError, ValueError):
    """A picture that can't be used; the message says which and why."""


def read_picture(source: Any, *, folder: str | os.PathLike | None = None) -> Image.Image:
    """The picture in RGB, turned as its camera was held; what is transparent becomes white.

    `source`: a path (inside `folder` where one is given), bytes, a `data:` URL, a PIL image, or a mapping with
    `bytes` or `path` as `datasets` stores it. Raises PictureError.
    """
    source = _unwrap(source)
    name = str(source) if _is_path(source) else "the picture"
    if isinstance(source, Image.Image):
        image = _check_size(source, name)
    else:
        image = _open_bytes(picture_bytes(source, folder=folder), name)
    with _refusing_damage(name):
        return _to_rgb(_turn_upright(image))


def check_picture(source: Any, *, folder: str | os.PathLike | None = None) -> str:
    """Its key, 32 hexadecimal digits that name its content. Raises PictureError where `read_picture` would.

    A file is opened and hashed once, until it changes.
    """
    source = _unwrap(source)
    if not _is_path(source):
        return _check_bytes(picture_bytes(source), "the picture")
    file = resolve_picture(source, folder=folder)
    status = file.stat()
    return _check_file(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2**17)
def _check_file(file: Path, modified: int, size: int) -> str:
    return _check_bytes(_read_file(file), str(file))


def _check_bytes(content: bytes, name: str) -> str:
    image = _open_bytes(content, name)
    with _refusing_damage(name):
        image.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its size, which is faster
        image.load()
    return blake2b(content, digest_size=16).hexdigest()


def picture_bytes(source: Any, *, folder: str | os.PathLike | None = None) -> bytes:
    """The picture as a file holds it; one from memory as PNG, upright, so that nothing is lost.

    Raises PictureError.
    """
    source = _unwrap(source)
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        with _refusing_damage("the picture"):
            image = _turn_upright(_check_size(source, "the picture"))
            image = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else _to_rgb(image)
            image.save(file, "PNG", compress_level=1)
        return file.getvalue()
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return _decode_url(source)
    return _read_file(resolve_picture(source, folder=folder))


def resolve_picture(path: Any, *, folder: str | os.PathLike | None = None) -> Path:
    """The file that a path names. Inside `folder`, links followed, where one is given. Raises PictureError."""
    if not isinstance(path, str | os.PathLike):
        raise PictureError(f"expected a path, bytes or a PIL image, not {type(path).__name__}")
    try:
        file = Path(folder or "", path).resolve()
        leads_out = folder is not None and not file.is_relative_to(Path(folder).resolve())
        missing = not file.is_file()
    except (OSError, ValueError) as error:  # names that are too long or hold a NUL, loops of links
        raise PictureError(f"{str(path)[:80]!r}: can't be a path ({_reason(error)})") from error
    if leads_out:
        raise PictureError(f"{path}: leads out of {folder}; put it there, or name the folder that holds it")
    if missing:
        raise PictureError(f"{path}: no such picture{'' if folder is None else f' in {folder}'}")
    return file


# --- opening ----------------------------------------------------------------------------------------------------
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, MemoryError)


@contextlib.contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    """Whatever Pillow raises inside is a PictureError that names the picture."""
    try:
        yield
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise PictureError(f"{name}: is no picture of a kind that is read here ({kinds})") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: has far more pixels than the {MAX_PIXELS:,} that are read") from error
    except _DAMAGE as error:
        raise PictureError(f"{name}: is damaged or cut off ({_reason(error)})") from error


def _open_bytes(content: bytes, name: str) -> Image.Image:
    with _refusing_damage(name), warnings.catch_warnings():  # our limit is lower than the one that warns
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    return _check_size(image, name)


def _check_size(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name}: has {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"{name}: has {width} x {height} pixels; expected sides of at most {MAX_RATIO} to 1")
    if image.mode.startswith(("I", "F")):
        raise PictureError(f"{name}: has more than 8 bits a channel ({image.mode}); convert it to 8")
    return image


def _turn_upright(image: Image.Image) -> Image.Image:
    """Decoded, too. Pillow's own `exif_transpose` fails on the odd notes of some cameras."""
    image.load()
    try:
        held = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises on such notes: the picture can still be read
        held = 1
    return image.transpose(Image.Transpose[_UPRIGHT[held - 2]]) if 2 <= held <= 8 else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and not str(source).startswith("data:")


def _unwrap(source: Any) -> Any:
    """What a mapping of `datasets` holds, {"bytes", "path"}."""
    if not isinstance(source, Mapping):
        return source
    inside = source.get("bytes") or source.get("path")
    if isinstance(inside, Mapping) or not inside:
        raise PictureError("has neither bytes nor a path")
    return inside


def _decode_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise PictureError(f"{url[:30]}...: is no picture in base64 ({error})") from error


def _read_file(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise PictureError(f"{file}: is a file of {size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read_bytes()
    except OSError as error:
        raise PictureError(f"{file}: can't be read ({error.strerror})") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:100] or type(error).__name__
