"""Batches with pictures: the processor's ids, the answer's labels, the tower's features, the model's loss."""

from ironlogic.data.chats import ChatError, make_chats
from ironlogic.data.masking import IGNORED
from ironlogic.training.runs import RunError
from ironlogic.vision.answers import answer_pictures, control_rows
from ironlogic.vision.batches import (
    Features,
    Pictures,
    _too_many,
    batches_for,
    cached_tower,
    encode_pictures,
    image_length,
    label_loss,
    look_at,
    open_head,
    order_by_length,
    tower_key,
)
from ironlogic.vision.splice import splice

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

RNG = np.random.default_rng(0)


def picture() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def tiny(seed=0, projector="mlp2x_gelu"):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if projector == "pixel_shuffle":
        tower = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)
        )
        look = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
        look = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return splice((tower.eval(), look), "nano", projector=projector, max_length=256)


@pytest.fixture(scope="module")
def loaded():
    return tiny()


def chat(question, answer, *images):
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


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


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("What <|image_pad|> is it?", "a", picture()), "2 times '<|image_pad|>' for 1 pictures: a text holds"),
        (chat("Say <|image_pad|>", "a"), "1 times '<|image_pad|>' for 0 pictures"),
        (chat("What is it?", "<|image_pad|>", picture()), "2 times"),
        (chat("What?", "a", "no/such.png"), "no such picture"),
        (chat("What?", "a", None), "is a place for a picture, but no picture came"),
        (chat("What? " * 100, "a", picture()), "needs at least"),
        (
            chat("What?", "a", *[picture()] * 16),
            "256 of them for 16 pictures, but max_length is 256",
        ),
    ],
)
def test_a_row_that_cant_be_used_is_left_out_and_says_why(loaded, messages, reason):
    rows, _, rejected = encode_pictures(loaded, make_chats([CHATS[0], messages, CHATS[2]]), max_length=256)
    assert len(rows) == 2
    assert rejected[0].line == 2
    assert reason in str(rejected[0])
    with pytest.raises(ChatError, match="no row is left"):
        encode_pictures(loaded, make_chats([messages]), max_length=256)


def test_the_length_that_a_refused_row_asks_for_is_enough_and_one_less_is_not(loaded):
    messages = chat("What?", "yes", *[picture()] * 3)
    _, _, (one,) = encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=50)
    needed = int(one.reason.split()[3])
    assert len(encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=needed)[0]) == 2
    assert len(encode_pictures(loaded, make_chats([CHATS[2], messages]), max_length=needed - 1)[0]) == 1


def test_a_long_answer_is_cut_but_no_picture(loaded):
    (row,), pictures, _ = encode_pictures(loaded, make_chats([chat("Why?", "so " * 300, picture())]), max_length=60)
    batch = batches_for(loaded, pictures, None)([row])
    assert row.length == batch["input_ids"].shape[1] == 60
    assert batch["input_ids"].eq(loaded.processor.image_token_id).sum() == 16


def test_chats_carry_their_pictures():
    for messages, before in zip(make_chats(CHATS), CHATS, strict=True):
        images = [] if isinstance(messages[0]["content"], str) else own(messages)
        assert [Pictures().add(image) for image in images] == [Pictures().add(image) for image in own(before)]


def test_order_by_length_is_a_draw_of_all_rows_every_epoch_with_little_padding():
    lengths = [int(one) for one in np.random.default_rng(1).integers(20, 900, 640)]
    order = order_by_length(lengths, 16, seed=1, epochs=2)
    assert order == order_by_length(lengths, 16, seed=1, epochs=2) != order_by_length(lengths, 16, seed=2, epochs=2)
    assert sorted(order[:640]) == sorted(order[640:]) == list(range(640))
    assert order[:640] != order[640:]
    padded = sum(max(lengths[row] for row in order[i : i + 16]) * 16 for i in range(0, 640, 16))
    assert sum(lengths) / padded > 0.9


# --- features


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "pixel_shuffle"])
def test_cached_features_give_the_same_logits(tmp_path, projector):
    loaded = tiny(projector=projector)
    rows, pictures, _ = encode_pictures(loaded, make_chats(CHATS), max_length=256)
    keys = [key for row in rows for key in row.pictures]
    seen = look_at(loaded, pictures, keys, tmp_path, batch_size=len(keys))
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
    alone = look_at(loaded, pictures, keys[5:6], tmp_path / "a", batch_size=4)
    together = look_at(loaded, pictures, keys, tmp_path / "b", batch_size=4)
    assert torch.equal(alone[keys[5]], together[keys[5]])
    monkeypatch.setattr(Pictures, "open", None)  # whoever opens a picture now fails
    again = look_at(loaded, pictures, keys * 2, tmp_path / "b", batch_size=4)
    assert torch.equal(again[keys[3]], together[keys[3]])


def test_the_key_follows_weights_layer_and_preparation(loaded):
    keys = [tower_key(loaded), tower_key(tiny()), tower_key(tiny(seed=1))]
    assert keys[0] == keys[1] != keys[2]
    other = tiny()
    other.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert tower_key(other) != keys[0]
    other = tiny()
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
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("ironlogic.vision.batches.shutil.disk_usage", lambda path: usage)
    assert not _too_many(torch.zeros(1024), 128, tmp_path)  # 512 KiB, half of it
    assert _too_many(torch.zeros(1024), 129, tmp_path)
    assert "features of 129 pictures" in capsys.readouterr().out
    usage.free, pictures = 1000, Pictures()
    assert look_at(loaded, pictures, [pictures.add(picture())], tmp_path) is None
    assert "the tower runs at every step" in capsys.readouterr().out


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
