"""A short Fragmented Training of nano, trained once for all tests that need a finished run (`small_run`)."""

from pathlib import Path

from ironlogic.burden import Burden
from ironlogic.data.chats import make_chats
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.models import LoadedModel, load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import Run
from ironlogic.training.sft import train_sft

LORA = LoraSettings(rank=4, alpha=8)
SETTINGS = TrainSettings(
    learning_rate=5e-3, batch_size=4, accumulation=1, max_length=128, log_steps=1, save_steps=3, lora=LORA
)
BURDEN = Burden()
CHATS = make_chats(map(task_chat, make_tasks(32, seed=1)))


def nano(source: str | Path = "nano", **options) -> LoadedModel:
    return load_model(source, **({"max_length": 128} | options))


def train_ft(
    folder: Path, *, source="nano", chats=CHATS, settings=SETTINGS, burden: Burden | None = BURDEN, **options
) -> Run:
    """8 optimizer steps, checkpoints at 3 and 6."""
    return train_sft(nano(source), chats, settings, run=folder, burden=burden, **options)
