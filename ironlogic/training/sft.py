"""A stage of training: model + conversations + settings -> a run folder (`runs`).

Fragmented Training is supervised fine-tuning with a `Burden`. Calling the same stage again on the same folder
goes on where it stopped. Knows no architecture and no device: that is `models`.

The folder also carries what goes in (`stage.json`, `chats.jsonl`), so that the same function trains it elsewhere:
`python -m ironlogic.training.sft FOLDER` in one process, `torchrun --nproc_per_node 2 -m ironlogic.training.sft
FOLDER` in two, each with its own card and a whole copy of the model (data parallel; a model that is too large for
one card is not split; where the rows don't come out even, the last step repeats some). `prepare_sft` writes such a
folder without loading a model.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden, BurdenError, burden_dataset
from ironlogic.data.chats import ChatError, check_chat
from ironlogic.data.masking import EncodeReport, encode_chats
from ironlogic.models import LoadedModel, ModelError, add_lora, as_loaded, load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.session import SessionError
from ironlogic.training.runs import (
    Run,
    RunError,
    no_room,
    open_run,
    read_metrics,
    run_folder,
    save_adapter,
    start_or_join,
    write_json,
)
from ironlogic.training.stages import (
    Watch,
    content_hash,
    describe_stage,
    finish_stage,
    fit,
    stage_callbacks,
    trainer_arguments,
)

import datasets
import peft
import transformers
import trl

__all__ = ["Run", "RunError", "open_run", "prepare_sft", "train_prepared", "train_sft"]

# As torchrun numbers them; DDP adds up what they see, so P of them train P times the rows a step.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train_sft(
    loaded: LoadedModel | Any,
    chats: datasets.Dataset | Sequence[Sequence[dict[str, Any]]],
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None = None,
    watch: Watch | None = None,
) -> Run:
    """Supervised fine-tuning of a LoRA adapter; Fragmented Training when a `burden` is given.

    `chats` has a column `messages` (or is a list of conversations). A model that carries an adapter goes on
    training it, any other gets a fresh one from `settings.lora`. Every epoch of rows is written out before,
    each with its own draw of the burden, so what the model sees can be looked at and resuming is exact.
    `run` is a name in the results folder or a path; if it holds the same run, finished, that is returned, and
    if interrupted, training goes on from the newest whole checkpoint. `watch` is called with all metrics at
    every logged step. Under torchrun an optimizer step takes processes x batch_size x accumulation rows, and
    only the first process writes.

    Raises `RunError` when the folder holds another run, can't be written or the loss is no longer finite.
    """
    loaded, folder = as_loaded(loaded), run_folder(run)
    chats = _as_dataset(chats)
    if not len(chats):
        raise RunError(f"{folder}: there are no conversations to train on")
    stage = _stage(loaded.source, loaded.four_bit_share > 0, chats, settings, burden)
    wanted = describe_stage(
        stage["stage"],
        loaded,
        stage["rows"],
        stage["data_sha256"],
        settings,
        burden=stage["burden"],
        processes=PROCESSES,
    )
    prepared = None if _look(folder) else _prepare(loaded, chats, settings, burden)  # bad rows claim no folder
    previous = _start(folder, stage, chats, wanted) if PROCESS == 0 else _look(folder)
    if previous.get("finished"):
        if watch and (lines := read_metrics(folder)):
            watch(lines)
        return Run(folder, previous)
    rows, report = prepared or _prepare(loaded, chats, settings, burden)
    transformers.set_seed(settings.seed)  # before any weight is drawn: TRL 1.14 doesn't
    loaded = _with_adapter(loaded, settings)
    trainer = _trainer(loaded, rows, settings, folder, watch)
    seconds = fit(trainer, folder, may_halve=PROCESSES == 1)  # the others would wait for one that halves alone
    if PROCESS == 0:
        save_adapter(loaded, folder)
    return finish_stage(folder, wanted, trainer, loaded, data=str(report), seconds=round(seconds, 3))


def prepare_sft(
    model: str | Path,
    chats: datasets.Dataset | Sequence[Sequence[dict[str, Any]]],
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None = None,
    four_bit: bool = True,
) -> Path:
    """A run folder that `python -m ironlogic.training.sft` can train, here or on another machine; loads no model.

    Arguments as in `train_sft`; `model` is what `load_model` takes. Raises `RunError` when the folder holds another
    stage or can't be written.
    """
    folder, chats = run_folder(run), _as_dataset(chats)
    _write_stage(folder, _stage(str(model), four_bit, chats, settings, burden), chats)
    return folder


def train_prepared(folder: Path, *, watch: Watch | None = None) -> Run:
    """`train_sft` on what the folder carries. Raises `RunError` when there is nothing, or it was changed."""
    try:
        stage = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        lines = (folder / "chats.jsonl").read_text(encoding="utf-8").split("\n")
        chats = datasets.Dataset.from_list([json.loads(line) for line in lines if line])
        settings = TrainSettings(**stage["settings"] | {"lora": LoraSettings(**stage["settings"]["lora"])})
        same = content_hash(chats["messages"]) == stage["data_sha256"]
    except OSError as error:
        wanted = "expected a folder written by train_sft or prepare_sft"
        raise RunError(f"{folder}: no {Path(str(error.filename)).name} here; {wanted}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}: stage.json or chats.jsonl is damaged ({error!r:.200}); prepare it again"
        ) from error
    if not same:
        raise RunError(f"{folder / 'chats.jsonl'}: not the rows that stage.json names; prepare the folder again")
    loaded = load_model(stage["model"], four_bit=stage["four_bit"], max_length=settings.max_length)
    burden = stage["burden"] and Burden(**stage["burden"])
    return train_sft(loaded, chats, settings, run=folder.resolve(), burden=burden, watch=watch)


# --- the folder -------------------------------------------------------------------------------------------
def _as_dataset(chats: datasets.Dataset | Sequence[Sequence[dict[str, Any]]]) -> datasets.Dataset:
    known = isinstance(chats, datasets.Dataset)
    for row, messages in enumerate(chats["messages"] if known else chats):
        try:
            turns = check_chat(messages)
        except ChatError as error:
            raise RunError(f"row {row}: {error}; load_chats leaves such rows out and reports them") from error
        parts = [part for turn in turns if not isinstance(turn["content"], str) for part in turn["content"]]
        if any(part["type"] == "image" for part in parts):
            raise RunError(
                f"row {row} holds a picture, which this stage would not see; vision_train has those that do"
            )
    if not known:
        return datasets.Dataset.from_list([{"messages": list(chat)} for chat in chats])
    keys = chats["row"] if "row" in chats.column_names else []
    if any(type(key) not in (int, str) for key in keys) or len(set(keys)) < len(keys):
        return chats.remove_columns("row")  # a column of the user's that names no row
    return chats


def _stage(
    model: str, four_bit: bool, chats: datasets.Dataset, settings: TrainSettings, burden: Burden | None
) -> dict[str, Any]:
    """stage.json: what goes in, whatever machine trains it."""
    return {
        "stage": "sft" if burden is None else "ft",
        "model": model,
        "four_bit": four_bit,
        "rows": len(chats),
        "data_sha256": content_hash(chats["messages"]),
        "settings": json.loads(json.dumps(asdict(settings))),
        "burden": None if burden is None else json.loads(json.dumps(asdict(burden))),
    }


def _write_stage(folder: Path, stage: dict[str, Any], chats: datasets.Dataset) -> None:
    path, beside = folder / "stage.json", folder / "chats.part"
    if path.exists():
        previous = json.loads(path.read_text(encoding="utf-8"))
        if other := [name for name, value in stage.items() if previous.get(name) != value]:
            raise RunError(
                f"{folder} was prepared for another run: it differs in {', '.join(other)}. "
                "Choose another name for this run, or delete the folder"
            )
        return
    columns = [name for name in ("messages", "row") if name in chats.column_names]  # `row` keys the burden
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chats.select_columns(columns))
        beside.replace(folder / "chats.jsonl")
        write_json(path, stage)
    except OSError as error:
        raise RunError(no_room(folder, error)) from error


def _start(folder: Path, stage: dict[str, Any], chats: datasets.Dataset, wanted: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "run.json").exists():
        _write_stage(folder, stage, chats)
    previous = start_or_join(folder, wanted)
    before = previous.get("processes", 1)
    if before != PROCESSES and not previous.get("finished"):
        raise RunError(
            f"{folder} was begun with {before} process{'es' * (before > 1)}, here are {PROCESSES}: a step would "
            "take another number of rows. Go on with as many, or choose another name for this run"
        )
    return previous


def _look(folder: Path) -> dict[str, Any]:
    """run.json as it is, for the processes that don't write; the first one may not have begun it."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- data -------------------------------------------------------------------------------------------------
def _prepare(
    loaded: LoadedModel, chats: datasets.Dataset, settings: TrainSettings, burden: Burden | None
) -> tuple[datasets.Dataset, EncodeReport]:
    """All epochs one after the other, tokenised, in the order of training."""
    rows = burden_dataset(
        chats,
        burden or Burden(ratio=0.0),
        seed=settings.seed,
        epochs=settings.epochs,
        tokenizer=loaded.tokenizer,
    )
    max_length = min(settings.max_length, loaded.max_length)
    encoded, report = encode_chats(rows, loaded.tokenizer, loss=settings.loss, max_length=max_length)
    places = {key: i for i, key in enumerate(zip(encoded["epoch"], encoded["row"], strict=True))}
    order = [places[key] for key in _training_order(rows, settings) if key in places]
    return encoded.select(order).select_columns(["input_ids", "labels"]), report


def _training_order(rows: datasets.Dataset, settings: TrainSettings) -> list[tuple[int, Any]]:
    """(epoch, row) of every row, epoch by epoch in random order, rows of similar length in one batch.

    Drawn over all rows, before any is left out, and by length in characters, which a burden leaves as it is: a run
    and its control twin go through the same rows in the same order.
    """
    length = {
        (epoch, row): sum(len(str(message["content"])) for message in messages)
        for epoch, row, messages in zip(rows["epoch"], rows["row"], rows["messages"], strict=True)
    }
    order: list[tuple[int, Any]] = []
    for epoch in range(settings.epochs):
        rng = random.Random(f"{settings.seed}-{epoch}")
        mine = [key for key in length if key[0] == epoch]
        rng.shuffle(mine)
        size = settings.batch_size
        for begin in range(0, len(mine), size * 16):
            nearby = sorted(mine[begin : begin + size * 16], key=length.get)
            batches = [nearby[i : i + size] for i in range(0, len(nearby), size)]
            rng.shuffle(batches)
            order += [key for batch in batches for key in batch]
    return order


# --- training ---------------------------------------------------------------------------------------------
def _with_adapter(loaded: LoadedModel, settings: TrainSettings) -> LoadedModel:
    if not isinstance(loaded.model, peft.PeftModel):
        return add_lora(loaded, settings.lora, seed=settings.seed)
    if list(loaded.model.peft_config) != ["default"]:
        several = ", ".join(loaded.model.peft_config)
        raise ModelError(
            f"{loaded.source} carries adapters by name ({several}); load the one to train by its folder"
        )
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loaded


def _trainer(loaded, rows, settings: TrainSettings, folder: Path, watch: Watch | None) -> trl.SFTTrainer:
    steps = math.ceil(len(rows) / (settings.batch_size * settings.accumulation * PROCESSES))
    arguments = trl.SFTConfig(
        **trainer_arguments(settings, folder, steps=steps),
        train_sampling_strategy="sequential",  # the rows are in their order already
        ddp_find_unused_parameters=settings.lora.experts,  # an expert may get no token in a step
        neftune_noise_alpha=settings.neftune_alpha or None,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return trl.SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=rows,
        processing_class=loaded.tokenizer,
        callbacks=stage_callbacks(folder, watch)[0 if PROCESS == 0 else 1 :],  # the recorder comes first
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ironlogic.training.sft", description=train_prepared.__doc__)
    parser.add_argument(
        "folder", help="a folder written by train_sft or prepare_sft, or its name in the results folder"
    )
    named = parser.parse_args().folder
    folder = Path(named).absolute() if Path(named).is_dir() else run_folder(named)

    def watch(lines: list[dict[str, Any]]) -> None:
        print("step {step} of {steps}: loss {loss:.4f}, {seconds:.0f} s".format(**lines[-1]), flush=True)

    try:
        run = train_prepared(folder, watch=watch if PROCESS == 0 else None)
    except (BurdenError, ChatError, ModelError, RunError, SessionError) as error:
        raise SystemExit(str(error)) from error
    if PROCESS == 0:
        print(f"finished: {run.adapter}")


if __name__ == "__main__":
    main()
