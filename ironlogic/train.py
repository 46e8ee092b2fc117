"""A stage of training: model + conversations + settings -> a run folder (`runs`).

Fragmented Training is supervised fine-tuning with a `Burden`. Calling the same stage again on the same folder
goes on where it stopped. Knows no architecture and no device: that is `models`.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden, burden_dataset
from ironlogic.masking import EncodeReport, encode_chats
from ironlogic.models import LoadedModel, add_lora, as_loaded
from ironlogic.presets import TrainSettings
from ironlogic.runs import Run, RunError, open_run, read_metrics, run_folder, save_adapter, start_or_join
from ironlogic.stages import (
    Watch,
    content_hash,
    describe_stage,
    finish_stage,
    fit,
    stage_callbacks,
    trainer_arguments,
)

import datasets  # isort: skip  (models comes first: it imports Unsloth before these)
import peft  # isort: skip
import transformers  # isort: skip
import trl  # isort: skip

__all__ = ["Run", "RunError", "open_run", "train_sft"]


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
    every logged step.

    Raises `RunError` when the folder holds another run, can't be written or the loss is no longer finite.
    """
    loaded, folder = as_loaded(loaded), run_folder(run)
    if not isinstance(chats, datasets.Dataset):
        chats = datasets.Dataset.from_list([{"messages": list(messages)} for messages in chats])
    wanted = describe_stage(
        "sft" if burden is None else "ft",
        loaded,
        len(chats),
        content_hash(chats["messages"]),
        settings,
        burden=None if burden is None else json.loads(json.dumps(asdict(burden))),
    )
    previous = start_or_join(folder, wanted)
    if previous.get("finished"):
        if watch and (lines := read_metrics(folder)):
            watch(lines)
        return Run(folder, previous)
    transformers.set_seed(settings.seed)  # before any weight is drawn: TRL 1.14 doesn't
    rows, report = _prepare(loaded, chats, settings, burden)
    loaded = _with_adapter(loaded, settings)
    trainer = _trainer(loaded, rows, settings, folder, watch)
    seconds = fit(trainer, folder)
    save_adapter(loaded, folder)
    return finish_stage(folder, wanted, trainer, loaded, data=str(report), seconds=round(seconds, 3))


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
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loaded


def _trainer(loaded, rows, settings: TrainSettings, folder: Path, watch: Watch | None) -> trl.SFTTrainer:
    steps = math.ceil(len(rows) / (settings.batch_size * settings.accumulation))
    arguments = trl.SFTConfig(
        **trainer_arguments(settings, folder, steps=steps),
        train_sampling_strategy="sequential",  # the rows are in their order already
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
        callbacks=stage_callbacks(folder, watch),
    )
