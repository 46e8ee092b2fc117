"""Chats with pictures: LLaVA's, the_cauldron's and our own rows; bad pictures beside good ones; rows in and out."""

import io
import json
import re

from ironlogic.data import chats
from ironlogic.data.chats import image_parts

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def load_chats(source, **options):
    loaded = chats.load_chats(source, **options)
    return loaded.rows, list(loaded.rejected)


def png(image=IMAGE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coco").mkdir()
    for name in ("x.png", "coco/y.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:200])
    return tmp_path


def llava(image, *texts, **extras):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ({"image": image} if image is not None else {}) | {"conversations": turns} | extras


def kinds(messages):
    return [[(p["type"], p["text"]) for p in turn["content"]] for turn in messages]


def test_llava_json(folder):
    rows = [
        llava("x.png", "<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", id="000"),
        llava("coco/y.png", "What is it?\n<image>", "A dog.", id="001"),
        llava("x.png", "Which?", "This."),
        llava(None, "Hi", "Hello"),
        llava(["x.png", "coco/y.png"], "<image>\n<image>\nCompare.", "Alike."),
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    dataset, rejected = load_chats(folder / "data.json")
    assert rejected == []
    assert kinds(dataset[0]["messages"])[0] == [("image", None), ("text", "What is it?")]
    assert kinds(dataset[1]["messages"])[0] == [("text", "What is it?"), ("image", None)]
    assert kinds(dataset[2]["messages"])[0] == [("image", None), ("text", "Which?")]  # no place: in front
    assert kinds(dataset[3]["messages"])[0] == [("text", "Hi")]
    assert kinds(dataset[4]["messages"])[0] == [("image", None), ("image", None), ("text", "Compare.")]
    assert [p["image"] for p in image_parts(dataset[4]["messages"])] == [
        str((folder / name).resolve()) for name in ("x.png", "coco/y.png")
    ]
    assert "images" not in dataset.column_names  # paths stay paths
    assert dataset["id"][:2] == ["000", "001"]


def test_a_bad_picture_costs_its_row_only(folder):
    (folder / "deep").mkdir()
    good = llava("x.png", "<image>\nWhat?", "A cat.")
    bad = {
        "../x.png": "leads out of",
        "none.png": "no such picture",
        "cut.png": "cut off",
        5: "expected a path",
    }
    bad_rows = [llava(image, "<image>\nWhat?", "A cat.") for image in bad]
    bad_rows += [llava(None, "<image>\nWhat?", "A cat."), llava("x.png", "<image><image> What?", "A cat.")]
    reasons = [*bad.values(), "1 places for pictures .* has 0 pictures", "2 places for pictures .* has 1 pictures"]
    path = folder / "data.json"
    path.write_text(json.dumps([good, *bad_rows, good]))
    dataset, rejected = load_chats(path)
    assert dataset["source_row"][:] == [1, len(bad_rows) + 2]
    assert [one.line for one in rejected] == list(range(2, len(bad_rows) + 2))
    for one, reason in zip(rejected, reasons, strict=True):
        assert re.search(reason, str(one))


def test_the_folder_of_pictures_can_be_another_one(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.jsonl"
    path.write_text(json.dumps(llava("x.png", "<image>\nWhat?", "A cat.")))
    dataset, _ = load_chats(path, images=folder)
    assert image_parts(dataset[0]["messages"])[0]["image"] == str((folder / "x.png").resolve())


CAULDRON = {
    "images": [{"bytes": png(), "path": None}],
    "texts": [
        {"user": "What?", "assistant": "A cat.", "source": "s"},
        {"user": "Sure?", "assistant": "Yes.", "source": "s"},
    ],
}


@pytest.mark.parametrize("kind", ["list", "bytes", "dataset", "parquet"])
def test_the_cauldron_from_memory_and_parquet(tmp_path, kind):
    source = [CAULDRON, CAULDRON | {"images": []}]
    if kind == "bytes":
        source[0] = CAULDRON | {"images": [png()]}
    elif kind == "dataset":
        features = datasets.Features(
            images=datasets.List(datasets.Image()),
            texts=datasets.List({name: datasets.Value("string") for name in ("user", "assistant", "source")}),
        )
        source = datasets.Dataset.from_list(source, features=features)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(source), tmp_path / "x.parquet")
        source = tmp_path / "x.parquet"
    dataset, rejected = load_chats(source)
    assert rejected == []
    assert kinds(dataset[0]["messages"]) == [
        [("image", None), ("text", "What?")],
        [("text", "A cat.")],
        [("text", "Sure?")],
        [("text", "Yes.")],
    ]
    assert dataset[0]["images"] == [png()]
    assert dataset[1]["images"] is None


def test_a_damaged_picture_in_memory(tmp_path):
    dataset, rejected = load_chats([CAULDRON, CAULDRON | {"images": [png()[:99]]}])
    assert len(dataset) == 1
    assert str(rejected[0]).startswith("row 2: picture 1 the picture: is damaged or cut off")


def test_our_messages_take_pictures_of_every_kind(folder):
    parts = [{"type": "image", "image": one} for one in (str(folder / "x.png"), IMAGE, png())]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "Alike?"}]}
    dataset, rejected = load_chats([{"messages": [user, {"role": "assistant", "content": "Yes."}]}])
    assert rejected == []
    row = dataset[0]
    assert [p["image"] for p in image_parts(row["messages"])] == [str(folder / "x.png"), None, None]
    assert row["images"][0] is None
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["images"][1]))), PIXELS)


def test_rows_with_pictures_are_read_again_as_they_are():
    first, _ = load_chats([CAULDRON, {"messages": [{"role": "user", "content": "q"}, ANSWER]}])
    again, rejected = load_chats(first)
    assert rejected == []
    assert again["messages"][:] == first["messages"][:]
    assert again["images"][:] == first["images"][:]


ANSWER = {"role": "assistant", "content": "a"}


def test_images_and_messages_as_trl_has_them():
    places = [{"type": "image"}, {"type": "text", "text": "What?"}]
    dataset, rejected = load_chats(
        [
            {"messages": [{"role": "user", "content": places}, ANSWER], "images": [IMAGE]},
            {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": [IMAGE]},
            {"messages": [{"role": "user", "content": "What is <image> in HTML?"}, ANSWER]},  # only a text
            {"messages": [{"role": "user", "content": places}, ANSWER], "images": [IMAGE, IMAGE]},
        ]
    )
    assert kinds(dataset[0]["messages"]) == kinds(dataset[1]["messages"])
    assert kinds(dataset[2]["messages"])[0] == [("text", "What is <image> in HTML?")]
    assert "holds 1 places for pictures" in str(rejected[0])


def test_the_fingerprint_follows_the_pictures():
    other = Image.fromarray(255 - PIXELS)
    one, same, different = (
        load_chats([CAULDRON | {"images": [{"bytes": png(image), "path": None}]}])[0]._fingerprint
        for image in (IMAGE, IMAGE, other)
    )
    assert one == same != different
