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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ironlogic import IronLogicError
from ironlogic.session import results_path, see_place

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from ironlogic.models import LoadedModel

__all__ = ["Run", "RunError", "open_run", "read_metrics", "replacing", "run_folder", "save_adapter", "write_json"]

# As torchrun numbers them; DDP adds up what they see, so P of them train P times the rows a step.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# What has to agree, with every setting, for a folder to hold "the same run".
_SAME = ("stage", "model", "four_bit", "rows", "data_sha256", "burden")
_SAME_ONCE_BEGUN = ("processes", "splice_sha256")


class RunError(IronLogicError, RuntimeError):
    """A run that can't start or go on; the message says what to do, and nothing made earlier is lost."""


@dataclass(frozen=True)
class Run:
    """A run folder. `loaded` is the trained model while it is still in memory."""

    folder: Path
    record: dict[str, Any]  # run.json
    loaded: "LoadedModel | None" = None

    def __reduce__(self) -> tuple:
        return Run, (self.folder, self.record)  # to another process without its model

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps: step, loss (nats per trained token), learning_rate, grad_norm, seconds, ..."""
        return read_metrics(self.folder)

    def load_model(self, **options: Any) -> "LoadedModel":
        """The trained model: the one in memory, else from disk, with `options` of `models.load_model`.

        That is base and adapter; of a splice's first stage the splice, which has to be on disk, and the projector.
        """
        from ironlogic.models import ModelError, load_model, projector_of  # heavy; a folder is read without it

        from safetensors.torch import load_file

        if self.loaded:
            return self.loaded
        max_length = self.record["settings"]["max_length"]
        options = {"four_bit": self.record["four_bit"], "max_length": max_length} | options
        if self.record["stage"] != "projector":
            return load_model(self.adapter, **options)
        try:
            loaded = load_start(self.record["model"], **options)
        except ModelError as error:
            raise RunError(
                f"{self.folder} holds a projector alone, and its splice can't be loaded: {error}. If that was made "
                "in memory, make it again and call reopen(run, splice), or save_spliced once and load that"
            ) from error
        projector_of(loaded.model).load_state_dict(load_file(self.folder / "projector.safetensors"))
        return replace(loaded, source=str(self.folder))


def open_run(folder: str | Path) -> Run:
    """A finished run by its name in the results folder or by its path, without its model."""
    folder = run_folder(folder)
    record = read_record(folder)
    if not record:
        raise RunError(f"{folder}: no run here (no run.json); train one with train_sft(..., run={folder.name!r})")
    if not record.get("finished"):
        raise RunError(f"{folder}: this run has not finished; call its training cell again, it goes on by itself")
    return Run(folder, record)


def load_start(model: str, **options: Any) -> "LoadedModel":
    """What a prepared run begins with: what `load_model` takes, or the result of the run in that folder."""
    from ironlogic.models import load_model

    folder = Path(model).expanduser()
    if not (folder / "run.json").is_file():
        return load_model(model, **options)
    return replace(open_run(folder.absolute()).load_model(**options), source=model)


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
    names = [*_SAME, *(name for name in _SAME_ONCE_BEGUN if name in previous)]
    pairs = {name: (previous.get(name), record.get(name)) for name in names}
    pairs |= other_settings(previous["settings"], record["settings"])
    if other := [f"{name} ({was!r:.40}, now {now!r:.40})" for name, (was, now) in pairs.items() if was != now]:
        raise RunError(
            f"{folder} holds another run: it differs in {', '.join(other)}. "
            "Choose another name for this run, or delete the folder"
        )
    return previous


def other_settings(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, both values of every setting by which two runs learn otherwise.

    Those of an older version lack what came later, which is off by default.
    """
    was, now = _flat(was), _flat(now)
    names = [name for name in was | now if was.get(name) != now.get(name) and (name in was or now[name])]
    return {f"settings.{name}": (was.get(name), now.get(name)) for name in names if name != "report_to"}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """With the settings of LoRA among the others."""
    lora = settings.get("lora") or {}
    return {n: v for n, v in settings.items() if n != "lora"} | {f"lora.{n}": v for n, v in lora.items()}


def start_or_join(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json, unless the same run has begun here. Raises `RunError`."""
    if "versions" not in find_run(folder, record):  # not begun, or only prepared
        write_json(folder / "run.json", record)


# --- lines of a step: metrics.jsonl, completions.jsonl ------------------------------------------------------
def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return read_steps(folder / "metrics.jsonl")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; a killed run may leave half a line, or half a letter, at the end."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        return [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); mend or delete this file") from error


def drop_later_steps(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the lines up to that step in the file and returns them: those behind a checkpoint come again."""
    kept = [line for line in read_steps(path) if line["step"] <= step]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    return kept


# --- the result and the way there ---------------------------------------------------------------------------
def save_adapter(loaded: "LoadedModel", folder: Path) -> None:
    """The adapter and the tokenizer in `folder/adapter`, in PEFT's form, with its base by name."""
    with replacing(folder / "adapter") as beside:
        loaded.model.save_pretrained(beside, save_embedding_layers=False)  # else it looks on the hub
        loaded.tokenizer.save_pretrained(beside)
        settings = json.loads((beside / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(beside / "adapter_config.json", settings | {"base_model_name_or_path": loaded.base})


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave a half-written one behind."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(numbered, key=_step_of, reverse=True)
    return next(filter(_is_whole, newest_first), None)


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
    if len(parts) < 2 + PROCESSES:  # a process may write its random state after the first has ended the rest
        return False
    return state.get("global_step") == _step_of(checkpoint) and all(map(zipfile.is_zipfile, parts))


# --- whole or not at all, on a disk that may be full or read-only -------------------------------------------
@contextlib.contextmanager
def replacing(target: Path, raises: type[IronLogicError] = RunError) -> Iterator[Path]:
    """A place to write a file or folder to; written whole it takes the target's place, after an error nothing does.

    Whatever a library says of a full or read-only disk becomes one error of the type `raises`.
    """
    part, old = (target.with_name(f"{target.name}.{end}") for end in ("part", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        if target.is_dir():
            _remove(old)
            target.rename(old)
        part.replace(target)
        _remove(old)
    except (OSError, SafetensorError) as error:
        raise raises(no_room(target, error)) from error
    finally:
        with contextlib.suppress(OSError):
            _remove(part)
        if old.exists() and not target.exists():  # interrupted between two names
            old.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def no_room(place: Path, error: Exception) -> str:
    """The message of that error."""
    cause = getattr(error, "strerror", None) or error
    return (
        f"{place} can't be written ({cause}); what was there before is untouched. Free space there, or choose "
        "another folder (for runs: IRONLOGIC_RUNS), and run this again"
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
