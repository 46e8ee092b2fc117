"""What an exported model is made from, loaded by plain transformers, and how far an artefact is from it.

The base is loaded afresh on the CPU in the type it is stored in, never taken from the 4-bit model that was trained:
bitsandbytes repacks those weights in place, and a merge then gives garbage without a word. Does not know whether an
adapter of fitting shapes was trained on this very base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ironlogic.export.gguf import ExportError
from ironlogic.models import (
    ModelError,
    load_processor,
    model_inputs,
    need_template,
    refuse_pickles,
    resolve,
    split_adapter,
)
from ironlogic.training.runs import Run, RunError, open_run, run_folder

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open

__all__ = [
    "PROBES",
    "TOLERANCE",
    "TYPES",
    "Comparison",
    "Source",
    "compare",
    "count_weights",
    "find_source",
    "insist",
    "load_fresh",
    "next_token_logits",
    "probe_inputs",
    "read_config",
    "with_adapter",
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
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Comparison:
    """An artefact's next-token distributions beside those of the model it was made from."""

    artefact: str  # name of the file or folder
    reader: str  # transformers or llama.cpp
    kind: str  # f32, bf16, f16, q8_0, q4_k_m
    bytes: int
    positions: int  # next-token distributions compared
    logit_difference: float  # largest
    mean_kl: float  # nats
    max_kl: float  # nats
    top1: float  # share of positions with the same most likely token
    tolerance: float  # of mean_kl


@dataclass(frozen=True)
class Source:
    """What is exported: a base, and an adapter on it unless it is merged already."""

    name: str
    base: str  # folder or hub name
    adapter: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)  # run.json


# --- sources ------------------------------------------------------------------------------------------------
def find_source(run_or_path: Run | str | Path, base: str | Path | None) -> Source:
    """What a run (object, name or folder), an adapter's or a model's folder, or a hub name stands for."""
    try:
        if isinstance(run_or_path, Run):
            run = run_or_path
        else:
            folder = Path(run_or_path).expanduser()
            here = folder if (folder / "run.json").is_file() else run_folder(run_or_path)
            run = open_run(here.absolute()) if (here / "run.json").is_file() else None
        found, adapter = split_adapter(resolve(run.adapter if run else run_or_path))
        found = resolve(base) if base else found
        for place in filter(None, (found, adapter)):
            refuse_pickles(place)
    except (ModelError, RunError) as error:
        raise ExportError(str(error)) from error
    for place in filter(None, (found, adapter)):
        for file in Path(place).glob("*.safetensors"):
            _check_whole(file)
    name = run.folder.name if run else Path(adapter or found).name
    return Source(name, found, Path(adapter) if adapter else None, run.record if run else {})


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} is cut short or damaged ({error}); copy or train it again") from None


def load_fresh(place: str) -> tuple[Any, Any]:
    """(model, tokenizer or processor) by plain transformers on the CPU, in the type it is stored in."""
    local = Path(place).is_dir()
    try:
        config = read_config(place)
        packed = hasattr(config, "quantization_config")
        kind = torch.bfloat16 if packed else "auto"
        safe = {"local_files_only": local, "trust_remote_code": False}
        model = _auto(config).from_pretrained(place, dtype=kind, device_map="cpu", **safe)
        processor = load_processor(place, config)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{place} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    return (model.dequantize() if packed else model).eval(), processor


def _auto(config: Any) -> Any:
    return (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )


def with_adapter(model: Any, source: Source) -> Any:
    """The base with the adapter beside it; every tensor of the adapter has found its place."""
    advice = f"the adapter {source.adapter} was not trained on {source.base}; name its base (base=...)"
    try:
        model = peft.PeftModel.from_pretrained(model, source.adapter).eval()
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{advice}: {' '.join(str(error).split())[:200]}") from error
    with safe_open(source.adapter / "adapter_model.safetensors", framework="pt") as tensors:
        strays = set(tensors.keys()) ^ set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if strays:
        raise ExportError(f"{advice}: {len(strays)} tensors fit only one of them, {min(strays)} for one")
    return model


def count_weights(source: Source) -> tuple[int, int]:
    """(parameters, bytes of one as it is stored), known before anything is loaded."""
    config = read_config(source.base)
    with torch.device("meta"):
        model = _auto(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), (config.dtype or torch.bfloat16).itemsize


def read_config(place: str | Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            place, local_files_only=Path(place).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"{place}: its config.json can't be had ({str(error).splitlines()[0]})") from error


# --- comparing ----------------------------------------------------------------------------------------------
def probe_inputs(processor: Any) -> list[dict[str, torch.Tensor]]:
    """The probes as a model takes them; with a picture in front where it can see."""
    need_template(processor)
    seeing = hasattr(processor, "image_processor")
    ramp = np.add.outer(np.arange(96), np.arange(96)).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, ramp.T[::-1], 255 - ramp], axis=-1))
    inputs = []
    for i, probe in enumerate(PROBES):
        content = [{"type": "image"}] * (seeing and i < 2) + [{"type": "text", "text": probe}] if seeing else probe
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pictures = {"images": [picture]} if seeing and i < 2 else {}
        inputs.append(dict(processor(text=text, **pictures, add_special_tokens=False, return_tensors="pt")))
    return inputs


def next_token_logits(model: Any, probes: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Float32 logits of every position on the CPU, (token, vocabulary) a probe."""
    found = []
    with torch.inference_mode():
        for probe in probes:
            found.append(model(**model_inputs(model, probe)).logits[0].float().cpu())
    return found


def compare(
    path: Path, reader: str, kind: str, expected: list[torch.Tensor], got: list[torch.Tensor]
) -> Comparison:
    """Two models' logits over the same probes; columns that a padded vocabulary adds are left out."""
    ours, theirs = torch.cat(expected), torch.cat([g[:, : e.shape[1]] for e, g in zip(expected, got, strict=True)])
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return Comparison(
        artefact=path.name,
        reader=reader,
        kind=kind,
        bytes=sum(f.stat().st_size for f in (path.glob("*.safetensors") if path.is_dir() else [path])),
        positions=len(ours),
        logit_difference=round((ours - theirs).abs().max().item(), 6),
        mean_kl=divergence.mean().item(),
        max_kl=divergence.max().item(),
        top1=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        tolerance=TOLERANCE[kind],
    )


def insist(found: list[Comparison], tolerance: float | None = None) -> list[Comparison]:
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
