"""The models of the seeds and their recipes, as frozen settings.

One dial for the common case: the name of a preset. What a preset does not know: whether the machine can
hold it (`memory.plan_memory`) and how a model is loaded (`models`).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from ironlogic import IronLogicError
from ironlogic.burden import Burden
from ironlogic.data.problems import WORLDS

__all__ = [
    "PRESETS",
    "VISION_PRESETS",
    "LoraSettings",
    "Preset",
    "PresetError",
    "TrainSettings",
    "VisionPreset",
    "find_preset",
    "pick_preset",
]


@dataclass(frozen=True)
class LoraSettings:
    """Where the low-rank adapter sits: on the language model, and on a vision tower only where `vision` says so."""

    rank: int = 8
    alpha: int = 16  # the update is scaled by alpha / rank
    attention: bool = True
    mlp: bool = True
    experts: bool = False  # the experts of a mixture-of-experts model; costs gigabytes
    vision: bool = False  # the tower of a model that sees, in `train_sft`; a splice's own stages keep theirs frozen
    dropout: float = 0.0


@dataclass(frozen=True)
class TrainSettings:
    """One training stage. Lengths in tokens, `warmup_steps` in optimizer steps (a share of them below 1)."""

    epochs: int = 1
    learning_rate: float = 2e-4
    batch_size: int = 1  # rows per device and forward pass
    accumulation: int = 8  # forward passes per optimizer step
    warmup_steps: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    max_length: int = 4096
    neftune_alpha: float = 0.0  # noise on the embeddings (Jain et al. 2023, arXiv 2310.05914); 0: none
    loss: Literal["assistant", "all"] = "assistant"
    save_steps: int = 50
    log_steps: int = 5
    seed: int = 3407
    lora: LoraSettings = field(default_factory=LoraSettings)
    projector_learning_rate: float | None = None  # of a splice's projector beside LoRA; None: the same
    pictures: int = 0  # in one conversation, at most: rows with more are left out; 0: any number
    padding_free: bool = False  # text stages: the rows of a forward pass one behind the other, without padding
    report_to: str = "none"  # a tracker that is installed, by transformers' name: trackio, tensorboard, wandb, ...


@dataclass(frozen=True)
class Preset:
    """A model, what it needs and how it is trained."""

    name: str
    model: str  # folder in data/, local path or hub name
    card_gib: float  # smallest card it is meant for; 0 = no card needed
    train: TrainSettings
    burden: Burden
    data: str = "problems"  # hub dataset or file of chats; "problems", "reasoning-gym": made by `make_tasks`
    four_bit: bool = True
    rows: int = 3000  # conversations an arm is trained on, at most
    evaluation_seeds: int = 1  # repetitions of each arm in notebook 02
    questions: int = 200  # held-out problems that every model is asked
    shots: int = 0  # solved examples that the base is shown, in an arm of its own: it was not taught the form
    ratios: tuple[float, ...] = ()  # of the scrambles that are asked; (): 0, 0.3, 0.5, 0.7 and 1
    sweep: tuple[float, ...] = ()  # learning rates to choose from, for each arm by itself
    note: str = ""  # shown by notebook 00
    measured_gib: float = 0.0  # peak of a step on a card, CUDA context included (tests/gpu); 0: planned only

    @property
    def world(self) -> str:
        """Where made problems for this model come from (`data.make_tasks`), whatever it is trained on."""
        return self.data if self.data in WORLDS else "problems"


# "As the seed": the published script (seed 001), line by line. It is the only one of its author: seeds 000 and 002
# name the method, the base model, 4 bit and the data, so theirs is this script on their base model.
_SEED = TrainSettings(
    epochs=3,
    learning_rate=2e-5,
    batch_size=1,
    accumulation=1,
    warmup_steps=25,
    schedule="cosine",
    weight_decay=0.01,
    max_grad_norm=1.0,  # not in the script: the trainer's default
    optimizer="paged_adamw_8bit",
    max_length=4096,
    loss="all",  # the script masks nothing
    log_steps=5,
    seed=3407,
    lora=LoraSettings(rank=8, alpha=16),
)
_SEED_BURDEN = Burden(ratio=0.7, unit="seed", redraw=False)  # `map` shuffles once, before the three epochs
_NO_BURDEN = Burden(ratio=0.0)
SEED_DATA = "TeichAI/gemini-3-pro-preview-high-reasoning-250x"  # 248 conversations, seeds 000 and 001
SEED_SFT_DATA = "TeichAI/gemini-3-pro-preview-high-reasoning-1000x"  # seed 000's second stage

# "Recommended": the same adapter, optimizer, length and epochs. What differs, and why:
_CARD = TrainSettings(
    epochs=3,
    learning_rate=2e-4,  # of LoRA, not of full fine-tuning: 2e-4 up to 13 B (QLoRA, arXiv 2305.14314)
    batch_size=1,
    accumulation=8,  # one conversation a step is mostly noise; costs no memory
    warmup_steps=0.05,  # a share: 25 steps would be a quarter of the 93 that are left
    optimizer="paged_adamw_8bit",
    max_length=4096,
    loss="assistant",  # loss on the shuffled prompt teaches to write shuffled text
    lora=LoraSettings(rank=8, alpha=16),
)
_LARGE = replace(_CARD, learning_rate=1e-4)  # from 33 B on in the same paper; 27 B and 30 B are nearer to that
_BURDEN = Burden(ratio=0.7)  # a fresh draw every epoch, and code, links and formulas stay whole

_NANO = TrainSettings(
    learning_rate=5e-3,
    batch_size=16,
    accumulation=1,
    max_length=256,
    save_steps=100,
    log_steps=10,
    lora=LoraSettings(rank=16, alpha=32),
)

_SMOLLM2 = replace(
    _NANO,
    learning_rate=1e-3,
    batch_size=8,
    warmup_steps=0.05,
)

# `measured_gib`: on an H200 held to the memory of such a card, through Unsloth, weights of the true shapes
_T4 = Preset(
    name="t4",
    model="Qwen/Qwen3-4B-Instruct-2507",
    card_gib=14,
    train=_CARD,
    burden=_BURDEN,
    data=SEED_DATA,
    note="Colab or Kaggle, 16 GB",
)
_GEMMA = replace(
    _T4,
    name="gemma-3-27b",
    model="google/gemma-3-27b-it",
    card_gib=30,
    train=_LARGE,
    note="seed 001's model, 32 GB",
    measured_gib=25.12,
)
# Attention only: at rank 8 LoRA on 6,144 experts has 315 M parameters, of which a token trains a sixteenth.
_QWEN_MOE = replace(
    _GEMMA,
    name="qwen3-30b-a3b",
    model="Qwen/Qwen3-30B-A3B-Instruct-2507",
    card_gib=31.4,
    note="seed 002's model, 32 GB with nothing else on the card; needs Unsloth",
    measured_gib=30.0,
)
_QWEN_VL = replace(
    _T4,
    name="qwen3-vl-4b",
    model="Qwen/Qwen3-VL-4B-Instruct",
    note="seed 000's model, stage 1: FT",
    measured_gib=8.8,
)
_AS_SEED = {"train": _SEED, "burden": _SEED_BURDEN, "measured_gib": 0.0}
_SECOND_STAGE = {"burden": _NO_BURDEN, "data": SEED_SFT_DATA}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="nano",
            model="nano",
            card_gib=0,
            train=_NANO,
            burden=Burden(),
            rows=1500,
            evaluation_seeds=5,
            sweep=(5e-4, 1e-3, 2e-3, 5e-3),
            note="shipped in data/, runs on any laptop",
        ),
        Preset(
            name="smollm2",
            model="smollm2",
            card_gib=0,
            train=_SMOLLM2,
            burden=Burden(),
            data="reasoning-gym",
            four_bit=False,  # 0.5 GB in float32; 4 bit is slower on a processor
            rows=640,
            evaluation_seeds=3,
            questions=120,
            shots=5,
            ratios=(0.0, 0.7, 1.0),  # what the claims need
            sweep=(5e-4, 1e-3, 2e-3),
            note="a real language model of 135 M parameters, from a Python package; any laptop",
        ),
        _T4,
        replace(_T4, name="24gb", model="google/gemma-3-12b-it", card_gib=22, note="RTX 3090 or 4090"),
        replace(_GEMMA, name="32gb", note="RTX 5090"),
        _GEMMA,
        replace(
            _GEMMA,
            name="gemma-3-27b-as-seed",
            note="seed 001 exactly: one shuffle for all epochs, loss on every token",
            **_AS_SEED,
        ),
        _QWEN_MOE,
        replace(
            _QWEN_MOE,
            name="qwen3-30b-a3b-as-seed",
            card_gib=40,
            note="seed 002's model with seed 001's script; needs Unsloth",
            # finetune_mlp_modules=True means every expert
            **_AS_SEED | {"train": replace(_SEED, lora=replace(_SEED.lora, experts=True))},
        ),
        _QWEN_VL,
        replace(
            _QWEN_VL,
            name="qwen3-vl-4b-sft",
            train=replace(_CARD, epochs=1),  # four times the rows: about as many steps as stage 1
            note="stage 2, plain SFT: give it the model of stage 1",
            **_SECOND_STAGE,
        ),
        replace(
            _QWEN_VL,
            name="qwen3-vl-4b-as-seed",
            note="seed 000, stage 1, with seed 001's script",
            **_AS_SEED,
        ),
        replace(
            _QWEN_VL,
            name="qwen3-vl-4b-sft-as-seed",
            note="seed 000, stage 2, plain SFT: give it the model of stage 1",
            **_AS_SEED | _SECOND_STAGE,
        ),
    )
}


@dataclass(frozen=True)
class VisionPreset:
    """A splice and its training stages. `accumulation` gathers on one card what the seed had on all of its own."""

    name: str
    tower: str  # folder in data/, local path or hub name
    language_model: str
    projector: Literal["mlp2x_gelu", "pixel_shuffle"]
    card_gib: float
    projector_stage: TrainSettings
    instruct_stage: TrainSettings | None  # None: the seed has no second stage
    four_bit: bool = False  # the language model
    tiles: int = 0  # parts that a picture is cut into at most; 0: one view
    data: tuple[str, ...] = ()  # hub data sets, one a stage
    rows: int = 0  # of the first stage's data; 0: all
    note: str = ""
    measured_gib: float = 0.0  # of its larger stage


# Seed 003, stage 1. It names no optimizer, weight decay, length or seed: those are LLaVA-1.5's script. For the
# token <image>, `splice` takes Qwen3's own <|image_pad|>, which needs no new row in the embedding.
_LLAVA = TrainSettings(
    learning_rate=1e-3,
    batch_size=32,
    accumulation=8,
    warmup_steps=0.03,
    weight_decay=0.0,
    max_length=2048,
    save_steps=200,
    seed=42,
    pictures=1,
)
_LLAVA_INSTRUCT = replace(  # stage 2
    _LLAVA,
    learning_rate=2e-4,
    projector_learning_rate=2e-5,
    batch_size=16,
    lora=LoraSettings(rank=128, alpha=256, dropout=0.05),
)
# Seed 004: 1 row x 4 passes on each of 8 cards.
_SMVL = TrainSettings(
    learning_rate=1e-4,
    batch_size=1,
    accumulation=32,
    warmup_steps=0.1,
    max_length=2048,
    loss="all",  # only padding and image tokens are masked
    seed=42,
    pictures=1,  # the seed takes the first of several
)
_NANO_VISION = TrainSettings(
    learning_rate=1e-2,
    batch_size=8,
    accumulation=1,
    weight_decay=0.0,
    max_length=128,
    save_steps=200,
    log_steps=5,
)
_NANO_INSTRUCT = replace(
    _NANO_VISION, learning_rate=4e-3, projector_learning_rate=8e-3, lora=LoraSettings(rank=16, alpha=32)
)

_CLIP, _SMOL = "openai/clip-vit-large-patch14-336", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
_LLAVA_DATA = ("liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K")

VISION_PRESETS = {
    preset.name: preset
    for preset in (
        VisionPreset(
            name="nano-vision",
            tower="nano-vision",
            language_model="nano",
            projector="mlp2x_gelu",
            card_gib=0,
            projector_stage=_NANO_VISION,
            instruct_stage=_NANO_INSTRUCT,
            note="shipped in data/, runs on any laptop",
        ),
        VisionPreset(  # recommended: as many rows a step as the seed, but what one consumer card holds at a time
            name="vqwen3-4b",
            tower=_CLIP,
            language_model="Qwen/Qwen3-4B",
            projector="mlp2x_gelu",
            card_gib=14,
            # a caption with its picture is far below 1024 tokens; a plan for 2048 would halve the batch again
            projector_stage=replace(_LLAVA, batch_size=8, accumulation=32, max_length=1024, pictures=0),
            instruct_stage=replace(_LLAVA_INSTRUCT, batch_size=4, accumulation=32, pictures=0),
            four_bit=True,  # 5 GiB less; the seed had 141 GB
            data=_LLAVA_DATA,
            note="seed 003's model, in 4 bit",
            measured_gib=11.34,
        ),
        VisionPreset(
            name="vqwen3-4b-as-seed",
            tower=_CLIP,
            language_model="Qwen/Qwen3-4B",
            projector="mlp2x_gelu",
            card_gib=40,
            projector_stage=_LLAVA,
            instruct_stage=_LLAVA_INSTRUCT,
            data=_LLAVA_DATA,
            note="seed 003: 23 h on an H200",
        ),
        VisionPreset(  # recommended
            name="qwen3-smvl",
            tower=_SMOL,
            language_model="Qwen/Qwen3-0.6B",
            projector="pixel_shuffle",
            card_gib=14,
            # the same 32 rows a step; loss on the answer, which the seed too says generalises better
            projector_stage=replace(_SMVL, batch_size=8, accumulation=4, loss="assistant", pictures=0),
            # the seed stops at the projector, so its language model never learns to answer about pictures
            instruct_stage=replace(
                _SMVL,
                learning_rate=2e-4,
                projector_learning_rate=2e-5,
                batch_size=8,
                accumulation=4,
                loss="assistant",
                pictures=0,
                lora=LoraSettings(rank=16, alpha=32),
            ),
            data=("HuggingFaceM4/the_cauldron",),
            rows=60_000,
            note="seed 004's model, with a second stage",
            measured_gib=4.73,
        ),
        VisionPreset(
            name="qwen3-smvl-as-seed",
            tower=_SMOL,
            language_model="Qwen/Qwen3-0.6B",
            projector="pixel_shuffle",
            card_gib=14,
            projector_stage=_SMVL,
            instruct_stage=None,
            tiles=16,  # with the view of the whole 0.8 to 1.3 thousand tokens a picture
            data=("HuggingFaceM4/the_cauldron",),
            rows=60_000,
            note="seed 004: 1.5 h on 8 cards of 64 GB",
        ),
    )
}


class PresetError(IronLogicError, ValueError):
    """A preset that does not exist; the message names those that do."""


def find_preset(preset: "str | Preset") -> Preset:
    """The preset of that name, or the preset itself. Raises PresetError with the names that exist."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise PresetError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def pick_preset(card_gib: float | None) -> Preset:
    """The largest general preset (nano, t4, 24gb, 32gb) that is meant for a card of `card_gib` GiB; None: no card.

    >>> pick_preset(None).name, pick_preset(15.6).name, pick_preset(31.4).name
    ('nano', 't4', '32gb')
    """
    fitting = [
        PRESETS[name] for name in ("nano", "t4", "24gb", "32gb") if PRESETS[name].card_gib <= (card_gib or 0)
    ]
    return fitting[-1]
