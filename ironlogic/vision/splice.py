"""Give a language model eyes: a vision tower, a new projector and a language model in one stock transformers class.

`splice` moves both models into the class (no copy is made), builds every id and size through constructors and
proves that text alone still gives the language model's own logits. What comes out reloads with plain transformers,
without custom code. Whether it sees is for `check_splice` to say; whether it learns, for the two training stages.
"""

import contextlib
import copy
import json
import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ironlogic import models
from ironlogic.models import (
    LoadedModel,
    as_loaded,
    bare,
    four_bit_share,
    load_model,
    projector_name,
    projector_of,
)

import tokenizers
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

# transformers.AutoImageProcessor asks for torchvision, the class itself doesn't
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

__all__ = [
    "SpliceError",
    "Tower",
    "add_image_token",
    "as_smolvlm_tower",
    "bare",
    "count_features",
    "feature_fields",
    "image_template",
    "image_token_ids",
    "is_tiled",
    "keeps_image",
    "open_tower",
    "projector_name",
    "projector_of",
    "splice",
    "tower_name",
    "tower_of",
]

# SmolVLM's default configuration, which transformers makes beside ours as it writes it, names a token it hasn't
logging.getLogger("transformers.configuration_utils").addFilter(lambda told: "got 128002" not in told.getMessage())

# --- the parts: tower, projector, image token, chat template ----------------------------------------------------
_PROBE = "zxq probe"
# Rewrites a list of content parts into one text before the language model's own template runs, unchanged, on it.
# Sandboxed templates can't append to a list, hence the sums; the last line keeps the body's first blank.
_PRELUDE = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
  {%- if 'content' in message and message.content is iterable and message.content is not string -%}
    {%- set flat.text = '' -%}
    {%- for part in message.content -%}
      {%- if part is string -%}{%- set flat.text = flat.text + part -%}
      {%- elif part.type == 'text' -%}{%- set flat.text = flat.text + part.text -%}
      {%- elif part.type in ('image', 'image_url') -%}{%- set flat.text = flat.text + IMAGE -%}
      {%- else -%}{{- raise_exception('a message holds a part that is neither text nor image') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
  {%- else -%}{%- set flat.messages = flat.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{- '' }}"""


class SpliceError(models.ModelError):
    """A vision tower and a language model that can't be joined, or a splice that fails its check."""


# --- the tower


@dataclass(frozen=True)
class Tower:
    """A vision tower and what it emits for one picture: (extra + grid * grid, width) features."""

    model: Any
    image_processor: Any
    size: int  # pixels of a side
    patch: int  # pixels of a side
    grid: int  # patches of a side
    extra: int  # features besides the patches (CLS, registers)


def open_tower(vision_tower: Any, *, layer: int = -2) -> Tower:
    """A tower from a folder, a hub name, or a loaded model with its image processor (a tuple).

    A whole CLIP, SigLIP or SmolVLM checkpoint will do: its tower is taken out. Raises `SpliceError` when the
    tower doesn't emit one feature for each patch of a square picture.
    """
    if isinstance(vision_tower, tuple):
        model, image_processor = vision_tower
        if not isinstance(model, transformers.PreTrainedModel):
            raise SpliceError(f"vision_tower holds a {type(model).__name__}; expected (model, image processor)")
        model, image_processor = _take_tower(model), getattr(image_processor, "image_processor", image_processor)
        if hasattr(image_processor, "do_image_splitting"):
            image_processor = _without_tiles(image_processor.to_dict(), _side(model.config, "image_size"))
    else:
        model, image_processor = _load_tower(vision_tower)
    size, patch = (_side(model.config, name) for name in ("image_size", "patch_size"))
    tokens = count_features(model, layer, size)
    grid = size // patch
    if tokens < grid * grid:
        raise SpliceError(
            f"{type(model).__name__} emits {tokens} features for {grid} x {grid} patches; LLaVA needs one for each"
        )
    _check_pictures(image_processor, size, type(model).__name__)
    return Tower(model, image_processor, size, patch, grid, tokens - grid * grid)


def _side(config: Any, name: str) -> int:
    """Pixels of a side: an `image_size` or `patch_size` is one number, or a pair."""
    value = getattr(config, name, None)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if value is None or len(sides) != 1:
        raise SpliceError(
            f"the vision tower ({config.model_type}) has {name}={value!r}; LLaVA needs a fixed, square one"
        )
    return sides.pop()


def _take_tower(whole: Any) -> Any:
    """The vision tower inside a whole checkpoint, as the class that transformers builds from its vision config."""
    config = getattr(whole.config, "vision_config", None)
    if config is None:
        return whole
    with torch.device("meta"):
        kind = type(transformers.AutoModel.from_config(config))
    tower = next((module for module in whole.modules() if isinstance(module, kind)), None)
    if tower is None:
        raise SpliceError(f"{type(whole).__name__} holds no {kind.__name__}; pass its vision tower instead")
    return tower


def _load_tower(name: Any) -> tuple[Any, Any]:
    source = models.resolve(name)
    local = {"local_files_only": Path(source).is_dir(), "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **local)
        model = _take_tower(transformers.AutoModel.from_pretrained(source, **local, use_safetensors=True))
        size = _side(model.config, "image_size")
        image_processor = _load_image_processor(source, size, config.model_type, local)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SpliceError(f"{source} can't be loaded as a vision tower: {reason[0]}") from error
    return model.eval(), image_processor


def _load_image_processor(source: str, size: int, kind: str, local: dict) -> Any:
    if kind not in ("smolvlm", "idefics3"):
        return AutoImageProcessor.from_pretrained(source, **local)
    settings = {}
    for file in ("processor_config.json", "preprocessor_config.json"):
        with contextlib.suppress(OSError):
            path = transformers.utils.cached_file(source, file, **local)
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            settings = content.get("image_processor", content)
    return _without_tiles(settings, size)


def _without_tiles(settings: dict, size: int) -> Any:
    """What SmolVLM's and Idefics3's do to a picture that they don't cut into tiles."""
    names = ("image_mean", "image_std", "resample", "rescale_factor")
    kept = {name: settings[name] for name in names if name in settings}
    return transformers.SiglipImageProcessorPil(size={"height": size, "width": size}, **kept)


@torch.no_grad()
def count_features(model: Any, layer: int, size: int) -> int:
    """Features that the tower emits for one picture; on the meta device, those of a small tower of its kind."""
    if any(parameter.is_meta for parameter in model.parameters()):
        small = {"num_hidden_layers": max(2, abs(layer)), "num_attention_heads": 1}
        small |= {"hidden_size": 16, "intermediate_size": 16}
        model = type(model)(type(model.config)(**model.config.to_dict() | small))
    weight = next(model.parameters())
    blank = torch.zeros(1, model.config.num_channels, size, size, dtype=weight.dtype, device=weight.device)
    try:
        states = model(blank, output_hidden_states=True, return_dict=True).hidden_states[layer]
    except Exception as error:  # a model of others that wants other inputs fails in its own way
        raise SpliceError(
            f"{type(model).__name__} can't be run on pixels alone or has no layer {layer} "
            f"({type(error).__name__}: {str(error)[:120]}); CLIP, SigLIP, SmolVLM, ViT and DINOv2 towers work"
        ) from error
    if states.dim() != 3:
        raise SpliceError(
            f"{type(model).__name__} emits features of shape {tuple(states.shape)}, not (1, N, width)"
        )
    return states.shape[1]


def _check_pictures(image_processor: Any, size: int, tower: str) -> None:
    wide = Image.new("RGB", (size + 40, size), "gray")
    shape = tuple(image_processor(wide, return_tensors="pt")["pixel_values"].shape)
    if shape[-2:] != (size, size):
        raise SpliceError(
            f"{type(image_processor).__name__} makes pictures of {shape[-2]} x {shape[-1]} pixels, but {tower} "
            f"wants {size} x {size}; set its size and crop_size"
        )


def as_smolvlm_tower(tower: Any) -> Any:
    """The tower as SmolVLM's class has it; SigLIP's and Idefics3's have the same tensors and compute the same."""
    if tower.config.model_type == "smolvlm_vision":
        return tower
    if tower.config.model_type not in ("siglip_vision_model", "idefics3_vision"):
        raise SpliceError(
            f"pixel_shuffle takes the tower of SmolVLM, Idefics3 or SigLIP, not {type(tower).__name__}; "
            "choose projector='mlp2x_gelu'"
        )
    fields = {key: value for key, value in tower.config.to_dict().items() if key != "model_type"}
    with torch.device("meta"):
        same = SmolVLMVisionTransformer(SmolVLMVisionConfig(**fields))
    names = same.state_dict().keys()
    same.load_state_dict({name: value for name, value in tower.state_dict().items() if name in names}, assign=True)
    return same.eval()


# --- the text side


def add_image_token(tokenizer: Any, token: str) -> int:
    """The id of the image token: a reserved one as it is, or a new special token at the end."""
    if token not in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise SpliceError(f"image token {token!r} becomes {len(ids)} tokens, {ids}; choose another name")
    return ids[0]


def image_template(tokenizer: Any, token: str) -> str:
    """The tokenizer's chat template, made to write `token` where a message holds an image.

    A template that does so already is kept; one that drops lists of content (Qwen3's) gets a prelude that turns
    them into text, so that thinking, tools and `{% generation %}` stay what they were.
    """
    template = tokenizer.chat_template
    if not template:
        raise SpliceError("the language model's tokenizer has no chat template; set tokenizer.chat_template")
    if keeps_image(tokenizer, token, template):
        return template
    around = ("<|vision_start|>", "<|vision_end|>")
    marked = all(mark in tokenizer.get_added_vocab() for mark in around)
    image = token.join(around) if marked else token + "\n"
    template = _PRELUDE.replace("IMAGE", json.dumps(image)) + template
    if not keeps_image(tokenizer, token, template):
        raise SpliceError("the language model's chat template drops the text of a user turn; pass a working one")
    return template


def keeps_image(tokenizer: Any, token: str, template: str | None = None) -> str:
    """The rendered probe when the template writes one image and the question beside it, else an empty string."""
    parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception:  # a template is a program of others: one that refuses lists may fail in any way
        return ""
    return text if text.count(token) == 1 and text.count(_PROBE) == 1 else ""


def feature_fields(loaded: LoadedModel) -> dict[str, Any]:
    """What configuration and processor have to say, so that each patch of the tower, and no CLS, gets a place."""
    model = bare(loaded.model)
    config, vision = model.config, model.config.vision_config
    shuffled = config.model_type == "smolvlm"
    layer = -1 if shuffled else config.vision_feature_layer
    patches = (vision.image_size // vision.patch_size) ** 2
    if is_tiled(loaded):
        return {
            "processor.image_seq_len": patches // config.scale_factor**2,
            "processor.image_processor.max_image_size": {"longest_edge": vision.image_size},
        }
    extra = count_features(tower_of(model), layer, vision.image_size) - patches
    strategy = _select_strategy(extra)
    fields = {
        "processor.vision_feature_select_strategy": strategy,
        "processor.num_additional_image_tokens": extra,
        "processor.patch_size": vision.patch_size * (config.scale_factor if shuffled else 1),
    }
    if not shuffled:
        fields["config.vision_feature_select_strategy"] = strategy
    return fields


def is_tiled(loaded: LoadedModel) -> bool:
    """Whether pictures may be cut into several views."""
    return bool(getattr(loaded.processor.image_processor, "do_image_splitting", False))


def _select_strategy(extra: int) -> str:
    """LLaVA's word for what is done with the features besides the patches: "default" drops the first one, a CLS."""
    return "default" if extra == 1 else "full"


def image_token_ids(model: Any) -> dict[str, int]:
    """Every copy of the image token's id in a model: in its nested configuration and on its modules."""
    ids, waiting = {}, [("config", model.config.to_dict())]
    while waiting:
        path, settings = waiting.pop()
        for name, value in settings.items():
            if isinstance(value, dict):
                waiting.append((f"{path}.{name}", value))
            elif name in ("image_token_id", "image_token_index") and value is not None:
                ids[f"{path}.{name}"] = value
    for path, module in (("model", model), ("model.model", model.model)):
        if "image_token_id" in vars(module):  # SmolVLM's classes keep copies
            ids[f"{path}.image_token_id"] = module.image_token_id
    return ids


# --- names inside the two classes


def tower_name(model: Any) -> str:
    """The name of the vision tower: `vision_tower` or `vision_model`."""
    return "vision_model" if model.config.model_type == "smolvlm" else "vision_tower"


def tower_of(model: Any) -> torch.nn.Module:
    """The vision tower."""
    return getattr(bare(model).model, tower_name(model))


# --- the splice -------------------------------------------------------------------------------------------------
def splice(
    vision_tower: Any,
    language_model: Any,
    *,
    projector: Literal["mlp2x_gelu", "pixel_shuffle"] = "mlp2x_gelu",
    image_token: str = "<|image_pad|>",
    vision_feature_layer: int = -2,
    shuffle_factor: int = 4,
    tiles: int = 0,
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
    `tiles`, with `pixel_shuffle`: 0, or 4, 9, ... 36, the most parts that a picture is cut into (seed 004: 16). Its
    long side then spans their square root of views; a view of the whole comes last.
    """
    if projector not in ("mlp2x_gelu", "pixel_shuffle"):
        raise SpliceError(f"projector is {projector!r}; expected 'mlp2x_gelu' or 'pixel_shuffle'")
    if tiles and (projector != "pixel_shuffle" or tiles not in (4, 9, 16, 25, 36)):
        raise SpliceError(
            f"tiles is {tiles!r} with {projector}; expected 0, or with pixel_shuffle 4, 9, 16, 25 or 36"
        )
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
        tiles=tiles,
        max_length=max_length,
        seed=seed,
    )
    if tiles:
        tokenizer, image_token = _rename_for_tiles(tokenizer, image_token)
    image_id = add_image_token(tokenizer, image_token)
    tokenizer.chat_template = image_template(tokenizer, image_token)
    # answers of a batch begin at one place; a tokenizer keeps only what it was made with
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
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
        if tiles:
            processor = _tile_processor(tower, tokenizer, model.model.image_seq_len, tiles)
            _check_room(processor, loaded.max_length)
    model.lm_head = lm.get_output_embeddings()
    _start_projector(model, seed)
    _complete(model, lm, tokenizer)
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
        longest = models.longest(loaded.model.config)
        loaded = replace(loaded, max_length=min(max_length, longest or max_length))
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
    strategy = _select_strategy(tower.extra)
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


# What Idefics3's processor, the one of transformers that cuts tiles without torchvision, calls its tokens; and
# the reserved ones of Qwen3 whose places they take. A new name needs no new row in the embedding.
_TILE_TOKENS = {
    "<image>": "<|image_pad|>",
    "<fake_token_around_image>": "<|vision_start|>",
    "<end_of_utterance>": "<|vision_end|>",
}
_WHOLE_TOKEN = {"<global-img>": "<|vision_pad|>"}  # words where none is reserved; llama.cpp wants a token


def _rename_for_tiles(tokenizer: Any, image_token: str) -> tuple[Any, str]:
    """The tokenizer with the tokens that stand around tiles, and the image token's name; where none is reserved for
    one of them, it is added. The row and column before a tile are words."""
    content, template = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    if template:
        template = template.replace(f"<|vision_start|>{image_token}<|vision_end|>", "<image>")
    for name, reserved in (_TILE_TOKENS | _WHOLE_TOKEN | {"<image>": image_token}).items():
        if reserved in tokenizer.get_added_vocab():
            content = content.replace(json.dumps(reserved), json.dumps(name))
    renamed = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(content),
        model_max_length=tokenizer.model_max_length,
        chat_template=template,
        **tokenizer.special_tokens_map,
    )
    for name in _TILE_TOKENS:
        add_image_token(renamed, name)
    return renamed, "<image>"


def _tile_processor(tower: Tower, tokenizer: Any, tokens: int, tiles: int) -> Any:
    """Cuts a picture into at most `tiles` views of the tower's size, `tokens` each, and one of the whole."""
    own = tower.image_processor
    pictures = SmolVLMImageProcessorPil(
        size={"longest_edge": tower.size * math.isqrt(tiles)},
        max_image_size={"longest_edge": tower.size},
        **{name: getattr(own, name) for name in ("resample", "rescale_factor", "image_mean", "image_std")},
    )
    return transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=tokens, chat_template=tokenizer.chat_template
    )


def _check_room(processor: Any, max_length: int) -> None:
    """Raises `SpliceError` when a picture of the most tiles leaves no room for a word."""
    longest, side = processor.image_processor.size["longest_edge"], processor.image_processor.max_image_size
    rows = longest // side["longest_edge"]
    text = processor.replace_image_token({"rows": [[rows]], "cols": [[rows]]}, 0)
    tokens = len(processor.tokenizer.encode(text, add_special_tokens=False))
    if tokens >= max_length:
        raise SpliceError(
            f"{rows} x {rows} tiles and the view of the whole take {tokens} tokens, but a row has at most "
            f"{max_length}; choose fewer tiles or a larger max_length"
        )


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


def _complete(model: Any, lm: Any, tokenizer: Any) -> None:
    """Device, type, ends of an answer, tied weights; only the projector is trainable."""
    like = model.get_input_embeddings().weight
    tower_of(model).to(device=like.device, dtype=like.dtype)
    model.generation_config = copy.deepcopy(lm.generation_config)
    model.generation_config.eos_token_id = _with_end(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.tie_weights()
    model.requires_grad_(False).eval()
    projector_of(model).requires_grad_(True)
    if getattr(lm, "is_quantized", False):
        # the trainer asks the model whether it is in 4 bit, and from_pretrained asks the outer configuration
        flags = "is_quantized quantization_method hf_quantizer is_loaded_in_4bit is_4bit_serializable"
        for name in flags.split():
            setattr(model, name, getattr(lm, name))
        model.config.quantization_config = lm.hf_quantizer.quantization_config
        vars(lm.config).pop("quantization_config", None)


def _with_end(eos: int | list[int] | None, end: int) -> int | list[int]:
    """The tokens that end an answer, the tokenizer's own among them; a number when it is alone."""
    if eos is None or eos == end:
        return end
    ends = eos if isinstance(eos, list) else [eos]
    if end not in ends:
        ends = [end, *ends]
    return ends if len(ends) > 1 else ends[0]


@torch.no_grad()
def _check_text(model: Any, lm: Any) -> None:
    """Text alone has to give the language model's own logits; scaled or capped logits don't survive the class."""
    if model.device.type == "meta":
        return
    ids = torch.arange(8, device=model.device)[None] + 3
    own = lm.eval()(input_ids=ids).logits.float()
    try:
        difference = (model(input_ids=ids).logits.float() - own).abs().max().item()
    except (AttributeError, TypeError) as error:  # it asks for what most models return
        raise SpliceError(f"{type(model).__name__} can't carry a {type(lm).__name__}: {error}") from error
    if not difference < 1e-3:
        raise SpliceError(
            f"{type(lm).__name__}: in {type(model).__name__} the same text gives other logits (by "
            f"{difference:.2g}); the class leaves out what this model does to them, such as capping or scaling"
        )
