"""Does it fit? One step of LoRA training in GiB, by arithmetic, before anything is downloaded.

Parameters are counted exactly, on the model that transformers builds from a configuration without storage.
Activations are a closed form (`_Layer`) that agrees within a tenth with what a CPU measures.

What it does not know: a vision tower's activations (images come on top), what else draws on the card (a desktop
takes 0.5-2 GiB), RLVR's samples and key-value cache, training without LoRA, weights that a repository keeps in 16
bit without saying so (Unsloth's dynamic 4-bit Gemma-3-27B: 19.1 instead of 15.7 GiB), Unsloth's thriftier kernels.
`plan_memory` imports transformers: where Unsloth is used, import `models` before calling it.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil  # comes with accelerate

from ironlogic.presets import PRESETS, LoraSettings, Preset, TrainSettings

__all__ = ["ARCHITECTURES", "NF4_BYTES", "MemoryPlan", "PlanError", "plan_memory"]

GIB = 2**30
# nf4 with double quantisation: 4 bits, an 8-bit scale per 64 values, a 32-bit scale per 256 of those scales
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
CONTEXT_GIB = 1.0  # CUDA context and libraries; on a CPU Python and torch themselves
FRAGMENTATION = 0.05
USABLE = 0.98  # a "24 GB" card offers its programs 23.5 GiB
CHUNK = 256  # tokens whose logits TRL's fused loss holds at a time
LOSS_BYTES = {True: 16, False: 12}  # per logit; the fused loss also takes the entropy
# bytes per trained parameter; paged states count as if they stayed on the card
OPTIMIZER_BYTES = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8)
OPTIMIZER_BYTES |= dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2) | {"sgd": 0}
DATA = Path(__file__).resolve().parent.parent / "data"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _text(*widths: int) -> dict[str, int]:
    """A decoder's widths under the names that transformers gives them."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads", "head_dim"), widths, strict=True))


_QWEN_EYES = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
_QWEN_EYES |= {"deepstack_visual_indexes": [5, 11, 17]}
_GEMMA_EYES = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_GEMMA_EYES |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
_QWEN = {"model_type": "qwen3", "tie_word_embeddings": True}
_QWEN_4B = _text(151936, 2560, 9728, 36, 32, 8, 128) | {"tie_word_embeddings": True}
_QWEN_VL = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "vision_config": _QWEN_EYES}
_QWEN_MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
_GEMMA = {"model_type": "gemma3", "vision_config": _GEMMA_EYES}
# The seeds' models as published: transformers' own arguments, and the number of parameters that they must give.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"total": 596_049_920, **_QWEN, **_text(151936, 1024, 3072, 28, 16, 8, 128)},
    "Qwen3-4B": {"total": 4_022_468_096, **_QWEN, **_QWEN_4B},
    "Qwen3-30B-A3B": {"total": 30_532_122_624, **_QWEN_MOE, **_text(151936, 2048, 6144, 48, 32, 4, 128)},
    "Gemma-3-12B": {"total": 12_187_325_040, **_GEMMA, "text_config": _text(262208, 3840, 15360, 48, 16, 8, 256)},
    "Gemma-3-27B": {"total": 27_432_406_640, **_GEMMA, "text_config": _text(262208, 5376, 21504, 62, 32, 16, 128)},
    "Qwen3-VL-4B": {"total": 4_437_815_808, **_QWEN_VL, "text_config": _QWEN_4B},
}


class PlanError(ValueError):
    """Something that can't be planned; the message says what came and what is expected."""


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
class _Setup:
    """What can be chosen about a training step."""

    length: int  # tokens per row
    batch_size: int  # rows per forward pass
    four_bit: bool
    lora: LoraSettings
    optimizer: str
    checkpointing: str  # offload, card, none
    fused_loss: bool
    experts_too: bool  # whether 4 bit reaches fused experts
    width: int  # bytes of a value that is not in 4 bit: 2 on a card, 4 on a CPU


@dataclass(frozen=True)
class _Layer:
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
class _Model:
    """Numbers of parameters by kind. Embeddings, head, norms, router and vision: `total` less the others."""

    total: int
    linear: int  # matrices that 4 bit applies to
    experts: int  # fused experts of a mixture
    largest: int  # largest of the matrices in 4 bit
    layer_experts: int  # experts of one layer
    adapted: dict[str, int]  # of LoRA per rank: attention, mlp, experts
    layers: int
    vocabulary: int
    layer: _Layer


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
    fused_loss: bool = True,
    fused_experts_quantized: bool = True,
    ram_gib: float | None = None,
) -> MemoryPlan:
    """The peak memory of one step of LoRA training, and whether `card_gib` GiB hold it.

    `preset_or_config`: a preset or its name, a transformers configuration, a folder with a config.json, or a hub
    name that begins like one of `ARCHITECTURES`. What is None comes from the preset, else from `TrainSettings`.
    `length` in tokens, `batch_size` in rows per forward pass.
    `checkpointing`: "offload" (or True) keeps the layers' inputs in RAM, as Unsloth does; "card" on the card, as
    transformers does; False keeps all activations. `fused_loss`: logits of 256 tokens at a time, else of all.
    `fused_experts_quantized`: False for plain transformers, whose 4 bit leaves fused experts as they are.
    `card_gib` 0 or None plans a CPU run as `models` sets it up (float32 but for the 4-bit weights, no
    checkpointing, no 8-bit optimizer), against `ram_gib` or else all of this machine's RAM.
    Activations and logits are added up, though they don't peak at the same moment: the safe side. Raises
    `PlanError` for a model or a setting that can't be planned.
    """
    name, config, settings, quantised = _find(preset_or_config)
    model = _count(name, config)
    cpu = not card_gib
    keep = {True: "offload", False: "none"}.get(checkpointing, checkpointing)
    optimizer = optimizer or settings.optimizer
    setup = _Setup(
        length=settings.max_length if length is None else length,
        batch_size=settings.batch_size if batch_size is None else batch_size,
        four_bit=quantised if four_bit is None else four_bit,
        lora=lora or settings.lora,
        optimizer="adamw_torch" if cpu and "8bit" in optimizer else optimizer,
        checkpointing="none" if cpu and keep == "offload" else keep,
        fused_loss=fused_loss,
        experts_too=fused_experts_quantized or not model.experts,
        width=4 if cpu else 2,
    )
    room = card_gib or ram_gib or psutil.virtual_memory().total / GIB
    _check(setup, room)
    parts = _parts(model, setup)
    peak = sum(parts.values())
    words = [text for key, text in _say(setup).items() if key != "experts_too" or model.experts * setup.four_bit]
    title = f"{name}, {model.total / 1e6:,.1f} M parameters: {', '.join(words)}"
    return MemoryPlan(peak <= USABLE * room, peak, parts, room, _advise(model, setup, room), title)


def _check(setup: _Setup, room: float) -> None:
    if not (min(setup.length, setup.batch_size, setup.lora.rank) >= 1 and room > 0):
        sizes = f"length {setup.length}, batch_size {setup.batch_size}, lora.rank {setup.lora.rank}, {room} GiB"
        raise PlanError(f"{sizes}: expected 1 or more of each, and more than 0 GiB (card_gib=None: no card)")
    if setup.optimizer not in OPTIMIZER_BYTES:
        raise PlanError(f"unknown optimizer {setup.optimizer!r}; expected one of {', '.join(OPTIMIZER_BYTES)}")
    if setup.checkpointing not in ("offload", "card", "none"):
        raise PlanError(f"checkpointing is {setup.checkpointing!r}; expected True, False, 'offload' or 'card'")


def _find(what: Any) -> tuple[str, Any, TrainSettings, bool]:
    """(name, configuration, settings, 4 bit) of whatever stands for a model."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    what = PRESETS.get(what, what) if isinstance(what, str) else what
    rest = (what.train, what.four_bit) if isinstance(what, Preset) else (TrainSettings(), True)
    if isinstance(what, PreTrainedConfig):
        return what.model_type, what, *rest
    model = what.model if isinstance(what, Preset) else str(what)
    for folder in (Path(model).expanduser(), DATA / model):
        if (folder / "config.json").is_file():
            try:
                return folder.name, AutoConfig.from_pretrained(folder, local_files_only=True), *rest
            except Exception as error:
                raise PlanError(f"{folder / 'config.json'}: transformers can't read it: {error!r:.300}") from error
    for name, known in ARCHITECTURES.items():
        if Path(model).name.lower().startswith(name.lower()):
            arguments = {key: value for key, value in known.items() if key not in ("total", "model_type")}
            return name, CONFIG_MAPPING[known["model_type"]](**copy.deepcopy(arguments)), *rest
    names = f"a preset ({', '.join(PRESETS)}) or a model known here ({', '.join(ARCHITECTURES)})"
    raise PlanError(f"{model}: not a folder with a config.json, nor a transformers configuration, nor {names}")


def _count(name: str, config: Any) -> _Model:
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
    return _Model(
        total=sum(p.numel() for p in model.parameters()),
        linear=sum(quantised),
        experts=experts,
        largest=max(quantised, default=0),
        layer_experts=experts // max(len({path.split(".")[0] for path in fused}), 1),
        adapted=adapted | {"experts": sum(len(p) * sum(p.shape[1:]) for p in fused.values())},
        layers=len(layers),
        vocabulary=text.vocab_size,
        layer=layer,
    )


def _widths(layer: Any, text: Any) -> _Layer:
    """The widths of one decoder layer, read off the shapes of its parameters."""
    shapes = {path.removesuffix(".weight"): p.shape for path, p in layer.named_parameters()}

    def width(name: str, side: int = 0) -> int:
        return sum(s[side] for path, s in shapes.items() if path.endswith(name) and len(s) < 3)

    # norms of queries and keys hold one head's width but work on all of them
    heads = width("q_norm") and width(".q_proj") - width("q_norm") + width(".k_proj") - width("k_norm")
    expert = [s for path, s in shapes.items() if path.endswith("experts.down_proj") and len(s) == 3]
    routed = text.num_experts_per_tok * text.hidden_size if expert else 0
    return _Layer(
        hidden=text.hidden_size,
        query=width(".q_proj"),
        key=width(".k_proj"),
        inner=width(".down_proj", side=1),
        norms=width("norm") + heads,
        routed=routed,
        routed_inner=routed * expert[0][1:].numel() // text.hidden_size**2 if expert else 0,
    )


def _parts(model: _Model, setup: _Setup) -> dict[str, float]:
    """The terms of the peak, in GiB."""
    quantised = setup.four_bit * (model.linear + model.experts * setup.experts_too)
    buffer = setup.four_bit * max(model.largest, model.layer_experts * setup.experts_too)
    tokens, width = setup.batch_size * setup.length, setup.width
    one, inputs = model.layer.saved(width, setup.lora), model.layer.hidden * width
    kept = {"offload": inputs, "card": model.layers * inputs, "none": (model.layers - 1) * one}
    adapter = setup.lora.rank * sum(rows * vars(setup.lora)[where] for where, rows in model.adapted.items())
    at_once = min(CHUNK, tokens) if setup.fused_loss else tokens
    sizes = {
        "quantised weights": quantised * NF4_BYTES,
        "other weights": (model.total - quantised) * width,
        "LoRA and optimizer": adapter * (4 + 4 + OPTIMIZER_BYTES[setup.optimizer]),
        "activations": tokens * (kept[setup.checkpointing] + one + model.layer.in_flight(width)),
        "dequantisation buffer": buffer * width,
        "logits": model.vocabulary * at_once * LOSS_BYTES[setup.fused_loss],
    }
    parts = {name: size / GIB for name, size in sizes.items()}
    return parts | {"margin": CONTEXT_GIB + FRAGMENTATION * sum(parts.values())}


def _options(model: _Model, setup: _Setup) -> dict[str, list[Any]]:
    """Values of each setting (some twice), from the present one to the one that saves most memory."""
    heavy = OPTIMIZER_BYTES[setup.optimizer] > 2 and setup.width == 2
    lora = replace(setup.lora, rank=min(setup.lora.rank, 8), experts=setup.lora.experts and not model.experts)
    return {
        "fused_loss": [setup.fused_loss, True],
        "checkpointing": [setup.checkpointing, "offload" if setup.width == 2 else setup.checkpointing],
        "experts_too": [setup.experts_too, True],
        "batch_size": [setup.batch_size >> n for n in range(setup.batch_size.bit_length())],
        "optimizer": [setup.optimizer, "paged_adamw_8bit" if heavy else setup.optimizer],
        "four_bit": [setup.four_bit, True],
        "length": [setup.length, *range(setup.length, 256, -max(setup.length // 16, 256)), min(setup.length, 256)],
        "lora": [setup.lora, lora],
    }


def _distance(setup: _Setup, other: _Setup) -> tuple[int, ...]:
    """How far `other` is: changes of what is learnt, changes, tokens lost."""
    changed = {field for field, value in vars(other).items() if value != vars(setup)[field]}
    return len(changed & {"four_bit", "length", "lora"}), len(changed), -other.length, -other.batch_size


def _advise(model: _Model, setup: _Setup, room: float) -> str:
    """How much is to spare, or which term to cut and the nearest setting that fits, or that nothing does."""
    parts, where, note = _parts(model, setup), f"{room:.4g} GiB", ""
    if setup.four_bit and not setup.experts_too:
        stay, weights = model.experts * setup.width / GIB, parts["quantised weights"] + parts["other weights"]
        size = f"{model.experts:,} parameters x {setup.width} bytes = {stay:.1f} of {weights:.1f} GiB of weights"
        note = f"; without Unsloth the fused experts are not quantised: {size}"
    spare = USABLE * room - sum(parts.values())
    if spare >= 0:
        tight = ", so close what else draws on it" if spare < 0.05 * room else ""
        return f"fits on {where} with {spare:.1f} GiB to spare{tight}{note}"
    options = _options(model, setup)
    values = itertools.product(*map(dict.fromkeys, options.values()))
    setups = [replace(setup, **dict(zip(options, chosen, strict=True))) for chosen in values]
    fitting = [s for s in setups if sum(_parts(model, s).values()) <= USABLE * room]
    least = _parts(model, setups[-1])
    nearest = min(fitting, key=lambda s: _distance(setup, s), default=setups[-1])
    new, old = _say(nearest), _say(setup)
    settings = ", ".join(new[field] for field in new if new[field] != old[field]) or "these settings"
    if not fitting:
        return f"nothing fits on {where}: even {settings} would take {sum(least.values()):.1f} GiB{note}"
    largest = max((name for name in parts if name != "margin" and least[name] < parts[name]), key=parts.get)
    return f"largest term to cut: {largest} ({parts[largest]:.1f} GiB); fits on {where} with {settings}{note}"


def _say(setup: _Setup) -> dict[str, str]:
    """Settings in words."""
    where = ", ".join(name for name in ("attention", "mlp", "experts") if vars(setup.lora)[name])
    kept = {"offload": "checkpoints in RAM (Unsloth)", "card": "checkpoints on the card", "none": "no checkpoints"}
    return {
        "four_bit": "4 bit" if setup.four_bit else f"{8 * setup.width} bit",
        "experts_too": "experts quantised by Unsloth" if setup.experts_too else "experts not quantised",
        "lora": f"LoRA rank {setup.lora.rank} ({where})",
        "batch_size": f"batch size {setup.batch_size}",
        "length": f"length {setup.length}",
        "optimizer": setup.optimizer,
        "checkpointing": kept[setup.checkpointing],
        "fused_loss": "fused loss" if setup.fused_loss else "all logits at once",
    }
