"""Does it fit? One step of LoRA training in GiB, by arithmetic, before anything is downloaded.

Parameters are counted exactly, on the model that transformers builds from a configuration without storage.
Activations are a closed form (`LayerWidths`) that agrees within a tenth with what a CPU measures.

What it does not know: what else draws on the card (a desktop takes 0.5-2 GiB), vLLM, training without LoRA,
Unsloth's thriftier kernels. It is within 15 % of the peaks that 12 public notebooks print; `tests/test_memory.py`
says what had to be assumed for two of them.
`plan_memory` imports transformers: where Unsloth is used, import `models` before calling it.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ironlogic.architectures import ARCHITECTURES, ModelCount, PlanError, count_model
from ironlogic.presets import (
    PRESETS,
    VISION_PRESETS,
    LoraSettings,
    Preset,
    TrainSettings,
    VisionPreset,
    pick_preset,
)

import psutil  # comes with accelerate

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
# Unsloth's dynamic 4 bit leaves some layers in 16 bit; its repositories say which, their names only that it is so.
# Gemma-3-27B then holds 19.07 GiB with its adapter (printed by a public notebook), where plain nf4 takes 15.92.
DYNAMIC, DYNAMIC_BYTES = "unsloth-bnb-4bit", 0.13  # bytes per parameter on top of nf4
DATA = Path(__file__).resolve().parent.parent / "data"
_NO_LORA = LoraSettings(attention=False, mlp=False)  # a splice's first stage


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
    samples: int  # answers that GRPO writes at a time; 0: no GRPO
    pictures: int  # in a row
    width: int  # bytes of a value that is not in 4 bit: 2 on a card, 4 on a CPU
    projector: bool = False  # whether a splice's projector is trained too


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
    transformers does; False keeps all activations. `fused_loss`: logits of 256 tokens at a time, else of all.
    `fused_experts_quantized`: False for plain transformers, whose 4 bit leaves fused experts as they are.
    `samples`: answers that GRPO writes at a time with plain transformers, prompt and answer in `length`; their keys
    and values are kept. Its reference model is the base without the adapter and costs nothing.
    `pictures`: in every row; their tokens are part of `length`. A tower that takes any size (Qwen3-VL) is planned
    for 512 x 512 pixels.
    `card_gib` 0 or None plans a CPU run as `models` sets it up (float32 but for the 4-bit weights, no
    checkpointing, no 8-bit optimizer), against `ram_gib` or else all of this machine's RAM.
    Activations, logits and the cache are added up, though they don't peak at the same moment: the safe side. Raises
    `PlanError` for a model or a setting that can't be planned.
    """
    name, config, stages, quantised = _find(preset_or_config)
    model = replace(count_model(name, config), dynamic=name.endswith(DYNAMIC))
    cpu, splice = not card_gib, len(stages) > 1 or stages[0].lora == _NO_LORA
    keep = {True: "card" if splice else "offload", False: "none"}.get(checkpointing, checkpointing)
    room, plans = card_gib or ram_gib or psutil.virtual_memory().total / GIB, []
    for settings in stages:
        optim = optimizer or settings.optimizer
        setup = _Setup(
            length=settings.max_length if length is None else length,
            batch_size=settings.batch_size if batch_size is None else batch_size,
            four_bit=quantised if four_bit is None else four_bit,
            lora=settings.lora if lora is None or settings.lora == _NO_LORA else lora,
            optimizer="adamw_torch" if cpu and "8bit" in optim else optim,
            checkpointing="none" if cpu and keep == "offload" else keep,
            fused_loss=fused_loss,
            experts_too=(fused_experts_quantized and not cpu) or not model.experts,  # packed on a card only
            samples=samples,
            pictures=pictures or int(splice),
            width=4 if cpu else 2,
            projector=splice,
        )
        _check(name, model, setup, room)
        plans.append(_plan(name, model, setup, room))
    largest = max(plans, key=lambda plan: plan.peak_gib)
    if largest.fits or len(plans) == 1:
        return largest
    return replace(largest, advice="; ".join(f"stage {n}: {plan.advice}" for n, plan in enumerate(plans, 1)))


def _plan(name: str, model: ModelCount, setup: _Setup, room: float) -> MemoryPlan:
    parts = _parts(model, setup)
    peak = sum(parts.values())
    words = [text for key, text in _say(setup).items() if key != "experts_too" or model.experts * setup.four_bit]
    title = f"{name}, {model.total / 1e6:,.1f} M parameters: {', '.join(words)}"
    return MemoryPlan(peak <= USABLE * room, peak, parts, room, _advise(model, setup, room), title)


def _check(name: str, model: ModelCount, setup: _Setup, room: float) -> None:
    if not (min(setup.length, setup.batch_size, setup.lora.rank) >= 1 and room > 0):
        sizes = f"length {setup.length}, batch_size {setup.batch_size}, lora.rank {setup.lora.rank}, {room} GiB"
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
    if setup.checkpointing not in ("offload", "card", "none"):
        raise PlanError(f"checkpointing is {setup.checkpointing!r}; expected True, False, 'offload' or 'card'")


def _find(what: Any) -> tuple[str, Any, list[TrainSettings], bool]:
    """(name, configuration, settings of each stage, 4 bit) of whatever stands for a model."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    what = (PRESETS | VISION_PRESETS).get(what, what) if isinstance(what, str) else what
    rest = ([TrainSettings()], True)
    if isinstance(what, Preset):
        rest, what = ([what.train], what.four_bit), what.model
    elif isinstance(what, VisionPreset):
        stages = [replace(what.projector_stage, lora=_NO_LORA), what.instruct_stage]
        rest, what = ([stage for stage in stages if stage], what.four_bit), what.name
    if isinstance(what, PreTrainedConfig):
        return what.model_type, what, *rest
    model = str(what)
    for folder in (Path(model).expanduser(), DATA / model):
        if (folder / "config.json").is_file():
            try:
                return (
                    folder.name,
                    AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
                    *rest,
                )
            except Exception as error:
                raise PlanError(f"{folder / 'config.json'}: transformers can't read it: {error!r:.300}") from error
    for name, known in ARCHITECTURES.items():
        if Path(model).name.lower().startswith(name.lower()):
            arguments = {key: value for key, value in known.items() if key not in ("total", "model_type")}
            title = f"{name}-{DYNAMIC}" if model.lower().endswith(DYNAMIC) else name
            return title, CONFIG_MAPPING[known["model_type"]](**copy.deepcopy(arguments)), *rest
    names = f"a preset ({', '.join(PRESETS)}) or a model known here ({', '.join(ARCHITECTURES)})"
    raise PlanError(f"{model}: not a folder with a config.json, nor a transformers configuration, nor {names}")


def _parts(model: ModelCount, setup: _Setup) -> dict[str, float]:
    """The terms of the peak, in GiB."""
    quantised = setup.four_bit * (model.linear + model.experts * setup.experts_too)
    buffer = setup.four_bit * max(model.largest, model.layer_experts * setup.experts_too)
    tokens, width = setup.batch_size * setup.length, setup.width
    one, inputs = model.layer.saved(width, setup.lora), model.layer.hidden * width
    kept = {"offload": inputs, "card": model.layers * inputs, "none": (model.layers - 1) * one}
    trained = setup.projector * model.projector + setup.lora.rank * sum(
        rows * vars(setup.lora)[where] for where, rows in model.adapted.items()
    )
    at_once = min(CHUNK, tokens) if setup.fused_loss else tokens
    sizes = {
        "quantised weights": quantised * (NF4_BYTES + DYNAMIC_BYTES * model.dynamic),
        "other weights": (model.total - quantised) * width,
        "LoRA and optimizer": trained * (4 + 4 + OPTIMIZER_BYTES[setup.optimizer]),
        "activations": tokens * (kept[setup.checkpointing] + one + model.layer.in_flight(width)),
        "dequantisation buffer": buffer * width,
        "logits": model.vocabulary * at_once * LOSS_BYTES[setup.fused_loss],
    }
    if setup.samples:
        remembered = (model.layers - model.sliding) * setup.length + model.sliding * min(setup.length, model.window)
        sizes["key-value cache"] = setup.samples * remembered * 2 * model.layer.key * width
    if setup.pictures:
        sizes["vision tower at work"] = (
            setup.batch_size * setup.pictures * model.eyes.patches * model.eyes.widest * width
        )
    parts = {name: size / GIB for name, size in sizes.items()}
    return parts | {"margin": CONTEXT_GIB + FRAGMENTATION * sum(parts.values())}


def _options(model: ModelCount, setup: _Setup) -> dict[str, list[Any]]:
    """Values of each setting (some twice), from the present one to the one that saves most memory."""
    heavy = OPTIMIZER_BYTES[setup.optimizer] > 2 and setup.width == 2
    least = max(256, 2 * setup.pictures * model.eyes.tokens) if setup.pictures else 256
    lora = replace(setup.lora, rank=min(setup.lora.rank, 8), experts=setup.lora.experts and not model.experts)
    return {
        "fused_loss": [setup.fused_loss, True],
        "checkpointing": [
            setup.checkpointing,
            "offload" if setup.width == 2 and not setup.projector else setup.checkpointing,
        ],
        "experts_too": [setup.experts_too, setup.experts_too or setup.width == 2],
        "batch_size": [setup.batch_size >> n for n in range(setup.batch_size.bit_length())],
        "optimizer": [setup.optimizer, "paged_adamw_8bit" if heavy else setup.optimizer],
        "four_bit": [setup.four_bit, True],
        "length": [
            setup.length,
            *range(setup.length, least, -max(setup.length // 16, 256)),
            min(setup.length, least),
        ],
        "samples": [setup.samples >> n for n in range(setup.samples.bit_length())] or [0],
        "lora": [setup.lora, lora],
    }


def _distance(setup: _Setup, other: _Setup) -> tuple[int, ...]:
    """How far `other` is: changes of what is learnt, changes, tokens lost."""
    changed = {field for field, value in vars(other).items() if value != vars(setup)[field]}
    sizes = (other.length, other.batch_size, other.samples)
    return len(changed & {"four_bit", "length", "lora"}), len(changed), *(-size for size in sizes)


def _advise(model: ModelCount, setup: _Setup, room: float) -> str:
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
        other = (
            f"; the preset for that is {pick_preset(room).name}" if setup.width == 2 and not setup.projector else ""
        )
        return f"nothing fits on {where}: even {settings} would take {sum(least.values()):.1f} GiB{other}{note}"
    largest = max((name for name in parts if name != "margin" and least[name] < parts[name]), key=parts.get)
    return f"largest term to cut: {largest} ({parts[largest]:.1f} GiB); fits on {where} with {settings}{note}"


def _say(setup: _Setup) -> dict[str, str]:
    """Settings in words."""
    where = ", ".join(name for name in ("attention", "mlp", "experts") if vars(setup.lora)[name])
    kept = {"offload": "checkpoints in RAM (Unsloth)", "card": "checkpoints on the card", "none": "no checkpoints"}
    return {
        "four_bit": "4 bit" if setup.four_bit else f"{8 * setup.width} bit",
        "experts_too": "experts quantised by Unsloth" if setup.experts_too else "experts not quantised",
        "lora": f"LoRA rank {setup.lora.rank} ({where})" if where else "the projector alone",
        "batch_size": f"batch size {setup.batch_size}",
        "length": f"length {setup.length}",
        "optimizer": setup.optimizer,
        "checkpointing": kept[setup.checkpointing],
        "fused_loss": "fused loss" if setup.fused_loss else "all logits at once",
    } | ({"samples": f"{setup.samples} samples at a time"} if setup.samples else {})
