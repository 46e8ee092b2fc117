"""Supervised fine-tuning of a LoRA adapter; with a `Burden` it is Fragmented Training.

Model + conversations + settings -> a run folder (`runs`). Calling the same stage again on the same folder goes on
where it stopped. The folder carries what goes in (`run.json`, `chats.jsonl`), so that it can be trained elsewhere:
`python -m ironlogic.training FOLDER` in one process, `torchrun --nproc_per_node 2 -m ironlogic.training FOLDER` in
two, each with its own card and a whole copy of the model (data parallel; a model that is too large for one card is
not split; where the rows don't come out even, the last step repeats some). `prepare_sft` writes such a folder
without loading a model.
"""

import contextlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden
from ironlogic.data.chats import ChatError, Chats, image_parts, load_chats
from ironlogic.data.masking import IGNORED, encode_chats
from ironlogic.data.pictures import PictureError, check_picture, picture_bytes
from ironlogic.models import LoadedModel, as_loaded, load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.training.runs import (
    Run,
    RunError,
    find_run,
    read_record,
    replacing,
    run_folder,
    save_adapter,
    start_or_join,
    write_json,
)
from ironlogic.training.stages import (
    Watch,
    content_hash,
    describe_inputs,
    describe_stage,
    finish_stage,
    finished_run,
    fit,
    trainer_arguments,
    with_trained_adapter,
)

import datasets
import torch
import trl

__all__ = ["prepare_sft", "train_prepared", "train_sft"]

# As torchrun numbers them; DDP adds up what they see, so P of them train P times the rows a step.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train_sft(
    loaded: LoadedModel | Any,
    chats: Chats,
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None = None,
    watch: Watch | None = None,
) -> Run:
    """Supervised fine-tuning of a LoRA adapter; Fragmented Training when a `burden` is given.

    `chats` come from `load_chats` or `make_chats`; with pictures where the model takes them (Qwen3-VL, Gemma 3, a
    splice): its eyes stay as they are, and the burden moves words alone. A model that carries an adapter goes on
    training it, any other gets a fresh one from `settings.lora`. Every epoch of rows is written out before, each
    with its own draw of the burden, so what the model sees can be looked at and resuming is exact.
    `run` is a name in the results folder or a path; if it holds the same run, finished, that is returned, and
    if interrupted, training goes on from the newest whole checkpoint. `watch` is called with all metrics at
    every logged step. Under torchrun an optimizer step takes processes x batch_size x accumulation rows, and
    only the first process writes.

    Raises `RunError` when the folder holds another run, can't be written or the loss is no longer finite.
    """
    loaded, folder = as_loaded(loaded), run_folder(run)
    pictured = _find_picture(chats)
    if pictured is not None and loaded.processor is None:
        error = ChatError(f"holds a picture, but {loaded.source} takes none", field="messages")
        raise RunError(f"{chats.reject(pictured, error)}; load a model that sees, or leave such rows out")
    stage = "sft" if burden is None else "ft"
    sha256 = rows_hash(chats)
    record = describe_stage(stage, loaded, len(chats), sha256, settings, burden=burden, processes=PROCESSES)
    if finished := finished_run(folder, record, watch):
        return finished
    # before anything is written: bad rows claim no folder
    rows, batches, report = _prepare(loaded, chats, settings, burden, pictured is not None)
    if PROCESS == 0:
        _write_chats(folder, chats)
        start_or_join(folder, record)
    loaded = with_trained_adapter(loaded, settings.lora, seed=settings.seed)
    trainer = _trainer(loaded, rows, batches, settings, folder)
    if settings.padding_free:
        _check_rows_are_apart(trainer, rows)
    # alone: the other processes would wait for one that halves its batch
    seconds = fit(trainer, folder, watch, may_halve=PROCESSES == 1)
    if PROCESS == 0:
        save_adapter(loaded, folder)
    return finish_stage(folder, record, trainer, loaded, data=report, seconds=round(seconds, 3))


def prepare_sft(
    model: str | Path,
    chats: Chats,
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None = None,
    four_bit: bool = True,
) -> Path:
    """A run folder that `python -m ironlogic.training` can train, here or on another machine; loads no model.

    Arguments as in `train_sft`; `model` is what `load_model` takes. Raises `RunError` when the folder holds another
    run or can't be written.
    """
    folder = run_folder(run)
    _find_picture(chats)
    stage = "sft" if burden is None else "ft"
    sha256 = rows_hash(chats)
    record = describe_inputs(stage, str(model), four_bit, len(chats), sha256, settings, burden)
    if not find_run(folder, record):
        _write_chats(folder, chats)
        write_json(folder / "run.json", record)
    return folder


def train_prepared(run: str | Path, *, watch: Watch | None = None) -> Run:
    """`train_sft` on what the folder carries. Raises `RunError` when there is nothing, or it was changed."""
    folder = run_folder(run)
    record, path = read_record(folder), folder / "chats.jsonl"
    for name in ("run.json", "chats.jsonl"):
        if not (folder / name).is_file():
            raise RunError(f"{folder}: no {name} here; expected a folder written by train_sft or prepare_sft")
    try:
        chats = load_chats(path)
        settings = TrainSettings(**record["settings"] | {"lora": LoraSettings(**record["settings"]["lora"])})
        burden = record["burden"] and Burden(**record["burden"])
        unchanged = rows_hash(chats) == record["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder}: run.json or chats.jsonl is damaged ({error!r:.200}); prepare it again"
        ) from error
    if not unchanged:
        raise RunError(f"{path}: not the rows that run.json names; prepare the folder again")
    loaded = load_model(record["model"], four_bit=record["four_bit"], max_length=settings.max_length)
    return train_sft(loaded, chats, settings, run=folder.absolute(), burden=burden, watch=watch)


# --- the folder -------------------------------------------------------------------------------------------
def _find_picture(chats: Chats) -> int | None:
    """The first row that holds a picture. Raises `RunError` for what are no chats."""
    if not isinstance(chats, Chats):
        raise RunError(f"the chats are a {type(chats).__name__}; expected what load_chats or make_chats returns")
    return next((row for row, messages in enumerate(chats) if image_parts(messages)), None)


def rows_hash(chats: Chats) -> str:
    """sha256 of the conversations; a picture counts by what it shows, not by where it lies."""

    def named(messages: list[dict]) -> list[dict]:
        for part in image_parts(messages):
            with contextlib.suppress(PictureError):  # one that can't be read is told when its row is encoded
                part["image"] = check_picture(part.get("image"))
        return messages

    return content_hash(map(named, chats))


def _write_chats(folder: Path, chats: Chats) -> None:
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


# --- data -------------------------------------------------------------------------------------------------
def _prepare(
    loaded: LoadedModel, chats: Chats, settings: TrainSettings, burden: Burden | None, pictures: bool
) -> tuple[datasets.Dataset, PictureBatches | None, str]:
    """All epochs one after the other, tokenised, in the order of training; what adds the pictures; a report."""
    burden = burden or Burden(ratio=0.0)
    burdened = burden.apply(chats, epochs=settings.epochs, seed=settings.seed, tokenizer=loaded.tokenizer)
    options = {"loss": settings.loss, "max_length": min(settings.max_length, loaded.max_length)}
    columns, batches = ["input_ids", "labels"], None
    if pictures:
        if settings.padding_free:
            raise RunError("padding_free: not with pictures; leave it off")
        rows, reader, rejected = encode_pictures(loaded, burdened, most=settings.pictures, **options)
        encoded, report = datasets.Dataset.from_list(rows), f"{len(rows)} rows, {rejected}"
        columns, batches = [*columns, "picture_keys"], PictureBatches(reader)
    else:
        encoded, report = encode_chats(burdened, loaded.tokenizer, **options)
    places = {key: i for i, key in enumerate(zip(encoded["epoch"], encoded["row"], strict=True))}
    order = [places[key] for key in _training_order(burdened.rows, settings) if key in places]
    return encoded.select(order).select_columns(columns), batches, str(report)


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
        keys = [key for key in length if key[0] == epoch]
        rng.shuffle(keys)
        size = settings.batch_size
        for begin in range(0, len(keys), size * 16):
            nearby = sorted(keys[begin : begin + size * 16], key=length.get)
            batches = [nearby[i : i + size] for i in range(0, len(nearby), size)]
            rng.shuffle(batches)
            order += [key for batch in batches for key in batch]
    return order


# --- training ---------------------------------------------------------------------------------------------
def _trainer(
    loaded: LoadedModel,
    rows: datasets.Dataset,
    batches: PictureBatches | None,
    settings: TrainSettings,
    folder: Path,
) -> trl.SFTTrainer:
    steps = math.ceil(len(rows) / (settings.batch_size * settings.accumulation * PROCESSES))
    arguments = trl.SFTConfig(
        **trainer_arguments(settings, folder, steps=steps),
        train_sampling_strategy="sequential",  # the rows are in their order already
        ddp_find_unused_parameters=settings.lora.experts,  # an expert may get no token in a step
        neftune_noise_alpha=settings.neftune_alpha or None,
        max_length=None,
        packing=False,
        padding_free=settings.padding_free,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=batches is None,
    )
    # Unsloth gives padding-free batches to rows that are known to be cut already; it looks here
    rows._unsloth_truncated_to = min(settings.max_length, loaded.max_length)
    return trl.SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=rows,
        processing_class=loaded.tokenizer,
        data_collator=batches,
    )


def _check_rows_are_apart(trainer: trl.SFTTrainer, rows: datasets.Dataset) -> None:
    """Raises `RunError` if a row of a padding-free batch sees the one before it: another there, another loss.

    Position ids that start anew are all that parts the rows; a model, or an attention, may not look at them.
    """
    if not trainer.args.padding_free:
        print("padding_free: not for this model, as Unsloth knows it; its batches are padded")
        return
    before, row = (rows[i]["input_ids"][:64] for i in (0, -1))
    losses = []
    for neighbour in (before, before[::-1]):
        ignored = {"input_ids": neighbour, "labels": [IGNORED] * len(neighbour)}
        batch = trainer._prepare_inputs(trainer.data_collator([ignored, {"input_ids": row, "labels": row}]))
        trainer.model.eval()  # without dropout
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses.append(float(trainer.model(**batch, use_cache=False).loss))
        trainer.model.train()
    rounding = 0.01 if trainer.args.bf16 or trainer.args.fp16 else 1e-4
    if not math.isclose(*losses, rel_tol=rounding):
        raise RunError(
            f"padding_free: rows of one batch see each other in this model (loss {losses[0]:.5f} behind one row, "
            f"{losses[1]:.5f} behind another); leave padding_free off, or load it with flash attention"
        )
