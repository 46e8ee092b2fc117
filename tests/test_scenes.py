"""The picture world: pixels show what a scene says, and a scene depends on its key alone."""

from ironlogic.data.chats import check_chat
from ironlogic.data.scenes import (
    COLORS,
    HELD_OUT_KINDS,
    KINDS,
    PLACES,
    SIZE,
    make_scenes,
    scene_chats,
)
from ironlogic.session import ROOT

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer


def test_a_scene_depends_on_its_key_alone():
    many = make_scenes(20, seed=5)
    for one, other in zip(many[12:], make_scenes(8, seed=5, first=12), strict=True):
        assert one.caption == other.caption
        assert np.array_equal(one.image, other.image)
    for others in (make_scenes(20, seed=6), make_scenes(20, seed=5, split="val")):
        assert not any(np.array_equal(a.image, b.image) for a, b in zip(many, others, strict=True))
    with pytest.raises(ValueError, match="no split 'dev'; expected one of train, val, test"):
        make_scenes(1, seed=0, split="dev")


@pytest.mark.slow
def test_no_scan_is_in_two_splits():
    scans = [{scene.scan for scene in make_scenes(1500, seed=1, split=split)} for split in ("train", "val", "test")]
    for seen, size in zip(scans, (1200, 200, 397), strict=True):
        expected = size * (1 - (1 - 1 / size) ** 1500)  # of draws with replacement
        assert len(seen) == pytest.approx(expected, rel=0.06)
    assert sum(map(len, scans)) == len(set.union(*scans))


def test_pixels_show_what_the_scene_says():
    for scene in make_scenes(200, seed=2, split="test"):
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == np.uint8
        light = scene.image.astype(float).max(axis=2) - 60
        rows, columns = np.indices(light.shape)
        ink = light.clip(0)
        middle = (ink * rows).sum() / ink.sum(), (ink * columns).sum() / ink.sum()
        vertical, horizontal = ("top", "bottom")[int(middle[0] > 16)], ("left", "right")[int(middle[1] > 16)]
        assert scene.place == f"{vertical} {horizontal}"
        brightest = scene.image.reshape(-1, 3)[light.ravel().argsort()[-10:]].mean(axis=0)
        near = min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - brightest).sum())
        assert near == scene.color, brightest


def test_colors_places_and_numbers_are_even():
    scenes = make_scenes(1500, seed=3)
    for names in ([s.color for s in scenes], [s.place for s in scenes], [s.number for s in scenes]):
        counts = np.unique(names, return_counts=True)[1]
        assert counts.min() > 0.6 * counts.max()
    assert {s.place for s in scenes} == set(PLACES)


def test_questions_and_their_answers():
    scene = next(s for s in make_scenes(100, seed=4) if s.number == 3 and s.place == "bottom left")
    answers = {kind: scene.ask(kind)[1] for kind in (*KINDS, *HELD_OUT_KINDS)}
    assert answers == {
        "number": "Answer: 3",
        "color": f"Answer: {scene.color}",
        "place": "Answer: Cid",
        "next": "Answer: 4",
        "larger": "Answer: 5",
    }
    assert scene.caption == f"Cid {scene.color} 3"


def test_conversations_and_saved_pictures(tmp_path):
    chats = scene_chats(3, tmp_path / "pictures", kinds=["caption", "color"], seed=7)
    for index, (scene, chat) in enumerate(zip(make_scenes(3, seed=7), chats, strict=True)):
        path = tmp_path / "pictures" / f"0000{index}.png"
        assert np.array_equal(np.asarray(Image.open(path)), scene.image)
        assert check_chat(chat) == chat
        assert chat[0]["content"][0] == {"type": "image", "image": str(path)}
        assert scene.color in chat[1]["content"].split()


def test_every_answer_is_spoken_in_three_tokens():
    tokenizer = Tokenizer.from_file(str(ROOT / "data" / "nano" / "tokenizer.json"))
    for scene in make_scenes(100, seed=8):
        for kind in (*KINDS, *HELD_OUT_KINDS):
            assert len(tokenizer.encode(scene.ask(kind)[1]).ids) == 3, scene.ask(kind)
    lengths = {len(tokenizer.encode(scene.ask(kind)[0]).ids) for kind in KINDS}
    assert len(lengths) == 1  # batches by length would hold one kind each
