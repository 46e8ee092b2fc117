"""Models to measure: random weights at the true shapes of the presets' models, written in the hub's own layout.

Written without building the model first. `tiny` keeps the architecture and takes widths that a laptop holds.
"""

import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SPLICES = ("vqwen3-4b", "qwen3-smvl")
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
    if sees:  # the text is what is trained here; a processor only has to be there
        write_processor(config, tokenizer, folder)
    else:
        tokenizer.save_pretrained(folder)
    if tiny:
        (folder / "tiny").touch()
    return write_weights(dict(tensors_of(model)), folder)


def tensors_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor without values) as the hub has them: tied heads left out, fused experts one by one."""
    tied = model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{i}.{part}.weight"), half
        elif name.endswith("experts.down_proj"):
            for i, expert in enumerate(tensor):
                yield name.replace("down_proj", f"{i}.down_proj.weight"), expert
        elif name != "lm_head.weight" or not tied:
            yield name, tensor


def write_weights(tensors: dict[str, Any], folder: Path) -> float:
    """safetensors shards of small random numbers (norms: ones); their GiB.

    By hand, the same noise over and over: `save_file` takes five times as long, of which a lent card has no time.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    noise, ones = (values.view(torch.uint8).numpy().data for values in (noise, torch.ones(2**20).bfloat16()))

    def write(file: str) -> None:
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in split.filename_to_tensors[file]:
            begin, end = end, end + tensors[name].nbytes
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb", buffering=0) as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in split.filename_to_tensors[file]:
                source, left = ones if "norm" in name and tensors[name].ndim == 1 else noise, tensors[name].nbytes
                while left:
                    left -= out.write(source[: min(left, len(source))])

    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, max_shard_size="4GB", filename_pattern=pattern)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, split.filename_to_tensors))
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    if split.is_sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return split.metadata["total_size"] / 2**30


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
