"""Pictures: every way in gives the same pixels; every kind of bad one is refused with a reason."""

import base64
import io
import os
import struct
import zlib

from ironlogic.data.pictures import (
    PictureError,
    check_picture,
    picture_bytes,
    read_picture,
    resolve_picture,
)

import numpy as np
import pytest
from PIL import Image, ImageOps

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encode(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed PNG whose header promises that many pixels and which holds none."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_way_in_gives_the_same_pixels(tmp_path):
    content = encode(IMAGE)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    sources = [path, str(path), content, bytearray(content), IMAGE, url, {"bytes": content, "path": None}]
    sources += [{"bytes": None, "path": str(path)}]
    for source in sources:
        check_picture(source)
        assert np.array_equal(np.asarray(read_picture(source)), PIXELS)
    assert np.array_equal(np.asarray(read_picture("a.png", folder=tmp_path)), PIXELS)
    assert picture_bytes(path) == picture_bytes(url) == content
    assert np.array_equal(np.asarray(read_picture(picture_bytes(IMAGE))), PIXELS)


def test_the_key_follows_the_content_and_a_file_is_opened_once_until_it_changes(tmp_path, monkeypatch):
    other = PIXELS.copy()
    other[0, 0, 0] ^= 1
    keys = [check_picture(Image.fromarray(pixels)) for pixels in (PIXELS, PIXELS.copy(), other)]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 32
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes(IMAGE))
    assert check_picture(path) == check_picture("a.png", folder=tmp_path) == keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # whoever opens a picture now fails
        assert check_picture(path) == keys[0]
    path.write_bytes(picture_bytes(Image.fromarray(other)))
    os.utime(path, ns=(1, 1))
    assert check_picture(path) == keys[2]
    path.write_bytes(b"no picture any more")
    with pytest.raises(PictureError, match="no picture of a kind"):
        check_picture(path)


def test_transparent_is_white_grey_is_rgb_and_a_turned_camera_is_upright():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_picture(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(encode(Image.new("L", (4, 4), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert read_picture(encode(Image.new("P", (4, 4), 0), "GIF")).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its right side
    turned = read_picture(encode(IMAGE, "JPEG", exif=exif))
    assert turned.size == (24, 36)
    for held in range(10):
        exif[0x0112] = held
        file = encode(IMAGE, "JPEG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
        from_memory = Image.open(io.BytesIO(file))
        for source in (file, from_memory, picture_bytes(from_memory)):
            assert read_picture(source).tobytes() == upright.tobytes()
    cmyk = Image.open(io.BytesIO(encode(IMAGE.convert("CMYK"), "JPEG", exif=exif)))  # no mode of PNG's
    assert read_picture(picture_bytes(cmyk)).size == (36, 24)


def test_odd_notes_of_a_camera_lose_no_picture():
    held, odd = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x0102, 4, 1, 70_000)
    notes = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + odd + held + struct.pack("<I", 0)
    file = encode(IMAGE, "JPEG", exif=notes)
    check_picture(file)
    assert read_picture(file).size == (24, 36)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (encode(IMAGE)[:300], "damaged or cut off"),
        (encode(IMAGE, "JPEG")[:-200], "damaged or cut off"),
        (b"", "no picture of a kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a kind"),
        (encode(IMAGE, "TIFF"), "no picture of a kind"),
        (png_of_size(9_000, 9_000), "has 9000 x 9000 pixels; at most 50,000,000"),
        (png_of_size(2**31 - 1, 2**31 - 1), "far more pixels than the 50,000,000"),
        (png_of_size(10_000, 10), "sides of at most 100 to 1"),
        (encode(Image.new("I;16", (4, 4))), "more than 8 bits"),
        ("data:image/png;base64,@@", "no picture in base64"),
        ("data:image/png,abc", "no picture in base64"),
        ("no/such.png", "no/such.png: no such picture"),
        ("http://example.org/a.png", "no such picture"),
        ("a\0b", "can't be a path"),
        ("x" * 5000, "can't be a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"url": "x"}, "neither bytes nor a path"),
        (5, "expected a path, bytes or a PIL image, not int"),
        (None, "not NoneType"),
    ],
)
def test_a_bad_picture_is_refused_and_says_why(source, reason):
    for look in (check_picture, read_picture):
        with pytest.raises(PictureError, match=reason) as caught:
            look(source)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_path_stays_in_its_folder(tmp_path):
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    inside.mkdir()
    outside.write_bytes(encode(IMAGE))
    (inside / "link.png").symlink_to(outside)
    (inside / "a.png").write_bytes(encode(IMAGE))
    assert resolve_picture("../data/a.png", folder=inside) == (inside / "a.png").resolve()
    for path in ("../secret.png", str(outside), "link.png", "a/../../secret.png"):
        with pytest.raises(PictureError, match="leads out of"):
            read_picture(path, folder=inside)
    with pytest.raises(PictureError, match="leads out of"):
        read_picture({"path": "../secret.png"}, folder=inside)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(PictureError, match="no such picture"):
            read_picture(name, folder=tmp_path)


def test_a_file_too_long_is_not_read(tmp_path):
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(2**27)  # sparse
    with pytest.raises(PictureError, match="134,217,728 bytes; at most"):
        read_picture(tmp_path / "long.png")


def test_a_picture_given_is_not_changed():
    image = Image.fromarray(PIXELS).convert("RGBA")
    read_picture(image)
    check_picture(image)
    picture_bytes(image)
    assert image.mode == "RGBA"
