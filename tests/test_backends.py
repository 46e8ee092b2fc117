"""Weights that would not fit are refused with the arithmetic, before they are loaded."""

import pytest

from ironlogic import backends, memory
from ironlogic.models import DATA, ModelError, load_model

import transformers  # isort: skip


def wide_folder(path, **changes):
    """config.json of Qwen3-30B-A3B and nothing else."""
    known = dict(memory.ARCHITECTURES["Qwen3-30B-A3B"]) | changes
    known.pop("total")
    transformers.CONFIG_MAPPING[known.pop("model_type")](**known).save_pretrained(path)
    return path


@pytest.mark.parametrize("backend", ["transformers", None])
def test_experts_that_would_stay_wide_are_refused_before_loading(tmp_path, backend):
    folder = wide_folder(tmp_path / "Qwen3-30B-A3B")
    with pytest.raises(ModelError, match="its experts would not be in 4 bit") as caught:
        load_model(folder, backend=backend)  # there are no weights in that folder
    assert "28,991,029,248 parameters x 2 bytes = 54.0 of 55.6 GiB of weights" in str(caught.value)
    assert "which takes 15.5 GiB" in str(caught.value)


def test_experts_that_came_out_wide_are_refused_by_their_bytes(tmp_path, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(DATA / "nano-moe")
    loaded = load_model("nano-moe")
    held = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**30
    backends._refuse_wide_experts("nano-moe", config, loaded_gib=held)  # what fits goes through
    monkeypatch.setattr(backends, "see_memory", lambda: held * 0.9)
    with pytest.raises(ModelError, match="would not be in 4 bit"):
        backends._refuse_wide_experts("nano-moe", config, loaded_gib=held)
    with pytest.raises(ModelError, match="would not be in 4 bit"):
        load_model("nano-moe")
    assert load_model("nano-moe", four_bit=False).four_bit_share == 0.0  # asked for, so given
