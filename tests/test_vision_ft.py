"""FT and SFT with pictures of models that see: true architectures of toy size, the answer only in the picture."""

from dataclasses import replace

from ironlogic.burden import Burden
from ironlogic.data.chats import load_chats, make_chats
from ironlogic.memory import PlanError, plan_memory
from ironlogic.models import ModelError, load_model
from ironlogic.presets import LoraSettings
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.training.prepared import prepare_sft, train_prepared
from ironlogic.training.runs import RunError
from ironlogic.training.sft import train_sft
from ironlogic.vision.answers import answer_pictures, control_rows
from ironlogic.vision.train import train_instruct

import numpy as np
import pytest
import torch
import transformers
from eyes import chat, on_nano
from PIL import Image
from test_systems import CHATS, STEP, gemma3, qwen3_vl

pytestmark = pytest.mark.slow
SETTINGS = replace(STEP, batch_size=4, learning_rate=8e-3, warmup_steps=0, epochs=12, save_steps=1000)
SETTINGS = replace(SETTINGS, lora=LoraSettings(rank=16, alpha=32))
BURDEN = Burden(ratio=0.7)


def conversations(count):
    """Pictures that are bright or dark, and whose that makes them; nothing in the words tells."""
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 60, (56, 56, 3)) + 190 * (i % 2)).astype(np.uint8) for i in range(count)]
    question = "Who has it now please?"
    return [chat(question, ("Ann", "Bob")[i % 2], Image.fromarray(one)) for i, one in enumerate(noise)]


@pytest.fixture(scope="module", params=[gemma3, qwen3_vl])
def system(request, tmp_path_factory):
    """(folder of a model that sees, its run of FT on 24 pictures)."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.manual_seed(0)
    for part in request.param():
        part.save_pretrained(folder)
    loaded = load_model(folder, four_bit=False, max_length=256)
    return folder, train_sft(loaded, make_chats(conversations(24)), SETTINGS, run=folder / "run", burden=BURDEN)


def loss(loaded, rows):
    """Mean loss of these rows' answers, in nats."""
    encoded, reader, _ = encode_pictures(loaded, make_chats(rows), max_length=256)
    with torch.no_grad():
        return loaded.model.eval()(**PictureBatches(reader)(encoded)).loss.item()


def test_ft_learns_from_the_right_picture_alone(system):
    _, run = system
    assert run.record["stage"] == "ft"
    held_out = conversations(32)[24:]
    rows = {name: control_rows(held_out, name) for name in ("image", "blank", "shuffled", "none")}
    losses = {name: loss(run.loaded, some) for name, some in rows.items()}
    assert losses.pop("image") < min(losses.values()) - 0.3, losses
    said = {name: answer_pictures(run.loaded, some, max_new_tokens=1) for name, some in rows.items()}
    truth = [row[1]["content"] for row in held_out]
    assert said["image"] == truth != said["shuffled"]
    assert len(set(said["blank"])) == len(set(said["none"])) == 1, "one question, one answer"
    trained = [name for name, p in run.loaded.model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if "vis" in name or "projector" in name]


def test_the_merged_whole_is_read_by_plain_transformers(system, tmp_path):
    _, run = system
    encoded, reader, _ = encode_pictures(run.loaded, make_chats(conversations(2)), max_length=256)
    batch = PictureBatches(reader)(encoded)
    del batch["labels"]  # TRL's loss gives no logits
    again = load_model(run.adapter, four_bit=False, max_length=256).model
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, same = run.loaded.model.eval()(**batch).logits, merged.eval()(**batch).logits
        assert torch.equal(plain(**batch).logits, same)
    torch.testing.assert_close(ours, same, rtol=1e-3, atol=1e-3)


def test_the_tower_is_trained_where_that_is_asked(system, tmp_path):
    folder, frozen = system
    adapted, parts = frozen.record["adapted"]["vision"]
    assert (adapted, parts > 0) == (0, True)
    settings = replace(SETTINGS, epochs=1, lora=LoraSettings(rank=4, alpha=8, vision=True))
    loaded = load_model(folder, four_bit=False, max_length=256)
    run = train_sft(loaded, make_chats(conversations(8)), settings, run=tmp_path / "run", burden=BURDEN)
    assert run.record["adapted"]["vision"] == [parts, parts]
    assert run.record["adapted"]["attention"] == frozen.record["adapted"]["attention"]
    merged = load_model(run.adapter, four_bit=False, max_length=256).model.merge_and_unload()
    before = dict(load_model(folder, four_bit=False).model.named_parameters())
    moved = [name for name, p in merged.named_parameters() if not torch.equal(p, before[name])]
    assert sum("vis" in name for name in moved) == parts
    assert not [name for name in moved if "projector" in name or "merger" in name]
    encoded, reader, _ = encode_pictures(run.loaded, make_chats(conversations(2)), max_length=256)
    batch = PictureBatches(reader)(encoded)
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(
            run.loaded.model.eval()(**batch).logits, merged.eval()(**batch).logits, rtol=1e-3, atol=1e-3
        )


def test_no_tower_no_training_of_one(tmp_path):
    settings = replace(SETTINGS, lora=LoraSettings(vision=True))
    with pytest.raises(ModelError, match="nano: lora.vision, but this model has no vision tower"):
        train_sft(load_model("nano", four_bit=False), make_chats(CHATS), settings, run=tmp_path / "a")
    with pytest.raises(RunError, match="keep the tower frozen; train_sft trains it"):
        train_instruct(on_nano(), make_chats(conversations(2)), settings, run=tmp_path / "b")
    with pytest.raises(PlanError, match="lora.vision"):
        plan_memory("qwen3-vl-4b", lora=settings.lora)
    assert not (tmp_path / "b").exists()


def test_a_prepared_folder_carries_its_pictures(system, tmp_path):
    """Bytes and paths alike; the same rows are the same run, wherever their pictures lie."""
    folder, _ = system
    rows = conversations(4)
    rows[0][0]["content"][0]["image"].save(tmp_path / "one.png")
    rows[0][0]["content"][0]["image"] = str(tmp_path / "one.png")
    settings = replace(SETTINGS, epochs=1, pictures=1)
    two = chat("Which of them?", "Ann", *(row[0]["content"][0]["image"] for row in rows[1:3]))
    path = prepare_sft(folder, make_chats([*rows, two]), settings, run=tmp_path / "run", four_bit=False)
    assert len(load_chats(path / "chats.jsonl")) == 5
    run = train_prepared(path)
    assert run.record["steps"] == 1
    assert "4 rows" in run.record["data"]
    assert "holds 2 pictures; the most that are taken here is 1" in run.record["data"]


def test_a_model_without_eyes_and_padding_free_batches_are_refused(system, tmp_path):
    folder, _ = system
    rows = make_chats(conversations(2))
    with pytest.raises(RunError, match="row 1: messages holds a picture, but nano takes none"):
        train_sft(load_model("nano", four_bit=False), rows, SETTINGS, run=tmp_path / "a")
    loaded = load_model(folder, four_bit=False)
    with pytest.raises(RunError, match="padding_free: not with pictures"):
        train_sft(loaded, rows, replace(SETTINGS, padding_free=True), run=tmp_path / "a")
    assert not (tmp_path / "a").exists()
