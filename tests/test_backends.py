"""Weights that would not fit are refused with the arithmetic, before they are loaded."""

from ironlogic import memory
from ironlogic import models as backends
from ironlogic.models import DATA, ModelError, load_model

import pytest
import transformers


def wide_folder(path, name):
    """config.json of that model, and weights that can't be read."""
    known = dict(memory.ARCHITECTURES[name])
    transformers.CONFIG_MAPPING[known.pop("model_type")](**known).save_pretrained(path)
    (path / "model.safetensors").touch()
    return path


@pytest.mark.parametrize("backend", ["transformers", None])
def test_experts_that_would_stay_wide_are_refused_before_loading(tmp_path, backend):
    folder = wide_folder(tmp_path / "Qwen3-30B-A3B", "Qwen3-30B-A3B")
    with pytest.raises(ModelError, match="its experts would not be in 4 bit") as caught:
        load_model(folder, backend=backend)
    assert "28,991,029,248 parameters x 2 bytes = 54.0 of 55.6 GiB of weights" in str(caught.value)
    assert "which takes 15.5 GiB" in str(caught.value)


@pytest.mark.slow
def test_experts_that_came_out_wide_are_refused_by_their_bytes(tmp_path, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(DATA / "nano-moe")
    loaded = load_model("nano-moe")
    held = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**30
    wide = {"four_bit": True, "packs_experts": False, "held_gib": held}
    backends._refuse_too_large("nano-moe", config, **wide)  # what fits goes through
    monkeypatch.setattr(backends, "see_memory", lambda: held * 0.9)
    with pytest.raises(ModelError, match="would not be in 4 bit"):
        backends._refuse_too_large("nano-moe", config, **wide)
    with pytest.raises(ModelError, match="would not be in 4 bit"):
        load_model("nano-moe")


def test_16_bit_of_a_mixture_is_given_when_asked_for():
    assert load_model("nano-moe", four_bit=False).four_bit_share == 0.0


@pytest.mark.slow
def test_weights_that_no_setting_makes_fit_are_refused_before_loading(tmp_path, monkeypatch):
    folder = wide_folder(tmp_path / "Gemma-3-27B", "Gemma-3-27B")
    monkeypatch.setattr(backends, "see_memory", lambda: 20.0)
    with pytest.raises(
        ModelError, match=r"its weights take 51\.1 GiB; in float32 102\.2 GiB, and this machine has 20"
    ):
        load_model(folder, four_bit=False)
    monkeypatch.setattr(backends, "see_memory", lambda: 4.0)
    with pytest.raises(ModelError, match=r"To train it: nothing fits on 4 GiB"):
        load_model(folder)


def test_unsloth_is_never_asked_for_more_than_the_context(monkeypatch):
    """It would stretch RoPE, and nano's answers with it."""
    monkeypatch.setattr(backends, "BACKEND", "unsloth")
    asked = []

    def load(base, config, four_bit, max_length, seed):
        asked.append(max_length)
        raise ModelError("enough")

    monkeypatch.setattr(backends, "_load_with_unsloth", load)
    with pytest.raises(ModelError, match="enough"):
        load_model("nano", max_length=2048, backend="unsloth")
    assert asked == [512]
