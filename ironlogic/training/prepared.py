"""A run folder that is written first and trained later, in one process or several, here or elsewhere.

`prepare_sft` loads no model and trains nothing. `python -m ironlogic.training FOLDER` trains the folder in one
process, `torchrun --nproc_per_node 2 -m ironlogic.training FOLDER` in two, each with its own card and a whole copy
of the model (data parallel; a model that is too large for one card is not split; where the rows don't come out
even, the last step repeats some). Text, pictures and both stages of a splice go the same way; GRPO doesn't.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

import ironlogic
from ironlogic.burden import Burden
from ironlogic.data.chats import Chats, image_parts, load_chats
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import (
    Run,
    RunError,
    find_run,
    load_start,
    read_record,
    replacing,
    run_folder,
    write_json,
)
from ironlogic.training.stages import Watch, content_hash, describe_inputs

__all__ = ["prepare_sft", "rows_hash", "train_prepared", "write_chats"]

# What trains each stage, as the package's front door has it: this room knows none of those built on it
_TRAIN = {"sft": "train_sft", "ft": "train_sft", "projector": "train_projector", "instruct": "train_instruct"}


def prepare_sft(
    model: str | Path,
    chats: Chats,
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None = None,
    four_bit: bool = True,
    stage: Literal["sft", "projector", "instruct"] = "sft",
) -> Path:
    """A run folder that `python -m ironlogic.training` can train, here or on another machine; loads no model.

    `stage`: what `train_sft`, `train_projector` or `train_instruct` would do; the other arguments are theirs.
    `model` is what `load_model` takes (of a splice what `save_spliced` wrote), or the path of an earlier run, which
    may still have to be trained. Raises `RunError` when the folder holds another run or can't be written.
    """
    folder, sha256 = run_folder(run), rows_hash(chats)
    if stage not in ("sft", "projector", "instruct"):
        raise RunError(f"stage is {stage!r}; expected sft, projector or instruct")
    if burden is not None:
        if stage != "sft":
            raise RunError(f"a burden with stage {stage!r}; the stages of a splice train without one")
        stage = "ft"
    record = describe_inputs(stage, str(model), four_bit, len(chats), sha256, settings, burden)
    if not find_run(folder, record):
        write_chats(folder, chats)
        write_json(folder / "run.json", record)
    return folder


def train_prepared(run: str | Path, *, watch: Watch | None = None) -> Run:
    """Trains what the folder carries. Raises `RunError` when there is nothing, or it was changed."""
    folder = run_folder(run)
    record, path = read_record(folder), folder / "chats.jsonl"
    for name in ("run.json", "chats.jsonl"):
        if not (folder / name).is_file():
            raise RunError(f"{folder}: no {name} here; expected a folder written by train_sft or prepare_sft")
    try:
        chats = load_chats(path)
        settings = TrainSettings(**record["settings"] | {"lora": LoraSettings(**record["settings"]["lora"])})
        more = {"burden": Burden(**record["burden"])} if record["burden"] else {}
        train = _TRAIN[record["stage"]]
        unchanged = rows_hash(chats) == record["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}: run.json or chats.jsonl is damaged ({error!r:.200}); prepare it again"
        ) from error
    if not unchanged:
        raise RunError(f"{path}: not the rows that run.json names; prepare the folder again")
    loaded = load_start(record["model"], four_bit=record["four_bit"], max_length=settings.max_length)
    return getattr(ironlogic, train)(loaded, chats, settings, run=folder.absolute(), watch=watch, **more)


# --- the rows in the folder -------------------------------------------------------------------------------
def rows_hash(chats: Chats) -> str:
    """sha256 of the conversations; a picture counts by what it shows, not by where it lies.

    Raises `RunError` for what are no chats.
    """
    if not isinstance(chats, Chats):
        raise RunError(f"the chats are a {type(chats).__name__}; expected what load_chats or make_chats returns")

    def named(messages: list[dict]) -> list[dict]:
        for part in image_parts(messages):
            with contextlib.suppress(PictureError):  # one that can't be read is told when its row is encoded
                part["image"] = check_picture(part.get("image"))
        return messages

    return content_hash(map(named, chats))


def write_chats(folder: Path, chats: Chats) -> None:
    """chats.jsonl with its pictures, unless it is there: run.json, written after it, says whether it is whole."""
    if (folder / "run.json").exists():
        return
    keys = chats.rows["row"][:] if "row" in chats.rows.column_names else None  # they key the burden
    with replacing(folder / "chats.jsonl") as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for index, messages in enumerate(chats):
            for part in image_parts(messages):
                part["image"] = _carry(part.get("image"), folder)
            row = {"messages": messages} | ({"row": keys[index]} if keys else {})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _carry(picture: Any, folder: Path) -> str | None:
    """Its name inside the folder, where a copy lies; of one that can't be read, what came."""
    try:
        content = picture_bytes(picture)
        file = folder / "pictures" / check_picture(content)
    except PictureError:
        return picture if isinstance(picture, str) else None
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return f"pictures/{file.name}"
