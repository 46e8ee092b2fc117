"""The check of a splice: a good one passes every row, each thing broken on purpose is named by its row."""

import functools

from ironlogic.data.chats import make_chats
from ironlogic.data.scenes import scene_chats
from ironlogic.models import LoadedModel, load_model
from ironlogic.presets import VISION_PRESETS
from ironlogic.vision.check import check_splice
from ironlogic.vision.faults import FAULTS, TILE_FAULTS, break_splice, train_fault
from ironlogic.vision.splice import SpliceError, projector_of, splice

import peft
import pytest
import torch
import transformers as tf
from eyes import chat, language_model, picture, tower


def make(kind="clip"):
    """(a good splice, its language model's logits of a text); "shuffle" and "tiles" in SmolVLM's class."""
    words, tokenizer = language_model()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        reference = ids, words(input_ids=ids).logits
    tiles = 4 * (kind == "tiles")
    shape = (
        {"projector": "pixel_shuffle", "shuffle_factor": 2, "tiles": tiles} if kind in ("shuffle", "tiles") else {}
    )
    return splice(tower("siglip" if shape else kind), (words, tokenizer), **shape), reference


def adapt(loaded, **options):
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    return LoadedModel(peft.get_peft_model(loaded.model, config), loaded.tokenizer, loaded.processor)


def failed(loaded, reference=None):
    return {row.name for row in check_splice(loaded, reference=reference).failed}


# --- what is good


@pytest.mark.parametrize("kind", ["clip", "siglip", "shuffle", "tiles"])
def test_a_good_splice_passes_and_is_left_as_it_was(kind):
    loaded, reference = make(kind)
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


def test_own_images_and_how_a_report_looks():
    loaded, _ = make()
    same = [picture()] * 2
    report = check_splice(loaded, images=same, reload=False)
    assert [row.name for row in report.failed] == ["image reaches logits"], "two equal pictures prove nothing"
    assert "BAD image reaches logits" in str(report)
    assert report._repr_html_().count("<tr>") == len(report.rows) == 12
    assert report._repr_html_().count("broken") == 1
    with pytest.raises(SpliceError, match="image reaches logits: exchanging .* never reach"):
        report.require()
    assert "needed" in check_splice(loaded, images=same[:1], reload=False).failed[0].detail


def test_an_adapter_on_the_language_model_with_the_projector_saved():
    for kind, name in (("clip", "multi_modal_projector"), ("shuffle", "connector")):
        loaded, _ = make(kind)
        target = r".*\.(?:language_model|text_model)\..*\.(?:q_proj|down_proj)"
        report = check_splice(adapt(loaded, target_modules=target, modules_to_save=[name]))
        assert report.passed, str(report)
        assert report.rows[-1].name == "adapter saved"


@pytest.mark.slow
def test_a_reloaded_model_passes_before_anything_is_frozen(tmp_path):
    loaded, reference = make()
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


# --- what is broken on purpose


def _one_over(loaded):
    """One place more for the first picture and one less for the last: the sum fits."""
    processor, write = loaded.processor, loaded.processor.replace_image_token

    def shifted(images, image_idx, **options):
        more = (image_idx == 0) - (image_idx == len(images["pixel_values"]) - 1)
        return processor.image_token * (write(images, image_idx, **options).count(processor.image_token) + more)

    processor.replace_image_token = shifted


def _other_rows_picture(loaded):
    """Every text gets the first picture of the batch."""
    trunk, look = loaded.model.model, loaded.model.model.get_image_features

    def first(*inputs, **options):
        out = look(*inputs, **options)
        out.pooler_output = [out.pooler_output[0] for _ in out.pooler_output]
        return out

    trunk.get_image_features = first


def _set(path, value):
    """Another value for one attribute."""

    def change(loaded):
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, loaded), name, value)

    return change


def _both(name, value):
    """The same wrong value where model and processor have it."""
    return lambda x: [_set(f"{where}.{name}", value)(x) for where in ("model.config", "processor")]


def _head(rows):
    return lambda x: setattr(x.model, "lm_head", torch.nn.Linear(64, rows, bias=False))


def _processor_template(loaded):
    loaded.processor.chat_template = loaded.processor.chat_template.replace("<|vision_end|>", "")


def _cut_off(loaded):
    trunk = loaded.model.model
    trunk.get_image_features = torch.no_grad()(trunk.get_image_features)


NOWHERE = {"image reaches logits", "projector gradient"}
NOT_SAVED = ["model.multi_modal_projector.linear_2.weight"]
# kind of splice, what is broken -> the rows that have to say so; what they say is what is wrong
BROKEN = [
    ("clip", _set("model.config.image_token_id", 1000), {"image token"}),
    ("clip", _set("model.config.text_config.image_token_id", 1000), {"image token"}),
    ("clip", _set("processor.image_token_id", 1000), {"image token"}),
    ("clip", _set("processor.image_token", "<image>"), {"image token"}),
    ("shuffle", _set("model.config.image_token_id", 1000), {"image token"} | NOWHERE),
    ("shuffle", _set("model.image_token_id", 1000), {"image token"}),
    ("shuffle", _set("model.model.image_token_id", 1000), {"image token"}),
    ("clip", lambda x: x.tokenizer.add_tokens(["<one>", "<two>"]), {"tokenizer fits"}),
    ("clip", _head(1000), {"tokenizer fits"}),
    (
        "clip",
        _processor_template,
        {"chat template"},
    ),
    ("siglip", _both("vision_feature_select_strategy", "default"), {"image features"}),
    ("clip", _both("vision_feature_select_strategy", "full"), {"image features"}),
    ("clip", _set("processor.num_additional_image_tokens", 0), {"image features", "placeholders"}),
    ("clip", _set("processor.patch_size", 16), {"image features", "placeholders"}),
    ("tiles", _set("processor.image_seq_len", 5), {"image features", "placeholders", "tiles"}),
    ("tiles", _set("processor.image_processor.max_image_size", {"longest_edge": 16}), {"image features"}),
    ("clip", _one_over, {"placeholders"}),
    ("clip", _other_rows_picture, {"batch equals single"}),
    ("clip", _cut_off, {"projector gradient"}),
    ("clip", lambda x: torch.nn.init.zeros_(projector_of(x.model).linear_2.weight), NOWHERE),
    ("siglip", _set("processor.image_processor.image_std", [1.0, 1.0, 1.0]), {"mean and deviation"}),
    ("clip", _set("processor.image_processor.do_rescale", False), {"mean and deviation"}),
    ("clip", _set("model.generation_config.eos_token_id", 0), {"answer ends"}),
    ("clip", _set("tokenizer.pad_token", "<|im_end|>"), {"answer ends"}),
    ("clip", _head(1024), {"tied weights", "text alone"}),
    ("shuffle", _set("model.config.tie_word_embeddings", False), {"tied weights"}),
    ("clip", lambda x: x.model.get_input_embeddings().weight.data[9].add_(1), {"text alone"}),
    ("clip", lambda x: x.model.model.vision_tower.requires_grad_(True), {"trainable parts"}),
    ("clip", _set("model._keys_to_ignore_on_save", NOT_SAVED), {"reload"}),
]
# the faults that notebook 03 shows
SEEN_BY = {
    "pictures go nowhere (seed 004)": "image reaches logits",
    "a wrong image token id": "image token",
    "template that reads text only (Qwen3's)": "chat template",
    "tower's output sliced wrong": "image features",
    "another tower's colours": "mean and deviation",
    "answers padded on the right": "batch equals single",
    "head no longer tied": "tied weights",
    "LoRA inside the tower": "trainable parts",
    "LoRA without the projector": "adapter saved",
    "a tile's tokens off by one": "tiles",
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fault", "rows"), BROKEN)
def test_a_fault_is_named(kind, fault, rows):
    loaded, reference = make(kind)
    fault(loaded)
    broken = [row.name for row in check_splice(loaded, reference=reference, reload="reload" in rows).failed]
    assert rows <= set(broken)
    assert broken[0] in rows, "what follows from it comes later"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, *TILE_FAULTS])
def test_each_fault_of_the_notebook_turns_its_check_red(fault):
    loaded, _ = make("tiles" if fault in TILE_FAULTS else "clip")
    assert SEEN_BY[fault] in failed(break_splice(loaded, fault))


def test_every_row_is_needed_by_some_fault():
    (loaded, reference), (tiled, _) = make(), make("tiles")
    rows = check_splice(loaded, reference=reference).rows + check_splice(tiled, reload=False).rows
    assert {row.name for row in rows} <= set().union(*(rows for _, _, rows in BROKEN), SEEN_BY.values())
    with pytest.raises(ValueError, match="no fault 'x'; expected one of a tile's tokens"):
        break_splice(tiled, "x")


def test_adapters_that_land_in_the_tower_or_lose_the_projector():
    loaded, _ = make()
    in_tower = adapt(loaded, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
    report = check_splice(in_tower)
    assert [row.name for row in report.failed] == ["trainable parts"]
    assert "vision_tower" in report.failed[0].detail
    loaded, _ = make()
    lost = adapt(loaded, target_modules=r".*language_model.*\.q_proj")
    assert failed(lost) == {"trainable parts", "adapter saved"}
    projector_of(lost.model).requires_grad_(True)  # by hand: it trains, and is not written
    report = check_splice(lost)
    assert [row.name for row in report.failed] == ["adapter saved"]
    assert "0 of 4 tensors" in report.failed[0].detail


def test_the_loss_falls_while_no_picture_reaches_the_language_model():
    """Seed 004: one forgotten id, and the projector's gradient is 0.0, not None."""
    loaded, _ = make("shuffle")
    loaded.model.config.image_token_id = 1000
    loaded.model.requires_grad_(True)
    loaded.model.model.vision_model.requires_grad_(False)
    chats = [chat("What is it?", answer, picture()) for answer in ("red", "blue")]
    images = [[messages[0]["content"][0]["image"]] for messages in chats]
    text = [loaded.processor.apply_chat_template(messages, tokenize=False) for messages in chats]
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


@pytest.mark.slow
def test_both_losses_fall_but_the_broken_splice_learns_nothing_about_pictures(tmp_path):
    rows = make_chats(scene_chats(160, tmp_path, kinds=["color"], seed=1))
    settings = VISION_PRESETS["nano-vision"].instruct_stage
    built = []

    def build(*, seed):
        built.append(splice("nano-vision", "nano", seed=seed))
        return built[-1]

    start = [p.clone() for p in projector_of(build(seed=1).model).parameters()]
    for fault in ("", "pictures go nowhere (seed 004)"):
        metrics, answers = train_fault(build, fault, rows, settings, rows[:8], seed=1, max_new_tokens=6)
        assert [line["step"] for line in metrics] == list(range(1, 21))
        assert sum(line["loss"] for line in metrics[-5:]) / 5 < 0.7 * metrics[0]["loss"]
        assert len(answers) == 8
        unmoved = all(map(torch.equal, start, projector_of(built[-1].model).parameters()))
        assert unmoved == (fault != "")
    assert len(set(answers)) == 1, "one question, one answer, whatever the picture"
