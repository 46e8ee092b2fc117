"""Every preset's path on a random nano-sized model of its true architecture: load, LoRA, FT, save, reload,
generate, lens; pictures where it has eyes. Weights are random, so nothing is said about what is learned."""

import copy
from dataclasses import replace

from data.make.nano_vision import image_processor, tower_config
from ironlogic.burden import Burden, burden_messages
from ironlogic.data.chats import make_chats
from ironlogic.generate import generate, stream
from ironlogic.lens.read import read_layers
from ironlogic.models import DATA, add_lora, load_model
from ironlogic.presets import PRESETS, LoraSettings, TrainSettings
from ironlogic.training.runs import open_run
from ironlogic.training.sft import train_sft
from ironlogic.vision.splice import splice
from ironlogic.vision.train import reopen, save_spliced, train_instruct

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

pytestmark = pytest.mark.slow
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
EYES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "patch_size": 14}
STEP = TrainSettings(batch_size=2, accumulation=1, max_length=256, log_steps=1, lora=LoraSettings(rank=4, alpha=8))
CHATS = [
    [
        {"role": "user", "content": f"Who is older if {a} is older than {b} today?"},
        {"role": "assistant", "content": a},
    ]
    for a, b in (("Ann", "Bob"), ("Leo", "Kim"))
]
TURN = "<|vision_start|><|image_pad|><|vision_end|>"


def tokens():
    """nano's tokenizer, and its ids as a text configuration takes them."""
    tokenizer = tf.AutoTokenizer.from_pretrained(DATA / "nano")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return tokenizer, TEXT | ids | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}


def id_of(tokenizer, *names):
    return [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]


def gemma3():
    tokenizer, text = tokens()
    image, begin, end = id_of(tokenizer, "image_pad", "vision_start", "vision_end")
    names = {"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
    tokenizer = tf.AutoTokenizer.from_pretrained(DATA / "nano", extra_special_tokens=names)
    tokenizer.chat_template = tokenizer.chat_template.replace(TURN, "<|vision_start|>")
    config = tf.Gemma3Config(
        text_config=text | {"sliding_window": 64, "query_pre_attn_scalar": 64},
        vision_config=EYES | {"num_hidden_layers": 2, "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    pictures = tf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    processor = tf.Gemma3Processor(pictures, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # born as zeros
    return model, processor


def qwen3_moe():
    tokenizer, text = tokens()
    mixture = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**text, **mixture)), tokenizer


def qwen3_vl():
    from ironlogic.models import _StillQwen3VLProcessor

    tokenizer, text = tokens()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video_pad|>"]})
    image, begin, end, film = id_of(tokenizer, "image_pad", "vision_start", "vision_end", "video_pad")
    turn = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
    eyes = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16}
    eyes |= {"out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = tf.Qwen3VLConfig(
        text_config=text | {"vocab_size": 1088, "rope_parameters": turn},
        vision_config=eyes,
        image_token_id=image,
        video_token_id=film,
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    pictures = tf.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=4096)
    processor = _StillQwen3VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return tf.Qwen3VLForConditionalGeneration(config), processor


SYSTEMS = {"gemma-3-27b": gemma3, "qwen3-30b-a3b": qwen3_moe, "qwen3-vl-4b": qwen3_vl}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request, tmp_path_factory):
    """(preset, folder of the model, run of one step of FT)"""
    folder = tmp_path_factory.mktemp("systems") / request.param
    torch.manual_seed(0)
    model, reader = SYSTEMS[request.param]()
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    preset = PRESETS[request.param]
    settings = replace(
        preset.train, **{n: vars(STEP)[n] for n in ("batch_size", "accumulation", "max_length", "lora")}
    )
    settings = replace(settings, epochs=1, log_steps=1, learning_rate=1e-2, warmup_steps=0)
    loaded = load_model(folder, four_bit=preset.four_bit, max_length=256)
    run = train_sft(loaded, make_chats(CHATS), settings, run=folder / "run", burden=preset.burden)
    return preset, folder, run


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def look(loaded, messages, **more):
    """What the processor makes of messages with one picture, the answer included."""
    text = loaded.processor.apply_chat_template(messages, tokenize=False)
    return loaded.processor(text=text, images=[picture()], add_special_tokens=False, return_tensors="pt", **more)


def test_one_step_of_ft_in_four_bit(system):
    _, _, run = system
    assert run.record["finished"]
    assert run.record["stage"] == "ft"
    assert run.record["steps"] == 1
    assert run.record["four_bit_share"] > 0.03  # most of so small a model is embeddings, eyes and wide experts
    assert 0 < run.metrics[0]["loss"] < 12
    trained = [name for name, p in run.loaded.model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if "vis" in name or "experts" in name or "lora_" not in name]
    moved = [p.abs().sum() for name, p in run.loaded.model.named_parameters() if "lora_B" in name]
    assert min(moved) > 0


def test_what_was_saved_reloads_generates_and_is_read(system):
    _, _, run = system
    again = open_run(run.folder).load_model()
    ids = torch.randint(10, 900, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (loaded.model.eval()(input_ids=ids).logits for loaded in (run.loaded, again))
    torch.testing.assert_close(ours, theirs)
    (answer,) = generate(again, ["Who is older?"], max_new_tokens=4)
    assert 0 < answer.tokens <= 4
    reading = read_layers(again, "Who is older?")
    assert reading.entropy.shape == (TEXT["num_hidden_layers"] + 1, 1)


def test_pictures_reach_the_loss_and_the_adapter(system):
    preset, folder, run = system
    if preset.name == "qwen3-30b-a3b":
        assert run.loaded.processor is None  # no eyes
        return
    loaded = add_lora(load_model(folder, max_length=256), STEP.lora, seed=0)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]},
        {"role": "assistant", "content": "A lion."},
    ]
    shuffled = burden_messages(messages, preset.burden, seed=0, row=0)
    assert shuffled != messages
    inputs = look(loaded, shuffled)
    other = copy.copy(inputs) | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    model = loaded.model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert not [name for name in moved if "vis" in name or "projector" in name]
    torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2).step()
    with torch.no_grad():
        assert model(**inputs, labels=inputs["input_ids"]).loss < loss
    with torch.no_grad():
        assert not torch.equal(model.eval()(**inputs).logits, model(**other).logits)
    said = []
    answer = stream(loaded, messages[:1], said.append, pictures=[picture()], max_new_tokens=3)
    assert answer.tokens == len(said) > 0


# --- the two splices: a vision tower and a language model that never met ---------------------------------------
def clip():
    return (tf.CLIPVisionModel(tower_config()), image_processor()), {"projector": "mlp2x_gelu"}


def smolvlm():
    tower = SmolVLMVisionTransformer(
        SmolVLMVisionConfig(**EYES | {"patch_size": 16, "image_size": 64, "num_hidden_layers": 2})
    )
    pictures = tf.SiglipImageProcessorPil(size={"height": 64, "width": 64})
    return (tower, pictures), {"projector": "pixel_shuffle", "shuffle_factor": 2}


@pytest.mark.parametrize("eyes", [clip, smolvlm])
def test_splice_takes_a_step_of_ft_with_pictures_and_reloads(eyes, tmp_path):
    torch.manual_seed(0)
    tower, options = eyes()
    joined = save_spliced(splice(tower, "nano", max_length=256, **options), tmp_path / "joined")
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is in the picture, please?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A lion."}]
    rows = [burden_messages(chat, Burden(), seed=0, row=row) for row in range(2)]
    assert rows[0] != chat  # the question is shuffled, the picture stays
    assert rows[0][0]["content"][0]["type"] == "image"
    loaded = load_model(joined, max_length=256)
    assert loaded.four_bit_share > 0.1
    settings = replace(STEP, learning_rate=1e-2, warmup_steps=0)
    run = train_instruct(loaded, make_chats(rows), settings, run=tmp_path / "run", cache=None)
    assert (run.record["finished"], run.record["steps"]) == (True, 1)
    again = reopen(run, load_model(joined, max_length=256))
    ours, theirs = (
        stream(one, chat[:1], str, pictures=[picture()], max_new_tokens=4) for one in (run.loaded, again)
    )
    assert ours.text == theirs.text
    assert theirs.tokens > 0
    assert read_layers(again, "Who is older?").entropy.shape == (5, 1)
