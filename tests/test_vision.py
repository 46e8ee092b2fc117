"""Pictures in batches, the tower's features, the loss; answers about pictures, their controls, and the widget."""

import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from ironlogic.data.chats import ChatError, make_chats
from ironlogic.data.masking import IGNORED
from ironlogic.data.scenes import scene_chats
from ironlogic.models import ModelError, load_model
from ironlogic.presets import TrainSettings
from ironlogic.show.picture_widget import picture_explorer
from ironlogic.show.vision import plot_answers
from ironlogic.training.picture_rows import PictureBatches, PictureReader, encode_pictures
from ironlogic.training.runs import RunError
from ironlogic.vision.answers import answer_pictures, control_rows, control_tests, last_question, load_questions
from ironlogic.vision.features import (
    Features,
    _run_tower,
    cached_tower,
    compute_features,
    label_loss,
    open_head,
    order_by_length,
    tower_key,
)
from ironlogic.vision.splice import splice
from ironlogic.vision.train import train_and_answer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from eyes import chat, on_nano, picture
from PIL import Image
from safetensors import SafetensorError
from test_systems import gemma3, qwen3_vl


@pytest.fixture(scope="module")
def loaded():
    return on_nano()


@pytest.fixture(scope="module", params=["clip", "shuffle", "tiles", gemma3, qwen3_vl])
def seeing(request, tmp_path_factory):
    """A model of each kind that takes pictures, as `load_model` or `splice` gives it."""
    if isinstance(request.param, str):
        return on_nano(request.param)
    folder = tmp_path_factory.mktemp("seeing")
    for part in request.param():
        part.save_pretrained(folder)
    return load_model(folder, four_bit=False, max_length=256)


def own(messages):
    return [part["image"] for part in messages[0]["content"] if part["type"] == "image"]


CHATS = [
    chat("What is it?", "a red 3", picture()),
    chat("\nAre these alike in any way?\n", "no", picture(), picture().resize((96, 40))),
    chat("What is two plus two?", "4"),
]


def encode(loaded, chats=CHATS, **options):
    return encode_pictures(loaded, make_chats(chats), **{"max_length": 256} | options)


def test_rows_are_what_the_processor_makes_and_only_answers_are_trained(seeing):
    rows, reader, rejected = encode(seeing)
    assert not rejected
    for row, messages in zip(rows, CHATS, strict=True):
        text, images = seeing.processor.apply_chat_template(messages, tokenize=False), own(messages)
        if reader.kind == "smolvlm" and not reader.tiled:
            images = [[image] for image in images]
        elif reader.tiled:
            images = [images] * bool(images)
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        wanted = seeing.processor(text=[text], images=images or None, **options)
        batch = PictureBatches(reader)([row])
        wanted.pop("pixel_attention_mask", None)  # all ones
        assert wanted.keys() == batch.keys() - {"labels"}
        for name, value in wanted.items():
            assert torch.equal(batch[name].flatten(), value.flatten()), name
        assert row["length"] == batch["input_ids"].shape[1]
        trained = batch["input_ids"][batch["labels"] != IGNORED]
        assert seeing.tokenizer.decode(trained) == messages[1]["content"] + "<|im_end|>"


def test_loss_on_every_token_leaves_out_pictures_and_padding(seeing):
    rows, reader, _ = encode(seeing, loss="all")
    batch = PictureBatches(reader)(rows)
    trained = batch["input_ids"][batch["labels"] != IGNORED]
    assert torch.equal(batch["labels"][batch["labels"] != IGNORED], trained)
    assert reader.image_id not in trained
    blocks = [sum(len(reader.block(key)) for key in row["picture_keys"]) for row in rows]
    read = [
        row["length"] - block - 1 for row, block in zip(rows, blocks, strict=True)
    ]  # nothing predicts the first
    assert (batch["labels"] != IGNORED).sum(1).tolist() == read


def test_both_sides_of_padding_hold_the_same_rows(loaded):
    rows, reader, _ = encode(loaded)
    right, left = (PictureBatches(reader, side=side)(rows) for side in ("right", "left"))
    for index, row in enumerate(rows):
        length = row["length"]
        assert torch.equal(right["input_ids"][index, :length], left["input_ids"][index, -length:])
        assert right["attention_mask"][index].sum() == left["attention_mask"][index].sum() == length


UNUSABLE = [
    (chat("What <|image_pad|> is it?", "a", picture()), "2 times '<|image_pad|>' for 1 pictures: a text holds"),
    (chat("Say <|image_pad|>", "a"), "1 times '<|image_pad|>' for 0 pictures"),
    (chat("What is it?", "<|image_pad|>", picture()), "2 times"),
    (chat("What?", "a", "no/such.png"), "no such picture"),
    (chat("What?", "a", b"no picture"), "is no picture of a kind"),
    (chat("What? " * 100, "a", picture()), "needs at least"),
    (chat("What?", "a", *[picture()] * 4), "holds 4 pictures; the most that are taken here is 3"),
]


def test_rows_that_cant_be_used_are_left_out_and_say_why(loaded, tmp_path):
    narrow = Image.new("RGB", (9000, 20))
    narrow.save(tmp_path / "narrow.png")
    unusable = [*UNUSABLE, (chat("What?", "a", str(tmp_path / "narrow.png")), "has 9000 x 20 pixels")]
    broken = [messages for messages, _ in unusable if b"no picture" not in own(messages)]
    reasons = [reason for messages, reason in unusable if messages in broken]
    rows, _, rejected = encode(loaded, [CHATS[0], *broken, CHATS[2]], most=3)
    assert len(rows) == 2
    assert [row.line for row in rejected] == list(range(2, 2 + len(broken)))
    for row, reason in zip(rejected, reasons, strict=True):
        assert reason in str(row)
    with pytest.raises(ChatError, match="no row is left"):
        encode(loaded, broken, most=3)
    with pytest.raises(ChatError, match="is no picture"):
        make_chats([messages for messages, _ in UNUSABLE if b"no picture" in own(messages)])


@pytest.mark.parametrize("kind", ["clip", "tiles"])
def test_the_length_that_a_refused_row_asks_for_is_enough_and_one_less_is_not(kind):
    loaded, messages = on_nano(kind), chat("What?", "yes", *[picture()] * 2)
    _, _, (one,) = encode(loaded, [CHATS[2], messages], max_length=40)
    needed = int(re.search(r"at least (\d+)", one.reason)[1])
    assert [len(encode(loaded, [CHATS[2], messages], max_length=length)[0]) for length in (needed, needed - 1)] == [
        2,
        1,
    ]
    (row,), reader, _ = encode(loaded, [chat("What?", "so " * 99, *own(messages))], max_length=needed + 20)
    batch = PictureBatches(reader)([row])  # a long answer is cut, and no picture
    assert row["length"] == batch["input_ids"].shape[1] == needed + 20
    views = 5 * 4 if kind == "tiles" else 16
    assert batch["input_ids"].eq(reader.image_id).sum() == 2 * views


@pytest.mark.parametrize("kind", ["clip", "shuffle", "tiles"])
def test_a_picture_of_few_pixels_keeps_its_colour(kind):
    """Three pixels are easily taken for the three colours."""
    reader = PictureReader(on_nano(kind))

    def means(size):
        key = reader.add(Image.new("RGB", size, (250, 120, 10)))
        views = reader.pixels([key])["pixel_values"]
        assert len(reader.block(key)) >= len(views)
        return views.mean((0, 2, 3))

    for size in ((1, 1), (3, 3), (1, 90), (90, 1), (3, 50)):
        torch.testing.assert_close(means(size), means((64, 64)), atol=0.02, rtol=0)


def test_models_without_eyes_or_of_unknown_kinds_are_refused(loaded):
    with pytest.raises(ModelError, match="takes no pictures here; known are llava, smolvlm, qwen3_vl, gemma3"):
        encode(load_model("nano", four_bit=False))


def test_order_by_length_is_a_draw_of_all_rows_every_epoch_with_little_padding():
    lengths = [int(one) for one in np.random.default_rng(1).integers(20, 900, 640)]
    order = order_by_length(lengths, 16, seed=1, epochs=2)
    assert order == order_by_length(lengths, 16, seed=1, epochs=2) != order_by_length(lengths, 16, seed=2, epochs=2)
    assert sorted(order[:640]) == sorted(order[640:]) == list(range(640))
    assert order[:640] != order[640:]
    padded = sum(max(lengths[row] for row in order[i : i + 16]) * 16 for i in range(0, 640, 16))
    assert sum(lengths) / padded > 0.9


# --- features


@pytest.mark.parametrize("kind", ["clip", "shuffle", "tiles"])
def test_features_are_computed_once_of_each_picture_alone_and_give_the_same_logits(tmp_path, kind, monkeypatch):
    loaded = on_nano(kind)
    rows, reader, _ = encode(loaded)
    keys = [key for row in rows for key in row["picture_keys"]]
    seen = compute_features(loaded, reader, keys, tmp_path / "a", batch_size=len(keys))
    pixels, features = (PictureBatches(reader, one)(rows) for one in (None, seen))
    del pixels["labels"], features["labels"]
    with torch.no_grad():
        wanted = loaded.model(**pixels).logits
        with cached_tower(loaded.model):
            got = loaded.model(**features).logits
        assert torch.equal(loaded.model(**pixels).logits, wanted)  # the tower is back
    assert torch.equal(got, wanted)
    together = compute_features(loaded, reader, keys, tmp_path / "b", batch_size=2)
    alone = compute_features(loaded, reader, keys[1:2], tmp_path / "c", batch_size=2)
    assert torch.equal(together[keys[1]], alone[keys[1]])
    monkeypatch.setattr(PictureReader, "open", None)  # whoever opens a picture now fails
    again = compute_features(loaded, reader, keys * 2, tmp_path / "b", batch_size=2)
    assert torch.equal(again[keys[1]], alone[keys[1]])


def test_of_several_processes_one_computes_and_the_others_wait(loaded, tmp_path, monkeypatch):
    """Here threads, which hold the same lock on the file."""
    runs, tower = [], _run_tower

    def slowly(*args):
        runs.append(args)
        time.sleep(0.1)
        return tower(*args)

    monkeypatch.setattr("ironlogic.vision.features._run_tower", slowly)
    reader = PictureReader(loaded)
    keys = [reader.add(picture()) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(compute_features, loaded, reader, keys, tmp_path, batch_size=2) for _ in range(3)]
        features = [one.result() for one in waiting]
    assert len(runs) == 2
    assert all(torch.equal(one[key], features[0][key]) for one in features for key in keys)


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
    reader = PictureReader(loaded)
    keys = [reader.add(picture()) for _ in range(4)]
    needed = 4 * 17 * 64 * 4  # bytes: 4 pictures, 16 patches and CLS, width 64, float32
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("ironlogic.vision.features.shutil.disk_usage", lambda path, usage=usage: usage)
        features = compute_features(loaded, reader, keys, tmp_path / str(free))
        assert (features is not None) == fits
        assert ("the tower runs at every step" in capsys.readouterr().out) == (not fits)


def test_a_disk_that_is_full_while_features_are_written(tmp_path, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("ironlogic.vision.features.save_file", full)
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
        monkeypatch.setattr("ironlogic.vision.features._LOGITS", size)
        got = label_loss(hidden, labels, head)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], gradient)
    count = (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(label_loss(hidden, labels, head, count=2 * count), wanted / 2)
    with pytest.raises(ValueError, match="the head is trained"):
        label_loss(hidden, labels, head.requires_grad_(True))


def test_the_loss_over_an_open_head_is_the_models_own(loaded):
    rows, reader, _ = encode(loaded)
    batch = PictureBatches(reader)(rows)
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
    return scene_chats(3, tmp_path_factory.mktemp("pictures"), seed=9, split="test")


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
    chats = [chat(f"Say {i}.", "so") for i in range(60)]
    for i in range(60):
        shutil.copy(rows[0][0]["content"][0]["image"], tmp_path / f"{i}.png")
        chats.append(chat(f"Who? {i}", "Ann", f"{i}.png"))
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    train, test = load_questions(path, train=40, test=3, seed=1)
    assert "120 rows" in capsys.readouterr().out
    assert (len(train), len(test)) == (40, 3)
    assert all(last_question(row)[0] is not None for row in test)
    path.write_text(json.dumps({"messages": chats[0]}) + "\n")
    with pytest.raises(ChatError, match="too few to hold out one with a picture"):
        load_questions(path, train=40, test=3)


def test_held_out_questions_that_one_control_could_not_ask_are_told(capsys):
    loaded = on_nano("tiles", max_length=100)
    wide, square = Image.new("RGB", (96, 40)), Image.new("RGB", (32, 32))  # in three views and in five
    rows = [chat("What is it?", "a", wide), chat("What is it?", "b", square), chat("why " * 16, "c", wide)]
    rows += [chat("What is <image>?", "d", wide), chat("Which is it?", "e", square)]
    tests = control_tests(loaded, rows)
    told = capsys.readouterr().out
    assert "held-out questions: 2 rows left out" in told
    assert "(line 3)" in told
    assert "a text holds it (line 4)" in told
    replies = [[row[1]["content"] for row in test] for test in tests.values()]
    assert replies == [["a", "b", "e"]] * 3
    assert all(len(answer_pictures(loaded, test, max_new_tokens=1)) == 3 for test in tests.values())
    with pytest.raises(ChatError, match="no question is left to ask: 1 row left out"):
        control_tests(loaded, rows[3:4])


def test_200_rows_of_the_cauldron_go_from_parquet_through_both_stages_to_answers(tmp_path, capsys):
    rows = []
    for row in range(200):
        files = [io.BytesIO() for _ in range(1 + (row % 5 == 0))]
        for file in files:
            picture().resize((20 + row % 30, 20)).save(file, "JPEG")
        texts = [{"user": f"{i}: what is it?", "assistant": "so", "source": "s"} for i in range(1 + row % 3)]
        rows.append({"images": [{"bytes": file.getvalue(), "path": None} for file in files], "texts": texts})
    rows[7]["images"][0]["bytes"] = rows[7]["images"][0]["bytes"][:300]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    train, held_out = load_questions(tmp_path / "x.parquet", train=24, test=6)
    said = capsys.readouterr().out
    assert "199 rows. 1 row left out" in said
    assert "(line 8)" in said
    settings = TrainSettings(batch_size=8, accumulation=1, max_length=128)
    tests = control_tests(on_nano(), held_out)
    stages = {"projector": (train, settings), "instruct": (train, settings), "run": tmp_path / "run"}
    answers = train_and_answer(
        lambda seed: on_nano(), tests, **stages, seed=1, cache=tmp_path / "features", max_new_tokens=2
    )
    assert {name: len(said) for name, said in answers.items()} == dict.fromkeys(tests, 6)
    for stage in ("projector", "instruct"):
        record = json.loads((tmp_path / "run" / stage / "run.json").read_text())
        assert (record["rows"], record["data"]) == (24, "all 24 rows")


def test_answers_without_a_truth_are_not_judged():
    pictures, words = [Image.new("L", (8, 8)), png("red")], ["a", "b"]
    judged, told = plot_answers(pictures, words, words, ["a", "c"]), plot_answers(pictures, words, words)
    colors = [[panel.title.get_color() for panel in figure.axes[:2]] for figure in (judged, told)]
    assert len(set(colors[0])) == 2
    assert colors[1] == ["black"] * 2


@pytest.mark.filterwarnings("error")
def test_any_answer_fits_over_its_picture():
    said = ["a\x18b\n\n\uffffc $x$ \U000f0000", "long " * 200, "x" * 500, ""]
    figure = plot_answers([Image.new("L", (8, 8))] * 4, ["What is it?"] * 4, said, columns=2)
    assert figure._repr_png_().startswith(b"\x89PNG")
    captions = [panel.get_title() for panel in figure.axes]
    assert captions[0] == "What is it?\na\\x18b \\uffffc $x$ \\U000f0000"
    assert all(len(line) <= 30 for caption in captions for line in caption.split("\n"))
    assert all(caption.count("\n") <= 4 for caption in captions)
