"""Small random towers and language models for tests of splices, and pictures to show them."""

from ironlogic.models import DATA
from ironlogic.vision.splice import splice

import numpy as np
import torch
import transformers as tf
from PIL import Image
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS = {
    "clip": (tf.CLIPVisionConfig, tf.CLIPVisionModel),
    "siglip": (tf.SiglipVisionConfig, tf.SiglipVisionModel),
    "smolvlm": (SmolVLMVisionConfig, SmolVLMVisionTransformer),
    "vit": (tf.ViTConfig, tf.ViTModel),
    "dinov2": (tf.Dinov2Config, tf.Dinov2Model),
}
RNG = np.random.default_rng(0)


def tokenizer(**options):
    return tf.AutoTokenizer.from_pretrained(DATA / "nano", **options)


def image_processor(kind="clip", side=32):
    size = {"height": side, "width": side}
    if kind == "clip":
        return tf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    if kind in ("vit", "dinov2"):
        return tf.ViTImageProcessorPil(size=size)
    return tf.SiglipImageProcessorPil(size=size)


def tower(kind="clip", *, seed=0, **sizes):
    """(a random one for 32 x 32 pixels in 16 patches, its image processor)."""
    torch.manual_seed(seed)
    sizes = SIZES | {"image_size": 32, "patch_size": 8} | sizes
    if kind == "dinov2":
        sizes.pop("intermediate_size")
    config, model = TOWERS[kind]
    model = model(config(**sizes)).eval()
    assert sum(p.numel() for p in model.parameters()) < 300_000
    return model, image_processor(kind)


def language_model(kind="Qwen3", **sizes):
    """(a random one, nano's tokenizer)."""
    torch.manual_seed(1)
    words = tokenizer()
    given = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind != "GPTNeoX":
        given |= {"num_key_value_heads": 1, "tie_word_embeddings": True}
    if kind.startswith(("Qwen3", "Gemma")):
        given["head_dim"] = 32
    given |= {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = getattr(tf, f"{kind}Config")(vocab_size=1024, max_position_embeddings=256, **given | sizes)
    model = getattr(tf, f"{kind}ForCausalLM")(config).eval()
    assert sum(p.numel() for p in model.parameters()) < 400_000
    return model, words


def on_nano(kind="clip", *, seed=0, max_length=256):
    """A random tower on nano; "shuffle" and "tiles" (2 x 2) in the SmolVLM class, four features a view."""
    if kind in ("shuffle", "tiles"):
        options = {"projector": "pixel_shuffle", "shuffle_factor": 2, "tiles": 4 * (kind == "tiles")}
        return splice(tower("siglip", seed=seed), "nano", max_length=max_length, **options)
    return splice(tower(kind, seed=seed), "nano", max_length=max_length)


def picture() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def chat(question, answer, *images):
    """One turn about these images, and its reply."""
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
