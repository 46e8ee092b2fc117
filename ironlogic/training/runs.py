"""A run folder: what goes into a stage of training, what was decided and measured, and what came out.

`run.json` holds every setting, version and seed, `chats.jsonl` the rows, `metrics.jsonl` a line per logged step,
`checkpoints/` the newest states while it trains, `adapter/` the result in plain PEFT form. Whatever is written is
whole or not there.
"""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.models import LoadedModel, load_model
from ironlogic.session import results_path, see_place

from safetensors import SafetensorError, safe_open

__all__ = [
    "Run",
    "RunError",
    "drop_later_steps",
    "find_run",
    "has_room",
    "newest_whole_checkpoint",
    "no_room",
    "open_run",
    "read_metrics",
    "read_record",
    "read_steps",
    "run_folder",
    "save_adapter",
    "start_or_join",
    "write_json",
    "writing",
]

# What has to agree for a folder to hold "the same run".
_SAME = ("stage", "model", "four_bit", "rows", "data_sha256", "settings", "burden")


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

    def load_model(self) -> LoadedModel:
        """The trained model: the one in memory, else base and adapter loaded from disk."""
        return self.loaded or load_model(
            self.adapter,
            four_bit=self.record["four_bit"],
            max_length=self.record["settings"]["max_length"],
        )


def open_run(folder: str | Path) -> Run:
    """A finished run by its name in the results folder or by its path, without its model."""
    folder = run_folder(folder)
    record = read_record(folder)
    if not record:
        raise RunError(f"{folder}: no run here (no run.json); train one with train_sft(..., run={folder.name!r})")
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


# --- run.json -----------------------------------------------------------------------------------------------
def read_record(folder: Path) -> dict[str, Any]:
    """run.json; empty where there is none. Raises `RunError` when it is damaged."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "four_bit" not in record:
            record["four_bit"] = record["four_bit_share"] > 0  # 0.1.0 wrote the share alone
        if not isinstance(record["settings"], dict):
            raise TypeError("its settings are no object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r:.200}); choose another name, or delete the folder") from error
    return record


def find_run(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """run.json as it stands in the folder; empty where no run was begun or prepared.

    Raises `RunError` when it is another run than that of `record`.
    """
    previous = read_record(folder)
    if not previous:
        return {}
    # a tracker changes nothing that is learned, and an older version knew fewer settings
    settings = previous["settings"].keys() - {"report_to"}
    ours, theirs = _identity(record, settings), _identity(previous, settings)
    if other := [name for name in _SAME if ours[name] != theirs[name]]:
        raise RunError(
            f"{folder} holds another run: it differs in {', '.join(other)}. "
            "Choose another name for this run, or delete the folder"
        )
    return previous


def _identity(record: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    compared = {name: record["settings"].get(name) for name in settings}
    return {name: record.get(name) for name in _SAME} | {"settings": compared}


def start_or_join(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes run.json, unless the same run has begun here; returns what stands there. Raises `RunError`."""
    previous = find_run(folder, record)
    if "versions" in previous:  # begun, and not only prepared
        return previous
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", record)
    return record


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: written beside, then renamed."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


# --- lines of a step: metrics.jsonl, completions.jsonl ------------------------------------------------------
def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return read_steps(folder / "metrics.jsonl")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; a killed run may leave half a line at the end."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def drop_later_steps(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the lines up to that step in the file and returns them: those behind a checkpoint come again."""
    kept = [line for line in read_steps(path) if line["step"] <= step]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    return kept


# --- the result and the way there ---------------------------------------------------------------------------
def save_adapter(loaded: LoadedModel, folder: Path) -> None:
    """The adapter and the tokenizer in `folder/adapter`, in PEFT's form, with its base by name."""
    beside = folder / "adapter.part"
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder):
        loaded.model.save_pretrained(beside, save_embedding_layers=False)  # else it looks on the hub
        loaded.tokenizer.save_pretrained(beside)
    settings = json.loads((beside / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = loaded.base
    write_json(beside / "adapter_config.json", settings)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    beside.rename(folder / "adapter")


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave a half-written one behind."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(numbered, key=_step_of, reverse=True)
    return next((path for path in newest_first if _is_whole(path)), None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    parts = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return (
        state.get("global_step") == _step_of(checkpoint) and len(parts) > 2 and all(map(zipfile.is_zipfile, parts))
    )


# --- a disk that is full or read-only -----------------------------------------------------------------------
@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What is written inside fails with one `RunError`, whatever a library says of a full or read-only disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(no_room(folder, error)) from error


def no_room(folder: Path, error: Exception) -> str:
    """The message of that error."""
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
