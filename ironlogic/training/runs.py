"""A run folder: what was decided, what was measured, and what came out.

`run.json` holds every setting, version and seed, `metrics.jsonl` a line per logged step, `checkpoints/` the
newest states while it trains, `adapter/` the result in plain PEFT form. Whatever is written is whole or not
there. Knows nothing of how a model is trained.
"""

import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.models import LoadedModel, load_model
from ironlogic.session import results_path, see_place

from safetensors import SafetensorError, safe_open

__all__ = [
    "Run",
    "RunError",
    "has_room",
    "newest_whole_checkpoint",
    "no_room",
    "open_run",
    "read_metrics",
    "run_folder",
    "save_adapter",
    "start_or_join",
    "write_json",
]

# What has to agree for a folder to hold "the same run".
_SAME = ("stage", "model", "four_bit_share", "rows", "data_sha256", "settings", "burden")


class RunError(IronLogicError, RuntimeError):
    """A run that can't start or go on; the message says what to do, and nothing made earlier is lost."""


@dataclass(frozen=True)
class Run:
    """A run folder. `loaded` is the trained model while it is still in memory."""

    folder: Path
    record: dict[str, Any]  # run.json
    loaded: LoadedModel | None = None

    def __reduce__(self) -> tuple:
        return Run, (self.folder, self.record)  # to another process without its model

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps: step, loss (nats per trained token), learning_rate, grad_norm, seconds, ..."""
        return read_metrics(self.folder)

    def without_model(self) -> "Run":
        """The same for whoever keeps several: a model that nobody holds gives its memory back."""
        return replace(self, loaded=None)

    def model(self) -> LoadedModel:
        """The trained model: the one in memory, else base and adapter loaded from disk."""
        return self.loaded or load_model(
            self.adapter,
            four_bit=self.record["four_bit_share"] > 0,
            max_length=self.record["settings"]["max_length"],
        )


def open_run(folder: str | Path) -> Run:
    """A finished run by its name in the results folder or by its path."""
    folder = run_folder(folder)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder}: no run here (no run.json); train one with train_sft(..., run={folder.name!r})"
        ) from None
    if not record.get("finished"):
        raise RunError(f"{folder}: this run has not finished; call its training cell again, it goes on by itself")
    return Run(folder, record)


def run_folder(run: str | Path) -> Path:
    """An absolute path, or one that begins with a dot, as it is; any other name in the results folder."""
    path = Path(run).expanduser()
    if not path.name or ".." in path.parts:
        raise RunError(f"{str(run)!r} is no name for a run; expected letters and digits, with / for sub-folders")
    if path.is_absolute() or str(run).startswith("."):
        return path
    return results_path(see_place(os.environ), environ=os.environ) / path


def start_or_join(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Writes run.json in a new folder; in an old one, makes sure that it holds the same run."""
    path = folder / "run.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted)
        except OSError as error:
            raise RunError(no_room(folder, error)) from error
        return wanted
    previous = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in _SAME if previous.get(name) != wanted[name]]
    if other:
        raise RunError(
            f"{folder} holds another run: it differs in {', '.join(other)}. "
            "Choose another name for this run, or delete the folder"
        )
    return previous


def no_room(folder: Path, error: Exception) -> str:
    cause = getattr(error, "strerror", None) or error
    return (
        f"{folder} can't be written ({cause}); what was saved before is untouched. "
        "Free space there, or set IRONLOGIC_RUNS to a folder with room, and run this again"
    )


def has_room(folder: Path) -> bool:
    """Whether a mebibyte can be written there: every library reports a full disk in its own way."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError:
        return False
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line


def save_adapter(loaded: LoadedModel, folder: Path) -> None:
    beside = folder / "adapter.part"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        loaded.model.save_pretrained(beside, save_embedding_layers=False)  # else it looks on the hub
        loaded.tokenizer.save_pretrained(beside)
    except (OSError, SafetensorError) as error:
        raise RunError(no_room(folder, error)) from error
    settings = json.loads((beside / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = loaded.base
    write_json(beside / "adapter_config.json", settings)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    beside.rename(folder / "adapter")


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave a half-written one behind."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    found = sorted(named, key=lambda path: -int(path.name.rpartition("-")[2]))
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    parts = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    step = int(checkpoint.name.rpartition("-")[2])
    return state.get("global_step") == step and len(parts) > 2 and all(map(zipfile.is_zipfile, parts))
