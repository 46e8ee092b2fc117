"""Models that leave the workbench: merged safetensors, GGUF and LoRA files, each reloaded and compared.

An adapter is merged into a freshly loaded base, never into the model that was trained (`artefacts` says why).
Nothing is published before its next-token distributions were compared; it is written beside and then renamed, so an
earlier artefact stays whole. Does not know how llama.cpp runs on a card.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ironlogic.export.artefacts import (
    TYPES,
    Comparison,
    Source,
    compare,
    count_weights,
    find_source,
    insist,
    load_fresh,
    next_token_logits,
    probe_inputs,
    read_config,
    with_adapter,
)
from ironlogic.export.gguf import (
    ExportError,
    convert,
    find_quantizer,
    gguf_logits,
    gguf_readers,
    load_gguf,
    modelfile_text,
    open_llama,
    quantize,
    why_not_gguf,
    write_gguf,
    write_lora_gguf,
)
from ironlogic.models import (
    LoadedModel,
    free_memory,
    in_plain_process,
    load_model,
    load_tokenizer,
    need_template,
)
from ironlogic.training.runs import Run, write_json

import psutil
import torch
import transformers
from safetensors import SafetensorError

__all__ = [
    "check_export",
    "export_gguf",
    "export_lora_gguf",
    "merge_adapter",
    "open_export",
    "write_modelfile",
]


@in_plain_process
def merge_adapter(run_or_path: Run | str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """The adapter of a run (its object, name or folder, or an adapter's folder) merged into its base, at `out`.

    Plain transformers loads the result, a vision-language model's too. It is stored in the type of the base (4-bit
    bases: bfloat16). `base` replaces the base that the adapter names. Raises `ExportError`.
    """
    source, out = find_source(run_or_path, base), Path(out).expanduser().absolute()
    _check_replaceable(out, source)
    _check_room(source, out.parent)
    model, processor, probes, reference = _reference(source)
    if source.adapter:
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ExportError(f"{source.adapter}: {error}; the adapter is broken, train it again") from error
    kind = TYPES[model.dtype]
    # transformers 5.17 can't undo how it read a 4-bit checkpoint: such models keep transformers' own tensor names
    original = not hasattr(read_config(source.base), "quantization_config")
    with _beside(out) as part:
        model.save_pretrained(part, max_shard_size="4GB", save_original_format=original)
        processor.save_pretrained(part)
        del model
        free_memory()
        reloaded = next_token_logits(load_fresh(str(part))[0], probes)
        found = replace(compare(part, "transformers", kind, reference, reloaded), artefact=out.name)
        insist([found])
        _note(part, out.name, source, [found])
    return out


@in_plain_process
def check_export(
    artefact: str | Path,
    reference: Run | str | Path,
    *,
    base: str | Path | None = None,
    tolerance: float | None = None,
    as_trained: bool = False,
) -> list[Comparison]:
    """Reloads an artefact with every reader at hand and compares its next-token distributions over `PROBES`.

    `reference`: what it was made from (a run, an adapter, or the merged folder). A merged folder is read by
    transformers; a GGUF file by transformers where it can (head width 128) and by llama.cpp where `llama_cpp` is
    installed, which also has to cut the probes into the same tokens. A mean divergence above `tolerance` (default:
    `TOLERANCE` of its kind), or no reader at all, is an `ExportError`. `as_trained`: the reference is loaded as it
    was trained, in 4 bit where it was; rounding is part of the difference then, and any is accepted.
    """
    artefact, source = Path(artefact), find_source(reference, base)
    if as_trained:
        tolerance = tolerance or float("inf")
        loaded = load_model(source.adapter or source.base, four_bit=source.record.get("four_bit_share", 0) > 0)
        processor = loaded.processor or loaded.tokenizer
        probes = probe_inputs(processor)
        expected = next_token_logits(loaded.model, probes)
        del loaded
    else:
        processor, probes, expected = _reference(source)[1:]
    free_memory()  # two copies need not be held
    if artefact.is_dir():
        loaded = load_fresh(str(artefact))[0]
        got = next_token_logits(loaded, probes)
        found = [compare(artefact, "transformers", TYPES[loaded.dtype], expected, got)]
    else:
        found = _read_gguf(artefact, expected, probes, getattr(processor, "tokenizer", processor))
    return insist(found, tolerance)


def _reference(source: Source) -> tuple[Any, Any, list, list]:
    """Base and adapter side by side, tokenizer or processor, the probes as inputs, and the logits to be met."""
    model, processor = load_fresh(source.base)
    if source.adapter:
        model = with_adapter(model, source)
    probes = probe_inputs(processor)
    return model, processor, probes, next_token_logits(model, probes)


# --- GGUF ---------------------------------------------------------------------------------------------------
@in_plain_process
def export_gguf(
    run_or_path: Run | str | Path,
    out: str | Path,
    *,
    quantization: str = "q8_0",
    llama_cpp: str | Path | None = None,
    base: str | Path | None = None,
) -> Path:
    """A run, an adapter or a merged folder as one GGUF file (f16, q8_0 or q4_k_m), compared before it is published.

    `out`: the file, or a folder that gets `<name>-<quantization>.gguf`. Written by the converter of a llama.cpp
    checkout (`llama_cpp`, or UNSLOTH_LLAMA_CPP_SCRIPTS_DIR; "": none); else, dense Qwen3 only, by `gguf`.
    q4_k_m also needs a quantizer: `llama-quantize` or the package llama-cpp-python. Nothing is built in this
    process; what is missing is named with the command to run later (`ExportError`).
    """
    if quantization not in ("f16", "q8_0", "q4_k_m"):
        raise ExportError(f"quantization {quantization!r}: expected f16, q8_0 or q4_k_m")
    source, out = find_source(run_or_path, base), Path(out).expanduser().absolute()
    path = out if out.suffix == ".gguf" else out / f"{source.name}-{quantization}.gguf"
    checkout = os.environ.get("UNSLOTH_LLAMA_CPP_SCRIPTS_DIR") if llama_cpp is None else llama_cpp
    _check_sightless(source)
    _check_room(source, path.parent, quantization)
    with _beside(path) as part, tempfile.TemporaryDirectory(dir=path.parent, prefix="merging-") as scratch:
        whole = Path(source.base)
        if source.adapter or not whole.is_dir():
            whole = merge_adapter(run_or_path, Path(scratch) / source.name, base=base)
        _write(whole, part, quantization, Path(checkout) if checkout else None)
        found = check_export(part, whole)
        _note(path.parent, path.name, source, [replace(c, artefact=path.name) for c in found])
    return path


@in_plain_process
def export_lora_gguf(run_or_path: Run | str | Path, out: str | Path, *, base: str | Path | None = None) -> Path:
    """The adapter alone as a LoRA file beside a GGUF of its base (llama.cpp `--lora`, Ollama `ADAPTER`)."""
    source, out = find_source(run_or_path, base), Path(out).expanduser().absolute()
    if not source.adapter:
        raise ExportError(f"{source.base}: a whole model, no adapter; export_gguf writes it")
    path = out if out.suffix == ".gguf" else out / f"{source.name}-lora.gguf"
    _check_sightless(source)
    with _beside(path) as part:
        write_lora_gguf(source.adapter, Path(source.base), part)
    return path


def write_modelfile(gguf_path: str | Path, like: str | Path, *, system: str = "") -> Path:
    """`Modelfile` beside a GGUF file, for `ollama create NAME -f Modelfile`; chat template and stops of `like`."""
    gguf_path, source = Path(gguf_path), find_source(like, None)
    tokenizer = load_tokenizer(source.base)
    need_template(tokenizer)
    ends = {tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(_end_ids(source.base))} - {None}
    path = gguf_path.with_name("Modelfile")
    with _beside(path) as part:
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
    """A whole model as GGUF by the converter of the checkout, or by `gguf`; q4_k_m by way of f16."""
    tool = find_quantizer(checkout) if quantization == "q4_k_m" else None
    first = path.with_name(f"{path.name}.f16") if quantization == "q4_k_m" else path
    kind = "f16" if quantization == "q4_k_m" else quantization
    try:
        if checkout:
            convert(checkout, folder, first, kind)
        elif reason := why_not_gguf(folder):
            raise ExportError(
                f"{folder.name}: {reason}, and no llama.cpp checkout was named (llama_cpp=...). To do it "
                "later: merge_adapter(..., 'MERGED'), then: python LLAMA_CPP/convert_hf_to_gguf.py MERGED "
                f"--outfile {path.name.removesuffix('.part')} --outtype {kind}"
            )
        else:
            write_gguf(folder, first, quantization=kind)
        if first != path:
            quantize(first, path, tool=tool)
    finally:
        if first != path:
            first.unlink(missing_ok=True)


def _read_gguf(path: Path, expected: list, probes: list, tokenizer: Any) -> list[Comparison]:
    """The file through every reader at hand; llama.cpp has to cut the texts into the same tokens too."""
    rows = [probe["input_ids"][0].tolist() for probe in probes]
    kind, readers = gguf_readers(path)
    if not readers:
        raise ExportError(
            f"{path.name} can't be checked here: transformers doesn't read its kind, and llama.cpp is not "
            "installed (pip install llama-cpp-python)"
        )
    if "llama.cpp" in readers:
        llama = open_llama(path, length=16)
        for text, row in zip(tokenizer.batch_decode(rows), rows, strict=True):
            if llama.tokenize(text.encode(), add_bos=False, special=True) != row:
                raise ExportError(f"{path.name}: llama.cpp cuts {text!r} into other tokens than the tokenizer")
    return [compare(path, reader, kind, expected, gguf_logits(path, reader, rows)) for reader in readers]


# --- folders ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A place to write to; what is there in the end takes the target's place, after an error nothing does."""
    part, old = (target.with_name(f"{target.name}.{end}") for end in ("part", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        yield part
        _remove(old)
        if target.is_dir():
            target.rename(old)
        part.replace(target)
        _remove(old)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{target} can't be written ({getattr(error, 'strerror', None) or error}); an earlier one is "
            "untouched. Free space there, or choose another folder, and run this again"
        ) from error
    finally:
        _remove(part)
        if old.exists() and not target.exists():  # interrupted between two names
            old.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_replaceable(out: Path, source: Source) -> None:
    used = [Path(place).resolve() for place in (source.base, source.adapter) if place and Path(place).exists()]
    if any(out.resolve() == place or out.resolve() in place.parents for place in used):
        raise ExportError(f"{out} holds what is to be exported; choose another folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and _exported(out) != {out.name}):
        raise ExportError(f"{out} holds something that is no earlier merge; choose another folder")


def _exported(folder: Path) -> set[str]:
    """What was exported into a folder: its own name for a merged model, and the names of GGUF files."""
    path = folder / "export.json"
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def _check_sightless(source: Source) -> None:
    if hasattr(read_config(source.base), "vision_config"):
        raise ExportError(
            f"{source.name} is a vision-language model, of which no GGUF is written here: llama.cpp has no place "
            "for a splice, and its convert_hf_to_gguf.py takes Gemma 3 and Qwen3-VL from the merged folder. Merged "
            "safetensors (merge_adapter) are the way out: plain transformers loads them, eyes and all"
        )


def _check_room(source: Source, folder: Path, quantization: str = "") -> None:
    """Before anything is loaded or written: disk for the result and what it is made of, memory for one copy."""
    count, size = count_weights(source)
    file = {"": 0, "f16": 2, "q8_0": 1.0625, "q4_k_m": 2.7}[quantization]  # bytes a weight; q4_k_m by way of f16
    merged = size if source.adapter or not quantization else 0
    there = next(place for place in (folder, *folder.parents) if place.exists())
    for what, where, free, wanted in (
        ("disk", str(there), shutil.disk_usage(there).free, count * (merged + file) * 1.05),
        ("memory", "this machine", psutil.virtual_memory().available, count * size * 1.2),
    ):
        if free < wanted:
            raise ExportError(
                f"{source.name} needs {wanted / 2**30:.2g} GiB of {what}, {where} has {free / 2**30:.2g} free; "
                "nothing was written. Make room, or keep the adapter alone (export_lora_gguf)"
            )


def _note(folder: Path, name: str, source: Source, found: Sequence[Comparison]) -> None:
    """export.json: what was written from what, and how far it is from it. The model card reads it."""
    path, merged = folder / "export.json", Path(source.base) / "export.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    made = (
        json.loads(merged.read_text(encoding="utf-8")).get(Path(source.base).name, {}) if merged.is_file() else {}
    )
    base = made.get("base") or (Path(source.base).name if Path(source.base).exists() else source.base)
    run = made.get("run") or source.name
    kept[name] = {"run": run, "base": base, "comparisons": [asdict(c) for c in found]}
    write_json(path, kept)
