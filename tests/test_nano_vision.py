"""The embedded vision tower: what is shipped, how it is made, and that it sees more than an untrained one."""

from data.make.nano_vision import image_processor, pretrain_tower, save_tower, tower_config
from ironlogic.data.scenes import make_scenes
from ironlogic.models import DATA

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

FOLDER = DATA / "nano-vision"


@pytest.fixture(scope="module")
def shipped() -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(FOLDER).eval()


def test_what_is_shipped(shipped):
    assert sum(p.numel() for p in shipped.parameters()) == 183_680
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2**20
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    scenes = [scene.image for scene in make_scenes(4, seed=0)]
    ours, theirs = (one(scenes, return_tensors="pt")["pixel_values"] for one in (image_processor(), processor))
    assert ours.shape == (4, 3, 32, 32)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def features(tower: CLIPVisionModel, scenes: list) -> np.ndarray:
    """What a splice reads: the patches of the last layer but one, and a constant."""
    pixels = image_processor()([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(1).numpy()
    return np.hstack([patches, np.ones((len(patches), 1))])


def read_numbers(tower: CLIPVisionModel) -> float:
    """Share of held-out digits that a linear map (ridge regression) reads off the patches."""
    train, test = make_scenes(1500, seed=5), make_scenes(400, seed=6, split="test")
    x, wanted = features(tower, train), np.eye(10)[[scene.number for scene in train]]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ wanted)
    return np.mean((features(tower, test) @ weights).argmax(1) == [scene.number for scene in test])


@pytest.mark.slow
def test_it_sees_more_than_an_untrained_tower(shipped):
    torch.manual_seed(0)
    untrained = CLIPVisionModel(tower_config()).eval()
    assert read_numbers(shipped) > 0.85 > read_numbers(untrained) + 0.1


@pytest.mark.slow
def test_making_it_learns_and_is_repeatable(tmp_path, capsys):
    first, second = (pretrain_tower(seed=1, steps=100, batch=32, scenes=400) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    loss = float(capsys.readouterr().out.split("loss")[1].split()[0])
    assert loss < 0.8 * np.log(32)  # the guess among 32 captions
    save_tower(first, tmp_path)
    again = CLIPVisionModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
