"""Readings against closed forms and other readings, on every architecture; each known mistake has to be caught."""

import copy
import json
import math
from dataclasses import replace

from ironlogic.lens import compare as comparing
from ironlogic.lens import probe
from ironlogic.lens import read as lens
from ironlogic.lens.attention import read_attention, read_routing
from ironlogic.lens.compare import compare_layers
from ironlogic.lens.parts import decoder_layers, embedding, final_norm, lora_factors, output_head, routers
from ironlogic.lens.probe import LensError, pick_positions, settled, sum_up
from ironlogic.lens.read import entropy_without_norm, read_generation, read_layers
from ironlogic.models import ModelError, add_lora, load_model
from ironlogic.presets import LoraSettings

import numpy as np
import peft
import pytest
import torch
import transformers
from eyes import on_nano, picture
from tiny import build, roughen

IDS = torch.randint(5, 480, (12,), generator=torch.Generator().manual_seed(1))
TEXT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EYES = {"hidden_size": 32, "intermediate_size": 48}


def gemma3_multimodal():
    config = transformers.Gemma3Config(
        text_config=TEXT | {"layer_types": ["full_attention"] * 4},
        vision_config=EYES | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        image_token_index=499,
        mm_tokens_per_image=4,
    )
    return roughen(transformers.Gemma3ForConditionalGeneration(config))


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
    eyes = {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=EYES | eyes, image_token_id=499
    )
    return roughen(transformers.Qwen3VLForConditionalGeneration(config))


def dense_model(dtype=torch.float32):
    return build("qwen3").to(dtype)


def mixture_model():
    return build("qwen3_moe", num_experts=8, num_local_experts=8, mlp_only_layers=[1])


def with_lora(model, *targets, **more):
    """The model with an adapter that does something."""
    settings = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **more)
    return peft.get_peft_model(model, settings).eval()


FAMILIES = {  # plain ones are on the map: test_families.py
    "gemma3": gemma3_multimodal,
    "qwen3_vl": qwen3_vl,
    "llava": lambda: on_nano().model,
    "smolvlm": lambda: on_nano("shuffle").model,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def dense():
    return dense_model()


@pytest.fixture(scope="module")
def mixture():
    return mixture_model()


@pytest.fixture
def adapted():
    return with_lora(dense_model(), "q_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


def reference(model, ids):
    """(L+1, T, V) log-probabilities by the other road: hidden states, of which the last is normed already."""
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
        norm, head, cap = (
            final_norm(model),
            output_head(model),
            model.config.to_dict().get("final_logit_softcapping"),
        )
        logits = [head(norm(state)) for state in states[:-1]] + [head(states[-1])]
        logits = torch.cat(logits).double()
        return ((logits / cap).tanh() * cap if cap else logits).log_softmax(-1)


def hook_count(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- numbers of one distribution --------------------------------------------------------------------------------
def numbers(logits, top_k=3):
    """Of a stack of distributions at one position."""
    found = sum_up(torch.as_tensor(logits, dtype=torch.float32)[:, None], top_k)
    return {name: value[:, 0] for name, value in found.items()}


@pytest.mark.parametrize("vocabulary", [2, 500, 151_936])
def test_uniform_logits_have_the_entropy_ln_v(vocabulary):
    found = numbers(torch.full((2, vocabulary), 3.0))
    assert found["entropy"] == pytest.approx(math.log(vocabulary), abs=1e-5)
    assert found["kl_to_final"] == pytest.approx(0, abs=1e-6)
    assert found["active"].tolist() == [vocabulary if vocabulary < 100 else 0] * 2


def test_certain_and_binary_distributions_have_their_closed_forms():
    certain = torch.full((1, 500), -50.0)
    certain[0, 7] = 50
    found = numbers(certain)
    assert found["entropy"][0] == pytest.approx(0, abs=1e-6)
    assert (found["top_ids"][0, 0], found["active"][0]) == (7, 1)
    p, q = 0.2, 0.6
    found = numbers(np.log([[q, 1 - q], [p, 1 - p]]), top_k=9)
    assert found["entropy"][1] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))  # KL(final || layer), not the other way round
    assert found["kl_to_final"] == pytest.approx([kl, 0], abs=1e-6)
    assert found["top_probs"][1] == pytest.approx([0.8, 0.2])


def test_numbers_agree_with_float64_at_the_real_width():
    logits = torch.randn(5, 151_936, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [3.0], [6.0], [12.0]]
    )
    found = numbers(logits)
    log_p = logits.double().log_softmax(-1)
    assert found["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).numpy(), abs=1e-5)
    kl = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)
    assert found["kl_to_final"] == pytest.approx(kl.numpy(), abs=1e-4)
    assert found["active"].tolist() == (log_p.exp() > 0.01).sum(-1).tolist()


def test_settle_layer():
    top = np.array([[1, 5, 3], [2, 5, 4], [2, 5, 3], [2, 5, 9]])
    assert settled(top).tolist() == [1, 0, 3]


# --- against an independent reading -----------------------------------------------------------------------------
def test_every_architecture_reads_as_its_hidden_states_do(family):
    right = reference(family, IDS)
    entropy = -(right.exp() * right).sum(-1).numpy()
    before = hook_count(family)  # transformers leaves some of its own
    reading = read_layers(family, IDS, positions=None, top_k=4)
    assert reading.entropy.shape == (5, 12)
    assert reading.entropy == pytest.approx(entropy, abs=1e-4)
    assert (reading.top_ids[:, :, 0] == right.argmax(-1).numpy()).all()
    assert reading.top_probs == pytest.approx(right.exp().topk(4).values.numpy(), abs=1e-5)
    kl = (right[-1].exp() * (right[-1] - right)).sum(-1).numpy()
    assert reading.kl_to_final == pytest.approx(kl, abs=1e-4)
    assert (reading.active == (right.exp() > 0.01).sum(-1).numpy()).all()
    assert reading.vocabulary == 1024
    assert max(reading.checks.values()) < 1e-4
    assert hook_count(family) == before


def test_positions_are_those_asked_for(dense):
    whole = read_layers(dense, IDS, positions=None)
    for positions, expected in ((-1, (11,)), (0, (0,)), ((3, -2), (3, 10)), (range(2, 5), (2, 3, 4))):
        part = read_layers(dense, IDS, positions=positions)
        assert part.positions == expected
        assert part.entropy == pytest.approx(whole.entropy[:, list(expected)], abs=1e-5)


def test_many_positions_are_read_in_blocks(dense, monkeypatch):
    whole = read_layers(dense, IDS, positions=None)
    monkeypatch.setattr(lens, "at_a_time", lambda layers, vocabulary: 5)
    parts = read_layers(dense, IDS, positions=None)
    assert parts.entropy == pytest.approx(whole.entropy, abs=1e-5)
    assert (parts.top_ids == whole.top_ids).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_read_in_float32(dtype):
    model = dense_model(dtype)
    states = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: states.append(out.clone()))
        for layer in decoder_layers(model)
    ]
    reading = read_layers(model, IDS, positions=None)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        normed = final_norm(model)(torch.cat(states).float()).double()
        right = (normed @ output_head(model).weight.double().T).log_softmax(-1)
    assert reading.entropy[1:] == pytest.approx(-(right.exp() * right).sum(-1).numpy(), abs=1e-4)
    assert reading.proved, (reading.checks, reading.allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reading_knows_what_its_type_may_be_off(nano, dtype):
    """Notebook 04 ends with `reading.proved`: on a card it reads bfloat16, whose rounding is far wider."""
    model = copy.deepcopy(nano.model).to(dtype)
    reading = read_layers(replace(nano, model=model), "Who is taller, Ann or Bob?", positions=None)
    assert reading.proved
    assert (max(reading.allowed.values()) < 5e-3) == (dtype == torch.float32)
    assert not replace(reading, checks={name: 2 * gap for name, gap in reading.allowed.items()}).proved
    assert not replace(reading, checks={}).proved


# --- adapters, 4 bit, nano --------------------------------------------------------------------------------------
def variants():
    plain = {"r": 4, "init_lora_weights": False}
    yield "lora", {**plain, "target_modules": ["q_proj", "v_proj"]}, False
    yield "lora on the head", {**plain, "target_modules": ["q_proj", "lm_head"]}, True
    yield "saved modules", {**plain, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, True


@pytest.mark.parametrize(("settings", "fed"), [v[1:] for v in variants()], ids=[v[0] for v in variants()])
def test_adapters_are_read_where_they_sit(settings, fed):
    base = dense_model()
    before = read_layers(base, IDS)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    with model.disable_adapter():
        assert (read_layers(model, IDS).entropy == before.entropy).all()  # bit by bit
    after = read_layers(model, IDS)
    assert (after.entropy[1:] != before.entropy[1:]).all()
    assert (np.abs(after.entropy[0] - before.entropy[0]) > 1e-3).all() == fed
    compare_layers(model, IDS, null_adapters=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-moe"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_shipped_models_with_and_without_adapter(name, four_bit):
    loaded = load_model(name, four_bit=four_bit)
    bare = read_layers(loaded, "Tom is taller than Anna. So", positions=None)
    adapted = add_lora(loaded, LoraSettings(rank=4, alpha=8), seed=1)
    fresh = read_layers(adapted, "Tom is taller than Anna. So", positions=None)
    assert fresh.entropy == pytest.approx(bare.entropy, abs=1e-4)  # B is zero
    with torch.no_grad():
        for _, b, _ in lora_factors(adapted, "default"):
            b.normal_(std=0.05)
    after = read_layers(adapted, "Tom is taller than Anna. So", positions=None)
    assert after.entropy[0] == pytest.approx(bare.entropy[0], abs=1e-5)
    assert np.abs(after.entropy[-1] - bare.entropy[-1]).max() > 1e-3
    assert hook_count(adapted.model) == 0


def test_all_kinds_of_prompt_are_the_same_tokens(nano):
    text = "Tom is taller than Anna."
    ids = nano.tokenizer(text)["input_ids"]
    mask = torch.ones(1, len(ids), dtype=torch.long)
    kinds = (
        text,
        torch.tensor(ids),
        torch.tensor([ids]),
        np.array(ids),
        {"input_ids": torch.tensor([ids]), "attention_mask": mask},
        nano.tokenizer(text, return_tensors="pt"),
    )
    found = [read_layers(nano, kind) for kind in kinds]
    assert {one.ids for one in found} == {tuple(ids)}
    assert "".join(found[0].tokens) == text
    chat = read_layers(nano, [{"role": "user", "content": text}])
    assert "".join(chat.tokens).endswith("<|im_start|>assistant\n")
    assert text in "".join(chat.tokens)


def test_generation_in_one_pass_equals_one_pass_per_token(nano):
    prompt = [{"role": "user", "content": "What is the opposite of hot?"}]
    whole = read_generation(nano, prompt, max_new_tokens=6)
    count = len(whole.positions)
    assert 1 <= count <= 6
    assert whole.positions[-1] == len(whole.ids) - 2
    for column, position in enumerate(whole.positions):
        step = read_layers(nano, torch.tensor(whole.ids[: position + 1]))
        assert step.entropy[:, 0] == pytest.approx(whole.entropy[:, column], abs=1e-4)
        assert whole.top_ids[-1, column, 0] == whole.ids[position + 1]  # greedy


def test_picture_positions_read_what_the_projector_puts_out():
    loaded = on_nano()
    text = f"{loaded.processor.image_token}What is it?"
    prompt = loaded.processor(text=text, images=[picture()], return_tensors="pt")
    places = (prompt["input_ids"][0] == loaded.model.config.image_token_index).nonzero()[:, 0].tolist()
    seen = []
    projector = loaded.model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    reading = read_layers(loaded, prompt, positions=places)
    handle.remove()
    with torch.no_grad():
        right = output_head(loaded.model)(final_norm(loaded.model)(seen[0])).log_softmax(-1)
    assert len(places) > 1
    assert reading.entropy[0] == pytest.approx(-(right.exp() * right).sum(-1).numpy(), abs=1e-4)
    assert read_layers(loaded, prompt).entropy.shape == (5, 1)


# --- injected mistakes ------------------------------------------------------------------------------------------
RIGHT_READOUT, RIGHT_WATCH, RIGHT_SUMS = probe.readout, probe.watch_states, probe.sum_up


def wrong_norm(change):
    """The readout with another norm; the proof's own rows stay right, as they are normed outside it."""

    def inject(monkeypatch):
        def readout(model, states, normed=None):
            with pytest.MonkeyPatch.context() as inner:
                right = final_norm(model)
                inner.setattr(probe, "final_norm", lambda _: lambda rows: change(rows, right))
                return RIGHT_READOUT(model, states, normed)

        monkeypatch.setattr(lens, "readout", readout)

    return inject


def one_scale(rows, norm):
    """TransformerLens #1076: the last row's scale for all rows."""
    scale = norm(rows)[-1].norm() / (rows[-1] * norm.weight).norm()
    return rows * scale * norm.weight


def wrong_states(change):
    def inject(monkeypatch):
        class Watch:
            def __init__(self, model, positions, length):
                self.inner, self.model = RIGHT_WATCH(model, positions, length), model

            def __enter__(self):
                self.states = self.inner.__enter__()
                return self.states

            def __exit__(self, *error):
                self.inner.__exit__(*error)
                self.states[:] = change(self.states, final_norm(self.model))

        monkeypatch.setattr(lens, "watch_states", Watch)

    return inject


def earlier_position(monkeypatch):
    def watch(model, positions, length):
        return RIGHT_WATCH(model, positions - 1, length)

    monkeypatch.setattr(lens, "watch_states", watch)


def wrong_sums(change):
    def inject(monkeypatch):
        monkeypatch.setattr(lens, "sum_up", change)

    return inject


def other_base(logits, top_k):
    found = RIGHT_SUMS(logits, top_k)
    return found | {"entropy": found["entropy"] / math.log(2)}


def half_softmax(dtype):
    def sums(logits, top_k):
        p = logits.to(dtype).softmax(-1)
        best = p.topk(top_k)
        right = RIGHT_SUMS(logits, top_k)
        entropy = -(p * p.clamp_min(1e-7).log()).sum(-1)
        return right | {
            "entropy": entropy.double().numpy(),
            "top_probs": best.values.double().numpy(),
            "top_ids": best.indices.numpy(),
        }

    return sums


def renamed(key, change):
    def sums(logits, top_k):
        found = RIGHT_SUMS(logits, top_k)
        return found | {key: change(found[key])}

    return sums


MISTAKES = {
    "norm missed": wrong_norm(lambda rows, norm: rows),
    "norm twice": wrong_norm(lambda rows, norm: norm(norm(rows))),
    "norm weight dropped": wrong_norm(lambda rows, norm: norm(rows) / norm.weight),
    "one scale for all rows": wrong_norm(one_scale),
    "norm in half precision twice rounded": wrong_norm(lambda rows, norm: norm(rows.bfloat16()).float()),
    "norm missed on all rows but the last (hidden states)": wrong_norm(
        lambda rows, norm: torch.cat([rows[:-1], norm(rows[-1:])])
    ),
    "norm twice on the last row only (hidden states)": wrong_states(lambda s, norm: [*s[:-1], norm(s[-1])]),
    "layers shifted by one": wrong_states(lambda s, norm: [*s[1:], s[-1]]),
    "layers shifted the other way": wrong_states(lambda s, norm: [s[0], *s[:-1]]),
    "layers in reverse": wrong_states(lambda s, norm: s[::-1]),
    "wrong position": earlier_position,
    "entropy in bits": wrong_sums(other_base),
    "entropy divided by ln V": wrong_sums(renamed("entropy", lambda h: h / math.log(1024))),
    "softmax in bfloat16": wrong_sums(half_softmax(torch.bfloat16)),
    "softmax in float16": wrong_sums(half_softmax(torch.float16)),
    "temperature": wrong_sums(lambda logits, k: RIGHT_SUMS(logits / 1.01, k)),
    "token ids off by one": wrong_sums(renamed("top_ids", lambda ids: (ids + 1) % 1024)),
    "least probable first": wrong_sums(renamed("top_probs", lambda p: p[..., ::-1])),
    "active count of the final row everywhere": wrong_sums(renamed("active", lambda n: n * 0 + 99)),
    "not a number": wrong_sums(renamed("entropy", lambda h: h * np.nan)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_mistake_is_caught(monkeypatch, mistake, dtype):
    model = dense_model(dtype)
    assert read_layers(model, IDS).entropy.shape == (5, 1)
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(LensError, match="refused|not finite|more than ln V"):
        read_layers(model, IDS)
    assert hook_count(model) == 0


def test_missing_softcap_is_caught(monkeypatch):
    model = build("gemma3_text", final_logit_softcapping=5.0)
    read_layers(model, IDS)
    monkeypatch.setattr(probe, "adjust_logits", lambda model, logits: logits)
    with pytest.raises(LensError, match="refused"):
        read_layers(model, IDS)


def test_the_seeds_mistake_is_shown_on_purpose(nano):
    silent = entropy_without_norm(nano, "Tom is taller than Anna. So", positions=None)
    right = read_layers(nano, "Tom is taller than Anna. So", positions=None)
    assert (silent[0] > 0.9 * right.ln_vocabulary).all()  # the embedding says nothing, as it seems
    assert right.entropy[0, -1] < 0.1
    dense = dense_model()
    with torch.no_grad():
        states = dense(input_ids=IDS[None], output_hidden_states=True).hidden_states
        log_p = output_head(dense)(states[2][0, -1]).log_softmax(-1)
    assert entropy_without_norm(dense, IDS)[2, 0] == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-4)


def test_norm_missed_for_the_adapter_only_is_caught(adapted, monkeypatch):
    """Seed 002: its own last row is right there, as hidden_states[-1] is normed already."""

    def readout(model, states, normed=None):
        active = not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
        with pytest.MonkeyPatch.context() as inner:
            right = final_norm(model)
            if active:
                inner.setattr(probe, "final_norm", lambda _: lambda rows: torch.cat([rows[:-1], right(rows[-1:])]))
            return RIGHT_READOUT(model, states, normed)

    monkeypatch.setattr(lens, "readout", readout)
    with adapted.disable_adapter():
        read_layers(adapted, IDS)
    with pytest.raises(LensError, match="embedding row"):
        read_layers(adapted, IDS)


def test_base_and_adapter_must_agree_at_the_embedding(adapted, monkeypatch):
    calls = []

    def drifting(*args, **options):
        reading = read_layers(*args, **options)
        calls.append(reading)
        return replace(reading, entropy=reading.entropy + 0.01 * len(calls))

    monkeypatch.setattr(comparing, "read_layers", drifting)
    with pytest.raises(LensError, match="nothing adapted feeds it"):
        compare_layers(adapted, IDS)


# --- refusals ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.empty(0, dtype=torch.long), "empty"),
        (torch.ones(2, 3, dtype=torch.long), "one sequence at a time"),
        (torch.ones(1, 2, 3, dtype=torch.long), "one sequence at a time"),
        (torch.tensor([1.0]), "expected token ids"),
        (torch.tensor([1, 1024]), "the model knows 0 to 1023"),
        (torch.tensor([-1]), "the model knows 0 to 1023"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.tensor([[0, 1]])}, "padded"),
        ({"pixel_values": torch.ones(1)}, "no input_ids"),
        ("text", "without its tokenizer"),
        (7, "expected text, messages"),
        (None, "expected text, messages"),
    ],
)
@pytest.mark.parametrize("read", [read_layers, read_attention, read_generation])
def test_prompts_that_cannot_be_read(dense, read, prompt, message):
    with pytest.raises(LensError, match=message):
        read(dense, prompt)
    assert hook_count(dense) == 0


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompts_of_a_real_tokenizer(nano, prompt):
    with pytest.raises(LensError, match="empty"):
        read_layers(nano, prompt)


def test_a_template_that_refuses_is_one_message(nano):
    with pytest.raises(LensError, match="chat template refuses"):
        read_layers(nano, [{"content": "no role"}])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (12, "12 is out of range"),
        (-13, "-13 is out of range"),
        ([], "no position"),
        (["a"], "'a'"),
        ([True], "True"),
    ],
)
def test_positions_that_are_not_there(dense, positions, message):
    with pytest.raises(LensError, match=message):
        read_layers(dense, IDS, positions=positions)
    assert pick_positions(np.int64(-1), 3) == [2]


def test_training_mode_comes_back_and_dropout_stays_out():
    model = with_lora(dense_model(), "q_proj", lora_dropout=0.9).train()
    first, second = read_layers(model, IDS), read_layers(model, IDS)
    assert model.training
    assert (first.entropy == second.entropy).all()
    with pytest.raises(LensError):
        read_layers(model, IDS, positions=99)
    assert model.training
    model.eval()
    read_layers(model, IDS)
    assert not model.training


@pytest.mark.parametrize("read", [read_layers, read_attention, read_routing])
def test_no_hook_is_left_behind(mixture, read):
    def fail(*_):
        raise RuntimeError("in the middle")

    handle = decoder_layers(mixture)[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        read(mixture, IDS)
    handle.remove()
    assert hook_count(mixture) == 0


def test_models_without_the_parts_are_refused(dense):
    with pytest.raises(ModelError, match="Linear is no transformers or PEFT model"):
        decoder_layers(torch.nn.Linear(2, 2))
    headless = dense_model().model
    with pytest.raises(ModelError, match="no output head"):
        read_layers(headless, IDS)
    normless = dense_model()
    del normless.model.norm
    with pytest.raises(ModelError, match="no final norm found beside its layers"):
        final_norm(normless)
    assert final_norm(dense) is dense.model.norm
    assert embedding(dense) is dense.model.embed_tokens


def test_a_model_that_skips_its_layers_is_refused(dense, monkeypatch):
    layers = decoder_layers(dense)
    monkeypatch.setattr(
        probe, "decoder_layers", lambda model: torch.nn.ModuleList([*layers, layers[0].__class__(dense.config, 0)])
    )
    with pytest.raises(LensError, match="states came out of 5 layers"):
        read_layers(dense, IDS)


def test_a_prompt_that_the_model_cuts_is_refused(dense):
    whole = dense.forward

    def cut(input_ids, **options):  # as Unsloth does beyond max_seq_length
        return whole(input_ids=input_ids[:, :5], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "forward", cut)
        with pytest.raises(LensError, match="works on 5 tokens of 1 rows, but the prompt has 12.*cut the prompt"):
            read_layers(dense, IDS)
    assert hook_count(dense) == 0


def test_a_model_by_its_folder_brings_its_tokenizer(nano, dense):
    plain = transformers.AutoModelForCausalLM.from_pretrained(nano.model.config.name_or_path, dtype=torch.float32)
    assert read_layers(plain, "A cow says").tokens == read_layers(nano, "A cow says").tokens
    assert read_layers(dense, IDS).tokens[0] == f"<{IDS[0]}>"


# --- attention --------------------------------------------------------------------------------------------------
def test_attention_equals_the_eager_one(family):
    reading = read_attention(family, IDS, positions=(-1, 4))
    assert reading.weights.shape[::2] == (4, 2)
    family.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            right = family(input_ids=IDS[None], output_attentions=True).attentions
    finally:
        family.set_attn_implementation("sdpa")
    right = torch.stack([one[0, :, [11, 4]] for one in right]).numpy()
    assert reading.weights == pytest.approx(right, abs=1e-5)
    assert reading.weights.sum(-1) == pytest.approx(1, abs=1e-5)
    assert (reading.weights[:, :, 1, 5:] == 0).all()
    assert reading.first_token.shape == (4, 2)


def test_attention_with_an_adapter(adapted):
    on = read_attention(adapted, IDS).weights
    with adapted.disable_adapter():
        off = read_attention(adapted, IDS).weights
    assert np.abs(on - off).max() > 1e-3


@pytest.mark.parametrize("fault", ["scaling", "position", "mask"])
def test_wrong_attention_is_refused(dense, monkeypatch, fault):
    from ironlogic.lens import attention as module

    def wrong(layer, hidden, queries, *, position_embeddings, turn, mask):
        if fault == "scaling":
            monkeypatch.setattr(layer, "scaling", layer.scaling * 2)
        if fault == "mask":
            mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
        if fault == "position":
            cos, sin = position_embeddings
            position_embeddings = cos.roll(1, dims=1), sin
        found = right(layer, hidden, queries, position_embeddings=position_embeddings, turn=turn, mask=mask)
        monkeypatch.undo() if fault == "scaling" else None
        return found

    right = module.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attend", wrong)
        with pytest.raises(LensError, match="layer 1: the attention weights"):
            read_attention(dense, IDS, positions=5)


# --- routing ----------------------------------------------------------------------------------------------------
def test_routing_equals_the_models_own(mixture):
    reading = read_routing(mixture, IDS)
    with torch.no_grad():
        own = mixture(input_ids=IDS[None], output_router_logits=True).router_logits
    assert reading.layers == (1, 3, 4)  # layer 2 is dense and nothing is shifted
    assert reading.probabilities == pytest.approx(torch.stack(own).softmax(-1).numpy(), abs=1e-5)
    assert (reading.chosen == torch.stack(own).topk(2).indices.numpy()).all()
    assert reading.usage.sum(-1) == pytest.approx(1)
    part = read_routing(mixture, IDS, positions=(2, -1))
    assert part.probabilities == pytest.approx(reading.probabilities[:, [2, 11]])


def test_router_outputs_of_other_versions(mixture):
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    right = logits.softmax(-1)
    best = logits.topk(2)
    granite = (best.indices, best.values.softmax(-1), logits)
    for out in (logits, logits.softmax(-1), (logits, None, best.indices), granite):
        found, chosen = read_routes(out)
        assert torch.allclose(found, right, atol=1e-6)
        assert (chosen == right.topk(2).indices).all()
    with pytest.raises(LensError, match="does not choose by its softmax"):
        read_routes((logits, None, logits.topk(2, largest=False).indices))


def read_routes(out):
    from ironlogic.lens.attention import _routes

    return _routes(out, [0, 1, 2], 2, 0, 8)


def test_dense_models_have_no_routing(dense):
    assert routers(dense) == {}
    with pytest.raises(LensError, match="no mixture of experts"):
        read_routing(dense, IDS)


# --- base and adapter -------------------------------------------------------------------------------------------
def test_comparison_is_of_one_model(adapted):
    before = [p.detach().clone() for p in adapted.parameters()]
    found = compare_layers(adapted, IDS, positions=(3, -1), null_adapters=3, seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True)
    )  # the trained one is back
    with adapted.disable_adapter():
        assert (read_layers(adapted, IDS, positions=(3, -1)).entropy == found.base.entropy).all()
    assert (read_layers(adapted, IDS, positions=(3, -1)).entropy == found.adapter.entropy).all()
    assert found.null_entropy.shape == found.null_kl_to_final.shape == found.null_same_top.shape == (3, 5, 2)
    assert (found.null_entropy[:, 0] == found.base.entropy[0]).all()  # nothing adapted feeds the embedding row
    assert (found.null_entropy[:, 1:].std(axis=0) > 0).all()
    again = compare_layers(adapted, IDS, positions=(3, -1), null_adapters=3, seed=5)
    assert (again.null_entropy == found.null_entropy).all()
    other = compare_layers(adapted, IDS, positions=(3, -1), null_adapters=3, seed=6)
    assert (other.null_entropy[:, 1:] != found.null_entropy[:, 1:]).all()
    low, high = found.null_band
    assert (found.outside == ((found.adapter.entropy < low - 1e-6) | (found.adapter.entropy > high + 1e-6))).all()


@pytest.mark.parametrize("experts", [False, True])
def test_null_updates_have_the_norm_of_the_trained(experts):
    target = {"target_parameters": ["mlp.experts.gate_up_proj"]} if experts else {}
    model = with_lora(mixture_model(), "q_proj", **target)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]

    def norms():
        deltas = [layer.get_delta_weight("default").detach() for layer in layers]
        return torch.cat([d.norm(dim=(-2, -1)).flatten() for d in deltas])

    before = norms()
    assert len(before) == 4 + (3 * 8 if experts else 0)
    with comparing._random_update(model, "default", seed=(0, 0)):
        inside = norms()
        changed = [layer.get_delta_weight("default").detach().flatten()[:5] for layer in layers]
    assert torch.allclose(before, inside, rtol=1e-4)
    assert torch.equal(before, norms())
    assert all(c.abs().sum() > 0 for c in changed)
    assert not torch.equal(changed[0], layers[0].get_delta_weight("default").detach().flatten()[:5])


def test_a_failed_null_brings_the_trained_adapter_back(adapted):
    before = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(RuntimeError, match="x"), comparing._random_update(adapted, "default", seed=(0, 0)):
        raise RuntimeError("x")
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_comparison_of_a_mixture_has_routing():
    found = compare_layers(with_lora(mixture_model(), "q_proj", "v_proj"), IDS, null_adapters=2)
    assert found.routing_shift.shape == (3,)
    assert found.null_routing_shift.shape == (2, 3)
    assert found.routing_shift[0] > 0  # attention alone moves the routing
    assert (found.null_routing_shift > 0).all()


def test_comparison_needs_an_adapter(dense, adapted):
    with pytest.raises(LensError, match="carries no adapter"):
        compare_layers(dense, IDS)
    with pytest.raises(LensError, match="no adapter 'x'; the model carries default"):
        compare_layers(adapted, IDS, adapter="x")
    with pytest.raises(LensError, match="null_adapters is 0"):
        compare_layers(adapted, IDS, null_adapters=0)


# --- exports ----------------------------------------------------------------------------------------------------
def test_exports(nano):
    reading = read_layers(nano, "A cow says\nmoo, $5", positions=(1, -1), top_k=3)
    lines = reading.to_csv().splitlines()
    assert len(lines) == 1 + 5 * 2
    assert lines[0].startswith("layer,position,token,entropy_nats,active,kl_to_final_nats,top_1,id_1,p_1")
    back = json.loads(reading.to_json())
    assert back["entropy_nats"] == reading.entropy.tolist()
    assert back["tokens"] == list(reading.tokens)
    assert reading.pick([1]).positions == (reading.positions[1],)
    with pytest.raises(ValueError, match="position 0 was not read"):
        reading.column(0)
