"""A stage of training: model + conversations + settings -> a run folder (`runs`).

Fragmented Training is supervised fine-tuning with a `Burden`. Calling the same stage again on the same folder
goes on where it stopped. Knows no architecture and no device: that is `models`.
"""

import hashlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ironlogic import __version__
from ironlogic.burden import Burden, burden_dataset
from ironlogic.masking import EncodeReport, encode_chats
from ironlogic.models import (
    LoadedModel,
    add_lora,
    as_loaded,
    trainer_hardware,
    trainer_optimizer,
)
from ironlogic.presets import TrainSettings
from ironlogic.runs import (
    Run,
    RunError,
    has_room,
    newest_whole_checkpoint,
    no_room,
    open_run,
    read_metrics,
    run_folder,
    save_adapter,
    start_or_join,
    write_json,
)

import torch  # isort: skip  (models comes first: it imports Unsloth before these)
import datasets  # isort: skip
import peft  # isort: skip
import transformers  # isort: skip
import trl  # isort: skip
from safetensors import SafetensorError  # isort: skip

__all__ = ["Run", "RunError", "open_run", "train_sft"]

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo")
Watch = Callable[[list[dict[str, Any]]], None]


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
    wanted = _describe(loaded, chats, settings, burden)
    previous = start_or_join(folder, wanted)
    if previous.get("finished"):
        if watch and (lines := read_metrics(folder)):
            watch(lines)
        return Run(folder, previous)
    transformers.set_seed(settings.seed)  # before any weight is drawn: TRL 1.14 doesn't
    rows, report = _prepare(loaded, chats, settings, burden)
    loaded = _with_adapter(loaded, settings)
    trainer = _trainer(loaded, rows, settings, folder, watch)
    began = time.perf_counter()
    _train(trainer, folder)
    record = wanted | {
        "finished": True,
        "data": str(report),
        "trained_parameters": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - began, 3),  # of the last session
        "peak_gib": max((line["peak_gib"] for line in read_metrics(folder)), default=0.0),
    }
    save_adapter(loaded, folder)
    write_json(folder / "run.json", record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Run(folder, record, loaded)


def _describe(loaded, chats, settings: TrainSettings, burden: Burden | None) -> dict[str, Any]:
    """What makes two runs the same, and where this one happens."""
    content = hashlib.sha256()
    for messages in chats["messages"]:
        content.update(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return {
        "ironlogic": __version__,
        "stage": "sft" if burden is None else "ft",
        "model": loaded.source,
        "four_bit_share": round(loaded.four_bit_share, 4),
        "rows": len(chats),
        "data_sha256": content.hexdigest(),
        "settings": asdict(settings),
        "burden": None if burden is None else json.loads(json.dumps(asdict(burden))),
        "backend": loaded.backend,
        "device": torch.cuda.get_device_name() if loaded.device.type == "cuda" else platform.processor() or "cpu",
        "versions": {name: _version(name) for name in _PACKAGES},
        "finished": False,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    """The peak on a card; on a CPU what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return psutil.Process().memory_info().rss / 2**30


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
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=1,  # the rows hold every epoch already
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=trainer_optimizer(settings.optimizer),
        logging_steps=max(1, min(settings.log_steps, steps // 5)),
        logging_nan_inf_filter=False,  # it would print a loss of 0.0
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
        **trainer_hardware(),
    )
    trainer = trl.SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=rows,
        processing_class=loaded.tokenizer,
        callbacks=[_Recorder(folder, watch), _StopOnNonFinite()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes the adapter of a 4-bit model bfloat16
            parameter.data = parameter.data.float()
    return trainer


def _train(trainer: trl.SFTTrainer, folder: Path) -> None:
    checkpoint = newest_whole_checkpoint(folder / "checkpoints")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        saved = newest_whole_checkpoint(folder / "checkpoints")
        print(
            f"interrupted at step {trainer.state.global_step}; run this again to go on from "
            f"{saved.name if saved else 'the start'}"
        )
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RunError) or has_room(folder):
            raise
        raise RunError(no_room(folder, error)) from error


class _Recorder(transformers.TrainerCallback):
    """Writes a line of metrics.jsonl at every logged step and shows it to `watch`."""

    def __init__(self, folder: Path, watch: Watch | None) -> None:
        self.folder, self.watch = folder, watch
        self.lines: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        # after a kill, steps behind the checkpoint are trained again: their old lines go
        self.lines = [line for line in read_metrics(self.folder) if line["step"] <= state.global_step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        self.began = time.perf_counter() - (self.lines[-1]["seconds"] if self.lines else 0.0)

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, "steps": state.max_steps}
        line |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        line["seconds"] = round(time.perf_counter() - self.began, 3)
        line["peak_gib"] = round(_memory_gib(), 3)
        self.lines.append(line)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch:
            self.watch(self.lines)


class _StopOnNonFinite(transformers.TrainerCallback):
    """One NaN ruins every weight at the next optimizer step; stop before it."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.patience = (
            10 if args.fp16 else 0
        )  # float16 looks for its loss scale by overflowing; it skips such steps
        self.overflows = 0

    def on_pre_optimizer_step(self, args, state, control, **_):
        bad = [name for name, p in self.trained if p.grad is not None and not p.grad.isfinite().all()]
        self.overflows = self.overflows + 1 if bad else 0
        if self.overflows > self.patience:
            raise RunError(
                f"step {state.global_step + 1}: the gradients of {len(bad)} tensors are not finite (first: "
                f"{bad[0]}). The weights are still good; lower the learning rate and choose another run name"
            )
