"""Give a language model eyes: a vision tower, a new projector and a language model in one stock transformers class.

`splice` moves both models into the class (no copy is made), builds every id and size through constructors and
proves that text alone still gives the language model's own logits. What comes out reloads with plain transformers,
without custom code. Whether it sees is for `check_splice` to say; whether it learns, for the two training stages.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from ironlogic.backends import four_bit_share
from ironlogic.models import LoadedModel, as_loaded, load_model
from ironlogic.vision.check import SpliceReport, check_splice
from ironlogic.vision.splice_parts import (
    SpliceError,
    Tower,
    add_image_token,
    as_smolvlm_tower,
    image_template,
    open_tower,
    projector_of,
    tower_of,
)
from ironlogic.vision.train import train_instruct, train_projector

import torch
import transformers

__all__ = ["SpliceError", "SpliceReport", "check_splice", "splice", "train_instruct", "train_projector"]

_FOUR_BIT = ("is_loaded_in_4bit", "is_4bit_serializable")


def splice(
    vision_tower: Any,
    language_model: Any,
    *,
    projector: Literal["mlp2x_gelu", "pixel_shuffle"] = "mlp2x_gelu",
    image_token: str = "<|image_pad|>",
    vision_feature_layer: int = -2,
    shuffle_factor: int = 4,
    four_bit: bool = False,
    max_length: int = 2048,
    seed: int = 3407,
) -> LoadedModel:
    """A vision-language model of `vision_tower` and `language_model`, its projector fresh, the rest frozen.

    Both are a local folder, a folder of data/ by its name, a hub name, or loaded: (tower, image processor) and
    (model, tokenizer) or a `LoadedModel`. Loaded models are moved in, so they share their weights with the result.
    `image_token` is reused where the tokenizer reserves it (Qwen3), else added. Raises `SpliceError` for what the
    class can't represent.

    `mlp2x_gelu` (LLaVA-1.5, seed 003): LlavaForConditionalGeneration, an image token for each patch, features of
    `vision_feature_layer`. `pixel_shuffle` (SmolVLM, seed 004): SmolVLMForConditionalGeneration, as the one stock
    class whose projector is a single linear map of `shuffle_factor` ** 2 neighbouring patches of the last layer.
    """
    if projector not in ("mlp2x_gelu", "pixel_shuffle"):
        raise SpliceError(f"projector is {projector!r}; expected 'mlp2x_gelu' or 'pixel_shuffle'")
    tower = open_tower(vision_tower, layer=vision_feature_layer)
    loaded = _open_language_model(language_model, four_bit, max_length, seed)
    lm, tokenizer = loaded.model, copy.deepcopy(loaded.tokenizer)
    again = partial(
        splice,
        vision_tower,
        loaded.base,
        projector=projector,
        image_token=image_token,
        vision_feature_layer=vision_feature_layer,
        shuffle_factor=shuffle_factor,
        max_length=max_length,
        seed=seed,
    )
    image_id = add_image_token(tokenizer, image_token)
    tokenizer.chat_template = image_template(tokenizer, image_token)
    tokenizer.padding_side = "left"  # answers of a batch begin at one place
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():  # new rows are drawn
            torch.manual_seed(seed)
            lm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    tower.model.config.image_mean = list(tower.image_processor.image_mean)  # kept in config.json, for check_splice
    tower.model.config.image_std = list(tower.image_processor.image_std)
    if projector == "mlp2x_gelu":
        model, processor = _build_llava(tower, lm, tokenizer, image_token, image_id, vision_feature_layer)
    else:
        model, processor = _build_smolvlm(tower, lm, tokenizer, image_token, image_id, shuffle_factor)
    model.lm_head = lm.get_output_embeddings()
    _start_projector(model, seed)
    _settle(model, lm, tokenizer)
    _check_text(model, lm)
    return replace(
        loaded,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        backend="transformers",
        source=f"{type(tower.model).__name__} + {loaded.source or type(lm).__name__}",
        base="",  # nowhere on disk yet
        four_bit_share=four_bit_share(model),
        in_16_bit=again if loaded.base else None,
    )


def _open_language_model(language_model: Any, four_bit: bool, max_length: int, seed: int) -> LoadedModel:
    if isinstance(language_model, tuple):
        loaded = as_loaded(*language_model)
        longest = loaded.model.config.max_position_embeddings
        loaded = replace(loaded, max_length=min(max_length, longest))
    elif isinstance(language_model, LoadedModel):
        loaded = language_model
    else:  # Unsloth rewrites the forward pass of the whole model, of which only the trunk is taken
        loaded = load_model(
            language_model, four_bit=four_bit, max_length=max_length, seed=seed, backend="transformers"
        )
    lm = loaded.model
    if not isinstance(lm, transformers.PreTrainedModel) or lm.get_output_embeddings() is None:
        raise SpliceError(
            f"{type(lm).__name__} is no causal language model of transformers; merge an adapter first"
        )
    return loaded


def _build_llava(
    tower: Tower, lm: Any, tokenizer: Any, image_token: str, image_id: int, layer: int
) -> tuple[Any, Any]:
    # "default" drops the first feature (CLS), "full" keeps all of them
    strategy = "default" if tower.extra == 1 else "full"
    config = transformers.LlavaConfig(
        vision_config=tower.model.config,
        text_config=lm.config,
        image_token_index=image_id,
        image_seq_length=tower.grid**2 + (tower.extra if strategy == "full" else 0),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    model = _build_empty(transformers.LlavaForConditionalGeneration, config)
    _move_in(model.model, "vision_tower", tower.model)
    _move_in(model.model, "language_model", lm.base_model)
    processor = transformers.LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tower.extra,
        image_token=image_token,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def _build_smolvlm(
    tower: Tower, lm: Any, tokenizer: Any, image_token: str, image_id: int, factor: int
) -> tuple[Any, Any]:
    vision = as_smolvlm_tower(tower.model)
    if tower.grid % factor:
        raise SpliceError(
            f"pixel_shuffle joins {factor} x {factor} patches, but {type(tower.model).__name__} emits "
            f"{tower.grid} x {tower.grid} of them; choose a shuffle_factor that divides {tower.grid}"
        )
    config = transformers.SmolVLMConfig(
        vision_config=vision.config,
        text_config=lm.config,
        image_token_id=image_id,
        scale_factor=factor,
        tie_word_embeddings=lm.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = _build_empty(transformers.SmolVLMForConditionalGeneration, config)
    _move_in(model.model, "vision_model", vision)
    _move_in(model.model, "text_model", lm.base_model)
    # SmolVLM's own processor needs torchvision even for still pictures. The class wants pixels of the shape
    # (picture, 1, 3, size, size): films of one frame, which VideoMAE's image processor makes.
    own = tower.image_processor
    frames = transformers.VideoMAEImageProcessorPil(
        size={"height": tower.size, "width": tower.size},
        do_center_crop=False,
        **{name: getattr(own, name) for name in ("resample", "rescale_factor", "image_mean", "image_std")},
    )
    processor = transformers.LlavaProcessor(
        image_processor=frames,
        tokenizer=tokenizer,
        patch_size=tower.patch * factor,
        vision_feature_select_strategy="full",
        image_token=image_token,
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def _build_empty(kind: type, config: Any) -> Any:
    try:
        with torch.device("meta"):
            return kind(config)
    except (AttributeError, ValueError) as error:  # it looks for the embedding by the name that most models use
        name = config.text_config.model_type
        raise SpliceError(f"{kind.__name__} can't carry a {name} model: {error}") from error


def _move_in(parent: Any, name: str, module: Any) -> None:
    """Puts a loaded module where the class, built from its config, expects one with the same tensors."""
    expected = getattr(parent, name)
    ours, theirs = dict(module.named_parameters()).keys(), dict(expected.named_parameters()).keys()
    if type(expected) is not type(module) or ours != theirs:
        raise SpliceError(
            f"{type(parent).__name__} builds a {type(expected).__name__} as its {name}, not this "
            f"{type(module).__name__} (tensors on one side only: {sorted(ours ^ theirs)[:3]})"
        )
    setattr(parent, name, module)


def _start_projector(model: Any, seed: int) -> None:
    """As `torch.nn.Linear` starts, uniform within 1 / sqrt(inputs), with zero biases; the same on every device.

    LLaVA's own start. A normal of 0.02 whatever the width, as transformers begins, makes the pictures of a narrow
    tower fainter than words.
    """
    part = projector_of(model)
    like = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    part.to_empty(device=like.device).to(like.dtype)
    for name, parameter in part.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif not parameter.is_meta:
            drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data.copy_(drawn / parameter.shape[1] ** 0.5)


def _settle(model: Any, lm: Any, tokenizer: Any) -> None:
    """Device, type, ends of an answer, tied weights; only the projector is trainable."""
    like = model.get_input_embeddings().weight
    tower_of(model).to(device=like.device, dtype=like.dtype)
    model.generation_config = copy.deepcopy(lm.generation_config)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.tie_weights()
    model.requires_grad_(False).eval()
    projector_of(model).requires_grad_(True)
    if getattr(lm, "is_quantized", False):
        # the trainer asks the model whether it is in 4 bit, and from_pretrained asks the outer configuration
        for name in ("is_quantized", "quantization_method", "hf_quantizer", *_FOUR_BIT):
            setattr(model, name, getattr(lm, name))
        model.config.quantization_config = lm.hf_quantizer.quantization_config
        vars(lm.config).pop("quantization_config", None)


@torch.no_grad()
def _check_text(model: Any, lm: Any) -> None:
    """Text alone has to give the language model's own logits; scaled or capped logits don't survive the class."""
    if model.device.type == "meta":
        return
    ids = torch.arange(8, device=model.device)[None] + 3
    difference = (model(input_ids=ids).logits.float() - lm.eval()(input_ids=ids).logits.float()).abs().max().item()
    if not difference < 1e-3:
        raise SpliceError(
            f"{type(lm).__name__}: in {type(model).__name__} the same text gives other logits (by "
            f"{difference:.2g}); the class leaves out what this model does to them, such as capping or scaling"
        )
