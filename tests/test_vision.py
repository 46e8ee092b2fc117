"""Pictures in batches, the tower's features, the loss; answers about pictures, their controls, and the widget."""

import io
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ironlogic.data.chats import ChatError, make_chats
from ironlogic.data.masking import IGNORED
from ironlogic.data.scenes import KINDS, make_scenes, question_chat, save_scenes
from ironlogic.show.picture_widget import picture_explorer
from ironlogic.training.runs import RunError
from ironlogic.vision.answers import answer_pictures, control_rows, last_question, load_questions
from ironlogic.vision.batches import (
    Features,
    Pictures,
    batches_for,
    cached_tower,
    compute_features,
    encode_pictures,
    image_length,
    label_loss,
    open_head,
    order_by_length,
    tower_key,
)
from ironlogic.vision.splice import splice

import numpy as np
import pytest
import torch
from eyes import chat, on_nano, picture
from PIL import Image
from safetensors import SafetensorError


@pytest.fixture(scope="module")
def loaded():
    return on_nano()


def own(messages):
    return [part["image"] for part in messages[0]["content"] if part["type"] == "image"]


CHATS = [
    chat("What is it?", "a red 3", picture()),
    chat("Are these two pictures alike in any way?", "no", picture(), picture()),
    chat("What is two plus two?", "4"),
]


def test_ids_are_those_of_the_processor_and_labels_those_of_the_answer(loaded):
    rows, pictures, rejected = encode_pictures(loaded, make_chats(CHATS), max_length=256)
    assert not rejected
    processor, block = loaded.processor, image_length(loaded.processor)
    assert block == 16
    for row, messages in zip(rows, CHATS, strict=True):
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
        wanted = processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
        batch = batches_for(loaded, pictures, None)([row])
        assert torch.equal(batch["input_ids"], wanted["input_ids"])
        assert row.length == batch["input_ids"].shape[1]
        if images:
            assert torch.equal(batch["pixel_values"], wanted["pixel_values"])
        trained = batch["input_ids"][batch["labels"] != IGNORED]
        assert loaded.tokenizer.decode(trained) == messages[1]["content"] + "<|im_end|>"


def test_loss_on_every_token_leaves_out_pictures_and_padding(loaded):
    rows, pictures, _ = encode_pictures(loaded, make_chats(CHATS), max_length=256, loss="all")
    batch = batches_for(loaded, pictures, None)(rows)
    ids, labels = batch["input_ids"], batch["labels"]
    real = (batch["attention_mask"] == 1) & (ids != loaded.processor.image_token_id)
    real[:, 0] = False  # nothing predicts it
    assert torch.equal(labels != IGNORED, real)
    assert torch.equal(labels[real], ids[real])


def test_both_sides_of_padding_hold_the_same_rows(loaded):
    rows, pictures, _ = encode_pictures(loaded, make_chats(CHATS), max_length=256)
    right, left = (batches_for(loaded, pictures, None, side=side)(rows) for side in ("right", "left"))
    for index, row in enumerate(rows):
        assert torch.equal(right["input_ids"][index, : row.length], left["input_ids"][index, -row.length :])
        assert right["attention_mask"][index].sum() == left["attention_mask"][index].sum() == row.length


UNUSABLE = [
    (chat("What <|image_pad|> is it?", "a", picture()), "2 times '<|image_pad|>' for 1 pictures: a text holds"),
    (chat("Say <|image_pad|>", "a"), "1 times '<|image_pad|>' for 0 pictures"),
    (chat("What is it?", "<|image_pad|>", picture()), "2 times"),
    (chat("What?", "a", "no/such.png"), "no such picture"),
    (chat("What? " * 100, "a", picture()), "needs at least"),
    (chat("What?", "a", *[picture()] * 16), "256 of them for 16 pictures, but max_length is 256"),
]


def test_rows_that_cant_be_used_are_left_out_and_say_why(loaded):
    broken = [messages for messages, _ in UNUSABLE]
    rows, _, rejected = encode_pictures(loaded, make_chats([CHATS[0], *broken, CHATS[2]]), max_length=256)
    assert len(rows) == 2
    assert [row.line for row in rejected] == list(range(2, 2 + len(UNUSABLE)))
    for row, (_, reason) in zip(rejected, UNUSABLE, strict=True):
        assert reason in str(row)
    with pytest.raises(ChatError, match="no row is left"):
        encode_pictures(loaded, make_chats(broken), max_length=256)


def test_the_length_that_a_refused_row_asks_for_is_enough_and_one_less_is_not(loaded):
    messages = chat("What?", "yes", *[picture()] * 3)
    _, _, (one,) = encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=50)
    needed = int(re.search(r"at least (\d+)", one.reason)[1])
    assert len(encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=needed)[0]) == 2
    assert len(encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=needed - 1)[0]) == 1


def test_a_long_answer_is_cut_but_no_picture(loaded):
    (row,), pictures, _ = encode_pictures(loaded, make_chats([chat("Why?", "so " * 300, picture())]), max_length=60)
    batch = batches_for(loaded, pictures, None)([row])
    assert row.length == batch["input_ids"].shape[1] == 60
    assert batch["input_ids"].eq(loaded.processor.image_token_id).sum() == 16


def test_order_by_length_is_a_draw_of_all_rows_every_epoch_with_little_padding():
    lengths = [int(one) for one in np.random.default_rng(1).integers(20, 900, 640)]
    order = order_by_length(lengths, 16, seed=1, epochs=2)
    assert order == order_by_length(lengths, 16, seed=1, epochs=2) != order_by_length(lengths, 16, seed=2, epochs=2)
    assert sorted(order[:640]) == sorted(order[640:]) == list(range(640))
    assert order[:640] != order[640:]
    padded = sum(max(lengths[row] for row in order[i : i + 16]) * 16 for i in range(0, 640, 16))
    assert sum(lengths) / padded > 0.9


# --- features


@pytest.mark.parametrize("kind", ["clip", "shuffle"])
def test_cached_features_give_the_same_logits(tmp_path, kind):
    loaded = on_nano(kind)
    rows, pictures, _ = encode_pictures(loaded, make_chats(CHATS), max_length=256)
    keys = [key for row in rows for key in row.pictures]
    seen = compute_features(loaded, pictures, keys, tmp_path, batch_size=len(keys))
    pixels, features = (batches_for(loaded, pictures, one)(rows) for one in (None, seen))
    del pixels["labels"], features["labels"]
    with torch.no_grad():
        wanted = loaded.model(**pixels).logits
        with cached_tower(loaded.model):
            got = loaded.model(**features).logits
        assert torch.equal(loaded.model(**pixels).logits, wanted)  # the tower is back
    assert torch.equal(got, wanted)


def test_features_depend_on_their_picture_alone_and_are_computed_once(loaded, tmp_path, monkeypatch):
    pictures = Pictures()
    keys = [pictures.add(picture()) for _ in range(11)]
    alone = compute_features(loaded, pictures, keys[5:6], tmp_path / "a", batch_size=4)
    together = compute_features(loaded, pictures, keys, tmp_path / "b", batch_size=4)
    assert torch.equal(alone[keys[5]], together[keys[5]])
    monkeypatch.setattr(Pictures, "open", None)  # whoever opens a picture now fails
    again = compute_features(loaded, pictures, keys * 2, tmp_path / "b", batch_size=4)
    assert torch.equal(again[keys[3]], together[keys[3]])


def test_the_key_follows_weights_layer_and_preparation(loaded):
    keys = [tower_key(loaded), tower_key(on_nano()), tower_key(on_nano(seed=1))]
    assert keys[0] == keys[1] != keys[2]
    other = on_nano()
    other.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert tower_key(other) != keys[0]
    other = on_nano()
    other.model.config.vision_feature_layer = -1
    assert tower_key(other) != keys[0]


def test_files_of_features_that_are_not_whole_are_never_read(tmp_path):
    Features(tmp_path).add({"a": torch.ones(2, 3)})
    (whole,) = tmp_path.glob("*.safetensors")
    content = whole.read_bytes()
    (tmp_path / "half.123.part").write_bytes(content)
    (tmp_path / "half.safetensors").write_bytes(content[:-4])
    (tmp_path / "other.safetensors").write_bytes(b"no such format")
    assert torch.equal(Features(tmp_path)["a"], torch.ones(2, 3))
    whole.unlink()
    assert "a" not in Features(tmp_path)


def test_no_room_for_features_is_told(loaded, tmp_path, monkeypatch, capsys):
    pictures = Pictures()
    keys = [pictures.add(picture()) for _ in range(4)]
    needed = 4 * 17 * 64 * 4  # bytes: 4 pictures, 16 patches and CLS, width 64, float32
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("ironlogic.vision.batches.shutil.disk_usage", lambda path, usage=usage: usage)
        features = compute_features(loaded, pictures, keys, tmp_path / str(free))
        assert (features is not None) == fits
        assert ("the tower runs at every step" in capsys.readouterr().out) == (not fits)


def test_a_disk_that_is_full_while_features_are_written(tmp_path, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("ironlogic.vision.batches.save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        Features(tmp_path / "features").add({"a": torch.ones(2, 3)})
    assert not list((tmp_path / "features").iterdir())


# --- loss


def test_label_loss_is_cross_entropy_and_so_is_its_gradient(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 500).requires_grad_(False)
    hidden = torch.randn(3, 20, 16, requires_grad=True)
    labels = torch.randint(0, 500, (3, 20))
    labels[torch.rand(3, 20) < 0.5] = IGNORED
    wanted = torch.nn.functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 500), labels[:, 1:].reshape(-1), ignore_index=IGNORED
    )
    (gradient,) = torch.autograd.grad(wanted, hidden)
    for size in (2**24, 500 * 7):  # all at once, and seven rows at a time
        monkeypatch.setattr("ironlogic.vision.batches._LOGITS", size)
        got = label_loss(hidden, labels, head)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], gradient)
    count = (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(label_loss(hidden, labels, head, count=2 * count), wanted / 2)
    with pytest.raises(ValueError, match="the head is trained"):
        label_loss(hidden, labels, head.requires_grad_(True))


def test_the_loss_over_an_open_head_is_the_models_own(loaded):
    rows, pictures, _ = encode_pictures(loaded, make_chats(CHATS), max_length=256)
    batch = batches_for(loaded, pictures, None)(rows)
    wanted = loaded.model(**batch).loss
    labels = batch.pop("labels")
    with open_head(loaded.model) as head:
        got = label_loss(loaded.model(**batch).logits, labels, head)
    projector = list(loaded.model.model.multi_modal_projector.parameters())
    torch.testing.assert_close(got, wanted)
    for one, other in zip(torch.autograd.grad(got, projector), torch.autograd.grad(wanted, projector), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- asking and controls


def test_answers_do_not_depend_on_the_batch_nor_on_the_cache(loaded, tmp_path):
    rows = [
        chat(question, "x", picture()) for question in ("What?", "Tell me what this is, please.", "Where is it?")
    ]
    rows.append(chat("What is two plus two?", "x"))
    together = answer_pictures(loaded, rows, max_new_tokens=6)
    assert together == [answer_pictures(loaded, [row], max_new_tokens=6)[0] for row in rows]
    assert together == answer_pictures(loaded, rows, max_new_tokens=6, cache=tmp_path, batch_size=2)
    with pytest.raises(ChatError, match="row 2: .*no such picture"):
        answer_pictures(loaded, [rows[0], chat("What?", "x", "no/such.png")])


def test_controls_take_the_picture_away_in_four_ways():
    images = [picture() for _ in range(5)]
    rows = [chat(f"q{i}", "a", image) for i, image in enumerate(images)] + [chat("text alone", "a")]
    got = {name: control_rows(rows, name, seed=3) for name in ("image", "blank", "shuffled", "none")}
    seen = {name: [own(row) for row in got[name]] for name in ("image", "blank", "shuffled")}
    assert seen["image"] == [[image] for image in images] + [[]]
    assert all(one[0].getextrema() == ((127, 127),) * 3 for one in seen["blank"][:5])
    shuffled = [one[0] for one in seen["shuffled"][:5]]
    assert sorted(map(id, shuffled)) == sorted(map(id, images))
    assert all(one is not image for one, image in zip(shuffled, images, strict=True))
    assert [row[0]["content"] for row in got["none"]] == [*(f"q{i}" for i in range(5)), "text alone"]
    assert control_rows(rows, "shuffled", seed=3) == got["shuffled"] != control_rows(rows, "shuffled", seed=4)
    assert rows[0][0]["content"][0]["image"] is images[0]  # what came in is as it was
    with pytest.raises(ValueError, match="expected image, blank, shuffled or none"):
        control_rows(rows, "dark")


# --- the widget, and own questions


@pytest.fixture(scope="module")
def nano_eyes():
    return splice("nano-vision", "nano", seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    scenes = make_scenes(3, seed=9, split="test")
    paths = save_scenes(scenes, tmp_path_factory.mktemp("pictures"))
    return [question_chat(scene, path, kind) for scene, path, kind in zip(scenes, paths, KINDS, strict=True)]


@pytest.fixture
def explorer(nano_eyes, rows):
    return picture_explorer(nano_eyes, rows, max_new_tokens=4)


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), color).save(file, "PNG")
    return file.getvalue()


def test_the_answer_is_the_models(nano_eyes, rows, explorer):
    for i, row in enumerate(rows):
        explorer.controls["picture"].value = i
        explorer.controls["question"].value = row[0]["content"][1]["text"]
        (answer,) = answer_pictures(nano_eyes, [row], max_new_tokens=4)
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


def upload(content: bytes) -> tuple[dict]:
    """What ipywidgets 8 hands over."""
    about = {"name": "x.png", "type": "image/png", "size": 9, "last_modified": datetime(2026, 1, 1, tzinfo=UTC)}
    return (about | {"content": memoryview(content)},)


def shown(html: str) -> str:
    return html.split("src=")[1].split(">")[0]


def test_an_upload_goes_before_the_picked_picture_until_another_is_picked(explorer):
    picked = shown(explorer.text.value)
    explorer.controls["upload"].value = upload(png("red"))
    uploaded = shown(explorer.text.value)
    assert uploaded != picked
    assert "truth" not in explorer.text.value
    seven = {"mine.png": {"name": "mine.png", "content": png("red")}}  # ipywidgets 7
    html, figure = explorer._show(picture=0, upload=seven, question="What is it?")
    assert (shown(html), figure) == (uploaded, None)
    explorer.controls["picture"].value = 1
    assert explorer.controls["upload"].value == ()
    assert shown(explorer.text.value) not in (uploaded, picked)


def test_a_damaged_upload_is_told_in_one_line(explorer):
    explorer.controls["upload"].value = upload(png("red")[:60])
    assert "PictureError" in explorer.text.value
    assert "Traceback" not in explorer.text.value


def test_rows_of_any_shape_are_offered_by_their_last_question(nano_eyes, rows):
    picture = rows[0][0]["content"][0]
    first = [{"role": "user", "content": [picture, {"type": "text", "text": "Who?"}]}]
    reply = [{"type": "text", "text": "Answer: Ann"}]
    talk = [{"role": "system", "content": "s"}, *first, {"role": "assistant", "content": reply}]
    more = [*talk, {"role": "user", "content": "What color?"}, {"role": "assistant", "content": "Answer: red"}]
    text = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert last_question(talk) == (picture["image"], "Who?", "Answer: Ann")
    assert last_question(more) == (picture["image"], "What color?", "Answer: red")
    assert last_question(text) == (None, "2 + 2?", "4")
    explorer = picture_explorer(nano_eyes, [text, more], max_new_tokens=4)
    assert explorer.controls["question"].value == "What color?"
    assert "the truth: Answer: red" in explorer.text.value


def test_an_empty_thought_is_no_part_of_an_answer(nano_eyes, rows, monkeypatch):
    """Qwen3's tags are text to its tokenizer, nano's are not; so the words are put into its mouth."""
    words = "<think>\n\n</think>\n\nAnswer: 7", "<think>\nhm\n</think>\nAnswer: 7"
    monkeypatch.setattr(type(nano_eyes.tokenizer), "batch_decode", lambda *_, **__: list(words))
    said = answer_pictures(nano_eyes, rows[:2], max_new_tokens=2)
    assert sorted(said) == ["<think>\nhm\n</think>\nAnswer: 7", "Answer: 7"]


def test_own_questions_are_split_and_too_few_are_told(rows, tmp_path, capsys):
    shutil.copytree(Path(rows[0][0]["content"][0]["image"]).parent, tmp_path, dirs_exist_ok=True)
    chats = [chat(f"Say {i}.", "so") for i in range(60)]
    for i in range(60):
        chats.append(chat(f"Who? {i}", "Ann", Path(rows[i % 3][0]["content"][0]["image"]).name))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    train, test = load_questions(path, train=40, test=3, seed=1)
    assert "120 rows" in capsys.readouterr().out
    assert (len(train), len(test)) == (40, 3)
    assert all(last_question(row)[0] is not None for row in test)
    path.write_text(json.dumps({"messages": chats[0]}) + "\n")
    with pytest.raises(ChatError, match="too few to hold out one with a picture"):
        load_questions(path, train=40, test=3)
