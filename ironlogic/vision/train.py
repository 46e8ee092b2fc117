"""The two training stages of a spliced vision-language model.

Stage 1, `train_projector`: the tower and the language model are frozen, the projector learns (LLaVA's feature
alignment, Liu et al. 2023, arXiv 2304.08485). Stage 2, `train_instruct`: the projector goes on, with LoRA on the
language model; the adapter carries both. Both are a stock `Trainer` whose loss is `label_loss`, over features that
are computed once. Each stage asks `check_splice` first, and refuses a splice that fails. In several processes:
`prepare_sft(..., stage="projector")` or `"instruct"`.
"""

import contextlib
import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ironlogic.data.chats import Chats
from ironlogic.models import (
    LoadedModel,
    ModelError,
    bare,
    free_memory,
    load_model,
    projector_name,
    projector_of,
)
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.picture_rows import PictureBatches, encode_pictures
from ironlogic.training.prepared import rows_hash
from ironlogic.training.runs import (
    PROCESS,
    PROCESSES,
    Run,
    RunError,
    no_room,
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
    finished_run,
    fit,
    trainer_arguments,
)
from ironlogic.vision.answers import answer_pictures
from ironlogic.vision.check import check_splice
from ironlogic.vision.features import (
    Features,
    cached_tower,
    compute_features,
    label_loss,
    open_head,
    order_by_length,
    tower_key,
)

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

__all__ = ["reopen", "save_spliced", "train_and_answer", "train_instruct", "train_projector"]

_MARK = "save_spliced.json"  # in the folder of a whole model: it may be written anew


def train_projector(
    loaded: LoadedModel,
    chats: Chats,
    settings: TrainSettings,
    *,
    run: str | Path,
    watch: Watch | None = None,
    cache: str | Path | None = "features",
) -> Run:
    """Stage 1: only the projector learns, inside `loaded`. Its weights come out as `projector.safetensors`.

    `chats` come from `load_chats` or `make_chats`; a row without a picture, or with one that can't be read, is left
    out and told in `run.json`. `cache` is a folder, by default one of the results folder, where features of the
    tower are kept; None: the tower runs at every step. The folder of a finished run is read, an interrupted one
    goes on, with the same bytes as if it had not been interrupted; either wants the splice as it was before.

    Raises `RunError`, `SpliceError` if the splice fails its check, `ChatError` if no row is left.
    """
    return _train("projector", loaded, chats, settings, run, watch, cache)


def train_instruct(
    loaded: LoadedModel,
    chats: Chats,
    settings: TrainSettings,
    *,
    run: str | Path,
    watch: Watch | None = None,
    cache: str | Path | None = "features",
) -> Run:
    """Stage 2: the projector goes on from where it is in `loaded`, with a fresh LoRA on the language model.

    The tower never gets a LoRA. The adapter, with the projector inside, is plain PEFT in `adapter/`. Rows of text
    alone are trained too. Everything else as in `train_projector`.
    """
    return _train("instruct", loaded, chats, settings, run, watch, cache)


def train_and_answer(
    build: Callable[..., LoadedModel],
    tests: Mapping[str, Iterable[Sequence[dict[str, Any]]]],
    *,
    instruct: tuple[Chats, TrainSettings],
    projector: tuple[Chats, TrainSettings] | None = None,
    run: str | Path,
    seed: int,
    watch: Watch | None = None,
    cache: str | Path | None = "features",
    **answering: Any,
) -> dict[str, list[str]]:
    """Stage 1 and stage 2 of a fresh splice, then its answers to the rows of every test, by the test's name.

    A job of `run_parallel`: it keeps no model. `build(seed=seed)` makes the splice; without `projector` stage 1 is
    left out. The runs lie in the folders `projector` and `instruct` of `run`; `reopen` gives their models. `tests`
    and `answering` as in `answer_pictures`.
    """
    folder = run_folder(run)
    loaded = build(seed=seed)
    if projector is not None:
        captions, settings = projector
        settings = replace(settings, seed=seed)
        train_projector(loaded, captions, settings, run=folder / "projector", watch=watch, cache=cache)
    questions, settings = instruct
    settings = replace(settings, seed=seed)
    trained = train_instruct(loaded, questions, settings, run=folder / "instruct", watch=watch, cache=cache).loaded
    answers = {name: answer_pictures(trained, rows, cache=cache, **answering) for name, rows in tests.items()}
    del loaded, trained  # a card has room for one model
    free_memory()
    return answers


def _train(
    stage: Literal["projector", "instruct"],
    loaded: LoadedModel,
    chats: Chats,
    settings: TrainSettings,
    run: str | Path,
    watch: Watch | None,
    cache: str | Path | None,
) -> Run:
    folder, sha256 = run_folder(run), rows_hash(chats)
    if settings.lora.vision:
        raise RunError("lora.vision: the stages of a splice keep the tower frozen; train_sft trains it afterwards")
    _must_be_bare(loaded)
    check_splice(loaded, reload=False).require()
    rows, reader, rejected = encode_pictures(
        loaded,
        chats,
        max_length=min(settings.max_length, loaded.max_length),
        loss=settings.loss,
        needs_picture=stage == "projector",
        most=settings.pictures,
    )
    projector = [tensor.tolist() for tensor in projector_of(loaded.model).state_dict().values()]
    start = content_hash([tower_key(loaded), projector])  # another start is another run
    record = describe_stage(stage, loaded, len(chats), sha256, settings, splice_sha256=start)
    if finished := finished_run(folder, record, watch):
        return replace(finished, loaded=reopen(finished, loaded))
    if PROCESS == 0:
        start_or_join(folder, record)
    features = None
    if cache is not None:
        keys = [key for row in rows for key in row["picture_keys"]]
        features = compute_features(loaded, reader, keys, run_folder(cache))
    transformers.set_seed(settings.seed)
    before = {name: p.detach().clone() for name, p in projector_of(loaded.model).named_parameters()}
    trained = _with_trained(stage, loaded, settings.lora)
    try:
        with _shortcuts(trained, features) as head:
            trainer = _trainer(trained, head, rows, PictureBatches(reader, features), settings, folder)
            seconds = fit(trainer, folder, watch, may_halve=True)
    except BaseException:  # an interrupt too: the next call begins with the model as it was
        if stage == "instruct":
            trained.model.unload()
        projector_of(loaded.model).load_state_dict(before)
        for name, parameter in projector_of(loaded.model).named_parameters():
            parameter.data = parameter.data.to(before[name].dtype)  # it was trained in float32
        raise
    _cast_back(trained)
    if PROCESS == 0:
        (save_adapter if stage == "instruct" else _save_projector)(trained, folder)
    return finish_stage(
        folder,
        record,
        trainer,
        trained,
        data=f"{len(rows)} rows, {rejected}" if rejected else f"all {len(rows)} rows",
        features="computed once" if features else "computed at every step",
        seconds=round(seconds, 3),
    )


def _must_be_bare(loaded: LoadedModel) -> None:
    layers = peft.tuners.tuners_utils.BaseTunerLayer
    if any(isinstance(module, layers) for module in loaded.model.modules()):
        raise ModelError(
            f"{loaded.source}: an earlier run put an adapter into this model. Make or load it again for a new run; "
            "to go on from the adapter, save_spliced(run, folder) and load_model(folder)"
        )


def _with_trained(stage: str, loaded: LoadedModel, lora: LoraSettings) -> LoadedModel:
    """The model with the stage's parameters, and no others, set to be trained."""
    loaded.model.requires_grad_(False)
    if stage == "projector":
        projector_of(loaded.model).requires_grad_(True)
        return loaded
    names = []
    if lora.attention:
        names += ["q_proj", "k_proj", "v_proj", "o_proj"]
    if lora.mlp:
        names += ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # the look-ahead: a list of names would hit the tower's attention too
        target_modules=rf"(?!.*(?:vision|visual|connector|projector)).*\.(?:{'|'.join(names)})",
        modules_to_save=[projector_name(loaded.model)],
        task_type="CAUSAL_LM",
    )
    return replace(loaded, model=peft.get_peft_model(loaded.model, config))


@contextlib.contextmanager
def _shortcuts(loaded: LoadedModel, features: Features | None) -> Iterator[torch.nn.Module]:
    """Inside, the model skips its head, which is given, and its tower where there are features."""
    # the trainer refuses a 4-bit model without an adapter, but the projector of stage 1 is not in 4 bit
    plain = bare(loaded.model)
    quantized = plain.__dict__.pop("is_quantized", None)
    try:
        with open_head(loaded.model) as head, cached_tower(loaded.model) if features else contextlib.nullcontext():
            yield head
    finally:
        if quantized is not None:
            plain.is_quantized = quantized


def _cast_back(loaded: LoadedModel) -> None:
    """What was trained in float32 in the model's own type again, so that it runs without autocast."""
    like = bare(loaded.model).get_input_embeddings().weight.dtype
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(like)
    loaded.model.eval()


def _save_projector(loaded: LoadedModel, folder: Path) -> None:
    beside = folder / "projector.part"
    try:
        save_file({name: t.contiguous() for name, t in projector_of(loaded.model).state_dict().items()}, beside)
    except (OSError, SafetensorError) as error:
        raise RunError(no_room(folder, error)) from error
    beside.replace(folder / "projector.safetensors")


# --- the trainer ------------------------------------------------------------------------------------------
class _Trainer(transformers.Trainer):
    """Checkpoints hold what is trained; the projector may have a learning rate of its own."""

    projector_rate: float | None = None

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.projector_rate is None:
            return optimizer
        name = projector_name(bare(self.model))
        projector = {id(p) for path, p in self.model.named_parameters() if name in path}
        for group in list(optimizer.param_groups):
            parameters = group["params"]
            group["params"] = [p for p in parameters if id(p) not in projector]
            apart = [p for p in parameters if id(p) in projector]
            optimizer.add_param_group({**group, "params": apart, "lr": self.projector_rate})
        return optimizer

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in self._trained().items()}
        save_file(tensors, Path(output_dir) / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        tensors = load_file(Path(resume_from_checkpoint) / "trained.safetensors")
        for name, parameter in self._trained().items():
            parameter.data.copy_(tensors[name])


def _trainer(
    loaded: LoadedModel,
    head: torch.nn.Linear,
    rows: list[dict[str, Any]],
    batches: PictureBatches,
    settings: TrainSettings,
    folder: Path,
) -> _Trainer:
    lengths = [row["length"] for row in rows]
    order = order_by_length(lengths, settings.batch_size, seed=settings.seed, epochs=settings.epochs)
    steps = math.ceil(len(order) / (settings.batch_size * settings.accumulation * PROCESSES))
    arguments = trainer_arguments(settings, folder, steps=steps)
    if loaded.device.type == "cuda":
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = _Trainer(
        model=loaded.model,
        args=transformers.TrainingArguments(
            **arguments,
            train_sampling_strategy="sequential",  # the rows are in their order already
            # a batch of text alone leaves the projector out, for which the other processes would wait
            ddp_find_unused_parameters=not all(row["picture_keys"] for row in rows),
            neftune_noise_alpha=settings.neftune_alpha or None,
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=[rows[row] for row in order],
        data_collator=batches,
        compute_loss_func=partial(_loss, head),
    )
    trainer.projector_rate = settings.projector_learning_rate
    return trainer


def _loss(head, outputs, labels, num_items_in_batch=None):
    """`logits` are hidden states here: the head is open."""
    return label_loss(outputs.logits, labels, head, count=num_items_in_batch)


# --- results ----------------------------------------------------------------------------------------------
def reopen(run: Run, loaded: LoadedModel) -> LoadedModel:
    """The result of a finished run in `loaded`, the same splice or, for stage 2, any copy of what it began with."""
    if run.record["stage"] == "instruct":
        _must_be_bare(loaded)
        return replace(loaded, model=peft.PeftModel.from_pretrained(loaded.model, run.adapter).eval())
    part = projector_of(loaded.model)
    part.load_state_dict(load_file(run.folder / "projector.safetensors"))
    return loaded


def save_spliced(run_or_loaded: Run | LoadedModel, folder: str | Path) -> Path:
    """The whole model, adapter merged, as plain safetensors with its processor; whole or not there.

    Reloads with plain `AutoModelForImageTextToText` and `AutoProcessor`, or `load_model(folder)`. A 4-bit base is
    loaded again in 16 bit for the merge. Raises `ModelError` when it can't be, `RunError` when there is no room.
    """
    loaded = run_or_loaded.loaded if isinstance(run_or_loaded, Run) else run_or_loaded
    if loaded is None:
        raise ModelError(
            f"{run_or_loaded.folder}: not in memory; pass Run(..., loaded=reopen(run, loaded)) or that"
        )
    folder = Path(folder).expanduser().absolute()
    _check_replaceable(folder)
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _merged(loaded).save_pretrained(beside)
        loaded.processor.save_pretrained(beside)
        write_json(beside / _MARK, {"made_of": loaded.source})
    except (OSError, SafetensorError) as error:
        raise RunError(no_room(folder.parent, error)) from error
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return folder


def _check_replaceable(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise RunError(f"{folder} holds something that save_spliced did not write; choose another folder")


def _merged(loaded: LoadedModel) -> Any:
    """The model without PEFT around it; one in memory is copied first, for its adapter must stay apart."""
    adapted = isinstance(loaded.model, peft.PeftModel)
    if not loaded.four_bit_share:
        return copy.deepcopy(loaded.model).merge_and_unload() if adapted else loaded.model
    if loaded.base:
        whole = load_model(loaded.base, four_bit=False, backend="transformers")
    elif loaded.in_16_bit:
        whole = loaded.in_16_bit()
    else:
        raise ModelError(f"{loaded.source}: is in 4 bit, and its 16-bit weights are nowhere on disk")
    if not adapted:
        projector_of(whole.model).load_state_dict(projector_of(loaded.model).state_dict())
        return whole.model
    with tempfile.TemporaryDirectory() as adapter:
        loaded.model.save_pretrained(adapter, save_embedding_layers=False)
        return peft.PeftModel.from_pretrained(whole.model, adapter).merge_and_unload()
