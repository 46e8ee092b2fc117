"""Presets: the seed's own numbers, the choice by card, and refusals."""

from dataclasses import FrozenInstanceError, replace

import pytest

from ironlogic.burden import Burden
from ironlogic.presets import (
    PRESETS,
    SEED_DATA,
    SEED_SFT_DATA,
    VISION_PRESETS,
    LoraSettings,
    PresetError,
    find_preset,
    pick_preset,
)


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
    ("name", "model", "data", "experts"),
    [
        ("gemma-3-27b-as-seed", "google/gemma-3-27b-it", SEED_DATA, False),
        ("qwen3-30b-a3b-as-seed", "Qwen/Qwen3-30B-A3B-Instruct-2507", SEED_DATA, True),
        ("qwen3-vl-4b-as-seed", "Qwen/Qwen3-VL-4B-Instruct", SEED_DATA, False),
        ("qwen3-vl-4b-sft-as-seed", "Qwen/Qwen3-VL-4B-Instruct", SEED_SFT_DATA, False),
    ],
)
def test_systems_as_the_seeds_have_them_differ_in_what_the_seeds_say(name, model, data, experts):
    preset, gemma = find_preset(name), find_preset("gemma-3-27b-as-seed")
    assert (preset.model, preset.data) == (model, data)
    assert preset.train == replace(gemma.train, lora=replace(gemma.train.lora, experts=experts))
    assert preset.burden == (Burden(ratio=0.0) if data == SEED_SFT_DATA else gemma.burden)


@pytest.mark.parametrize("name", ["32gb", "gemma-3-27b", "qwen3-30b-a3b", "qwen3-vl-4b", "24gb", "t4"])
def test_what_is_recommended_differs_where_a_reason_stands_beside_it(name):
    seed, ours = find_preset("gemma-3-27b-as-seed").train, find_preset(name).train
    different = {field for field, value in vars(ours).items() if value != vars(seed)[field]}
    assert different == {"learning_rate", "accumulation", "warmup_steps", "loss"}
    assert find_preset(name).burden == Burden(ratio=0.7)


def test_every_preset_says_what_it_is():
    assert all(preset.note for preset in PRESETS.values())


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.card_gib])
def test_presets_fit_their_card_and_others_are_told_what_fits(name):
    from ironlogic.memory import plan_memory

    preset = PRESETS[name]
    assert plan_memory(preset, card_gib=preset.card_gib).fits
    for card in (14.7, 23.5, 31.4):  # what cards of 16, 24 and 32 GB offer
        plan = plan_memory(preset, card_gib=card)
        if not plan.fits and not plan.advice.startswith("nothing fits"):
            assert "fits on" in plan.advice
            assert "LoRA rank 8 (attention, mlp)" in plan.advice  # the one setting that is in the way: experts
        elif not plan.fits:
            assert plan_memory("t4", card_gib=card).fits
            assert "the preset for that is t4" in plan.advice


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


def test_the_vision_recipes_are_the_seeds():
    llava = VISION_PRESETS["vqwen3-4b"]
    one, two = llava.projector_stage, llava.instruct_stage
    assert (one.batch_size, one.accumulation, one.learning_rate, one.schedule) == (32, 8, 1e-3, "cosine")
    assert (one.warmup_steps, one.epochs, one.loss) == (0.03, 1, "assistant")
    assert (two.batch_size, two.accumulation, two.learning_rate, two.projector_learning_rate) == (16, 8, 2e-4, 2e-5)
    assert (two.warmup_steps, two.epochs, two.schedule) == (0.03, 1, "cosine")
    assert two.lora == LoraSettings(rank=128, alpha=256, attention=True, mlp=True, dropout=0.05)
    assert (llava.image_tokens, llava.projector) == (576, "mlp2x_gelu")

    smvl = VISION_PRESETS["qwen3-smvl"]
    one = smvl.projector_stage
    assert one.batch_size * one.accumulation == 32
    assert (one.learning_rate, one.warmup_steps, one.weight_decay, one.schedule) == (1e-4, 0.1, 0.01, "cosine")
    assert (one.optimizer, one.max_length, one.loss, one.log_steps, one.seed) == ("adamw_torch", 2048, "all", 5, 42)
    assert (smvl.image_tokens, smvl.projector, smvl.rows) == (64, "pixel_shuffle", 60_000)
    assert smvl.instruct_stage is None
