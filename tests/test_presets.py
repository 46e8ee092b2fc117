"""Presets: the seed's own numbers, the choice by card, and refusals."""

from dataclasses import FrozenInstanceError

import pytest

from ironlogic.burden import Burden
from ironlogic.presets import PRESETS, PresetError, find_preset, pick_preset


def test_the_seeds_gemma_recipe_is_the_seeds():
    preset = find_preset("gemma-3-27b-as-seed")
    train = preset.train
    assert (train.epochs, train.learning_rate, train.batch_size, train.accumulation) == (3, 2e-5, 1, 1)
    assert (train.warmup_steps, train.schedule, train.weight_decay) == (25, "cosine", 0.01)
    assert (train.optimizer, train.max_length, train.loss, train.seed) == ("paged_adamw_8bit", 4096, "all", 3407)
    assert (train.lora.rank, train.lora.alpha, train.lora.attention, train.lora.mlp) == (8, 16, True, True)
    assert preset.burden == Burden(ratio=0.7, unit="seed", redraw=False)
    assert preset.four_bit


@pytest.mark.parametrize(
    ("card", "name"),
    [(None, "nano"), (8, "nano"), (14.7, "t4"), (23.5, "24gb"), (31.4, "32gb"), (79, "32gb")],
)
def test_pick_by_card(card, name):
    assert pick_preset(card).name == name


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(PresetError, match="unknown preset 'h100'; expected one of nano, t4"):
        find_preset("h100")


def test_presets_are_frozen_and_found_as_objects():
    assert find_preset(PRESETS["nano"]) is PRESETS["nano"]
    with pytest.raises(FrozenInstanceError):
        PRESETS["nano"].train.epochs = 9
