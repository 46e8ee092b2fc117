"""What every stage of training shares: its record, its trainer's settings, metrics, resuming and the end.

A stage is a stock trainer of transformers or TRL around a model of `models`; it writes into a folder of `runs`. The
rows and the loss are the stage's own: `sft`, `grpo`, `vision.train`.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ironlogic import __version__
from ironlogic.models import (
    LoadedModel,
    ModelError,
    add_lora,
    free_memory,
    lora_places,
    trainer_hardware,
    trainer_optimizer,
)
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import (
    PROCESSES,
    Run,
    RunError,
    drop_later_steps,
    find_run,
    has_room,
    newest_whole_checkpoint,
    no_room,
    read_metrics,
    write_json,
)

import filelock
import peft
import psutil
import torch
import transformers
from safetensors import SafetensorError
from transformers.integrations import integration_utils

__all__ = ["Watch", "content_hash", "describe_stage", "finish_stage", "finished_run", "fit", "trainer_arguments"]

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo")
Watch = Callable[[list[dict[str, Any]]], None]  # called with all metrics at every logged step

# Of several processes without a card, each goes on at the place "cpu:0", which torch.load (2.13) doesn't know
torch.serialization.register_package(11, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)


# --- the record -----------------------------------------------------------------------------------------------
def describe_inputs(
    stage: str, model: str, four_bit: bool, rows: int, data_sha256: str, settings: Any, burden: Any = None
) -> dict[str, Any]:
    """What goes into a stage, whatever machine trains it: the part of run.json that makes two runs the same.

    `settings` and `burden` are dataclasses. Raises `RunError` for a tracker that is not here.
    """
    _check_tracker(settings.report_to)
    return {
        "stage": stage,
        "model": model,
        "four_bit": four_bit,
        "rows": rows,
        "data_sha256": data_sha256,
        "settings": _as_json(settings),
        "burden": burden and _as_json(burden),
        "finished": False,
    }


def describe_stage(
    stage: str, loaded: LoadedModel, rows: int, data_sha256: str, settings: Any, *, burden: Any = None, **more: Any
) -> dict[str, Any]:
    """run.json at the start: what goes in, and where it is trained."""
    four_bit = loaded.four_bit_share > 0
    return {
        "ironlogic": __version__,
        **describe_inputs(stage, loaded.source, four_bit, rows, data_sha256, settings, burden),
        "four_bit_share": round(loaded.four_bit_share, 4),
        "backend": loaded.backend,
        "device": torch.cuda.get_device_name() if loaded.device.type == "cuda" else platform.processor() or "cpu",
        "versions": {name: _version(name) for name in _PACKAGES},
        "processes": PROCESSES,
        **more,
    }


def _as_json(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))  # as it will be read again: no tuples


def _check_tracker(name: str) -> None:
    if name == "none" or name in (installed := integration_utils.get_available_reporting_integrations()):
        return
    if name in integration_utils.INTEGRATION_TO_CALLBACK:
        raise RunError(f'report_to is {name!r}, which is not installed here; install it, or take report_to="none"')
    known = ", ".join(["none", *integration_utils.INTEGRATION_TO_CALLBACK])
    raise RunError(f"report_to is {name!r}; expected one of {known} (installed: {', '.join(installed) or 'none'})")


def content_hash(rows: Iterable[Any]) -> str:
    """sha256 of rows, in their order, as JSON writes them (what it can't hold, by its `repr`)."""
    content = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=repr)
        content.update(text.encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def with_trained_adapter(loaded: LoadedModel, lora: LoraSettings, *, seed: int) -> LoadedModel:
    """The model whose LoRA adapter, and nothing else, is trained: the one it carries, else a fresh one.

    Seeds torch's global generators, before any weight is drawn: TRL 1.14 doesn't.
    """
    transformers.set_seed(seed)
    if not isinstance(loaded.model, peft.PeftModel):
        return add_lora(loaded, lora, seed=seed)
    if list(loaded.model.peft_config) != ["default"]:
        several = ", ".join(loaded.model.peft_config)
        raise ModelError(
            f"{loaded.source} carries adapters by name ({several}); load the one to train by its folder"
        )
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loaded


# --- the trainer ----------------------------------------------------------------------------------------------
def trainer_arguments(settings: TrainSettings, folder: Path, *, steps: int) -> dict[str, Any]:
    """Arguments of transformers.TrainingArguments and its TRL children that are the same in every stage.

    The rows are given in the order of training and hold every epoch, so the trainer makes one pass of `steps`
    optimizer steps.
    """
    return {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": trainer_optimizer(settings.optimizer),
        "logging_steps": max(1, min(settings.log_steps, steps // 5)),
        "logging_nan_inf_filter": False,  # it would print a loss of 0.0
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": settings.report_to,
        "run_name": folder.name,
        "disable_tqdm": True,
        **trainer_hardware(),
    }


# --- training, going on, the end ------------------------------------------------------------------------------
def fit(
    trainer: transformers.Trainer,
    folder: Path,
    watch: Watch | None,
    *,
    columns: Sequence[str] = (),
    may_halve: bool = False,
) -> float:
    """Trains, going on from the newest whole checkpoint; seconds that this took.

    Trained weights become float32 first: TRL makes the adapter of a 4-bit model bfloat16. The folder belongs to
    this process until `finish_stage`; a killed one leaves no lock behind. Metrics are loss, learning rate, gradient
    norm and `columns`, further names of the trainer's log. When memory runs out and it `may_halve`, it goes on with
    half the batch and twice the accumulation, which gives the same updates but for rounding; not in one of several
    processes, for which the others would wait.
    Raises `RunError` when memory is short all the same, another process trains there, the folder can't be written
    or gradients are not finite.
    """
    if trainer.is_world_process_zero():
        _lock(folder)
        trainer.add_callback(_Recorder(folder, watch, columns))
    trainer.add_callback(_StopOnNonFinite())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.floating_point_ops = lambda inputs: 0  # nobody reads it, and it counts all parameters at every step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, integration_utils.TensorBoardCallback):
            callback.logging_dir = str(folder / "tensorboard")  # else in the checkpoints, which go at the end
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    began, fresh = time.perf_counter(), [parameter.detach().cpu().clone() for parameter in trained]
    while not _train(trainer, folder):
        free_memory()
        _halve_batch(trainer, folder, may_halve and PROCESSES == 1)
        for parameter, value in zip(trained, fresh, strict=True):
            parameter.data.copy_(value)
    return time.perf_counter() - began


def _train(trainer: transformers.Trainer, folder: Path) -> bool:
    """True when it came to its end, False when memory ran out."""
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
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return False
        if isinstance(error, RunError) or has_room(folder):
            raise
        raise RunError(no_room(folder, error)) from error
    return True


def _halve_batch(trainer: transformers.Trainer, folder: Path, may_halve: bool) -> None:
    arguments = trainer.args
    rows, forward_passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if rows == 1 or not may_halve:
        raise RunError(
            f"{folder}: out of memory with {rows} row{'s' * (rows > 1)} a forward pass. Choose a smaller "
            "max_length, batch or model; what was saved is untouched"
        )
    smaller = rows // 2 if rows % 2 == 0 else 1
    arguments.per_device_train_batch_size = smaller
    arguments.gradient_accumulation_steps = forward_passes * rows // smaller
    trainer._train_batch_size = arguments.train_batch_size  # the trainer's own copy
    trainer.optimizer = trainer.lr_scheduler = None  # their state belongs to the attempt that failed
    trainer.model_wrapped = trainer.model
    print(
        f"out of memory with {rows} rows a forward pass: going on with {smaller}, "
        f"{arguments.gradient_accumulation_steps} passes a step"
    )


def _lock(folder: Path) -> filelock.BaseFileLock:
    # one object a folder and process: a cell that is run again after an error does not lock itself out
    lock = filelock.FileLock(folder / "writing.lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise RunError(
            f"{folder} is being written by another notebook or process; wait for it, stop it, or choose another "
            "name for this run"
        ) from None
    except OSError as error:
        raise RunError(no_room(folder, error)) from error
    return lock


def finished_run(folder: Path, record: dict[str, Any], watch: Watch | None) -> Run | None:
    """The same run if it has finished here before: its metrics are shown again, its model stays on disk.

    Raises `RunError` when the folder holds another run.
    """
    previous = find_run(folder, record)
    if not previous.get("finished"):
        return None
    if watch and (lines := read_metrics(folder)):
        watch(lines)
    return Run(folder, previous)


def finish_stage(
    folder: Path, record: dict[str, Any], trainer: transformers.Trainer, loaded: LoadedModel, **more: Any
) -> Run:
    """Marks the run as finished, after its result was saved, and drops the checkpoints."""
    record = record | {
        "finished": True,
        "trained_parameters": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
        # by kind of part: weights with an adapter, of how many
        "adapted": {kind: list(counts) for kind, counts in lora_places(loaded.model).items()},
        "steps": trainer.state.global_step,
        "rows_a_pass": trainer.args.per_device_train_batch_size,  # lower than the settings' if memory ran out
        "peak_gib": max((line["peak_gib"] for line in read_metrics(folder)), default=0.0),
        **more,
    }
    if trainer.is_world_process_zero():
        write_json(folder / "run.json", record)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        _lock(folder).release(force=True)
    if (folder / "adapter").is_dir():  # a stage that goes on from here names this run, not its base
        loaded = replace(loaded, source=str(folder / "adapter"))
    return Run(folder, record, loaded)


def _memory_gib() -> float:
    """The peak on a card; on a CPU what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class _Recorder(transformers.TrainerCallback):
    """Writes a line of metrics.jsonl at every logged step and shows it to `watch`."""

    def __init__(self, folder: Path, watch: Watch | None, columns: Sequence[str]) -> None:
        self.path, self.watch = folder / "metrics.jsonl", watch
        self.columns = ("loss", "learning_rate", "grad_norm", *columns)

    def on_train_begin(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.lines = drop_later_steps(self.path, state.global_step)
        self.began = time.perf_counter() - (self.lines[-1]["seconds"] if self.lines else 0.0)

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, "steps": state.max_steps}
        line |= {name: logs[name] for name in self.columns if name in logs}
        line["seconds"] = round(time.perf_counter() - self.began, 3)
        line["peak_gib"] = round(_memory_gib(), 3)
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch:
            self.watch(self.lines)


class _StopOnNonFinite(transformers.TrainerCallback):
    """One NaN ruins every weight at the next optimizer step; stop before it."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # float16 looks for its loss scale by overflowing; it skips such steps
        self.patience = 10 if args.fp16 else 0
        self.overflows = 0

    def on_pre_optimizer_step(self, args, state, control, **_):
        bad = [name for name, p in self.trained if p.grad is not None and not p.grad.isfinite().all()]
        self.overflows = self.overflows + 1 if bad else 0
        if self.overflows > self.patience:
            raise RunError(
                f"step {state.global_step + 1}: the gradients of {len(bad)} tensors are not finite (first: "
                f"{bad[0]}). The weights are still good; lower the learning rate and choose another run name"
            )
