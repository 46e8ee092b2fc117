"""Models that leave the workbench: merged safetensors, GGUF and LoRA files, each reloaded and compared.

The base is loaded afresh on the CPU in the type it is stored in, never taken from the 4-bit model that was trained:
bitsandbytes repacks those weights in place, and a merge then gives garbage without a word. Nothing is published
before its next-token distributions were compared; it is written beside and then renamed, so an earlier artefact
stays whole. Whether an adapter of fitting shapes was trained on this very base can't be told here.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ironlogic.export.gguf import (
    ExportError,
    call,
    convert,
    find_quantizer,
    modelfile_text,
    why_not_gguf,
    write_gguf,
    write_lora_gguf,
)
from ironlogic.export.mmproj import (
    convert_eye,
    find_eye_converter,
    picture_mark,
    unscaled_side,
    why_not_mmproj,
    write_eye,
    write_language_model,
)
from ironlogic.export.readers import Llama, gguf_log_probs, gguf_readers, has_llama, load_gguf
from ironlogic.models import (
    LoadedModel,
    ModelError,
    free_memory,
    in_plain_process,
    load_model,
    load_processor,
    load_tokenizer,
    model_inputs,
    need_template,
    put_adapter,
    refuse_pickles,
    resolve,
    split_adapter,
)
from ironlogic.training.runs import Run, RunError, open_run, replacing, run_folder, write_json

import numpy as np
import peft
import psutil
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open

__all__ = [
    "Comparison",
    "check_export",
    "export_gguf",
    "export_lora_gguf",
    "merge_adapter",
    "open_export",
    "read_notes",
    "write_modelfile",
]

PROBES = (
    "What is the sum of 3 and 4?",
    "Tom is taller than Anna. Ben is taller than Tom. Who is the tallest?",
    "Why is the sky blue? Explain it to a child.",
    "don't  stop\n\n 123abc ¿ñ? 请用中文 🦙 <think>",
)
# Mean Kullback-Leibler divergence (nats a position) from its reference that an artefact may have. A merge that went
# wrong is off by nats; rounding alone moves nano by a seventh of these or less.
TOLERANCE = {"f32": 1e-6, "bf16": 5e-3, "f16": 5e-3, "q8_0": 1e-2, "q4_k_m": 0.1}
# Share of what the exchange of two pictures changes. Rounding: up to a tenth; patches one off: half and more
_PICTURES_MAY_DIFFER = 0.25
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Comparison:
    """An artefact's next-token distributions beside those of the model it was made from."""

    artefact: str  # name of the file or folder
    reader: str  # transformers or llama.cpp
    kind: str  # f32, bf16, f16, q8_0, q4_k_m
    bytes: int
    positions: int  # next-token distributions compared
    logit_difference: float  # largest, of normalised logits (log probabilities)
    mean_kl: float  # nats
    top1: float  # share of positions with the same most likely token
    tolerance: float  # of mean_kl


@in_plain_process
def merge_adapter(run_or_path: Run | str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """The adapter of a run (its object, name or folder, or an adapter's folder) merged into its base, at `out`.

    Plain transformers loads the result, a vision-language model's too. It is stored in the type of the base (4-bit
    bases: bfloat16). `base` replaces the base that the adapter names. Raises `ExportError`.
    """
    source, out = _find_source(run_or_path, base), Path(out).expanduser().absolute()
    _check_replaceable(out, source)
    _check_room(source, out.parent)
    model, processor, probes, reference = _reference(source)
    if source.adapter:
        try:
            model = model.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{source.adapter} can't be merged ({error}); train another") from error
    kind = _TYPES[model.dtype]
    # transformers 5.17 can't undo how it read a 4-bit checkpoint: such models keep transformers' own tensor names
    original = not hasattr(_read_config(source.base), "quantization_config")
    with replacing(out, ExportError) as part:
        model.save_pretrained(part, max_shard_size="4GB", save_original_format=original)
        processor.save_pretrained(part)
        del model
        free_memory()
        reloaded = _next_token_logits(_load_fresh(str(part))[0], probes)
        found = replace(_compare(part, "transformers", kind, reference, reloaded), artefact=out.name)
        _insist([found])
        _note(part, out.name, source, [found])
    return out


@in_plain_process
def check_export(
    artefact: str | Path,
    reference: Run | str | Path,
    *,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
    tolerance: float | None = None,
    as_trained: bool = False,
) -> list[Comparison]:
    """Reloads an artefact with every reader at hand and compares its next-token distributions over `PROBES`.

    `reference`: what it was made from (a run, an adapter, or the merged folder). A merged folder is read by
    transformers; a GGUF file by transformers where it can (head width 128) and by llama.cpp where xllamacpp is
    installed, which also has to cut the probes into the same tokens; that of a splice beside its eye, `mmproj`, by
    llama.cpp alone, two of the probes with a picture. A mean divergence above `tolerance` (default:
    `TOLERANCE` of its kind), or no reader at all, is an `ExportError`. `as_trained`: the reference is loaded as it
    was trained, in 4 bit where it was; rounding is part of the difference then, and any is accepted.
    """
    artefact, source = Path(artefact), _find_source(reference, base)
    if as_trained:
        tolerance = tolerance or float("inf")
        loaded = load_model(source.adapter or source.base, four_bit=source.record.get("four_bit_share", 0) > 0)
        processor = loaded.processor or loaded.tokenizer
        probes = _probe_inputs(processor)
        expected = _next_token_logits(loaded.model, probes)
        del loaded
    else:
        processor, probes, expected = _reference(source)[1:]
    free_memory()  # two copies need not be held
    if artefact.is_dir():
        loaded = _load_fresh(str(artefact))[0]
        kind, logits = _TYPES[loaded.dtype], {"transformers": _next_token_logits(loaded, probes)}
    elif "pixel_values" in probes[0]:
        if mmproj is None:
            raise ExportError(f"{artefact.name} is the language model of a splice; name its eye too (mmproj=...)")
        kind, read = gguf_readers(artefact)[0], _after_probes(artefact, Path(mmproj), processor)
        expected, logits = [of_probe[-1:] for of_probe in expected], {"llama.cpp": read}
        _insist_on_pictures(Path(mmproj), expected, read)
    else:
        rows = [probe["input_ids"][0].tolist() for probe in probes]
        kind, logits = gguf_log_probs(artefact, rows, getattr(processor, "tokenizer", processor))
    found = [_compare(artefact, reader, kind, expected, got) for reader, got in logits.items()]
    return _insist(found, tolerance)


@in_plain_process
def export_gguf(
    run_or_path: Run | str | Path,
    out: str | Path,
    *,
    quantization: str = "q8_0",
    llama_cpp: str | Path | None = None,
    base: str | Path | None = None,
) -> Path:
    """A run, an adapter or a merged folder as a GGUF file (f16, q8_0 or q4_k_m), compared before it is published.

    `out`: the file, or a folder that gets `<name>-<quantization>.gguf`. A dense Qwen3 is written by `gguf`, any
    other model by the converter of a llama.cpp checkout (`llama_cpp`, or UNSLOTH_LLAMA_CPP_SCRIPTS_DIR; "": none).
    q4_k_m also needs a quantizer, `llama-quantize`. Nothing is built in this process; what is missing is named with
    the command to run later (`ExportError`).

    Of a splice this is the language model; its eye, in f16, is written beside it by a checkout, as
    `mmproj-<name>-f16.gguf`, and llama.cpp itself (the package xllamacpp) compares both with the splice.
    `llama-mtmd-cli -m FILE --mmproj EYE --image PICTURE -p "MARK QUESTION"` shows it a picture; MARK is `picture`
    in export.json. What llama.cpp can't express of a splice is an `ExportError`, before anything is written.
    """
    if quantization not in ("f16", "q8_0", "q4_k_m"):
        raise ExportError(f"quantization {quantization!r}: expected f16, q8_0 or q4_k_m")
    source, path = _find_source(run_or_path, base), Path(out).expanduser().absolute()
    if path.suffix != ".gguf":
        path = path / f"{source.name}-{quantization}.gguf"
    named = os.environ.get("UNSLOTH_LLAMA_CPP_SCRIPTS_DIR") if llama_cpp is None else llama_cpp
    checkout = Path(named) if named else None
    config = _read_config(source.base)
    sees = hasattr(config, "vision_config")
    if sees:
        processor, eye_script = _find_eye(source, config, checkout)
    _check_room(source, path.parent, quantization)
    with (
        replacing(path, ExportError) as part,
        tempfile.TemporaryDirectory(dir=path.parent, prefix="merging-") as scratch,
    ):
        whole = Path(source.base)
        if source.adapter or not whole.is_dir():
            whole = merge_adapter(run_or_path, Path(scratch) / source.name, base=base)
        more = {}
        if sees:
            eye = path.with_name(f"mmproj-{path.stem.removesuffix(f'-{quantization}')}-f16.gguf")
            more = {"mmproj": eye.name, "picture": picture_mark(processor)}
            with replacing(eye, ExportError) as eye_part:
                halves = _halve(whole, Path(scratch))
                _write(halves[0], part, quantization, checkout)
                convert_eye(eye_script, halves[1], eye_part, processor.image_processor)
                found = check_export(part, whole, mmproj=eye_part)
        else:
            _write(whole, part, quantization, checkout)
            found = check_export(part, whole)
        _note(path.parent, path.name, source, [replace(c, artefact=path.name) for c in found], **more)
    return path


@in_plain_process
def export_lora_gguf(run_or_path: Run | str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """The adapter alone as a LoRA file beside a GGUF of its base (llama.cpp `--lora`, Ollama `ADAPTER`)."""
    source, path = _find_source(run_or_path, base), Path(out).expanduser().absolute()
    if not source.adapter:
        raise ExportError(f"{source.base}: a whole model, no adapter; export_gguf writes it")
    if path.suffix != ".gguf":
        path = path / f"{source.name}-lora.gguf"
    if hasattr(_read_config(source.base), "vision_config"):
        raise ExportError(f"{source.name} adapts a model that sees: export_gguf writes it merged, with its eye")
    with replacing(path, ExportError) as part:
        write_lora_gguf(source.adapter, Path(source.base), part)
    return path


def write_modelfile(gguf_path: str | Path, like: str | Path, *, system: str = "") -> Path:
    """`Modelfile` beside a GGUF file, for `ollama create NAME -f Modelfile`; chat template and stops of `like`."""
    gguf_path, source = Path(gguf_path), _find_source(like, None)
    tokenizer = load_tokenizer(source.base)
    need_template(tokenizer)
    ends = {tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(_end_ids(source.base))} - {None}
    path = gguf_path.with_name("Modelfile")
    with replacing(path, ExportError) as part:
        part.write_text(
            modelfile_text(gguf_path.name, tokenizer, stops=sorted(ends), system=system), encoding="utf-8"
        )
    return path


def open_export(path: str | Path, *, like: str | Path) -> LoadedModel:
    """A GGUF file as a model to generate with, through transformers, with the tokenizer of the folder `like`."""
    tokenizer = load_tokenizer(like)
    model = load_gguf(Path(path)).to("cuda" if torch.cuda.is_available() else "cpu")  # where Unsloth's patches live
    return LoadedModel(model, tokenizer, source=Path(path).name, base=str(path))


def _end_ids(place: str | Path) -> list[int]:
    """The token ids that end an answer, by the model's own generation settings."""
    try:
        ends = transformers.GenerationConfig.from_pretrained(place).eos_token_id
    except OSError:
        return []
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _write(folder: Path, path: Path, quantization: str, checkout: Path | None) -> None:
    """A whole model as GGUF by `gguf`, or by the converter of the checkout; q4_k_m by way of f16."""
    if quantization == "q4_k_m":
        tool, first = find_quantizer(checkout), path.with_name(f"{path.name}.f16")
        try:
            _write(folder, first, "f16", checkout)
            call([tool, first, path, "Q4_K_M"], path)  # matrices of no multiple of 256 come out in other types
        finally:
            first.unlink(missing_ok=True)
    elif not (reason := why_not_gguf(folder)):
        write_gguf(folder, path, quantization=quantization)
    elif checkout:
        convert(checkout, folder, path, quantization)
    else:
        name = path.name.removesuffix(".f16").removesuffix(".part")
        raise ExportError(
            f"{folder.name}: {reason}, and no llama.cpp checkout was named (llama_cpp=...). To do it "
            "later: merge_adapter(..., 'MERGED'), then: python LLAMA_CPP/convert_hf_to_gguf.py MERGED "
            f"--outfile {name} --outtype {quantization}"
        )


def _halve(whole: Path, scratch: Path) -> tuple[Path, Path]:
    """(folder of the language model, folder of the eye) of a splice."""
    model, processor = _load_fresh(str(whole))
    halves = scratch / "language" / whole.name, scratch / "eye" / whole.name
    write_language_model(model, processor, halves[0])
    write_eye(model, processor, halves[1])
    return halves


# --- what is exported ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """A base, and an adapter on it unless it is merged already."""

    name: str
    base: str  # folder or hub name
    adapter: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)  # run.json


def _find_source(run_or_path: Run | str | Path, base: str | Path | None) -> _Source:
    """What a run (object, name or folder), an adapter's or a model's folder, or a hub name stands for."""
    run = run_or_path if isinstance(run_or_path, Run) else None
    try:
        if run is None:
            folder = Path(run_or_path).expanduser()
            here = folder if (folder / "run.json").is_file() else run_folder(run_or_path)
            run = open_run(here.absolute()) if (here / "run.json").is_file() else None
        found, adapter = split_adapter(resolve(run.adapter if run else run_or_path))
        found = resolve(base) if base else found
        for place in filter(None, (found, adapter)):
            refuse_pickles(place)
            for file in Path(place).glob("*.safetensors"):
                _check_whole(file)
    except (ModelError, RunError) as error:
        raise ExportError(str(error)) from error
    name = run.folder.name if run else Path(adapter or found).name
    return _Source(name, found, Path(adapter) if adapter else None, run.record if run else {})


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} is cut short or damaged ({error}); copy or train it again") from None


def _check_replaceable(out: Path, source: _Source) -> None:
    used = [Path(place).resolve() for place in (source.base, source.adapter) if place and Path(place).exists()]
    if any(out.resolve() == place or out.resolve() in place.parents for place in used):
        raise ExportError(f"{out} holds what is to be exported; choose another folder")
    of_merge = read_notes(out).keys() == {out.name}  # GGUF files may lie there too
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not of_merge):
        raise ExportError(f"{out} holds something that is no earlier merge; choose another folder")


def _find_eye(source: _Source, config: Any, checkout: Path | None) -> tuple[Any, Path]:
    """The processor of a splice and the program for its eye, before anything is written."""
    try:
        processor = load_processor(source.base, config)
    except (OSError, ValueError) as error:
        raise ExportError(f"{source.base} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    if reason := why_not_mmproj(config, processor):
        raise ExportError(f"{source.name} can't leave as GGUF: {reason}. merge_adapter keeps its eyes")
    script = find_eye_converter(config, checkout)
    if not has_llama():
        raise ExportError("a splice as GGUF is checked by llama.cpp itself: pip install xllamacpp, then again")
    return processor, script


def _check_room(source: _Source, folder: Path, quantization: str = "") -> None:
    """Before anything is loaded or written: disk for the result and what it is made of, memory for one copy."""
    config = _read_config(source.base)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in _auto(config).from_config(config).parameters())
    size = (config.dtype or torch.bfloat16).itemsize
    file = {"": 0, "f16": 2, "q8_0": 1.0625, "q4_k_m": 2.7}[quantization]  # bytes a weight; q4_k_m by way of f16
    copies = bool(source.adapter or not quantization) + (hasattr(config, "vision_config") and bool(quantization))
    there = next(place for place in (folder, *folder.parents) if place.exists())
    for what, where, free, wanted in (
        ("disk", str(there), shutil.disk_usage(there).free, count * (copies * size + file) * 1.05),
        ("memory", "this machine", psutil.virtual_memory().available, count * size * 1.2),
    ):
        if free < wanted:
            raise ExportError(
                f"{source.name} needs {wanted / 2**30:.2g} GiB of {what}, {where} has {free / 2**30:.2g} free; "
                "nothing was written. Make room, or keep the adapter alone (export_lora_gguf)"
            )


def read_notes(folder: Path) -> dict[str, Any]:
    """export.json of a folder: what was exported into it, by its name; empty where there is none."""
    path = folder / "export.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} is damaged ({error!r:.200}); delete it, and export again") from error


def _note(folder: Path, name: str, source: _Source, found: Sequence[Comparison], **more: str) -> None:
    """export.json: what was written from what, and how far it is from it. The model card reads it."""
    base = Path(source.base)
    made = {"run": source.name, "base": base.name if base.exists() else source.base}
    made |= read_notes(base).get(base.name, {}) | more  # of a merged model: what it was merged from
    write_json(
        folder / "export.json",
        read_notes(folder) | {name: made | {"comparisons": [asdict(c) for c in found]}},
    )


# --- loading ------------------------------------------------------------------------------------------------
def _read_config(place: str | Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            place, local_files_only=Path(place).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"{place}: its config.json can't be had ({str(error).splitlines()[0]})") from error


def _auto(config: Any) -> Any:
    sees = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def _load_fresh(place: str) -> tuple[Any, Any]:
    """(model, tokenizer or processor) by plain transformers on the CPU, in the type it is stored in."""
    local, config = Path(place).is_dir(), _read_config(place)
    packed = hasattr(config, "quantization_config")
    kind = torch.bfloat16 if packed else "auto"
    safe = {"local_files_only": local, "trust_remote_code": False}
    try:
        model = _auto(config).from_pretrained(place, dtype=kind, device_map="cpu", **safe)
        processor = load_processor(place, config)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{place} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    return (model.dequantize() if packed else model).eval(), processor


def _reference(source: _Source) -> tuple[Any, Any, list, list]:
    """Base and adapter side by side, tokenizer or processor, the probes as inputs, and the logits to be met."""
    model, processor = _load_fresh(source.base)
    if source.adapter:
        model = _with_adapter(model, source)
    probes = _probe_inputs(processor)
    return model, processor, probes, _next_token_logits(model, probes)


def _with_adapter(model: Any, source: _Source) -> Any:
    """The base with the adapter beside it; every tensor of the adapter has found its place."""
    advice = f"the adapter {source.adapter} was not trained on {source.base}; name its base (base=...)"
    try:
        model = put_adapter(model, source.adapter).eval()
    except (ModelError, RuntimeError, ValueError) as error:
        raise ExportError(f"{advice}: {' '.join(str(error).split())[:200]}") from error
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ExportError(f"{source.adapter}: {kind} learns a prompt, no weights: there is nothing to merge")
    with safe_open(source.adapter / "adapter_model.safetensors", framework="pt") as tensors:
        strays = set(tensors.keys()) ^ set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    strays = {name for name in strays if ".base_layer." not in name}  # PEFT saves the base of an adapted head too
    if strays:
        raise ExportError(f"{advice}: {len(strays)} tensors fit only one of them, {min(strays)} for one")
    return model


# --- comparing ----------------------------------------------------------------------------------------------
def _probe_inputs(processor: Any) -> list[dict[str, torch.Tensor]]:
    """The probes as a model takes them; where it can see, the first twice, each time with another picture."""
    need_template(processor)
    seeing = hasattr(processor, "image_processor")
    pictures = _probe_pictures(processor) if seeing else []
    inputs = []
    for i, probe in enumerate(PROBES):
        content: Any = [{"type": "text", "text": probe}] if seeing else probe
        if i < len(pictures):
            content = [{"type": "image"}, {"type": "text", "text": PROBES[0]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        shown = {"images": [pictures[i]]} if i < len(pictures) else {}
        inputs.append(dict(processor(text=text, **shown, add_special_tokens=False, return_tensors="pt")))
    return inputs


def _probe_pictures(processor: Any) -> list[Image.Image]:
    """Two of 4 x 4 coloured squares; of a size that a splice need not scale."""
    spliced = isinstance(processor, transformers.LlavaProcessor | transformers.Idefics3Processor)
    side = unscaled_side(processor.image_processor) if spliced else 96
    squares = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side), Image.Resampling.NEAREST) for one in squares]


def _after_probes(language_model: Path, eye: Path, processor: Any) -> list[torch.Tensor]:
    """What llama.cpp with that eye expects after each probe: log probabilities (1, vocabulary)."""
    if not has_llama():
        raise ExportError("a splice as GGUF is checked by llama.cpp itself: pip install xllamacpp")
    pictures = _probe_pictures(processor)
    before, _, behind = picture_mark(processor).partition("<__media__>")
    llama, read = Llama(language_model, length=8192, eye=eye), []
    for i, probe in enumerate(PROBES):
        content: Any = probe
        if i < len(pictures):
            first, last = ({"type": "text", "text": text} for text in (before, behind + PROBES[0]))
            content = [first, {"type": "image", "image": pictures[i]}, last]
        read.append(llama.after([{"role": "user", "content": content}])[1][None])
    return read


def _insist_on_pictures(eye: Path, expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> None:
    """Raises `ExportError` unless the exchange of two pictures changes what comes next as in the splice.

    Distributions alone don't tell: a model that is sure of its next word says it whatever it is shown.
    """
    words = min(expected[0].shape[1], got[0].shape[1])
    logs = [[of_probe[:, :words].log_softmax(-1) for of_probe in of[:2]] for of in (expected, got)]
    ours, theirs = (first - second for first, second in logs)
    error = ((ours - theirs).norm() / ours.norm()).item()
    if not error < _PICTURES_MAY_DIFFER:
        raise ExportError(
            f"{eye.name}: llama.cpp sees other pictures than the splice: what an exchange of two changes is "
            f"{error:.0%} off ({_PICTURES_MAY_DIFFER:.0%} are allowed). Known: llama.cpp of October 2026 puts the "
            "class feature of CLIP behind the patches, so every place is one off. Take a tower of SigLIP's kind, "
            "or merge_adapter, which keeps the eyes"
        )


@torch.inference_mode()
def _next_token_logits(model: Any, probes: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Float32 logits of every position on the CPU, (token, vocabulary) a probe."""
    return [model(**model_inputs(model, probe)).logits[0].float().cpu() for probe in probes]


def _compare(
    path: Path, reader: str, kind: str, expected: list[torch.Tensor], got: list[torch.Tensor]
) -> Comparison:
    """Two models' logits, or log probabilities, over the same probes; what a padded vocabulary adds is left out."""
    words = min(expected[0].shape[1], got[0].shape[1])
    ours, theirs = (torch.cat([of_probe[:, :words] for of_probe in of]) for of in (expected, got))
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return Comparison(
        artefact=path.name,
        reader=reader,
        kind=kind,
        bytes=sum(f.stat().st_size for f in (path.glob("*.safetensors") if path.is_dir() else [path])),
        positions=len(ours),
        logit_difference=round((p - q).abs().max().item(), 6),
        mean_kl=divergence.mean().item(),
        top1=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        tolerance=TOLERANCE[kind],
    )


def _insist(found: list[Comparison], tolerance: float | None = None) -> list[Comparison]:
    """The comparisons, when all are within their tolerance (or the one given). Raises `ExportError`."""
    for c in found:
        allowed = c.tolerance if tolerance is None else tolerance
        if not c.mean_kl <= allowed:  # a NaN fails too
            raise ExportError(
                f"{c.artefact}, read by {c.reader}, is not the model it was made from: its next-token "
                f"distributions are {c.mean_kl:.2g} nats away (mean of {c.positions}; {c.kind} may have "
                f"{allowed:g}), and {c.top1:.0%} of the likeliest tokens agree. Don't use it; export it again"
            )
    return found
