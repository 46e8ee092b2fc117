"""Each fault is seen by the check that is there for it, and only the check and held-out questions see it."""

from ironlogic.data.chats import make_chats
from ironlogic.data.scenes import make_scenes, question_chat, save_scenes
from ironlogic.presets import VISION_PRESETS
from ironlogic.vision.check import check_splice
from ironlogic.vision.faults import FAULTS, break_splice, train_unchecked
from ironlogic.vision.splice import projector_of, splice

import pytest
import torch

SEEN_BY = {
    "pictures go nowhere (seed 004)": "image reaches logits",
    "a wrong image token id": "image token",
    "template that reads text only (Qwen3's)": "chat template",
    "tower's output sliced wrong": "image features",
    "another tower's colours": "mean and deviation",
    "answers padded on the right": "batch equals single",
    "head no longer tied": "tied weights",
    "LoRA inside the tower": "trainable parts",
    "LoRA without the projector": "adapter saved",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_turns_its_check_red(fault):
    report = check_splice(break_splice(splice("nano-vision", "nano"), fault))
    assert SEEN_BY[fault] in {row.name for row in report.failed}
    assert check_splice(splice("nano-vision", "nano")).passed  # nothing is left behind


def test_an_unknown_fault_is_named():
    with pytest.raises(ValueError, match="no fault 'x'; expected one of pictures go nowhere"):
        break_splice(splice("nano-vision", "nano"), "x")


@pytest.mark.slow
def test_the_loss_falls_while_the_projector_learns_nothing(tmp_path):
    scenes = make_scenes(160, seed=1)
    paths = save_scenes(scenes, tmp_path)
    rows = make_chats(question_chat(scene, path, "color") for scene, path in zip(scenes, paths, strict=True))
    first = splice("nano-vision", "nano", seed=1)
    start = [p.clone() for p in projector_of(first.model).parameters()]
    for fault in (None, "pictures go nowhere (seed 004)"):
        loaded = splice("nano-vision", "nano", seed=1)
        loaded = break_splice(loaded, fault) if fault else loaded
        lines = train_unchecked(loaded, rows, VISION_PRESETS["nano-vision"].instruct_stage)
        assert [line["step"] for line in lines] == list(range(1, 21))
        assert sum(line["loss"] for line in lines[-5:]) / 5 < 0.7 * lines[0]["loss"]
        now = projector_of(loaded.model).parameters()
        still = all(torch.equal(a, b) for a, b in zip(start, now, strict=True))
        assert still == (fault is not None)
