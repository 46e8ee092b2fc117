"""Presets: the seed's own numbers, the choice by card, and refusals."""

import re
from dataclasses import replace

from ironlogic.burden import Burden
from ironlogic.memory import plan_memory
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

import pytest


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


SYSTEMS = {name: preset for name, preset in (PRESETS | VISION_PRESETS).items() if preset.card_gib}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_fits_its_card_and_where_it_does_not_a_setting_is_named(name):
    card = SYSTEMS[name].card_gib
    assert plan_memory(name, card_gib=card).fits
    for smaller in (14.7, 23.5, 31.4):  # what cards of 16, 24 and 32 GB offer
        plan = plan_memory(name, card_gib=smaller)
        assert plan.fits or (smaller < card and re.search("batch size|length|LoRA|t4$", plan.advice)), plan.advice


def test_all_five_systems_are_there_as_the_seed_and_as_recommended():
    systems = ("gemma-3-27b", "qwen3-30b-a3b", "qwen3-vl-4b", "vqwen3-4b", "qwen3-smvl")
    assert all({name, f"{name}-as-seed"} <= set(SYSTEMS) for name in systems)


@pytest.mark.parametrize(
    ("card", "name"),
    [(None, "nano"), (8, "nano"), (14.7, "t4"), (23.5, "24gb"), (31.4, "32gb"), (79, "32gb")],
)
def test_pick_by_card(card, name):
    assert pick_preset(card).name == name


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(PresetError, match="unknown preset 'h100'; expected one of nano, smollm2, t4"):
        find_preset("h100")


def test_the_vision_recipes_are_the_seeds():
    llava = VISION_PRESETS["vqwen3-4b-as-seed"]
    one, two = llava.projector_stage, llava.instruct_stage
    assert (one.batch_size, one.accumulation, one.learning_rate, one.schedule) == (32, 8, 1e-3, "cosine")
    assert (one.warmup_steps, one.epochs, one.loss) == (0.03, 1, "assistant")
    assert (two.batch_size, two.accumulation, two.learning_rate, two.projector_learning_rate) == (16, 8, 2e-4, 2e-5)
    assert (two.warmup_steps, two.epochs, two.schedule) == (0.03, 1, "cosine")
    assert two.lora == LoraSettings(rank=128, alpha=256, attention=True, mlp=True, dropout=0.05)
    assert (llava.projector, llava.four_bit) == ("mlp2x_gelu", False)

    smvl = VISION_PRESETS["qwen3-smvl-as-seed"]
    one = smvl.projector_stage
    assert one.batch_size * one.accumulation == 32
    assert (one.learning_rate, one.warmup_steps, one.weight_decay, one.schedule) == (1e-4, 0.1, 0.01, "cosine")
    assert (one.optimizer, one.max_length, one.loss, one.log_steps, one.seed) == ("adamw_torch", 2048, "all", 5, 42)
    assert (smvl.projector, smvl.four_bit, smvl.rows) == ("pixel_shuffle", False, 60_000)
    assert smvl.instruct_stage is None


@pytest.mark.parametrize(
    ("name", "different"),
    [
        ("vqwen3-4b", {"batch_size", "accumulation", "max_length", "pictures"}),
        ("qwen3-smvl", {"batch_size", "accumulation", "loss", "pictures"}),
    ],
)
def test_recommended_splices_take_the_seeds_rows_a_step(name, different):
    ours, seed = VISION_PRESETS[name], VISION_PRESETS[f"{name}-as-seed"]
    for field in ("tower", "language_model", "data", "rows"):
        assert getattr(ours, field) == getattr(seed, field)
    one, other = ours.projector_stage, seed.projector_stage
    assert {field for field, value in vars(one).items() if value != vars(other)[field]} == different
    assert one.batch_size * one.accumulation == other.batch_size * other.accumulation
    if two := seed.instruct_stage:
        assert ours.instruct_stage == replace(two, batch_size=4, accumulation=32, pictures=0)
