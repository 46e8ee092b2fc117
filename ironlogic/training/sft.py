"""Supervised fine-tuning of a LoRA adapter; with a `Burden` it is Fragmented Training.

Model + conversations + settings -> a run folder (`runs`). Calling the same stage again on the same folder goes on
where it stopped. The folder carries what goes in (`run.json`, `chats.jsonl`), so that it can be trained elsewhere,
and in several processes (`prepared`).
"""

import math
import random
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden
from ironlogic.data.chats import ChatError, Chats, image_parts
from ironlogic.data.masking import IGNORED, encode_chats
from ironlogic.models import LoadedModel, as_loaded
from ironlogic.presets import TrainSettings
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.training.prepared import rows_hash, write_chats
from ironlogic.training.runs import PROCESS, PROCESSES, Run, RunError, run_folder, save_adapter, start_or_join
from ironlogic.training.stages import (
    Watch,
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

__all__ = ["train_sft"]


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
    splice): its eyes stay as they are unless `settings.lora.vision`, and the burden moves words alone. A model that
    carries an adapter goes on training it, any other gets a fresh one from `settings.lora`. Every epoch of rows is
    written out before, each with its own draw of the burden, so what the model sees can be looked at and resuming
    is exact. `run` is a name in the results folder or a path; if it holds the same run, finished, that is returned,
    and if interrupted, training goes on from the newest whole checkpoint. `watch` is called with all metrics at
    every logged step. Under torchrun an optimizer step takes processes x batch_size x accumulation rows, and
    only the first process writes.

    Raises `RunError` when the folder holds another run, can't be written or the loss is no longer finite.
    """
    loaded, folder, sha256 = as_loaded(loaded), run_folder(run), rows_hash(chats)
    pictured = next((row for row, messages in enumerate(chats) if image_parts(messages)), None)
    if pictured is not None and loaded.processor is None:
        error = ChatError(f"holds a picture, but {loaded.source} takes none", field="messages")
        raise RunError(f"{chats.reject(pictured, error)}; load a model that sees, or leave such rows out")
    stage = "sft" if burden is None else "ft"
    record = describe_stage(stage, loaded, len(chats), sha256, settings, burden=burden)
    if finished := finished_run(folder, record, watch):
        return finished
    # before anything is written: bad rows claim no folder
    rows, batches, report = _prepare(loaded, chats, settings, burden, pictured is not None)
    if PROCESS == 0:
        write_chats(folder, chats)
        start_or_join(folder, record)
    loaded = with_trained_adapter(loaded, settings.lora, seed=settings.seed)
    trainer = _trainer(loaded, rows, batches, settings, folder)
    if settings.padding_free:
        _check_rows_are_apart(trainer, rows)
    seconds = fit(trainer, folder, watch, may_halve=True)
    if PROCESS == 0:
        save_adapter(loaded, folder)
    return finish_stage(folder, record, trainer, loaded, data=report, seconds=round(seconds, 3))


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
