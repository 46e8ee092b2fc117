"""Splicing: towers, language models, templates and sources that work, and those that are refused with a reason."""

import json
import re

from ironlogic.models import LoadedModel, load_model
from ironlogic.training.picture_rows import PictureReader
from ironlogic.vision.check import check_splice
from ironlogic.vision.splice import SpliceError, image_template, projector_of, splice, tower_of

import pytest
import torch
import transformers as tf
from eyes import image_processor, language_model, tokenizer, tower
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

# In the manner of Qwen3's: content that is no text becomes empty, old thoughts are dropped, tools have a turn.
DROPS_PARTS = """
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and message.content is string %}{%- set seen.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- if loop.index0 > seen.last and message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.name + '</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


# --- what works


@pytest.mark.parametrize("kind", ["clip", "siglip", "smolvlm", "vit", "dinov2"])
def test_towers(kind):
    model, words = language_model()
    with torch.no_grad():
        ids = torch.arange(4, 20)[None]
        reference = ids, model(input_ids=ids).logits
    report = check_splice(splice(tower(kind), (model, words)), reference=reference)
    assert report.passed, str(report)
    assert len(report.rows) == 14


@pytest.mark.parametrize("kind", ["smolvlm", "siglip"])
def test_pixel_shuffle(kind):
    eye, maker = tower(kind)
    loaded = splice((eye, maker), language_model(), projector="pixel_shuffle", shuffle_factor=2)
    assert type(loaded.model) is tf.SmolVLMForConditionalGeneration
    assert [tuple(p.shape) for p in projector_of(loaded.model).parameters()] == [(64, 64 * 4)]
    report = check_splice(loaded)
    assert report.passed, str(report)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        same = tower_of(loaded.model)(pixels).last_hidden_state, eye(pixels).last_hidden_state
    torch.testing.assert_close(*same)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {}), ("Llama", {"tie_word_embeddings": False}), ("Gemma", {}), ("Qwen2", {}), ("GPTNeoX", {})],
)
def test_language_models(kind, more):
    loaded = splice(tower(), language_model(kind, **more))
    report = check_splice(loaded)
    assert report.passed, str(report)
    assert loaded.model.config.text_config.model_type in kind.lower() + "gpt_neox"


@pytest.mark.slow
def test_four_bit():
    words = load_model("nano", four_bit=True, backend="transformers")
    splice(tower(), words)
    loaded = splice(tower(), words)  # a language model can be used again
    assert 0.2 < loaded.four_bit_share < 0.5
    report = check_splice(loaded)
    assert report.passed, str(report)
    assert {type(p).__name__ for p in tower_of(loaded.model).parameters()} == {"Parameter"}


# --- the seeds' own sizes


def qwen3(hidden, layers, intermediate, heads):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    words = tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    with torch.device("meta"):
        config = tf.Qwen3Config(vocab_size=151_936, max_position_embeddings=40_960, **sizes, **ends)
        return tf.Qwen3ForCausalLM(config), words


def sizes_of(model):
    unique = {id(p): p for p in model.parameters()}.values()  # a tied head counts once
    return sum(p.numel() for p in unique if p.requires_grad), sum(p.numel() for p in unique)


def test_seed_003_at_its_own_size():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        eye = tf.CLIPVisionModel(tf.CLIPVisionConfig(**sizes, image_size=336, patch_size=14, projection_dim=768))
    maker = image_processor("clip", 336)
    loaded = splice((eye, maker), qwen3(2560, 36, 9728, 32))
    report = check_splice(loaded)
    assert report.passed, str(report)
    assert len(report.rows) == 8
    assert type(loaded.model) is tf.LlavaForConditionalGeneration
    assert loaded.model.config.image_seq_length == 576
    assert loaded.model.config.vision_feature_layer == -2
    assert sizes_of(loaded.model)[0] == 9_180_160  # "~9.2 M"
    assert written_places(loaded) == 576


def seed_004(**options):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        eye = SmolVLMVisionTransformer(SmolVLMVisionConfig(**sizes, image_size=512, patch_size=16))
    parts = (eye, image_processor("siglip", 512)), qwen3(1024, 28, 3072, 16)
    return splice(*parts, projector="pixel_shuffle", **options)


@pytest.mark.parametrize("tiles", [0, 16])
def test_seed_004_at_its_own_size(tiles):
    loaded = seed_004(tiles=tiles)
    report = check_splice(loaded)
    assert report.passed, str(report)
    trainable, every = sizes_of(loaded.model)
    assert trainable == 768 * 16 * 1024 == 12 * 2**20
    assert round(every / 2**20, 2) == 662.87
    assert written_places(loaded) == 64 * (4 * 3 + 1 if tiles else 1)


def test_pictures_of_seed_004_take_its_0_8_to_1_3_thousand_tokens():
    """nano's tokenizer takes ten tokens for a row and column, Qwen3's eight; an extreme picture takes fewer."""
    reader = PictureReader(seed_004(tiles=16))
    sizes = [(640, 480), (480, 640), (500, 375), (512, 512), (1, 1), (2000, 1600), (5000, 100)]
    tokens = [len(reader.block(reader.add(Image.new("RGB", size)))) for size in sizes]
    words = [(count - 64 * views) / views for count, views in zip(tokens, (13, 13, 13, 17, 17, 17, 5), strict=True)]
    assert all(11 <= count < 14 for count in words), "a border, a row and a column before each view"
    assert all(800 <= count <= 1300 for count in tokens[:-1]), tokens
    assert tokens[-1] < 400


def test_tiles_keep_the_embedding_and_are_read_back_by_transformers_own_classes(tmp_path):
    loaded = splice(tower("siglip"), language_model(), projector="pixel_shuffle", shuffle_factor=2, tiles=4)
    assert loaded.model.config.image_token_id == tokenizer().convert_tokens_to_ids("<|image_pad|>")
    assert len(loaded.model.get_input_embeddings().weight) == len(loaded.tokenizer) == 1024
    loaded.processor.save_pretrained(tmp_path)
    pictures = SmolVLMImageProcessorPil.from_pretrained(tmp_path)
    words = tf.AutoTokenizer.from_pretrained(tmp_path)
    plain = tf.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=words.chat_template)
    for size in ((64, 64), (90, 20), (1, 1)):
        image = Image.effect_noise(size, 80).convert("RGB")
        text = plain.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
        ours, theirs = (
            one(text=[text], images=[[image]], return_tensors="pt") for one in (loaded.processor, plain)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "pixel_values"))
    written = plain.tokenizer.decode(ours["input_ids"][0])
    places = re.findall(r"<fake_token_around_image>(<row_._col_.>|<global-img>)(?:<image>){4}(?=\W)", written)
    assert places == [*(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)), "<global-img>"]


def written_places(loaded):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = loaded.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    batch = loaded.processor(text=text, images=[[Image.new("RGB", (640, 480))]], return_tensors="pt")
    return (batch["input_ids"] == loaded.model.config.image_token_id).sum().item()


# --- the chat template


CHATS = [
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1", "reasoning_content": "easy"}],
    [
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "reasoning_content": "an old thought"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "count"}]},
        {"role": "tool", "content": "2"},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "enable_thinking": False}])
def test_a_template_that_drops_parts_is_wrapped_and_else_unchanged(chat, options):
    own = tokenizer(chat_template=DROPS_PARTS)
    wrapped = image_template(own, "<|image_pad|>")
    assert wrapped.endswith(DROPS_PARTS)

    def render(messages, template):
        return own.apply_chat_template(
            messages, chat_template=template, tokenize=False, tools=[{"name": "count"}], **options
        )

    expected = render(chat, DROPS_PARTS)
    assert render(chat, wrapped) == expected
    parts = [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in chat]
    assert render(parts, wrapped) == expected != render(parts, DROPS_PARTS)
    parts[-2]["content"].insert(0, {"type": "image"})
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render(parts, wrapped).replace(image, "") == expected
    assert render(parts, wrapped).count(image) == 1


def test_the_wrapped_template_still_marks_answers_and_refuses_other_parts():
    own = tokenizer(chat_template=DROPS_PARTS)
    own.chat_template = image_template(own, "<|image_pad|>")
    assert image_template(own, "<|image_pad|>") == own.chat_template, "one that knows images is kept"
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    chat = [asked, {"role": "assistant", "content": [{"type": "text", "text": "A four."}]}]
    out = own.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert own.decode(marked) == "A four.<|im_end|>"
    with pytest.raises(Exception, match="neither text nor image"):
        own.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


# --- the image token


def test_a_new_image_token_makes_the_embedding_larger_by_rows_that_follow_the_seed():
    added = []
    for state, seed in ((1, 7), (2, 7), (2, 8)):
        model, words = language_model()
        before = model.get_input_embeddings().weight.detach().clone()
        torch.manual_seed(state)
        loaded = splice(tower(), (model, words), image_token="<image>", seed=seed)
        rows = loaded.model.get_input_embeddings().weight
        assert torch.equal(rows[:1024], before)
        added.append(rows[1024:])
    assert torch.equal(added[0], added[1])
    assert not torch.equal(added[1], added[2])
    assert loaded.model.config.image_token_id == 1024
    assert len(rows) == 1088 == loaded.model.config.text_config.vocab_size
    assert check_splice(loaded).passed
    assert len(words) == 1024, "the caller's tokenizer is not touched"
    assert "<image>" not in words.get_vocab()


def test_a_splice_pads_on_the_left_when_reloaded_though_its_tokenizer_was_not_made_so(tmp_path):
    model, words = language_model()
    words.init_kwargs.pop("padding_side")  # as SmolLM2's
    splice(tower(), (model, words)).processor.save_pretrained(tmp_path)
    assert tf.AutoProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"


# --- where the parts come from


def test_folders_names_and_objects(tmp_path):
    eye, maker = tower()
    eye.save_pretrained(tmp_path / "eye")
    maker.save_pretrained(tmp_path / "eye")
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = tf.CLIPModel(
        tf.CLIPConfig(vision_config=eye.config.to_dict(), text_config=text | {"vocab_size": 64}, projection_dim=16)
    )
    whole.vision_model.load_state_dict(eye.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    maker.save_pretrained(tmp_path / "whole")
    model, words = language_model()
    model.save_pretrained(tmp_path / "words")
    words.save_pretrained(tmp_path / "words")
    made = [
        splice(tmp_path / "eye", tmp_path / "words"),
        splice(str(tmp_path / "whole"), language_model()),
        splice((whole, maker), LoadedModel(*language_model(), max_length=77)),
    ]
    for loaded in made:
        for name, value in made[0].model.state_dict().items():
            assert torch.equal(value, loaded.model.state_dict()[name]), name
    assert [loaded.max_length for loaded in made] == [256, 256, 77]


@pytest.mark.slow
def test_a_smolvlm_checkpoint_without_torchvision(tmp_path):
    eye, _ = tower("smolvlm")
    words = language_model()[0].config
    config = tf.SmolVLMConfig(vision_config=eye.config, text_config=words, scale_factor=2, pad_token_id=0)
    whole = tf.SmolVLMForConditionalGeneration(config)
    whole.model.vision_model.load_state_dict(eye.state_dict())
    whole.save_pretrained(tmp_path)
    told = {"image_processor_type": "SmolVLMImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"resample": 1}))
    loaded = splice(tmp_path, language_model(), projector="pixel_shuffle", shuffle_factor=2)
    assert check_splice(loaded).passed
    assert list(loaded.processor.image_processor.image_mean) == [0.4] * 3
    assert loaded.processor.image_processor.resample == 1
    for name, value in eye.state_dict().items():
        assert torch.equal(tower_of(loaded.model).state_dict()[name], value)
    tiles = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    assert check_splice(splice((eye, tiles), language_model())).passed


def test_the_projector_follows_its_seed_and_nothing_else_moves():
    eye, maker = tower()
    model, words = language_model()
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    one = splice((eye, maker), (model, words), seed=1)
    assert torch.equal(torch.rand(3), drawn), "the global generator is left alone"
    again, other = (splice(tower(), language_model(), seed=seed) for seed in (1, 2))
    weights = [loaded.model.model.multi_modal_projector.linear_1.weight for loaded in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.model.model.vision_tower is eye, "moved, not copied"
    assert one.model.model.language_model is model.model
    trainable = {name.split(".")[1] for name, p in one.model.named_parameters() if p.requires_grad}
    assert trainable == {"multi_modal_projector"}
    for layer in (one.model.model.multi_modal_projector.linear_1, one.model.model.multi_modal_projector.linear_2):
        bound = layer.in_features**-0.5  # uniform within it, as `torch.nn.Linear` starts
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not layer.bias.any()


# --- what is refused


def test_language_models_that_do_not_fit():
    for kind, more in (("Gemma2", {"final_logit_softcapping": 1.0}), ("Granite", {"logits_scaling": 8.0})):
        with pytest.raises(SpliceError, match="capping or scaling"):
            splice(tower(), language_model(kind, **more))
    config = tf.GPT2Config(vocab_size=1024, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    without_template = tokenizer()
    without_template.chat_template = None
    with pytest.raises(SpliceError, match="no chat template"):
        splice(tower(), (language_model()[0], without_template))
    with pytest.raises(SpliceError, match="can't carry a gpt2 model"):
        splice(tower(), (tf.GPT2LMHeadModel(config), tokenizer()))


def test_towers_that_do_not_fit(tmp_path):
    words = language_model()
    eye, maker = tower()
    with pytest.raises(SpliceError, match="40 x 40 pixels, but CLIPVisionModel wants 32 x 32"):
        splice((eye, image_processor("siglip", 40)), words)
    with pytest.raises(SpliceError, match="holds a ViTImageProcessorPil; expected"):
        splice((image_processor("vit"), eye), words)
    with pytest.raises(SpliceError, match="SmolVLM, Idefics3 or SigLIP"):
        splice((eye, maker), words, projector="pixel_shuffle")
    for options in ({"tiles": 4}, {"tiles": 5, "projector": "pixel_shuffle"}):
        with pytest.raises(SpliceError, match="expected 0, or with pixel_shuffle 4, 9"):
            splice((eye, maker), words, **options)
    with pytest.raises(SpliceError, match="6 x 6 tiles .* but a row has at most 256; choose fewer tiles"):
        splice(tower("siglip"), words, projector="pixel_shuffle", shuffle_factor=2, tiles=36)
    with pytest.raises(SpliceError, match="divides 4"):
        splice(tower("siglip"), words, projector="pixel_shuffle", shuffle_factor=3)
    with pytest.raises(SpliceError, match="expected 'mlp2x_gelu'"):
        splice((eye, maker), words, projector="mlp3x")
    with pytest.raises(SpliceError, match="has no layer -9"):
        splice((eye, maker), words, vision_feature_layer=-9)
    flexible = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(SpliceError, match="image_size=None"):
        splice((tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**flexible, patch_size=8)), maker), words)
    with pytest.raises(RuntimeError, match="no such folder"):
        splice(str(tmp_path / "nothing"), words)
