"""Asking about a picture: picked or uploaded, known question or free, and what goes wrong is shown."""

import io
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ironlogic.data.chats import ChatError
from ironlogic.data.scenes import KINDS, make_scenes, question_chat, save_scenes
from ironlogic.show.picture_widget import picture_explorer
from ironlogic.vision.answers import answer_pictures, last_question, load_questions
from ironlogic.vision.splice import splice

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def loaded():
    return splice("nano-vision", "nano", seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    scenes = make_scenes(3, seed=9, split="test")
    paths = save_scenes(scenes, tmp_path_factory.mktemp("pictures"))
    return [question_chat(scene, path, kind) for scene, path, kind in zip(scenes, paths, KINDS, strict=True)]


@pytest.fixture
def explorer(loaded, rows):
    return picture_explorer(loaded, rows, max_new_tokens=4)


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), color).save(file, "PNG")
    return file.getvalue()


def test_the_answer_is_the_models(loaded, rows, explorer):
    for i, row in enumerate(rows):
        explorer.controls["picture"].value = i
        explorer.controls["question"].value = row[0]["content"][1]["text"]
        (answer,) = answer_pictures(loaded, [row], max_new_tokens=4)
        assert f"<b>{answer or 'no answer'}</b>" in explorer.text.value
        verdict = "right" if answer == row[1]["content"] else f"the truth: {row[1]['content']}"
        assert verdict in explorer.text.value
        assert explorer.text.value.count("<img") == 1


def test_a_free_question_has_no_truth_and_no_question_no_answer(explorer):
    explorer.controls["question"].value = "Is it <b>odd</b>?"
    assert "truth" not in explorer.text.value
    assert "right" not in explorer.text.value
    assert "&lt;b&gt;odd" in explorer.text.value
    explorer.controls["question"].value = "  "
    assert "type a question" in explorer.text.value


@pytest.mark.parametrize("version", [7, 8])
def test_an_upload_goes_before_the_picked_picture(loaded, rows, version):
    explorer = picture_explorer(loaded, rows, max_new_tokens=4)
    before = explorer.text.value
    file = {"name": "mine.png", "content": png("red") if version == 7 else memoryview(png("red"))}
    values = {"picture": 0, "upload": {"mine.png": file} if version == 7 else (file,), "question": "What is it?"}
    html, figure = explorer._show(**values)
    assert figure is None
    assert html.split("src=")[1].split(">")[0] != before.split("src=")[1].split(">")[0]
    assert "truth" not in html
    other = values | {"upload": ()}
    assert explorer._show(**other)[0].split("src=")[1][:5000] != html.split("src=")[1][:5000]


def test_a_damaged_upload_is_told_in_one_line(explorer):
    damaged = {"name": "x.png", "type": "image/png", "size": 9, "content": memoryview(png("red")[:60])}
    damaged["last_modified"] = datetime(2026, 1, 1, tzinfo=UTC)
    explorer.controls["upload"].value = (damaged,)
    assert "PictureError" in explorer.text.value
    assert "Traceback" not in explorer.text.value


def test_picking_another_picture_puts_the_upload_away(explorer):
    mine = {"name": "x.png", "type": "image/png", "size": 9, "content": memoryview(png("red"))}
    explorer.controls["upload"].value = ({**mine, "last_modified": datetime(2026, 1, 1, tzinfo=UTC)},)
    shown = explorer.text.value
    explorer.controls["picture"].value = 1
    assert explorer.controls["upload"].value == ()
    assert explorer.text.value.split("src=")[1] != shown.split("src=")[1]


def test_rows_of_any_shape_are_offered_by_their_last_question(loaded, rows):
    picture = rows[0][0]["content"][0]
    first = [{"role": "user", "content": [picture, {"type": "text", "text": "Who?"}]}]
    reply = [{"type": "text", "text": "Answer: Ann"}]
    talk = [{"role": "system", "content": "s"}, *first, {"role": "assistant", "content": reply}]
    more = [*talk, {"role": "user", "content": "What color?"}, {"role": "assistant", "content": "Answer: red"}]
    text = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert last_question(talk) == (picture["image"], "Who?", "Answer: Ann")
    assert last_question(more) == (picture["image"], "What color?", "Answer: red")
    assert last_question(text) == (None, "2 + 2?", "4")
    explorer = picture_explorer(loaded, [text, more], max_new_tokens=4)
    assert explorer.controls["question"].value == "What color?"
    assert "the truth: Answer: red" in explorer.text.value


def test_an_empty_thought_is_no_part_of_an_answer(loaded, rows, monkeypatch):
    """Qwen3's tags are text to its tokenizer, nano's are not; so the words are put into its mouth."""
    words = "<think>\n\n</think>\n\nAnswer: 7", "<think>\nhm\n</think>\nAnswer: 7"
    monkeypatch.setattr(type(loaded.tokenizer), "batch_decode", lambda *_, **__: list(words))
    said = answer_pictures(loaded, rows[:2], max_new_tokens=2)
    assert sorted(said) == ["<think>\nhm\n</think>\nAnswer: 7", "Answer: 7"]


def test_own_questions_are_split_and_too_few_are_told(rows, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    many = [[dict(turn) for turn in rows[i % 3]] for i in range(60)]
    for i, chat in enumerate(many):
        chat[0] = {"role": "user", "content": [rows[i % 3][0]["content"][0], {"type": "text", "text": f"Who? {i}"}]}
        chat[0]["content"][0] = {"type": "image", "image": str(chat[0]["content"][0]["image"])}
    shutil.copytree(Path(many[0][0]["content"][0]["image"]).parent, tmp_path, dirs_exist_ok=True)
    for chat in many:
        chat[0]["content"][0]["image"] = Path(chat[0]["content"][0]["image"]).name
    text = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "so"}] for i in range(60)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*many, *text]))
    train, test = load_questions(path, train=40, test=3, seed=1)
    assert "120 rows" in capsys.readouterr().out
    assert (len(train), len(test)) == (40, 3)
    assert all(last_question(row)[0] is not None for row in test)
    path.write_text(json.dumps({"messages": text[0]}) + "\n")
    with pytest.raises(ChatError, match="too few to hold out one with a picture"):
        load_questions(path, train=40, test=3)
