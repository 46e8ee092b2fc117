"""`memory` against what ran on a card, published counts, what PEFT, bitsandbytes and a CPU hold, and itself."""

import contextlib
import copy
import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

from ironlogic import memory
from ironlogic.memory import GIB, NF4_BYTES, PlanError, plan_memory
from ironlogic.presets import PRESETS, VISION_PRESETS, LoraSettings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# transformers is imported inside the tests only: where Unsloth is used it has to come first

LORA_BYTES = 10  # float32 weight and gradient, 8-bit Adam
EIGHT_BIT = "paged_adamw_8bit"
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MIXTURE = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 4}
WIDTHS = tuple(TINY)


def config_of(model_type, *widths, **changes):
    """A small configuration; `widths` in the order of `TINY` make it a published one."""
    from transformers import CONFIG_MAPPING

    shape = dict(zip(WIDTHS, widths, strict=True)) if widths else dict(TINY)
    if model_type == "qwen3_moe":
        shape |= MIXTURE
    if model_type == "gemma3_text":
        shape["layer_types"] = ["full_attention"] * 3
    return CONFIG_MAPPING[model_type](**(shape | changes))


def qwen(hidden, inner, layers, heads):
    return config_of("qwen3", 151936, hidden, inner, layers, heads, 8, 128, tie_word_embeddings=False)


def parameters(plan):
    """All of them, from a plan in 16 bit."""
    return round(plan.parts["other weights"] * GIB / 2)


def adapter(plan):
    """Trainable parameters, from a plan with the 8-bit optimizer."""
    return round(plan.parts["LoRA and optimizer"] * GIB / LORA_BYTES)


# ---- on a card ------------------------------------------------------------------------------------------------
RUN = {name: preset for name, preset in (PRESETS | VISION_PRESETS).items() if preset.measured_gib}


@pytest.mark.parametrize("name", RUN)
def test_no_plan_is_below_what_a_card_took(name):
    above = plan_memory(name).peak_gib / RUN[name].measured_gib - 1
    assert 0 <= above < (0.25 if name == "qwen3-smvl" else 0.1), f"{above:+.1%}"


@pytest.mark.slow
def test_the_systems_that_a_24_gb_card_could_not_hold_are_refused_and_fit_with_shorter_rows():
    for name, term in (("gemma-3-27b", "logits (6.0 GiB)"), ("qwen3-30b-a3b", "activations (12.3 GiB)")):
        plan = plan_memory(name, card_gib=24)
        assert not plan.fits
        assert plan.advice.startswith(f"largest term to cut: {term}; fits on 24 GiB with length ")
        assert plan_memory(name, card_gib=31.4).fits
    assert plan_memory("gemma-3-27b", card_gib=24, fused_loss="chunked").fits  # what would hold it


# ---- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Gemma-3-12B", 12_187_325_040),
        ("Gemma-3-27B", 27_432_406_640),
        ("Qwen3-VL-4B", 4_437_815_808),
        ("vqwen3-4b", 4_022_468_096 + 303_507_456 + 9_180_160),  # "9.2 M" in the projector, says seed 003
        ("qwen3-smvl", round(662.87 * 2**20)),  # as seed 004 prints it, in units of 2 ** 20
    ],
)
def test_totals_are_the_published_ones(name, published):
    tolerance = 0.005 * 2**20 if name == "qwen3-smvl" else 0
    assert parameters(plan_memory(name, four_bit=False)) == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize(("attention", "mlp"), [(True, True), (True, False), (False, True)])
def test_lora_has_as_many_parameters_as_peft_adds(attention, mlp):
    lora = LoraSettings(rank=4, attention=attention, mlp=mlp)
    model = with_lora(config_of("qwen3"), lora, dtype="float32")
    plan = plan_memory(config_of("qwen3"), lora=lora, optimizer=EIGHT_BIT)
    assert adapter(plan) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_on_experts_is_counted_per_expert():
    plans = [
        plan_memory("Qwen3-30B-A3B", lora=LoraSettings(rank=8, experts=experts), optimizer=EIGHT_BIT)
        for experts in (True, False)
    ]
    one = 8 * ((2048 + 2 * 768) + (768 + 2048))  # rank x (columns + rows) of both matrices of one expert
    assert adapter(plans[0]) - adapter(plans[1]) == 48 * 128 * one


def test_only_the_decoders_matrices_are_in_four_bit():
    parts = plan_memory("Qwen3-VL-4B").parts
    hidden, query, key, inner = 2560, 4096, 1024, 9728
    matrices = 36 * (2 * hidden * query + 2 * hidden * key + 3 * hidden * inner)
    assert parts["quantised weights"] * GIB == pytest.approx(matrices * NF4_BYTES)
    assert parts["other weights"] * GIB == pytest.approx((4_437_815_808 - matrices) * 2)
    assert parts["dequantisation buffer"] * GIB == pytest.approx(2 * hidden * inner)


def test_four_bit_bytes_are_those_of_bitsandbytes():
    import bitsandbytes.functional as bnb
    import torch

    weight = torch.randn(1024, 2048)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = [packed, state.absmax, state.state2.absmax]
    measured = sum(t.numel() * t.element_size() for t in held) / weight.numel()
    assert pytest.approx(measured, rel=1e-6) == NF4_BYTES
    assert round(NF4_BYTES, 4) == 0.5159


def test_what_a_repository_keeps_in_16_bit_is_not_counted_as_four_bit():
    config = config_of("qwen3", num_hidden_layers=12)
    before = plan_memory(config).parts
    skipped = ["lm_head", "model.layers.1", "model.layers.5.mlp", "vision_tower.encoder.layers.2.mlp"]
    config.quantization_config = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped}
    after = plan_memory(config).parts
    attention, mlp = 2 * 128 * 256 + 2 * 128 * 128, 3 * 128 * 320
    kept = attention + 2 * mlp  # layers 1 and 5, not layers 10 and 11
    difference = (before["quantised weights"] - after["quantised weights"]) * GIB
    assert difference == pytest.approx(kept * NF4_BYTES)
    assert (after["other weights"] - before["other weights"]) * GIB == pytest.approx(kept * 2)


# ---- activations and logits, measured -------------------------------------------------------------------------


def with_lora(config, lora, dtype):
    """A real model with a float32 adapter, as the training stage makes it."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.requires_grad_(False)
    wanted = (memory.ATTENTION if lora.attention else ()) + (memory.MLP if lora.mlp else ())
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(wanted)]
    inject_adapter_in_model(LoraConfig(r=lora.rank, target_modules=names), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train()


def peak_bytes(held, step):
    """The most bytes that `step` has in storages at a time, those of the tensors in `held` not counted."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = {t.untyped_storage()._cdata for t in held}
            self.now = self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return out

        def gone(self, key, size):
            self.seen.discard(key)
            self.now -= size

    with Watch() as watch:
        step()
    return watch.peak


@pytest.mark.parametrize("checkpointing", ["card", False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma3_text", "qwen3_moe"])
def test_activations_are_what_a_cpu_measures(model_type, dtype, checkpointing):
    import torch

    config, lora, tokens = config_of(model_type), LoraSettings(rank=2), 128
    model = with_lora(config, lora, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.arange(tokens)[None]
    half = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def step():
        with half:
            loss = model.model(input_ids=ids, use_cache=False).last_hidden_state.sum()
        loss.backward()

    measured = peak_bytes([*model.parameters(), *model.buffers(), ids], step)
    place = {"card_gib": 24} if dtype == "bfloat16" else {"card_gib": None, "ram_gib": 24}
    plan = plan_memory(
        config, length=tokens, batch_size=1, lora=lora, four_bit=False, checkpointing=checkpointing, **place
    )
    tolerance = 0.04 if dtype == "bfloat16" else 0.08
    assert plan.parts["activations"] * GIB == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_what_the_loss_holds(fused):
    """Of TRL, chunk by chunk, and of transformers, all at once."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss
    from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

    tokens, vocabulary = 600, 4096
    hidden = torch.randn(1, tokens, 16, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocabulary, 16, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (1, tokens))

    def step():
        if fused:
            loss = _chunked_cross_entropy_loss(hidden, head, _CHUNKED_LM_HEAD_CHUNK_SIZE, labels)[0]
        else:
            loss = ForCausalLMLoss(hidden @ head.T, labels, vocabulary)
        loss.backward()

    measured = peak_bytes([hidden, head, labels], step)
    config = config_of("qwen3", vocab_size=vocabulary)
    plan = plan_memory(config, length=tokens, batch_size=1, fused_loss=fused)
    assert plan.parts["logits"] * GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "qwen3_moe"])
def test_cache_is_what_transformers_keeps_of_keys_and_values(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    local = {"layer_types": kinds, "sliding_window": 16} if model_type == "gemma3_text" else {}
    config = config_of(model_type, **local)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    samples, length = 3, 40
    with torch.no_grad():
        cache = model(input_ids=torch.ones(samples, length, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    plan = plan_memory(config, length=length, samples=samples)
    # a window of 16 keeps 15: the token at hand is the sixteenth
    lost = 2 * samples * 2 * 128 * 2 if model_type == "gemma3_text" else 0
    assert plan.parts["key-value cache"] * GIB == held + lost


EYES = {"hidden_size": 128, "intermediate_size": 480}
WIDE = EYES | {"num_hidden_layers": 3, "num_attention_heads": 2}
QWEN3 = TINY | {"model_type": "qwen3"}
VISION = {  # the tower, the rest of the configuration, patches and tokens of a picture
    "gemma3": (
        WIDE | {"image_size": 112, "patch_size": 14, "vision_use_head": False},
        {"text_config": TINY, "mm_tokens_per_image": 16},
        (64, 16),
    ),
    "llava": (
        WIDE | {"model_type": "clip_vision_model", "image_size": 112, "patch_size": 14, "intermediate_size": 512},
        {"text_config": QWEN3, "image_seq_length": 64},
        (64, 64),
    ),
    "smolvlm": (WIDE | {"image_size": 128, "patch_size": 16}, {"text_config": QWEN3, "scale_factor": 2}, (64, 16)),
    "qwen3_vl": (
        EYES
        | {"depth": 3, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16, "deepstack_visual_indexes": [0]},
        {"text_config": TINY},
        (1024, 256),
    ),
}


def sees(kind):
    """A small vision-language configuration."""
    from transformers import CONFIG_MAPPING

    tower, rest, _ = VISION[kind]
    return CONFIG_MAPPING[kind](vision_config=tower, **copy.deepcopy(rest))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen3_vl"])
def test_a_frozen_vision_tower_holds_its_widest_layer(kind):
    import torch
    from transformers import AutoModelForImageTextToText

    config, (patches, _) = sees(kind), VISION[kind][2]
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.requires_grad_(False)
    pictures, side = 4, round(patches**0.5)
    pixels = torch.rand(pictures, 3, *[side * config.vision_config.patch_size] * 2, dtype=torch.bfloat16)
    given = {"pixel_values": pixels}
    if kind == "qwen3_vl":  # patches in a row, each of two frames
        patch = torch.rand(patches * pictures, 3 * 2 * 16 * 16, dtype=torch.bfloat16)
        given = {"pixel_values": patch, "image_grid_thw": torch.tensor([[1, side, side]] * pictures)}
    held = [*model.parameters(), *model.buffers(), *given.values()]
    measured = peak_bytes(held, lambda: model.model.get_image_features(**given))
    plan = plan_memory(config, pictures=pictures, batch_size=1, length=5000)
    assert plan.parts["vision tower at work"] * GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", VISION)
def test_pictures_have_so_many_patches_and_tokens(kind):
    config, (patches, tokens) = sees(kind), VISION[kind][2]
    seen = memory.count_model(kind, config).eyes
    assert (seen.patches, seen.tokens) == (patches, tokens)
    with pytest.raises(PlanError, match=f"the pictures take 2 x {tokens} = {2 * tokens} tokens; expected a length"):
        plan_memory(config, pictures=2, length=2 * tokens)
    assert plan_memory(config, pictures=2, length=2 * tokens + 1).parts["vision tower at work"] > 0


# ---- whole plans ----------------------------------------------------------------------------------------------


def vision_8b():
    """Qwen3-VL-8B."""
    from transformers import CONFIG_MAPPING

    eyes = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096}
    text = dict(zip(WIDTHS, (151936, 4096, 12288, 36, 32, 8, 128), strict=True))
    eyes |= {"deepstack_visual_indexes": [8, 16, 24]}
    return CONFIG_MAPPING["qwen3_vl"](vision_config=eyes, text_config=text, tie_word_embeddings=False)


def untied(kind, *widths):
    return config_of(kind, *widths, tie_word_embeddings=False)


# "Peak reserved memory" as printed in the outputs of github.com/unslothai/notebooks (18 August 2026), in GiB, for
# rows of up to 2048 tokens; their true lengths are not printed. torch does not count the CUDA context.
PEAKS = {
    "Qwen3-14B r16": (lambda: qwen(5120, 17408, 40, 40), 2, 16, 12.949),
    "Qwen3-14B r32": (lambda: qwen(5120, 17408, 40, 40), 2, 32, 14.508),
    "Qwen3-32B": (lambda: qwen(5120, 25600, 64, 64), 2, 32, 24.529),
    "Gemma-3-27B": (lambda: "unsloth/gemma-3-27b-it-unsloth-bnb-4bit", 2, 8, 25.791),
    "Qwen3-VL-8B": (vision_8b, 2, 16, 8.213),
    "Llama-3.1-8B": (lambda: untied("llama", 128256, 4096, 14336, 32, 32, 8, 128), 2, 16, 7.922),
    "Mistral-7B-v0.3": (lambda: untied("llama", 32768, 4096, 14336, 32, 32, 8, 128), 2, 16, 5.836),
    "Qwen2.5-7B": (lambda: untied("qwen2", 152064, 3584, 18944, 28, 28, 4, 128), 2, 16, 7.893),
    "Mistral-Small-22B": (lambda: untied("llama", 32768, 6144, 16384, 56, 48, 8, 128), 1, 16, 14.271),
    "Llama-3.3-70B": (lambda: untied("llama", 128256, 8192, 28672, 80, 64, 8, 128), 2, 16, 42.789),
    "Phi-4": (lambda: untied("llama", 100352, 5120, 17920, 40, 40, 10, 128), 2, 16, 12.361),
    "Phi-3.5-mini": (lambda: untied("llama", 32064, 3072, 8192, 32, 32, 32, 96), 2, 16, 3.342),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEAKS)
def test_peaks_that_public_notebooks_print(name):
    what, batch_size, rank, peak = PEAKS[name]
    # one picture of a formula and its LaTeX a row, so far below the limit; 2048 tokens would be 17 % too many GiB
    length = 512 if name == "Qwen3-VL-8B" else 2048
    plan = plan_memory(
        what(), card_gib=80, length=length, batch_size=batch_size, lora=LoraSettings(rank=rank), optimizer=EIGHT_BIT
    )
    assert plan.peak_gib - memory.CONTEXT_GIB["card"] == pytest.approx(peak, rel=0.15)


def test_experts_stay_in_16_bit_without_unsloth_and_on_a_cpu_and_the_plan_says_so():
    plan = plan_memory("Qwen3-30B-A3B", card_gib=24, length=1024, fused_experts_quantized=False)
    assert not plan.fits
    assert plan.parts["quantised weights"] + plan.parts["other weights"] == pytest.approx(55.6, abs=0.05)
    assert "28,991,029,248 parameters x 2 bytes = 54.0 of 55.6 GiB" in plan.advice
    assert "with experts quantised by Unsloth" in plan.advice
    assert "55.6" in plan_memory("Qwen3-30B-A3B", card_gib=80, fused_experts_quantized=False).advice
    plan = plan_memory("Qwen3-30B-A3B", card_gib=None, ram_gib=64)
    assert plan.advice.startswith("nothing fits on 64 GiB")
    assert "28,991,029,248 parameters x 4 bytes = 108.0" in plan.advice


def test_parts_add_up_to_the_peak_and_the_table_shows_them():
    plan = plan_memory("Gemma-3-27B", card_gib=16)
    lines = plan.table().splitlines()
    assert plan.peak_gib == pytest.approx(sum(plan.parts.values()))
    assert lines[0].startswith("Gemma-3-27B, 27,432.4 M parameters: 4 bit, LoRA rank 8 (attention, mlp)")
    shown = [float(size) for size in re.findall(r"([\d.]+) GiB$", "\n".join(lines[1:-1]), re.MULTILINE)]
    assert shown == [round(size, 2) for size in (*plan.parts.values(), plan.peak_gib)]
    assert lines[-1].startswith("does not fit: nothing fits on 16 GiB: even length 256, ")


# ---- advice ---------------------------------------------------------------------------------------------------
def as_options(advice):
    """The settings that an advice names, as arguments of `plan_memory`."""
    text = re.search(r"fits on [\d.]+ GiB with (.*?)(?:;|$)", advice)[1]
    options = {}
    for field, pattern in (
        ("length", r"\blength (\d+)"),
        ("batch_size", r"batch size (\d+)"),
        ("samples", r"(\d+) samples at a time"),
    ):
        if match := re.search(pattern, text):
            options[field] = int(match[1])
    if match := re.search(r"LoRA rank (\d+) \((.*?)\)", text):
        options["lora"] = LoraSettings(rank=int(match[1]), experts="experts" in match[2])
    for field, value, words in (
        ("four_bit", True, "4 bit"),
        ("optimizer", EIGHT_BIT, EIGHT_BIT),
        ("checkpointing", "offload", "checkpoints in RAM"),
        ("fused_loss", True, "loss"),
        ("fused_experts_quantized", True, "experts quantised"),
    ):
        if words in text:
            options[field] = value
    return options


SETUPS = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40_000),
        "batch_size": st.integers(1, 24),
        "four_bit": st.booleans(),
        "lora": st.builds(LoraSettings, rank=st.integers(1, 256), experts=st.booleans()),
        "optimizer": st.sampled_from(sorted(memory.OPTIMIZER_BYTES)),
        "checkpointing": st.sampled_from(["offload", "card", False]),
        "fused_loss": st.sampled_from([True, False, "chunked"]),
        "fused_experts_quantized": st.booleans(),
        "samples": st.sampled_from([0, 0, 1, 6]),
    }
)
SMALL = {"vocab_size": 32_768, "hidden_size": 512}


def smallest(options, model_type):
    """The most saving value of every setting that an advice may name."""
    loss = options["fused_loss"]
    if model_type != "qwen3_moe":  # the usual loss of a mixture holds more than that of transformers
        loss = loss or True
    return {
        "length": min(256, options["length"]),
        "batch_size": 1,
        "samples": min(1, options["samples"]),
        "lora": LoraSettings(rank=min(8, options["lora"].rank)),
        "optimizer": "sgd" if options["optimizer"] == "sgd" else EIGHT_BIT,
        "four_bit": True,
        "checkpointing": "offload",
        "fused_loss": loss,
        "fused_experts_quantized": True,
    }


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=SETUPS, card=st.floats(0.75, 4))
def test_the_advice_fits_and_names_nothing_that_is_not_needed(model_type, options, card):
    config = config_of(model_type, **SMALL, **({"num_experts": 64} if model_type == "qwen3_moe" else {}))

    def fits(**changes):
        return plan_memory(config, card_gib=card, **(options | changes)).fits

    plan, least = plan_memory(config, card_gib=card, **options), smallest(options, model_type)
    assert plan.fits == (plan.peak_gib <= 0.98 * card)
    if plan.fits:
        assert plan.advice.startswith("fits on ")
    elif plan.advice.startswith("nothing fits"):
        assert not fits(**least)
    else:
        advised = as_options(plan.advice)
        assert advised
        assert fits(**advised)
        for field in advised:
            assert not fits(**{name: value for name, value in advised.items() if name != field}), field


def test_length_is_cut_no_further_than_needed_and_a_short_row_is_not_made_longer():
    length = as_options(plan_memory("32gb", card_gib=21).advice)["length"]
    assert 256 < length < 4096
    assert plan_memory("32gb", card_gib=21, length=length).fits
    assert not plan_memory("32gb", card_gib=21, length=length + 256).fits
    config = config_of("qwen3")
    for length, words in ((100, "even these settings would take"), (300, "even length 256 would take")):
        plan = plan_memory(config, card_gib=0.5, length=length, optimizer=EIGHT_BIT)
        assert plan.advice.startswith(f"nothing fits on 0.5 GiB: {words}")


def test_what_changes_nothing_learnt_is_advised_before_what_does():
    plan = plan_memory("Gemma-3-27B", card_gib=27, checkpointing="card", fused_loss=False, optimizer=EIGHT_BIT)
    assert as_options(plan.advice) == {"checkpointing": "offload", "fused_loss": True}
    assert "largest term to cut: logits (12.0 GiB)" in plan.advice


@settings(max_examples=8, deadline=None)
@given(options=SETUPS)
def test_more_of_anything_never_takes_less(options):
    config = config_of("qwen3_moe", num_hidden_layers=1)
    before = plan_memory(config, **options)
    lora = options["lora"]
    for more in (
        {"length": options["length"] + 1},
        {"samples": options["samples"] + 1},
        {"batch_size": options["batch_size"] + 1},
        {"lora": replace(lora, rank=lora.rank + 1)},
        {"lora": replace(lora, experts=True)},
        {"optimizer": "adamw_torch"},
    ):
        assert plan_memory(config, **(options | more)).peak_gib >= before.peak_gib, more
    for more in ({"four_bit": False}, {"fused_experts_quantized": False}):  # the buffer goes the other way
        after = plan_memory(config, **(options | more))
        for plan in (before, after):
            plan.parts["weights"] = plan.parts["quantised weights"] + plan.parts["other weights"]
        assert after.parts["weights"] >= before.parts["weights"], more


# ---- what stands for a model ----------------------------------------------------------------------------------


def test_name_preset_settings_folder_and_configuration_give_one_plan(tmp_path, monkeypatch):
    preset = PRESETS["t4"]
    train = preset.train
    by_hand = plan_memory(
        preset.model,
        length=train.max_length,
        batch_size=train.batch_size,
        four_bit=preset.four_bit,
        lora=train.lora,
        optimizer=train.optimizer,
    )
    assert plan_memory("t4") == plan_memory(preset) == by_hand
    assert plan_memory(replace(preset, train=replace(train, max_length=512))).peak_gib < by_hand.peak_gib

    config = config_of("qwen3")
    config.save_pretrained(tmp_path / "nano")
    before = config.to_dict()
    plan = plan_memory(config)
    assert config.to_dict() == before
    assert plan_memory(tmp_path / "nano").parts == plan.parts
    monkeypatch.setattr(memory, "DATA", tmp_path)
    nano = plan_memory("nano", card_gib=None, ram_gib=8)
    assert nano.fits
    assert nano.setup.startswith("nano, ")
    assert "batch size 16, length 256, adamw_torch, no checkpoints" in nano.setup


def test_cpu_run_is_judged_against_ram_in_float32(monkeypatch):
    config = config_of("qwen3")
    plan = plan_memory(config, card_gib=0, ram_gib=4, four_bit=False, optimizer=EIGHT_BIT)
    assert plan.card_gib == 4
    assert plan.parts["other weights"] == 2 * plan_memory(config, four_bit=False).parts["other weights"]
    assert "adamw_torch, no checkpoints" in plan.setup  # 8-bit optimizers need a card
    for total, fits in ((64, True), (1, False)):
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total * GIB))
        plan = plan_memory(config, card_gib=None)
        assert (plan.card_gib, plan.fits) == (total, fits)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("Qwen4-1T", {}, r"Qwen4-1T: not a folder .*nano, smollm2, t4.*Qwen3-0\.6B"),
        (42, {}, r"42: not a folder"),
        ("Qwen3-0.6B", {"length": 0}, r"length 0, .*expected 1 or more"),
        ("Qwen3-0.6B", {"batch_size": -2}, r"batch_size -2"),
        ("Qwen3-0.6B", {"lora": LoraSettings(rank=0)}, r"lora\.rank 0"),
        ("Qwen3-0.6B", {"samples": -1}, r"samples -1, pictures 0: expected 0 or more"),
        ("Qwen3-4B", {"pictures": 1}, r"Qwen3-4B: pictures is 1, but none can be planned for this model"),
        ("Qwen3-0.6B", {"card_gib": -1}, r"-1 GiB: .*more than 0 GiB"),
        ("Qwen3-0.6B", {"card_gib": float("nan")}, r"nan GiB"),
        ("Qwen3-0.6B", {"optimizer": "adamw"}, r"unknown optimizer 'adamw'; expected one of adamw_torch, "),
        (
            "Qwen3-0.6B",
            {"checkpointing": "yes"},
            r"checkpointing is 'yes'; expected True, False, 'offload' or 'card'",
        ),
    ],
)
def test_bad_requests_are_answered_in_one_message(what, options, message):
    with pytest.raises(PlanError, match=message):
        plan_memory(what, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "transformers can't read it"),
        ("{}", "transformers can't read it"),
        ('{"model_type": "no_such_model"}', "transformers can't read it.*no_such_model"),
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "transformers can't read it.*hidden_size"),
        ('{"model_type": "clip"}', "makes no decoder"),
        ('{"model_type": "gpt2"}', "makes no decoder"),
        (json.dumps({"model_type": "phi3", **TINY, "pad_token_id": 0}), "q_proj, k_proj"),
    ],
)
def test_a_folder_that_holds_no_plannable_model_says_why(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PlanError, match=message) as caught:
        plan_memory(tmp_path)
    assert "\n" not in str(caught.value)


def test_importing_it_stays_light():
    code = "import sys, ironlogic.memory; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
