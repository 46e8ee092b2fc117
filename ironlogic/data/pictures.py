"""Pictures: opened safely, from a path, from bytes, from memory; and named by their content.

A picture is refused, with one sentence that says why, when it is missing, damaged, cut off, of an unknown kind, far
too large or far too narrow (image processors scale the *short* side up), or when its path leaves the folder of its
data set. Knows nothing of towers and processors: that is `image_batches`.
"""

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError

from PIL import ExifTags, Image

__all__ = ["PictureError", "check_picture", "picture_bytes", "picture_key", "read_picture", "resolve_picture"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_TURN = Image.Transpose
_TURNS = {2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE}
_TURNS |= {6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
MAX_PIXELS, MAX_BYTES, MAX_RATIO = 50_000_000, 64 * 2**20, 100  # a picture of 50 million pixels is 150 MB


class PictureError(IronLogicError, ValueError):
    """A picture that can't be used; the message says which and why."""


def read_picture(source: Any, *, folder: str | os.PathLike | None = None) -> Image.Image:
    """The picture in RGB, turned as its camera was held; what is transparent becomes white.

    `source`: a path (inside `folder` where one is given), bytes, a `data:` URL, a PIL image, or a mapping with
    `bytes` or `path` as `datasets` stores it. Raises PictureError.
    """
    name, image = _open(source, folder)
    try:
        image.load()
        if (turn := _TURNS.get(_orientation(image))) is not None:
            image = image.transpose(turn)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except _DAMAGE as error:
        raise PictureError(_damaged(name, error)) from error


def check_picture(source: Any, *, folder: str | os.PathLike | None = None) -> None:
    """Raises PictureError where `read_picture` would; faster for JPEG, decoded at an eighth of its size."""
    name, image = _open(source, folder)
    try:
        image.draft("RGB", (1, 1))
        image.load()
    except _DAMAGE as error:
        raise PictureError(_damaged(name, error)) from error


def picture_bytes(source: Any, *, folder: str | os.PathLike | None = None) -> bytes:
    """The picture as a file holds it; one from memory as PNG, so that nothing is lost. Raises PictureError."""
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source = source if source.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else read_picture(source)
        source.save(file, "PNG", compress_level=1)
        return file.getvalue()
    if isinstance(source, Mapping):
        return picture_bytes(_unwrap(source), folder=folder)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return _from_url(source)
    return _read_file(resolve_picture(source, folder=folder))


def picture_key(content: bytes) -> str:
    """32 hexadecimal digits that name the content."""
    return blake2b(content, digest_size=16).hexdigest()


def resolve_picture(path: Any, *, folder: str | os.PathLike | None = None) -> Path:
    """The file that a path names. Inside `folder`, links followed, where one is given. Raises PictureError."""
    if not isinstance(path, str | os.PathLike):
        raise PictureError(f"expected a path, bytes or a PIL image, not {type(path).__name__}")
    try:
        file = Path(folder or "", path).resolve()
        if folder is not None and not file.is_relative_to(Path(folder).resolve()):
            raise PictureError(f"{path}: leads out of {folder}; put it there, or name the folder that holds it")
        if not file.is_file():
            raise PictureError(f"{path}: no such picture{'' if folder is None else f' in {folder}'}")
    except (OSError, ValueError) as error:  # names that are too long or hold a NUL, loops of links
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{str(path)[:80]!r}: can't be a path ({_why(error)})") from error
    return file


# --- opening ----------------------------------------------------------------------------------------------
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, MemoryError)
_DAMAGE += (Image.DecompressionBombError,)


def _open(source: Any, folder: str | os.PathLike | None) -> tuple[str, Image.Image]:
    """Its name for messages, and the picture: header read and measured, nothing decoded yet."""
    source = _unwrap(source)
    if isinstance(source, Image.Image):
        name, image = "the picture", source.copy()
    else:
        plain = isinstance(source, str | os.PathLike) and not str(source).startswith("data:")
        name, content = (str(source) if plain else "the picture"), picture_bytes(source, folder=folder)
        try:
            with warnings.catch_warnings():  # our own limit is lower than the one that warns
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(content), formats=FORMATS)
        except _DAMAGE as error:
            raise PictureError(_damaged(name, error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name}: has {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"{name}: has {width} x {height} pixels; expected sides of at most {MAX_RATIO} to 1")
    if image.mode.startswith(("I", "F")):
        raise PictureError(f"{name}: has more than 8 bits a channel ({image.mode}); convert it to 8")
    return name, image


def _orientation(image: Image.Image) -> int:
    """How the camera was held, by EXIF's number; 1, upright, where that can't be read: the picture still can."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises on the notes of some camera
        return 1


def _unwrap(source: Any) -> Any:
    if not isinstance(source, Mapping):
        return source
    found = source.get("bytes") or source.get("path")
    if isinstance(found, Mapping) or not found:
        raise PictureError("has neither bytes nor a path")
    return found


def _from_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise PictureError(f"{url[:30]}...: is no picture in base64 ({error})") from error


def _read_file(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise PictureError(f"{file}: is a file of {size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read_bytes()
    except OSError as error:
        raise PictureError(f"{file}: can't be read ({error.strerror})") from error


def _damaged(name: str, error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{name}: is no picture of a kind that is read here ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"{name}: has far more pixels than the {MAX_PIXELS:,} that are read"
    return f"{name}: is damaged or cut off ({_why(error)})"


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:100] or type(error).__name__
