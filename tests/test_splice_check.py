"""The check of a splice: a good one passes every row, each thing broken on purpose is named by its row."""

import types

from ironlogic.models import LoadedModel, load_model
from ironlogic.vision.check import check_splice
from ironlogic.vision.splice import SpliceError, projector_of, splice

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from PIL import Image

TEXT_ONLY = "{%- for m in messages %}{{- m.role + ': ' }}{%- if m.content is string %}{{- m.content }}{%- endif %}"
TEXT_ONLY += "{{- '<|im_end|>\\n' }}{%- endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return tf.AutoTokenizer.from_pretrained(load_model("nano", four_bit=False, backend="transformers").base)


def make(tokenizer, kind="clip"):
    """(a good splice, its language model's logits of a text): CLIP, SigLIP, or SigLIP with pixel shuffle."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        eye = tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes)).eval()
        maker = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        eye = tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes)).eval()
        maker = tf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    config = tf.Qwen3Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    words = tf.Qwen3ForCausalLM(config).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        reference = ids, words(input_ids=ids).logits
    shape = {"projector": "pixel_shuffle", "shuffle_factor": 2} if kind == "shuffle" else {}
    loaded = splice((eye, maker), (words, tokenizer), **shape)
    assert sum(p.numel() for p in loaded.model.parameters()) < 400_000
    return loaded, reference


def adapt(loaded, **options):
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    return LoadedModel(peft.get_peft_model(loaded.model, config), loaded.tokenizer, loaded.processor)


def failed(loaded, reference=None):
    return {row.name for row in check_splice(loaded, reference=reference).failed}


# --- what is good


@pytest.mark.parametrize("kind", ["clip", "siglip", "shuffle"])
def test_a_good_splice_passes_and_is_left_as_it_was(kind, tokenizer):
    loaded, reference = make(tokenizer, kind)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    trainable = [p.requires_grad for p in loaded.model.parameters()]
    loaded.model.train()
    report = check_splice(loaded, reference=reference)
    assert report.passed, str(report)
    assert report.require() is report
    assert loaded.model.training
    assert [p.requires_grad for p in loaded.model.parameters()] == trainable
    assert all(p.grad is None for p in loaded.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_own_images_and_how_a_report_looks(tokenizer):
    loaded, _ = make(tokenizer)
    same = [Image.new("RGB", (20, 30), "red")] * 2
    report = check_splice(loaded, images=same, reload=False)
    assert [row.name for row in report.failed] == ["image reaches logits"], "two equal pictures prove nothing"
    assert "BAD image reaches logits" in str(report)
    assert report._repr_html_().count("<tr>") == len(report.rows) == 12
    assert report._repr_html_().count("broken") == 1
    with pytest.raises(SpliceError, match="image reaches logits: exchanging .* never reach"):
        report.require()
    assert "needed" in check_splice(loaded, images=same[:1], reload=False).failed[0].detail


def test_an_adapter_on_the_language_model_with_the_projector_saved(tokenizer):
    for kind, name in (("clip", "multi_modal_projector"), ("shuffle", "connector")):
        loaded, _ = make(tokenizer, kind)
        target = r".*\.(?:language_model|text_model)\..*\.(?:q_proj|down_proj)"
        report = check_splice(adapt(loaded, target_modules=target, modules_to_save=[name]))
        assert report.passed, str(report)
        assert report.rows[-1].name == "adapter saved"


@pytest.mark.slow
def test_a_reloaded_model_passes_before_anything_is_frozen(tokenizer, tmp_path):
    loaded, reference = make(tokenizer)
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = load_model(tmp_path, four_bit=False, backend="transformers")
    report = check_splice(again, reference=reference)
    assert report.passed, str(report)
    again.model.train()
    assert failed(again) == {"trainable parts"}
    in_four_bit = load_model(tmp_path, four_bit=True, backend="transformers")
    report = check_splice(in_four_bit)
    assert report.passed, str(report)
    half = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    report = check_splice(LoadedModel(half, again.tokenizer, again.processor))
    assert report.passed, str(report)


def test_other_models_are_refused():
    with pytest.raises(SpliceError, match="got Qwen3ForCausalLM"):
        check_splice(load_model("nano", four_bit=False, backend="transformers"))


# --- what is broken on purpose: (kind of splice, what to break) -> the rows that have to say so


def _config_id(loaded):
    loaded.model.config.image_token_id = 1000


def _nested_id(loaded):
    loaded.model.config.text_config.image_token_id = 1000


def _processor_id(loaded):
    loaded.processor.image_token_id = 1000


def _model_id(loaded):
    loaded.model.image_token_id = 1000


def _trunk_id(loaded):
    loaded.model.model.image_token_id = 1000


def _pieces(loaded):
    loaded.processor.image_token = "<image>"


def _large_tokenizer(loaded):
    loaded.tokenizer.add_tokens(["<one>", "<two>"])


def _small_head(loaded):
    loaded.model.lm_head = torch.nn.Linear(64, 1000, bias=False)


def _template(loaded):
    loaded.processor.chat_template = loaded.tokenizer.chat_template = TEXT_ONLY


def _processor_template(loaded):
    loaded.processor.chat_template = loaded.processor.chat_template.replace("<|vision_end|>", "")


def _strategy(loaded):
    loaded.model.config.vision_feature_select_strategy = "default"
    loaded.processor.vision_feature_select_strategy = "default"


def _keeps_cls(loaded):
    loaded.model.config.vision_feature_select_strategy = "full"
    loaded.processor.vision_feature_select_strategy = "full"


def _one_too_few(loaded):
    loaded.processor.num_additional_image_tokens -= 1


def _patch(loaded):
    loaded.processor.patch_size = 16


def _one_over(loaded):
    """One place more for the first picture and one less for the last: the sum fits."""
    processor, write = loaded.processor, loaded.processor.replace_image_token

    def shifted(self, images, index, **options):
        more = (index == 0) - (index == len(images["pixel_values"]) - 1)
        return self.image_token * (write(images, index, **options).count(self.image_token) + more)

    processor.replace_image_token = types.MethodType(shifted, processor)


def _padding(loaded):
    loaded.tokenizer.padding_side = "right"


def _other_rows_picture(loaded):
    """Every text gets the first picture of the batch."""
    trunk, look = loaded.model.model, loaded.model.model.get_image_features

    def first(*inputs, **options):
        out = look(*inputs, **options)
        out.pooler_output = [out.pooler_output[0] for _ in out.pooler_output]
        return out

    trunk.get_image_features = first


def _detached(loaded):
    trunk, look = loaded.model.model, loaded.model.model.get_image_features

    def cut_off(*inputs, **options):
        with torch.no_grad():
            return look(*inputs, **options)

    trunk.get_image_features = cut_off


def _dead_projector(loaded):
    torch.nn.init.zeros_(loaded.model.model.multi_modal_projector.linear_2.weight)


def _mean(loaded):
    loaded.processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def _deviation(loaded):
    loaded.processor.image_processor.image_std = [1.0, 1.0, 1.0]


def _no_scaling(loaded):
    loaded.processor.image_processor.do_rescale = False


def _eos(loaded):
    loaded.model.generation_config.eos_token_id = 0


def _pad(loaded):
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token


def _untied(loaded):
    head = torch.nn.Linear(64, 1024, bias=False)
    loaded.model.lm_head = head


def _tie_flag(loaded):
    loaded.model.config.tie_word_embeddings = False


def _trained_embedding(loaded):
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[9] += 1


def _unfrozen(loaded):
    loaded.model.model.vision_tower.requires_grad_(True)


def _not_written(loaded):
    loaded.model._keys_to_ignore_on_save = ["model.multi_modal_projector.linear_2.weight"]


FAULTS = [
    ("clip", _config_id, {"image token"}),
    ("clip", _nested_id, {"image token"}),
    ("clip", _processor_id, {"image token"}),
    ("clip", _pieces, {"image token"}),
    ("shuffle", _config_id, {"image token", "image reaches logits", "projector gradient"}),
    ("shuffle", _model_id, {"image token"}),
    ("shuffle", _trunk_id, {"image token"}),
    ("clip", _large_tokenizer, {"tokenizer fits"}),
    ("clip", _small_head, {"tokenizer fits"}),
    ("clip", _template, {"chat template"}),
    ("clip", _processor_template, {"chat template"}),
    ("siglip", _strategy, {"image features"}),
    ("clip", _keeps_cls, {"image features"}),
    ("clip", _one_too_few, {"image features", "placeholders"}),
    ("clip", _patch, {"image features", "placeholders"}),
    ("clip", _one_over, {"placeholders"}),
    ("clip", _padding, {"batch equals single"}),
    ("clip", _other_rows_picture, {"batch equals single"}),
    ("clip", _detached, {"projector gradient"}),
    ("clip", _dead_projector, {"image reaches logits", "projector gradient"}),
    ("clip", _mean, {"mean and deviation"}),
    ("siglip", _deviation, {"mean and deviation"}),
    ("clip", _no_scaling, {"mean and deviation"}),
    ("clip", _eos, {"answer ends"}),
    ("clip", _pad, {"answer ends"}),
    ("clip", _untied, {"tied weights", "text alone"}),
    ("shuffle", _tie_flag, {"tied weights"}),
    ("clip", _trained_embedding, {"text alone"}),
    ("clip", _unfrozen, {"trainable parts"}),
    ("clip", _not_written, {"reload"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fault", "rows"), FAULTS, ids=[f"{k}{f.__name__}" for k, f, _ in FAULTS])
def test_a_fault_is_named(kind, fault, rows, tokenizer):
    loaded, reference = make(tokenizer, kind)
    fault(loaded)
    broken = [row.name for row in check_splice(loaded, reference=reference, reload="reload" in rows).failed]
    assert rows <= set(broken)
    assert broken[0] in rows, "what follows from it comes later"


def test_every_row_is_needed_by_some_fault(tokenizer):
    loaded, reference = make(tokenizer)
    every = {row.name for row in check_splice(loaded, reference=reference).rows}
    assert every == set().union(*(rows for _, _, rows in FAULTS))


def test_adapters_that_land_in_the_tower_or_lose_the_projector(tokenizer):
    loaded, _ = make(tokenizer)
    in_tower = adapt(loaded, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    report = check_splice(in_tower)
    assert [row.name for row in report.failed] == ["trainable parts"]
    assert "vision_tower" in report.failed[0].detail
    loaded, _ = make(tokenizer)
    lost = adapt(loaded, target_modules=r".*language_model.*\.q_proj")
    assert failed(lost) == {"trainable parts", "adapter saved"}
    projector_of(lost.model).requires_grad_(True)  # by hand: it trains, and is not written
    report = check_splice(lost)
    assert [row.name for row in report.failed] == ["adapter saved"]
    assert "0 of 4 tensors" in report.failed[0].detail


def test_the_loss_falls_while_no_picture_reaches_the_language_model(tokenizer):
    """Seed 004: one forgotten id, and the projector's gradient is 0.0, not None."""
    loaded, _ = make(tokenizer, "shuffle")
    loaded.model.config.image_token_id = 1000
    loaded.model.requires_grad_(True)
    loaded.model.model.vision_model.requires_grad_(False)
    rng = np.random.default_rng(1)
    images = [[Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))] for _ in range(2)]
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    chats = [[{"role": "user", "content": parts}, {"role": "assistant", "content": a}] for a in ("red", "blue")]
    text = [loaded.processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = loaded.processor(text=text, images=images, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        loss = loaded.model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    (weight,) = projector_of(loaded.model).parameters()
    assert weight.grad is not None, "so the usual smoke test passes"
    assert weight.grad.abs().sum() == 0
    loaded.model.requires_grad_(False)
    report = check_splice(loaded, reload=False)
    assert {"image token", "placeholders", "image reaches logits", "projector gradient"} <= failed(loaded)
    assert "config.image_token_id is 1000" in str(report)
    assert "modality_projection.proj.weight 0:" in str(report)
