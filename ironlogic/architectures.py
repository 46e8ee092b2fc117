"""What a model is made of, from its configuration alone: parameters by kind, widths of a layer, of a vision tower.

Parameters are counted exactly, on the model that transformers builds without storage. The seeds' models are known
by name, so that a plan needs no download. Knows bytes per token, not batches, cards or settings: that is `memory`.
"""

from dataclasses import dataclass
from typing import Any

from ironlogic import IronLogicError
from ironlogic.presets import LoraSettings

__all__ = ["ARCHITECTURES", "EyeWidths", "LayerWidths", "ModelCount", "PlanError", "count_model", "text_widths"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def text_widths(*widths: int) -> dict[str, int]:
    """A decoder's widths under the names that transformers gives them."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads", "head_dim"), widths, strict=True))


_QWEN_EYES = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
_QWEN_EYES |= {"deepstack_visual_indexes": [5, 11, 17]}
_GEMMA_EYES = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_GEMMA_EYES |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
_QWEN = {"model_type": "qwen3", "tie_word_embeddings": True}
_QWEN_4B = text_widths(151936, 2560, 9728, 36, 32, 8, 128) | {"tie_word_embeddings": True}
_QWEN_VL = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "vision_config": _QWEN_EYES}
_QWEN_MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
_WINDOW = {"sliding_window": 1024}
_GEMMA = {"model_type": "gemma3", "vision_config": _GEMMA_EYES}
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
_SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP |= {"image_size": 512, "patch_size": 16}
_SMALL = {**_QWEN, **text_widths(151936, 1024, 3072, 28, 16, 8, 128)}
# transformers' own arguments, and the number of parameters that they must give
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"total": 596_049_920, **_SMALL},
    "Qwen3-4B": {"total": 4_022_468_096, **_QWEN, **_QWEN_4B},
    "Qwen3-30B-A3B": {"total": 30_532_122_624, **_QWEN_MOE, **text_widths(151936, 2048, 6144, 48, 32, 4, 128)},
    "Gemma-3-12B": {
        "total": 12_187_325_040,
        **_GEMMA,
        "text_config": text_widths(262208, 3840, 15360, 48, 16, 8, 256) | _WINDOW,
    },
    "Gemma-3-27B": {
        "total": 27_432_406_640,
        **_GEMMA,
        "text_config": text_widths(262208, 5376, 21504, 62, 32, 16, 128) | _WINDOW,
    },
    "Qwen3-VL-4B": {"total": 4_437_815_808, **_QWEN_VL, "text_config": _QWEN_4B},
    "vqwen3-4b": {  # the splices of seeds 003 and 004
        "total": 4_335_155_712,
        "model_type": "llava",
        "vision_config": _CLIP,
        "text_config": _QWEN | _QWEN_4B,
        "tie_word_embeddings": True,
    },
    "qwen3-smvl": {
        "total": 695_065_856,
        "model_type": "smolvlm",
        "vision_config": _SIGLIP,
        "text_config": _SMALL,
        "scale_factor": 4,
        "tie_word_embeddings": True,
    },
}


class PlanError(IronLogicError, ValueError):
    """Something that can't be planned; the message says what came and what is expected."""


@dataclass(frozen=True)
class LayerWidths:
    """The widths of a decoder layer, in values per token, and what they cost in a training step.

    Assumes: attention never stores its T x T matrix (SDPA, flash) nor copies keys and values per query head;
    norms compute in float32; in 16 bit (autocast) PEFT copies its input for each adapted projection; dropout 0;
    ranks, heads and router are too narrow to count. LoRA on experts is not measured, the rest is.
    """

    hidden: int
    query: int
    key: int
    inner: int  # width of the MLP; 0 where there are only experts
    norms: int  # widths of all norms, added up
    routed: int  # experts per token x hidden
    routed_inner: int  # experts per token x width of one

    def saved(self, width: int, lora: LoraSettings) -> int:
        """Bytes per token that this layer keeps for its backward pass; `width` in bytes per value."""
        copies = width == 2  # nothing is cast in float32, so neighbours share one input
        adapted = lora.attention * (3 * self.hidden + self.query if copies else self.hidden)
        adapted += lora.mlp * bool(self.inner) * ((1 + copies) * self.hidden + self.inner)
        adapted += lora.experts * (self.routed + self.routed_inner)
        attention = 2 * self.query + 2 * self.key
        feed_forward = 3 * self.inner + 3 * self.routed_inner + self.routed
        return 4 * self.norms + width * (adapted + attention + feed_forward)

    def in_flight(self, width: int) -> int:
        """Bytes per token on top at the worst moment of the layer's gradient; its multiples are measured."""
        return 13 * self.hidden + (4 + width) * self.inner + 3 * width * self.routed


@dataclass(frozen=True)
class EyeWidths:
    """The vision tower, frozen: nothing is kept for a backward pass, so its widest moment is what counts."""

    patches: int  # of one picture
    tokens: int  # that stand for it in a row
    widest: int  # values per patch at that moment


@dataclass(frozen=True)
class ModelCount:
    """Numbers of parameters by kind. Embeddings, head, norms, router and vision: `total` less the others."""

    total: int
    linear: int  # matrices that 4 bit applies to
    experts: int  # fused experts of a mixture
    largest: int  # largest of the matrices in 4 bit
    layer_experts: int  # experts of one layer
    adapted: dict[str, int]  # of LoRA per rank: attention, mlp, experts
    layers: int
    vocabulary: int
    layer: LayerWidths
    sliding: int  # layers that attend to the last `window` tokens only
    window: int
    eyes: EyeWidths | None
    projector: int = 0  # what joins the eyes to the decoder
    dynamic: bool = False


def count_model(name: str, config: Any) -> ModelCount:
    """Parameters by kind, on a model without storage; `linear` lacks what a 4-bit repository says it skips."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    builder = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = builder.from_config(config)
        layers = model.get_decoder().layers
        widths = [_widths(layer, text) for layer in layers]
    except Exception as error:
        raise PlanError(f"{name}: transformers makes no decoder with layers of it: {error!r:.300}") from error
    linears = {path: m for path, m in layers.named_modules() if isinstance(m, torch.nn.Linear)}
    fused = {path: p for path, p in layers.named_parameters() if p.ndim == 3 and "experts" in path}
    skipped = (config.to_dict().get("quantization_config") or {}).get("llm_int8_skip_modules") or ()
    kept = tuple(f"{n.split('layers.', 1)[1]}." for n in skipped if "layers." in n and "vis" not in n)
    quantised = [m.weight.numel() for path, m in linears.items() if not f"{path}.".startswith(kept)]
    experts = sum(p.numel() for p in fused.values())
    adapted = {
        where: sum(m.in_features + m.out_features for path, m in linears.items() if path.endswith(names))
        for where, names in (("attention", ATTENTION), ("mlp", MLP))
    }
    layer = max(widths, key=lambda layer: layer.saved(2, LoraSettings()))
    if not layer.query:
        raise PlanError(f"{name}: no layer has {', '.join(ATTENTION)}, which LoRA adapts")
    return ModelCount(
        total=sum(p.numel() for p in model.parameters()),
        linear=sum(quantised),
        experts=experts,
        largest=max(quantised, default=0),
        layer_experts=experts // max(len({path.split(".")[0] for path in fused}), 1),
        adapted=adapted | {"experts": sum(len(p) * sum(p.shape[1:]) for p in fused.values())},
        layers=len(layers),
        vocabulary=text.vocab_size,
        layer=layer,
        sliding=text.to_dict().get("layer_types", []).count("sliding_attention"),
        window=text.to_dict().get("sliding_window") or 0,
        eyes=_see(config) if sees else None,
        projector=sum(
            p.numel() for n, p in model.named_parameters() if "multi_modal_projector" in n or "connector" in n
        ),
    )


def _see(config: Any) -> EyeWidths | None:
    """The vision tower's widths and how many tokens stand for a picture; None for kinds that were not measured."""
    if config.model_type not in ("gemma3", "llava", "smolvlm", "qwen3_vl"):
        return None
    eyes, side = config.vision_config, config.vision_config.to_dict().get("image_size") or 512
    patches = (side // eyes.patch_size) ** 2
    match config.model_type:
        case "gemma3":
            tokens = config.mm_tokens_per_image
        case "llava":
            tokens = config.image_seq_length
        case "smolvlm":
            tokens = patches // config.scale_factor**2
        case _:
            tokens = patches // eyes.spatial_merge_size**2
    # measured: CLIP's quick GELU holds a third copy, and Qwen3-VL turns queries and keys in float32
    inner = (3 if eyes.hidden_act == "quick_gelu" else 2) * eyes.intermediate_size
    turning = 21 * eyes.hidden_size if config.model_type == "qwen3_vl" else 0
    return EyeWidths(patches, tokens, max(4 * eyes.hidden_size + inner, turning))


def _widths(layer: Any, text: Any) -> LayerWidths:
    """The widths of one decoder layer, read off the shapes of its parameters."""
    shapes = {path.removesuffix(".weight"): p.shape for path, p in layer.named_parameters()}

    def width(name: str, side: int = 0) -> int:
        return sum(s[side] for path, s in shapes.items() if path.endswith(name) and len(s) < 3)

    # norms of queries and keys hold one head's width but work on all of them
    heads = width("q_norm") and width(".q_proj") - width("q_norm") + width(".k_proj") - width("k_norm")
    expert = [s for path, s in shapes.items() if path.endswith("experts.down_proj") and len(s) == 3]
    routed = text.num_experts_per_tok * text.hidden_size if expert else 0
    return LayerWidths(
        hidden=text.hidden_size,
        query=width(".q_proj"),
        key=width(".k_proj"),
        inner=width(".down_proj", side=1),
        norms=width("norm") + heads,
        routed=routed,
        routed_inner=routed * expert[0][1:].numel() // text.hidden_size**2 if expert else 0,
    )
