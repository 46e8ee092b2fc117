"""The models of the seeds and their recipes, as frozen settings.

One dial for the common case: the name of a preset. What a preset does not know: whether the machine can
hold it (`memory.plan_memory`) and how a model is loaded (`models`).
"""

from dataclasses import dataclass, field
from typing import Literal

from ironlogic.burden import Burden

__all__ = ["PRESETS", "LoraSettings", "Preset", "PresetError", "TrainSettings", "find_preset", "pick_preset"]


@dataclass(frozen=True)
class LoraSettings:
    """Where the low-rank adapter sits. Always on the language model, never on a vision tower."""

    rank: int = 8
    alpha: int = 16  # the update is scaled by alpha / rank
    attention: bool = True
    mlp: bool = True
    experts: bool = False  # the experts of a mixture-of-experts model; costs gigabytes


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


@dataclass(frozen=True)
class Preset:
    """A model, what it needs and how it is trained."""

    name: str
    model: str  # folder in data/, local path or hub name
    card_gib: float  # smallest card it is meant for; 0 = no card needed
    train: TrainSettings
    burden: Burden
    data: str = "problems"  # hub dataset or file of chats; "problems": made by `tasks`
    four_bit: bool = True
    evaluation_seeds: int = 1  # repetitions of each arm in notebook 02
    note: str = ""


_GEMMA_SEED = TrainSettings(  # seed 001's script, line by line
    epochs=3,
    learning_rate=2e-5,
    batch_size=1,
    accumulation=1,
    warmup_steps=25,
    optimizer="paged_adamw_8bit",
    max_length=4096,
    loss="all",
    lora=LoraSettings(rank=8, alpha=16),
)

SEED_DATA = "TeichAI/gemini-3-pro-preview-high-reasoning-250x"  # 248 conversations, seeds 000 and 001
_CARD = TrainSettings(optimizer="paged_adamw_8bit", epochs=3, max_length=4096)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="nano",
            model="nano",
            card_gib=0,
            train=TrainSettings(
                learning_rate=5e-3,
                batch_size=16,
                accumulation=1,
                max_length=256,
                save_steps=100,
                log_steps=10,
                lora=LoraSettings(rank=16, alpha=32),
            ),
            burden=Burden(),
            evaluation_seeds=5,
            note="shipped in data/, runs on any laptop",
        ),
        Preset("t4", "Qwen/Qwen3-4B-Instruct-2507", 14, _CARD, Burden(), SEED_DATA, note="Colab or Kaggle, 16 GB"),
        Preset("24gb", "google/gemma-3-12b-it", 22, _CARD, Burden(), SEED_DATA, note="RTX 3090 or 4090"),
        Preset("32gb", "google/gemma-3-27b-it", 30, _CARD, Burden(), SEED_DATA, note="RTX 5090"),
        Preset(
            "gemma-3-27b-as-seed",
            "google/gemma-3-27b-it",
            30,
            _GEMMA_SEED,
            Burden(unit="seed", redraw=False),
            SEED_DATA,
            note="seed 001 exactly: one shuffle for all epochs, loss on every token",
        ),
    )
}


class PresetError(ValueError):
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
