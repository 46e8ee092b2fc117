"""Models to measure: random weights at the true shapes of the presets' models, written in the hub's own layout.

Written as bytes, without building the model first: 51 GiB in less than a minute. `tiny` keeps the architecture and
takes widths that a laptop holds, to try the scripts.
"""

import json
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SPLICES = ("vqwen3-4b", "qwen3-smvl")
SHARD_BYTES = 4_000_000_000
TEXT = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1088},
}
EYES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_heads": 4, "depth": 2},
    **{"num_hidden_layers": 2, "out_hidden_size": 128, "deepstack_visual_indexes": [0]},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def config_of(system: str, *, tiny: bool) -> Any:
    """The published configuration of a preset's (language) model, or a small one of the same architecture."""
    from ironlogic.memory import ARCHITECTURES
    from ironlogic.presets import PRESETS, VISION_PRESETS

    from transformers import CONFIG_MAPPING

    model = (VISION_PRESETS[system].language_model if system in SPLICES else PRESETS[system].model).lower()
    name = next(name for name in ARCHITECTURES if name.lower() in model)
    shape = {key: value for key, value in ARCHITECTURES[name].items() if key != "total"}
    if tiny and "text_config" in shape:
        text = shape["text_config"] | TEXT
        if "VL" in name:
            turn = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}
            text |= {"rope_parameters": turn | {"mrope_interleaved": True}}
        shape |= {"text_config": text, "vision_config": shape["vision_config"] | EYES}
    elif tiny:
        shape |= TEXT | (EXPERTS if "num_experts" in shape else {})
    return CONFIG_MAPPING[shape.pop("model_type")](**shape)


def build(system: str, folder: Path, *, tiny: bool) -> float:
    """Configuration, weights and nano's tokenizer (every vocabulary has its ids) in `folder`; GiB of weights."""
    from ironlogic.models import DATA

    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(system, tiny=tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "nano")
    text = config.get_text_config()
    text.pad_token_id, text.eos_token_id, text.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    sees = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    shapes = dict(tensors_of(model))
    write_weights(shapes, folder)
    if sees:  # the text is what is trained here; a processor only has to be there
        write_processor(config, tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)
    if tiny:
        (folder / "tiny").touch()
    return sum(map(size_of, shapes.values())) / 2**30


def tensors_of(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) as the hub has them: tied heads left out, fused experts one by one."""
    tied = model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if tied and name == "lm_head.weight":
            continue
        if name.endswith("experts.gate_up_proj"):
            experts, both, width = shape
            for i in range(experts):
                for part in ("gate_proj", "up_proj"):
                    yield name.replace("gate_up_proj", f"{i}.{part}.weight"), (both // 2, width)
        elif name.endswith("experts.down_proj"):
            experts, width, inner = shape
            for i in range(experts):
                yield name.replace("down_proj", f"{i}.down_proj.weight"), (width, inner)
        else:
            yield name, shape


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a bfloat16 tensor."""
    return 2 * math.prod(shape)


def write_weights(shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """safetensors shards of small random numbers (norms: ones), by hand: the same noise over and over."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(2**24, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy().data
    ones = torch.ones(2**20, dtype=torch.bfloat16).view(torch.uint8).numpy().data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(size_of, shards[-1].values())) + size_of(shape) > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def write(file: str, shard: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            begin, end = end, end + size_of(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb", buffering=0) as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard.items():
                source = ones if len(shape) == 1 and "norm" in name else noise
                left = size_of(shape)
                while left:
                    left -= out.write(source[: min(left, len(source))])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, files, shards))
    index = {"metadata": {"total_size": sum(map(size_of, shapes.values()))}}
    index["weight_map"] = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_processor(config: Any, tokenizer: Any, folder: Path) -> None:
    from ironlogic.models import DATA, _StillQwen3VLProcessor

    import transformers

    if config.model_type == "gemma3":
        names = {"image_token": "<|image_pad|>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "nano", extra_special_tokens=names)
        pictures = transformers.Gemma3ImageProcessorPil()
        processor = transformers.Gemma3Processor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    else:
        pictures = transformers.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2)
        processor = _StillQwen3VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)


def tower_of(system: str, *, tiny: bool) -> tuple[Any, Any]:
    """(vision tower with random weights, its image processor) of a splice."""
    from ironlogic.memory import ARCHITECTURES

    import transformers
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    shape = {key: value for key, value in ARCHITECTURES[system]["vision_config"].items() if key != "model_type"}
    if tiny:
        shape |= {key: EYES[key] for key in shape.keys() & EYES.keys()} | {"image_size": 4 * shape["patch_size"]}
    if system == "vqwen3-4b":
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape))
    else:
        tower = SmolVLMVisionTransformer(SmolVLMVisionConfig(**shape))
    size = {"height": shape["image_size"], "width": shape["image_size"]}
    return tower, transformers.SiglipImageProcessorPil(size=size)


def conversations(length: int, count: int) -> list[list[dict[str, Any]]]:
    """Conversations of `length` tokens or some more, which the trainer cuts; half of them the answer's."""
    from ironlogic.data.problems import make_tasks

    words = " ".join(task.prompt for task in make_tasks(60, seed=3)).split()
    text = " ".join(words[i % len(words)] for i in range(length))  # a word is a token or more
    half = text[: len(text) // 2]
    return [[{"role": "user", "content": half}, {"role": "assistant", "content": half}] for _ in range(count)]
