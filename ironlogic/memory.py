"""Does it fit? One step of LoRA training in GiB, by arithmetic, before anything is downloaded.

Parameters are counted exactly, on the model that transformers builds from a configuration without storage.
Activations are a closed form (`LayerWidths`) that agrees within a tenth with what a CPU measures. Two terms come
from what Unsloth 2026.10 took on a card, rows of 4,096 tokens (GiB by torch, without the CUDA context):

    system          weights   allocated   reserved   the rest
    Gemma-3-27B     15.8      22.28       24.52      6 bytes a logit, of all tokens: bfloat16 and float32 (fitted)
    Qwen3-VL-4B      3.3       7.00        8.20      6 bytes a logit (fitted)
    Qwen3-30B-A3B   15.6      28.65       29.40      the activations of all 48 layers: 12.0 (traced)

A mixture is not checkpointed there: at the peak every layer's compiled block (unsloth/models/_block_compile.py)
still holds what its backward pass wants, the experts' products (unsloth_zoo, temporary_patches/moe_utils.py,
`_grouped_mm_eager`) above all; its loss holds next to nothing, and one stack of experts in 16 bit is 0.75 GiB. For
the other two the logits are inferred from the size; tests/gpu/README.md says what would cut them, and how to look.
Terms that don't peak at the same moment are added up all the same: torch keeps the blocks of the layers while the
loss asks for larger ones, which is the gap between allocated and reserved.

What the plan does not know: what else draws on the card (a desktop takes 0.5-2 GiB), vLLM, training without LoRA.
`tests/test_memory.py` holds it against the systems measured on a card (never below), against the peaks that 12
public notebooks print (15 %), and each term against what a CPU holds.
`plan_memory` imports transformers: where Unsloth is used, import `models` before calling it.
"""

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ironlogic import IronLogicError
from ironlogic.presets import (
    PRESETS,
    VISION_PRESETS,
    LoraSettings,
    Preset,
    TrainSettings,
    VisionPreset,
    pick_preset,
)
from ironlogic.smollm2 import FULL_NAME
from ironlogic.smollm2 import NAME as SMOLLM2

import psutil  # comes with accelerate

__all__ = [
    "ARCHITECTURES",
    "GIB",
    "NF4_BYTES",
    "MemoryPlan",
    "ModelCount",
    "PlanError",
    "count_model",
    "plan_memory",
]

GIB = 2**30
DATA = Path(__file__).resolve().parent.parent / "data"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# nf4 with double quantisation: 4 bits, an 8-bit scale per 64 values, a 32-bit scale per 256 of those scales
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# Unsloth's dynamic 4 bit leaves some layers in 16 bit; its repositories say which, their names only that it is so.
# Gemma-3-27B then holds 19.07 GiB with its adapter (printed by a public notebook), where plain nf4 takes 15.92.
DYNAMIC, DYNAMIC_BYTES = "unsloth-bnb-4bit", 0.13  # bytes per parameter on top of nf4
# bytes per trained parameter; paged states count as if they stayed on the card
OPTIMIZER_BYTES = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8)
OPTIMIZER_BYTES |= dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2) | {"sgd": 0}

CHUNK = 256  # tokens whose logits TRL's chunked loss holds at a time
# Bytes per logit. "vision": Unsloth's loss for vision-language models on a card, the logits of all tokens at once.
LOGIT_BYTES = {"chunked": 16, "all": 12, "vision": 6}
# On a card the CUDA context, 0.6, and small tensors; on a CPU Python and torch themselves
CONTEXT_GIB = {"card": 0.7, "cpu": 1.0}
FRAGMENTATION = 0.04  # of everything but the weights
CHECKPOINTS = {
    "offload": "checkpoints in RAM (Unsloth)",
    "card": "checkpoints on the card",
    "none": "no checkpoints",
}
LOSSES = {
    "all": "all logits at once",
    "chunked": "chunked loss",
    "vision": "Unsloth's loss (all logits at once)",
}
USABLE = 0.98  # a "24 GB" card offers its programs 23.5 GiB


# counted already, by kind and content of the configuration: building a large model takes up to a second
_COUNTS: dict[tuple[type, str], "ModelCount"] = {}
# transformers' arguments of the seeds' models by name, so that a plan needs no download
ARCHITECTURES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "configs").glob("*.json"))
}


class PlanError(IronLogicError, ValueError):
    """Something that can't be planned; the message says what came and what is expected."""


# --- what a model is made of --------------------------------------------------------------------------------------
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
        adapted = 0
        if lora.attention:
            adapted += 3 * self.hidden + self.query if copies else self.hidden
        if lora.mlp and self.inner:
            adapted += (1 + copies) * self.hidden + self.inner
        if lora.experts:
            adapted += self.routed + self.routed_inner
        attention = 2 * self.query + 2 * self.key
        feed_forward = 3 * self.inner + 3 * self.routed_inner + self.routed
        return 4 * self.norms + width * (adapted + attention + feed_forward)

    def compiled(self) -> int:
        """Bytes per token that Unsloth's compiled layer of a mixture keeps for its backward pass, as traced: the
        experts' products, the attention's inputs and output, each LoRA's input, three normed inputs; in 16 bit."""
        return 2 * (2 * self.routed_inner + 3 * self.query + 3 * self.key + 3 * self.hidden)

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
    largest_stack: int  # largest fused stack of experts
    adapted: dict[str, int]  # of LoRA per rank: attention, mlp, experts
    layers: int
    vocabulary: int
    layer: LayerWidths
    sliding: int  # layers that attend to the last `window` tokens only
    window: int
    eyes: EyeWidths | None
    projector: int = 0  # what joins the eyes to the decoder
    dynamic: bool = False  # Unsloth's dynamic 4 bit


def count_model(name: str, config: Any) -> ModelCount:
    """Parameters by kind, on a model without storage; `linear` lacks what a 4-bit repository says it skips."""
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _COUNTS:
        _COUNTS[key] = _count_model(name, config)
    return _COUNTS[key]


def _count_model(name: str, config: Any) -> ModelCount:
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    builder = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = builder.from_config(config)
        layers = model.get_decoder().layers
        widths = [_layer_widths(layer, text) for layer in layers]
    except Exception as error:
        raise PlanError(f"{name}: transformers makes no decoder with layers of it: {error!r:.300}") from error
    layer = max(widths, key=lambda layer: layer.saved(2, LoraSettings()))
    if not layer.query:
        raise PlanError(f"{name}: no layer has {', '.join(ATTENTION)}, which LoRA adapts")
    linears = {path: m for path, m in layers.named_modules() if isinstance(m, torch.nn.Linear)}
    stacks = [p for path, p in layers.named_parameters() if p.ndim == 3 and "experts" in path]
    skipped = (config.to_dict().get("quantization_config") or {}).get("llm_int8_skip_modules") or ()
    kept = tuple(f"{n.split('layers.', 1)[1]}." for n in skipped if "layers." in n and "vis" not in n)
    quantised = [m.weight.numel() for path, m in linears.items() if not f"{path}.".startswith(kept)]
    adapted = {
        where: sum(m.in_features + m.out_features for path, m in linears.items() if path.endswith(names))
        for where, names in (("attention", ATTENTION), ("mlp", MLP))
    }
    adapted["experts"] = sum(len(p) * sum(p.shape[1:]) for p in stacks)
    joins = ("multi_modal_projector", "connector")
    return ModelCount(
        total=sum(p.numel() for p in model.parameters()),
        linear=sum(quantised),
        experts=sum(p.numel() for p in stacks),
        largest=max(quantised, default=0),
        largest_stack=max((p.numel() for p in stacks), default=0),
        adapted=adapted,
        layers=len(layers),
        vocabulary=text.vocab_size,
        layer=layer,
        sliding=text.to_dict().get("layer_types", []).count("sliding_attention"),
        window=text.to_dict().get("sliding_window") or 0,
        eyes=_eye_widths(config) if sees else None,
        projector=sum(p.numel() for path, p in model.named_parameters() if any(join in path for join in joins)),
    )


def _layer_widths(layer: Any, text: Any) -> LayerWidths:
    """The widths of one decoder layer, read off the shapes of its parameters."""
    shapes = {path.removesuffix(".weight"): p.shape for path, p in layer.named_parameters()}

    def width(name: str, side: int = 0) -> int:
        return sum(s[side] for path, s in shapes.items() if path.endswith(name) and len(s) < 3)

    norms = width("norm")
    if width("q_norm"):  # norms of queries and keys hold one head's width but work on all of them
        norms += width(".q_proj") - width("q_norm") + width(".k_proj") - width("k_norm")
    down = [s for path, s in shapes.items() if path.endswith("experts.down_proj") and len(s) == 3]
    return LayerWidths(
        hidden=text.hidden_size,
        query=width(".q_proj"),
        key=width(".k_proj"),
        inner=width(".down_proj", side=1),
        norms=norms,
        routed=text.num_experts_per_tok * text.hidden_size if down else 0,
        routed_inner=text.num_experts_per_tok * (down[0][1:].numel() // text.hidden_size) if down else 0,
    )


def _eye_widths(config: Any) -> EyeWidths | None:
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


# --- the plan -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MemoryPlan:
    """The peak of one training step. All sizes in GiB."""

    fits: bool
    peak_gib: float  # the sum of `parts`
    parts: dict[str, float]  # term -> GiB
    card_gib: float  # what it is judged against: the card, or the RAM in a CPU run
    advice: str  # how much is to spare, or what to change
    setup: str = ""  # the model and the settings that were planned

    def table(self) -> str:
        """The plan as text: settings, one line per part, total with verdict, advice."""
        sizes = self.parts | {"peak": self.peak_gib}
        rows = [f"  {name:<22} {size:7.2f} GiB" for name, size in sizes.items()]
        return "\n".join([self.setup, *rows, "does not fit: " * (not self.fits) + self.advice])


@dataclass(frozen=True)
class _Stage:
    """What stands for a model, taken apart: one stage of its training."""

    settings: TrainSettings = field(default_factory=TrainSettings)
    four_bit: bool = True
    lora: bool = True
    projector: bool = False  # of a splice
    views: int = 1  # of a picture: its tiles and the whole


@dataclass(frozen=True)
class _Setup:
    """What can be chosen about a training step."""

    length: int  # tokens per row
    batch_size: int  # rows per forward pass
    four_bit: bool
    lora: LoraSettings | None  # None: the projector alone
    projector: bool  # whether a splice's projector is trained
    optimizer: str
    checkpointing: str  # offload, card, none
    loss: str  # a key of LOGIT_BYTES
    experts_too: bool  # whether 4 bit reaches fused experts
    samples: int  # answers that GRPO writes at a time; 0: no GRPO
    pictures: int  # in a row, all their views
    width: int  # bytes of a value that is not in 4 bit: 2 on a card, 4 on a CPU


def plan_memory(
    preset_or_config: Any,
    *,
    card_gib: float | None = 24,
    length: int | None = None,
    batch_size: int | None = None,
    four_bit: bool | None = None,
    lora: LoraSettings | None = None,
    optimizer: str | None = None,
    checkpointing: bool | Literal["offload", "card"] = True,
    fused_loss: bool | Literal["chunked"] = True,
    fused_experts_quantized: bool = True,
    samples: int = 0,
    pictures: int = 0,
    ram_gib: float | None = None,
) -> MemoryPlan:
    """The peak memory of one step of LoRA training, and whether `card_gib` GiB hold it.

    `preset_or_config`: a preset or its name, a transformers configuration, a folder with a config.json, or a hub
    name that begins like one of `ARCHITECTURES`. What is None comes from the preset, else from `TrainSettings`.
    A splice (`VISION_PRESETS`) is planned for its larger stage, a picture in every row, checkpoints on the card.
    `length` in tokens, `batch_size` in rows per forward pass.
    `checkpointing`: "offload" (or True) keeps the layers' inputs in RAM, as Unsloth does; "card" on the card, as
    transformers does; False keeps all activations, as Unsloth does for a mixture whose experts are in 4 bit.
    `fused_loss`: True is the loss as it runs: on a card Unsloth's, which holds the logits of all tokens for
    vision-language models; of 256 tokens elsewhere. "chunked": of 256 tokens everywhere. False: of all tokens, by
    transformers.
    `fused_experts_quantized`: False for plain transformers, whose 4 bit leaves fused experts as they are.
    `samples`: answers that GRPO writes at a time with plain transformers, prompt and answer in `length`; their keys
    and values are kept. Its reference model is the base without the adapter and costs nothing.
    `pictures`: in every row; their tokens are part of `length`. A tower that takes any size (Qwen3-VL) is planned
    for 512 x 512 pixels.
    `card_gib` 0 or None plans a CPU run as `models` sets it up (float32 but for the 4-bit weights, no
    checkpointing, no 8-bit optimizer), against `ram_gib` or else all of this machine's RAM.
    Raises `PlanError` for a model or a setting that can't be planned.
    """
    name, config, stages = _resolve(preset_or_config)
    model = replace(count_model(name, config), dynamic=name.endswith(DYNAMIC))
    cpu = not card_gib
    room = card_gib or ram_gib or psutil.virtual_memory().total / GIB
    plans = []
    for stage in stages:
        settings = stage.settings
        kept = {True: "card" if stage.projector else "offload", False: "none"}.get(checkpointing, checkpointing)
        asked = optimizer or settings.optimizer
        setup = _Setup(
            length=settings.max_length if length is None else length,
            batch_size=settings.batch_size if batch_size is None else batch_size,
            four_bit=stage.four_bit if four_bit is None else four_bit,
            lora=(lora or settings.lora) if stage.lora else None,
            projector=stage.projector,
            optimizer="adamw_torch" if cpu and "8bit" in asked else asked,
            checkpointing="none" if cpu and kept == "offload" else kept,
            loss=_loss_kind(fused_loss, model, whole=cpu or stage.projector),
            experts_too=(fused_experts_quantized and not cpu) or not model.experts,  # packed on a card only
            samples=samples,
            pictures=(pictures or int(stage.projector)) * stage.views,
            width=4 if cpu else 2,
        )
        _check(name, model, setup, room)
        plans.append(_plan(name, model, setup, room))
    largest = max(plans, key=lambda plan: plan.peak_gib)
    if largest.fits or len(plans) == 1:
        return largest
    return replace(largest, advice="; ".join(f"stage {n}: {plan.advice}" for n, plan in enumerate(plans, 1)))


def _resolve(what: Any) -> tuple[str, Any, list[_Stage]]:
    """(name, configuration, stages) of whatever stands for a model."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if isinstance(what, str):
        what = (PRESETS | VISION_PRESETS).get(what, what)
    stages = [_Stage()]
    if isinstance(what, Preset):
        stages, what = [_Stage(what.train, what.four_bit)], what.model
    elif isinstance(what, VisionPreset):
        shared = {"four_bit": what.four_bit, "projector": True, "views": 1 + what.tiles}
        stages = [_Stage(what.projector_stage, lora=False, **shared)]
        if what.instruct_stage:
            stages.append(_Stage(what.instruct_stage, **shared))
        what = what.name
    if isinstance(what, PreTrainedConfig):
        return what.model_type, what, stages
    model = FULL_NAME if what == SMOLLM2 else str(what)
    for folder in (Path(model).expanduser(), DATA / model):
        if (folder / "config.json").is_file():
            try:
                config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:
                raise PlanError(f"{folder / 'config.json'}: transformers can't read it: {error!r:.300}") from error
            return folder.name, config, stages
    for name, known in ARCHITECTURES.items():
        if Path(model).name.lower().startswith(name.lower()):
            arguments = copy.deepcopy(known)
            config = CONFIG_MAPPING[arguments.pop("model_type")](**arguments)
            return f"{name}-{DYNAMIC}" if model.lower().endswith(DYNAMIC) else name, config, stages
    names = f"a preset ({', '.join(PRESETS)}) or a model known here ({', '.join(ARCHITECTURES)})"
    raise PlanError(f"{model}: not a folder with a config.json, nor a transformers configuration, nor {names}")


def _loss_kind(fused: bool | str, model: ModelCount, *, whole: bool) -> str:
    """The key of LOGIT_BYTES. `whole`: a CPU run or a splice, whose loss is chunked whatever the model."""
    if not fused:
        return "all"
    return "vision" if model.eyes and not whole and fused != "chunked" else "chunked"


def _check(name: str, model: ModelCount, setup: _Setup, room: float) -> None:
    rank = setup.lora.rank if setup.lora else 1
    if not (min(setup.length, setup.batch_size, rank) >= 1 and room > 0):
        sizes = f"length {setup.length}, batch_size {setup.batch_size}, lora.rank {rank}, {room} GiB"
        raise PlanError(f"{sizes}: expected 1 or more of each, and more than 0 GiB (card_gib=None: no card)")
    if min(setup.samples, setup.pictures) < 0:
        raise PlanError(f"samples {setup.samples}, pictures {setup.pictures}: expected 0 or more of each")
    if setup.pictures and not model.eyes:
        raise PlanError(f"{name}: pictures is {setup.pictures}, but none can be planned for this model")
    if setup.pictures and setup.pictures * model.eyes.tokens >= setup.length:
        tokens = f"{setup.pictures} x {model.eyes.tokens} = {setup.pictures * model.eyes.tokens} tokens"
        raise PlanError(f"{name}: the pictures take {tokens}; expected a length beyond that, not {setup.length}")
    if setup.optimizer not in OPTIMIZER_BYTES:
        raise PlanError(f"unknown optimizer {setup.optimizer!r}; expected one of {', '.join(OPTIMIZER_BYTES)}")
    if setup.lora and setup.lora.vision:
        raise PlanError(f"{name}: lora.vision; what a trained tower keeps was never measured, so it isn't planned")
    if setup.checkpointing not in CHECKPOINTS:
        raise PlanError(f"checkpointing is {setup.checkpointing!r}; expected True, False, 'offload' or 'card'")


def _plan(name: str, model: ModelCount, setup: _Setup, room: float) -> MemoryPlan:
    parts = _parts(model, setup)
    peak = sum(parts.values())
    settings = _describe(setup)
    if not (model.experts and setup.four_bit):
        del settings["experts_too"]
    title = f"{name}, {model.total / 1e6:,.1f} M parameters: {', '.join(settings.values())}"
    return MemoryPlan(peak <= USABLE * room, peak, parts, room, _advise(model, setup, room), title)


def _parts(model: ModelCount, setup: _Setup) -> dict[str, float]:
    """The terms of the peak, in GiB."""
    width, lora = setup.width, setup.lora or LoraSettings(attention=False, mlp=False)
    quantised = buffer = 0
    if setup.four_bit:
        quantised = model.linear + model.experts * setup.experts_too
        buffer = max(model.largest, model.largest_stack * setup.experts_too)
    weights = {
        "quantised weights": quantised * (NF4_BYTES + DYNAMIC_BYTES * model.dynamic),
        "other weights": (model.total - quantised) * width,
    }
    trained = model.projector * setup.projector
    trained += lora.rank * sum(rows for where, rows in model.adapted.items() if getattr(lora, where))
    tokens = setup.batch_size * setup.length
    layer, layer_input = model.layer.saved(width, lora), model.layer.hidden * width
    kept = {"offload": layer_input, "card": model.layers * layer_input, "none": (model.layers - 1) * layer}
    held = kept[setup.checkpointing] + layer
    if model.experts and setup.four_bit and setup.experts_too and width == 2:  # through Unsloth
        held = model.layers * model.layer.compiled()
    chunk = min(CHUNK, tokens) * LOGIT_BYTES["chunked"]
    logits = {
        "chunked": chunk,
        "vision": tokens * LOGIT_BYTES["vision"],
        "all": max(tokens * LOGIT_BYTES["all"], chunk),  # so that a chunked loss is never advised for nothing
    }
    work = {
        "LoRA and optimizer": trained * (4 + 4 + OPTIMIZER_BYTES[setup.optimizer]),
        "activations": tokens * (held + model.layer.in_flight(width)),
        "dequantisation buffer": buffer * width,
        "logits": logits[setup.loss] * model.vocabulary,
    }
    if setup.samples:
        remembered = (model.layers - model.sliding) * setup.length
        remembered += model.sliding * min(setup.length, model.window)
        work["key-value cache"] = setup.samples * remembered * 2 * model.layer.key * width
    if setup.pictures:
        patches = setup.batch_size * setup.pictures * model.eyes.patches
        work["vision tower at work"] = patches * model.eyes.widest * width
    margin = CONTEXT_GIB["card" if width == 2 else "cpu"] * GIB + FRAGMENTATION * sum(work.values())
    return {name: size / GIB for name, size in (weights | work | {"margin": margin}).items()}


def _describe(setup: _Setup) -> dict[str, str]:
    """Settings in words."""
    words = {
        "four_bit": "4 bit" if setup.four_bit else f"{8 * setup.width} bit",
        "experts_too": "experts quantised by Unsloth" if setup.experts_too else "experts not quantised",
        "lora": "the projector alone",
        "batch_size": f"batch size {setup.batch_size}",
        "length": f"length {setup.length}",
        "optimizer": setup.optimizer,
        "checkpointing": CHECKPOINTS[setup.checkpointing],
        "loss": LOSSES[setup.loss],
    }
    if setup.lora:
        where = ", ".join(name for name in ("attention", "mlp", "experts") if getattr(setup.lora, name))
        words["lora"] = f"LoRA rank {setup.lora.rank} ({where})"
    if setup.samples:
        words["samples"] = f"{setup.samples} samples at a time"
    return words


# --- advice -------------------------------------------------------------------------------------------------------
def _advise(model: ModelCount, setup: _Setup, room: float) -> str:
    """How much is to spare, or which term to cut and the nearest setting that fits, or that nothing does."""
    parts, where = _parts(model, setup), f"{room:.4g} GiB"
    note = ""
    if setup.four_bit and not setup.experts_too:
        stay, weights = model.experts * setup.width / GIB, parts["quantised weights"] + parts["other weights"]
        size = f"{model.experts:,} parameters x {setup.width} bytes = {stay:.1f} of {weights:.1f} GiB of weights"
        note = f"; without Unsloth the fused experts are not quantised: {size}"
    spare = USABLE * room - sum(parts.values())
    if spare >= 0:
        tight = ", so close what else draws on it" if spare < 0.05 * room else ""
        return f"fits on {where} with {spare:.1f} GiB to spare{tight}{note}"
    suggestions = _suggestions(model, setup)
    smallest = replace(setup, **{name: values[-1] for name, values in suggestions.items()})
    least, nearest = _parts(model, smallest), _nearest(model, setup, suggestions, room)
    old, new = _describe(setup), _describe(nearest or smallest)
    settings = ", ".join(new[name] for name in new if new[name] != old[name]) or "these settings"
    if nearest is None:
        general = setup.width == 2 and not setup.projector
        other = f"; the preset for that is {pick_preset(room).name}" if general else ""
        return f"nothing fits on {where}: even {settings} would take {sum(least.values()):.1f} GiB{other}{note}"
    largest = max((name for name in parts if name != "margin" and least[name] < parts[name]), key=parts.get)
    return f"largest term to cut: {largest} ({parts[largest]:.1f} GiB); fits on {where} with {settings}{note}"


def _suggestions(model: ModelCount, setup: _Setup) -> dict[str, list[Any]]:
    """Other values of a setting, the nearest first; what changes nothing that is learnt comes first."""
    on_card, splice = setup.width == 2, setup.projector
    shortest = max(256, 2 * setup.pictures * model.eyes.tokens) if setup.pictures else 256
    lengths = [*range(setup.length, shortest, -max(setup.length // 16, 256)), shortest]
    values: dict[str, list[Any]] = {
        "loss": [_loss_kind(True, model, whole=not on_card or splice)] if setup.loss == "all" else [],
        "checkpointing": ["offload"] if on_card and not splice else [],
        "experts_too": [True] if on_card else [],
        "batch_size": [setup.batch_size >> n for n in range(1, setup.batch_size.bit_length())],
        "optimizer": ["paged_adamw_8bit"] if on_card and OPTIMIZER_BYTES[setup.optimizer] > 2 else [],
        "samples": [setup.samples >> n for n in range(1, setup.samples.bit_length())],
        "four_bit": [True],
        "length": [length for length in lengths if length < setup.length],
        "lora": [],
    }
    if setup.lora:
        narrow = replace(setup.lora, experts=setup.lora.experts and not model.experts)
        values["lora"] = [narrow, replace(narrow, rank=min(narrow.rank, 8))]
    others = {name: [v for v in some if v != getattr(setup, name)] for name, some in values.items()}
    return {name: some for name, some in others.items() if some}


def _nearest(model: ModelCount, setup: _Setup, suggestions: dict[str, list[Any]], room: float) -> _Setup | None:
    """Suggestion after suggestion until it fits; then each is taken back as far as possible, the dearest first."""

    def peak(changes: dict[str, Any]) -> float:
        return sum(_parts(model, replace(setup, **changes)).values())

    changes: dict[str, Any] = {}
    for name, values in suggestions.items():
        more = changes | {name: values[-1]}
        if peak(more) < peak(changes):  # 4 bit takes a buffer: on a tiny model it costs more than it saves
            changes = more
        if peak(changes) <= USABLE * room:
            break
    else:
        return None
    for name in reversed(list(changes)):
        values = [getattr(setup, name), *suggestions[name]]
        changes[name] = next(value for value in values if peak(changes | {name: value}) <= USABLE * room)
    return replace(setup, **changes)
