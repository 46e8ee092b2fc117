"""The embedded vision towers: what is shipped, how it is made, and that it sees more than an untrained one."""

from data.make.nano_vision import image_processor, pretrain_tower, save_tower, siglip_config, tower_config
from ironlogic.data.scenes import make_scenes
from ironlogic.models import DATA

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

TOWERS = {
    "clip": (DATA / "nano-vision", CLIPVisionModel, tower_config, 183_680),
    "siglip": (DATA / "nano-siglip", SiglipVisionModel, siglip_config, 183_488),
}
both = pytest.mark.parametrize("kind", TOWERS)


@both
def test_what_is_shipped(kind):
    folder, tower, _, parameters = TOWERS[kind]
    assert sum(p.numel() for p in tower.from_pretrained(folder).parameters()) == parameters
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    scenes = [scene.image for scene in make_scenes(4, seed=0)]
    makers = (image_processor(kind), AutoImageProcessor.from_pretrained(folder))
    ours, theirs = (maker(scenes, return_tensors="pt")["pixel_values"] for maker in makers)
    assert ours.shape == (4, 3, 32, 32)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def features(kind, tower, scenes) -> np.ndarray:
    """What a splice reads, and a constant: CLIP's patches of the last layer but one, SigLIP's of the last."""
    pixels = image_processor(kind)([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    output = tower.eval()(pixels, output_hidden_states=True)
    patches = output.hidden_states[-2][:, 1:] if kind == "clip" else output.last_hidden_state
    return np.hstack([patches.flatten(1).numpy(), np.ones((len(patches), 1))])


def read_numbers(kind, tower) -> float:
    """Share of held-out digits that a linear map (ridge regression) reads off the patches."""
    train, test = make_scenes(1500, seed=5), make_scenes(400, seed=6, split="test")
    x, wanted = features(kind, tower, train), np.eye(10)[[scene.number for scene in train]]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ wanted)
    return np.mean((features(kind, tower, test) @ weights).argmax(1) == [scene.number for scene in test])


@pytest.mark.slow
@both
def test_it_sees_more_than_an_untrained_tower(kind):
    folder, tower, config, _ = TOWERS[kind]
    torch.manual_seed(0)
    untrained = tower(config())
    assert read_numbers(kind, tower.from_pretrained(folder)) > 0.85 > read_numbers(kind, untrained) + 0.1


@pytest.mark.slow
@both
def test_making_it_learns_and_is_repeatable(kind, tmp_path, capsys):
    first, second = (pretrain_tower(kind, seed=1, steps=100, batch=32, scenes=400) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    loss = float(capsys.readouterr().out.split("loss")[1].split()[0])
    assert loss < 0.8 * np.log(32)  # the guess among 32 captions
    save_tower(first, tmp_path)
    again = TOWERS[kind][1].from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
