"""Everything that only a card can show, in parts that can be cut anywhere.

    python tests/gpu/card.py --out runs/card

Each part is a process of its own with a time limit; its result is a line of `results.jsonl` as soon as it is there,
and a second call goes on with the parts that have none. A card larger than a consumer's stands for one: a part
takes no more than its cap. The parts, in the order of their worth:

  a  the code cells of all eight notebooks on nano, executed without Jupyter, with their checks
  b  Qwen3-VL-4B: our stage beside the seed's plain script, and the layer reading of the 4-bit model
  c  float16 forced, as on a T4: FT, both stages of a splice, GRPO
  d  Gemma-3-27B and Qwen3-30B-A3B held to 31.4 and to 23.5 GiB, ours and the seed's script
  e  the splices of seeds 003 and 004, both stages

`--tiny` runs all of it with small models on any machine, to try the script; `--table` prints what was measured.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

# Where a notebook would take more than three minutes on a card, it takes fewer rows and trainings.
NOTEBOOKS: dict[str, dict[str, Any]] = {
    "00_start_here": {},
    "01_burden_preprocessing": {},
    "02_fragmented_training": {"SWEEP": False, "ROWS": 320, "SEEDS": 1},
    "03_vlm_splicing": {"PRESET": "nano-vision", "ROWS": 320, "SEEDS": 1},
    "04_layer_entropy": {},
    "05_evidence": {"ROWS": 320, "SEEDS": 1},
    "06_polish_and_reason": {"ROWS": 320, "STEPS": 4, "PROBLEMS": 32},
    "07_export_and_chat": {},
}


@dataclass(frozen=True)
class Part:
    """`run(**settings)` gives what goes into the results; `system`: whose weights it needs; `cap` in GiB."""

    name: str
    seconds: int
    run: Callable[..., dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    cap: float = 0.0
    float16: bool = False  # as on a card without bfloat16


# --- a: notebooks -----------------------------------------------------------------------------------------------
def run_notebook(name: str, parameters: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """Executes the code cells one after the other, as a kernel would; the last one holds the notebook's checks."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    os.chdir(ROOT / "notebooks")
    scope: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            assert all(f"{key} = " in source for key in parameters), f"{name} has not all of {[*parameters]}"
            source += "".join(f"\n{key} = {value!r}" for key, value in ({"PRESET": "auto"} | parameters).items())
        try:
            exec(compile(source, f"{name}, code cell {number}", "exec"), scope)
        except BaseException as error:
            raise RuntimeError(f"code cell {number} of {len(code)}") from error
    return {"cells": len(code)}


# --- b, d: a stage on a model of true shapes --------------------------------------------------------------------
def our_stage(folder: Path, system: str, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """Our stage with the preset's settings, one row a step."""
    from ironlogic.data.chats import make_chats
    from ironlogic.models import load_model
    from ironlogic.presets import PRESETS
    from ironlogic.training.sft import train_sft

    from weights import conversations

    preset = PRESETS[system]
    settings = replace(preset.train, epochs=1, accumulation=1, max_length=length, log_steps=1)
    loaded = load_model(folder, four_bit=True, max_length=length)
    memory = after_loading(loaded)
    rows = make_chats(conversations(length, steps))
    run = train_sft(loaded, rows, settings, run=folder / f"run-{time.time_ns()}", burden=preset.burden)
    return memory | {"tokens_per_second": length / step_seconds([line["seconds"] for line in run.metrics])}


def step_seconds(times: list[float]) -> float:
    """Seconds of a usual step: the median, as the first ones compile."""
    return max(statistics.median(later - earlier for earlier, later in pairwise(times)), 1e-9)


def largest_allocations(folder: Path, system: str, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """What lies on the card at the moment of the peak, by the lines of code that took it, in GiB."""
    import torch

    if not torch.cuda.is_available():
        return our_stage(folder, system, length, steps, tiny)
    torch.cuda.memory._record_memory_history(max_entries=2_000_000, context="alloc", stacks="python")
    result = our_stage(folder, system, length, steps, tiny)
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    total, peak, at = 0, 0, 0
    for number, event in enumerate(events):
        if event["action"] in ("alloc", "free_completed"):
            total += event["size"] if event["action"] == "alloc" else -event["size"]
            if total > peak:
                peak, at = total, number
    live: dict[int, dict] = {}
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    taken: dict[str, list[int]] = {}
    for event in live.values():
        taken.setdefault(lines_of(event["frames"]), []).append(event["size"])
    largest = sorted(taken.items(), key=lambda item: -sum(item[1]))[:40]
    return result | {"at_peak": [[round(sum(sizes) / 2**30, 3), len(sizes), where] for where, sizes in largest]}


def lines_of(frames: list[dict[str, Any]]) -> str:
    """The innermost lines of a stack outside torch, innermost first."""
    ours = [frame for frame in frames if "site-packages/torch/" not in frame["filename"]]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in ours[:5])


def after_loading(loaded: Any) -> dict[str, Any]:
    import torch

    on_card = torch.cuda.is_available()
    return {
        "backend": loaded.backend,
        "four_bit_share": round(loaded.four_bit_share, 4),
        "loaded_gib": round(torch.cuda.memory_allocated() / 2**30, 2) if on_card else None,
        "loading_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_card else None,
    }


def seed_script(folder: Path, system: str, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """The published script's calls (seed 001), with `max_steps`; its own reading of text."""
    import torch
    from unsloth import FastLanguageModel, get_chat_template  # before trl
    from datasets import Dataset  # isort: skip
    from trl import SFTConfig, SFTTrainer  # isort: skip

    from weights import conversations

    if not torch.cuda.is_available() and system != "qwen3-30b-a3b":
        return {"skipped": "without a card Unsloth takes no model that sees"}
    model, processor = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=length,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        local_files_only=True,
        use_gradient_checkpointing="unsloth",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer = get_chat_template(tokenizer, "gemma-3") if "gemma" in system else tokenizer
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations(length, steps)]
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        dataset_text_field="text",
        max_seq_length=length,
        packing=False,
        args=SFTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            warmup_steps=25,
            max_steps=steps,
            learning_rate=2e-5,
            fp16=torch.cuda.is_available() and not bf16,
            bf16=bf16,
            logging_steps=5,
            optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            seed=3407,
            output_dir=str(folder / "output"),
            report_to="none",
        ),
    )
    times, step = [], trainer.training_step

    def timed(*given):
        loss = step(*given)
        loss.item()  # waits for the card
        times.append(time.perf_counter())
        return loss

    trainer.training_step = timed
    trainer.train()
    return {"tokens_per_second": length / step_seconds(times)}


def read_in_4_bit(folder: Path, system: str, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """`read_layers` proves its reading or raises; the gaps it found, and its speed."""
    from ironlogic.lens.read import read_layers
    from ironlogic.models import load_model

    from weights import conversations

    loaded = load_model(folder, four_bit=True, max_length=length)
    began = time.perf_counter()
    reading = read_layers(loaded, conversations(min(length, 256), 1)[0][0]["content"])
    checks = {name: round(float(gap), 6) for name, gap in reading.checks.items()}
    return {"layers_per_second": reading.entropy.shape[0] / (time.perf_counter() - began), "checks": checks}


# --- c: float16 -------------------------------------------------------------------------------------------------
def ft_in_float16(tiny: bool) -> dict[str, Any]:
    from ironlogic.data.chats import make_chats
    from ironlogic.data.problems import make_tasks, task_chat
    from ironlogic.models import load_model
    from ironlogic.presets import PRESETS
    from ironlogic.training.sft import train_sft

    nano = PRESETS["nano"]
    rows = make_chats(map(task_chat, make_tasks(640, seed=3407)))
    run = train_sft(load_model("nano", max_length=256), rows, nano.train, run="float16", burden=nano.burden)
    losses = [round(line["loss"], 3) for line in run.metrics]
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
    return {"losses": losses, "seconds": run.record["seconds"]}


def splice_in_float16(tiny: bool) -> dict[str, Any]:
    from ironlogic.data.chats import make_chats
    from ironlogic.data.scenes import KINDS, caption_chat, make_scenes, question_chat, save_scenes
    from ironlogic.presets import VISION_PRESETS
    from ironlogic.vision.check import check_splice
    from ironlogic.vision.splice import splice
    from ironlogic.vision.train import train_instruct, train_projector

    preset, runs = VISION_PRESETS["nano-vision"], Path(os.environ["IRONLOGIC_RUNS"])
    scenes = make_scenes(320, seed=1)
    shown = list(zip(scenes, save_scenes(scenes, runs / "pictures"), strict=True))
    loaded = splice(preset.tower, preset.language_model, projector=preset.projector, four_bit=True, seed=1)
    report = check_splice(loaded)
    assert report.passed, str(report)
    captions = make_chats(caption_chat(*scene) for scene in shown[:160])
    questions = make_chats(question_chat(*scene, KINDS[i % 3]) for i, scene in enumerate(shown[160:]))
    one = train_projector(loaded, captions, preset.projector_stage, run="float16-1")
    two = train_instruct(one.loaded, questions, preset.instruct_stage, run="float16-2")
    return {"losses": [round(run.metrics[-1]["loss"], 3) for run in (one, two)]}


def grpo_in_float16(tiny: bool) -> dict[str, Any]:
    from ironlogic.data.problems import make_tasks
    from ironlogic.models import load_model
    from ironlogic.training.grpo import GrpoSettings, train_grpo

    settings = GrpoSettings(steps=3, max_new_tokens=64)
    loaded = load_model("nano", four_bit=False, max_length=256)
    run = train_grpo(loaded, make_tasks(32, seed=5), settings, run="float16-grpo")
    return {"reward": run.metrics[-1].get("reward"), "seconds": run.record["seconds"]}


# --- e: splices -------------------------------------------------------------------------------------------------
def splice_stage(folder: Path, system: str, stage: int, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """One stage with a picture in every row, as many rows a pass as the preset has."""
    from ironlogic.data.chats import make_chats
    from ironlogic.presets import VISION_PRESETS
    from ironlogic.vision.splice import splice
    from ironlogic.vision.train import train_instruct, train_projector

    from PIL import Image
    from weights import conversations, tower_of

    preset = VISION_PRESETS[system]
    settings = preset.projector_stage if stage == 1 else preset.instruct_stage
    settings = replace(settings, accumulation=1, max_length=min(length, settings.max_length), log_steps=1)
    tower = tower_of(system, tiny=tiny)
    options = {"projector": preset.projector, "four_bit": preset.four_bit, "max_length": settings.max_length}
    loaded = splice(tower, folder, **options)
    picture = {"type": "image", "image": Image.effect_noise((336, 336), 64).convert("RGB")}
    rows = conversations(settings.max_length, steps * settings.batch_size)
    for user, _ in rows:
        words = user["content"].split()
        user["content"] = [picture, {"type": "text", "text": " ".join(words[: len(words) // 4])}]
    train = train_projector if stage == 1 else train_instruct
    run = train(loaded, make_chats(rows), settings, run=folder / f"run-{time.time_ns()}", cache=None)
    tokens = settings.batch_size * settings.max_length
    speed = tokens / step_seconds([line["seconds"] for line in run.metrics])
    return {"tokens_per_second": speed, "length": settings.max_length}


def all_parts(length: int) -> list[Part]:
    """Every part in the order of its worth."""
    parts = [
        Part(f"a {name}", 240, run_notebook, {"name": name, "parameters": parameters})
        for name, parameters in NOTEBOOKS.items()
    ]
    vision = {"length": length, "steps": 8}
    parts += [
        Part("b qwen3-vl-4b, ours", 150, our_stage, vision, "qwen3-vl-4b", 14.7),
        Part("b qwen3-vl-4b, the seed's script", 150, seed_script, vision, "qwen3-vl-4b", 14.7),
        Part("b qwen3-vl-4b, layer reading", 100, read_in_4_bit, vision, "qwen3-vl-4b", 14.7),
    ]
    parts += [
        Part("c float16, FT", 150, ft_in_float16, float16=True),
        Part("c float16, splice", 200, splice_in_float16, float16=True),
        Part("c float16, GRPO", 150, grpo_in_float16, float16=True),
    ]
    large = {"length": length, "steps": 6}
    for cap in (31.4, 23.5):
        for system in ("gemma-3-27b", "qwen3-30b-a3b"):
            parts.append(Part(f"d {system}, ours, {cap:g} GiB", 220, our_stage, large, system, cap))
            parts.append(Part(f"d {system}, the seed's script, {cap:g} GiB", 220, seed_script, large, system, cap))
    for system in ("gemma-3-27b", "qwen3-30b-a3b"):
        trace = {"length": length, "steps": 2}
        parts.append(Part(f"d {system}, largest allocations", 240, largest_allocations, trace, system, 31.4))
    for system in ("vqwen3-4b", "qwen3-smvl"):
        for stage in (1, 2):
            settings = {"stage": stage, "length": 2048, "steps": 5}
            parts.append(Part(f"e {system}, stage {stage}", 130, splice_stage, settings, system, 23.5))
    return parts


def look_like_a_t4() -> None:
    """No bfloat16, for Unsloth and for us; Triton goes on compiling for the card that is there."""
    import torch

    capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: (7, 5)
    from ironlogic import models  # Unsloth decides when it is imported

    torch.cuda.get_device_capability = capability
    models.card_has_bfloat16 = lambda: False


# --- one part, in a process of its own --------------------------------------------------------------------------
def run_part(part: Part, folder: Path, *, tiny: bool) -> dict[str, Any]:
    """The part's result with the memory that it took."""
    import torch

    on_card = torch.cuda.is_available()
    if part.cap and on_card:
        be_as_small_as(part.cap)
    if part.float16 and on_card:
        look_like_a_t4()
    settings = dict(part.settings)
    if tiny:
        settings |= dict.fromkeys(settings.keys() & {"length"}, 128)
    if part.system:
        settings |= {"folder": folder} | {"system": part.system}
    began = time.perf_counter()
    try:
        result = part.run(**settings, tiny=tiny)
    except Exception as error:
        short = [cause for cause in causes_of(error) if "out of memory" in str(cause)]  # torch's, or the package's
        if not short:
            raise
        result = {"out_of_memory": str(short[-1])[:300], "traceback": traceback.format_exc()[-3000:]}
    result["seconds_in_all"] = round(time.perf_counter() - began, 1)
    return result | (memory_taken() if on_card else {})


def be_as_small_as(gib: float) -> None:
    """Takes no more than `gib`, and says so: Unsloth cuts its loss into pieces by the memory that is free."""
    import torch

    asked, cap = torch.cuda.mem_get_info, int(gib * 2**30)
    total = torch.cuda.get_device_properties(0).total_memory
    if cap >= total:
        return
    torch.cuda.set_per_process_memory_fraction(cap / total)

    def mem_get_info(*device: Any, **named: Any) -> tuple[int, int]:
        free, _ = asked(*device, **named)
        return max(min(free, cap - torch.cuda.memory_reserved()), 0), cap

    torch.cuda.mem_get_info = mem_get_info


def speak_as_t4() -> None:
    """A T4 has no bfloat16. torch and Triton compile for the card that is there and have to know the truth."""
    import torch

    asked = torch.cuda.get_device_capability

    def get_device_capability(*device: Any, **named: Any) -> tuple[int, int]:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return asked(*device, **named) if caller in ("torch", "triton") else (7, 5)

    torch.cuda.get_device_capability = get_device_capability
    torch.cuda.is_bf16_supported = lambda *_, **__: False


def memory_taken() -> dict[str, Any]:
    """Peaks of this process in GiB, and what the CUDA context takes on top of what torch has reserved."""
    import torch

    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    used = re.search(rf"^{os.getpid()}, (\d+)$", told, flags=re.MULTILINE)  # MiB; containers hide the ids
    context = used and int(used[1]) / 2**10 - torch.cuda.memory_reserved() / 2**30
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "context_gib": context and round(context, 2),
        "summary": torch.cuda.memory_summary(abbreviated=True)[:3000],
    }


def causes_of(error: BaseException) -> list[BaseException]:
    """The error, what raised it, and so on down to the first."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    return causes


def child(part: Part, folder: Path, *, tiny: bool) -> None:
    """Prints one line of JSON: the result, or what went wrong where."""
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            result = run_part(part, folder, tiny=tiny)
    except BaseException as error:
        causes = [f"{type(cause).__name__}: {str(cause)[:300]}" for cause in causes_of(error)]
        result = {"failed": " <- ".join(causes), "traceback": traceback.format_exc()[-3000:]}
    print(json.dumps({"result": result, "log": log.getvalue()[-1500:]}))


# --- all of them ------------------------------------------------------------------------------------------------
class Results:
    """results.jsonl: a line a part; of several lines of one part the last counts, and a failed part runs again.

    To run out of a card's memory is a result, and final.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        measured: dict[str, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # cut while it was written
                measured[json.loads(line)["part"]] = json.loads(line)
        return measured

    def add(self, part: str, result: dict[str, Any]) -> None:
        line = {"part": part, "date": str(date.today()), "card": card_name(), "commit": commit()} | result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {
            key: value for key, value in result.items() if key not in ("summary", "traceback", "log", "at_peak")
        }
        print(f"{part}: {json.dumps(shown)[:600]}", flush=True)


def card_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        return "no card"
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "no card"


def commit() -> str:
    """The commit that is measured, "-dirty" when files differ; IRONLOGIC_COMMIT where the tree came without it."""
    if named := os.environ.get("IRONLOGIC_COMMIT"):
        return named
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def seconds_for(limit: float, chosen: argparse.Namespace) -> float:
    """Seconds that something may still take; 0: not worth a start any more."""
    left = chosen.deadline - time.time() if chosen.deadline else limit
    return min(limit, left) if left > 20 else 0


def run_limited(
    command: list[str], seconds: float, folder: Path, environ: dict[str, str]
) -> tuple[int | None, str, str]:
    """(exit code, output, errors); None: it ran too long, and it and the processes that it started were ended."""
    with (folder / "out.txt").open("wb") as out, (folder / "err.txt").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environ, cwd=folder)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
    texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out.txt", "err.txt")]
    return code, *texts


def start_part(part: Part, weights: Path, results: Results, chosen: argparse.Namespace) -> None:
    """Runs one part as a process and writes down what came of it."""
    seconds = seconds_for(part.seconds, chosen)
    if not seconds:
        return
    scratch = chosen.scratch / re.sub(r"\W+", "-", part.name)
    environ = {
        **os.environ,
        **{"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "IRONLOGIC_NO_INSTALL": "1"},
        **{"IRONLOGIC_PRESET": "nano", "IRONLOGIC_RUNS": str(scratch / "runs"), "MPLBACKEND": "agg"},
        "COLAB_RELEASE_TAG": "card",  # a host with a torch and a front end of its own
    }
    command = [
        sys.executable,
        __file__,
        "--part",
        part.name,
        "--folder",
        str(weights),
        "--length",
        str(chosen.length),
    ]
    command += ["--tiny"] * chosen.tiny
    scratch.mkdir(parents=True, exist_ok=True)
    code, out, err = run_limited(command, seconds, scratch, environ)
    try:
        told = json.loads(out.splitlines()[-1])
        result = told["result"] | ({"log": told["log"]} if "failed" in told["result"] else {})
    except (json.JSONDecodeError, IndexError):
        failed = f"not done in {seconds:.0f} s" if code is None else f"ended with code {code}"
        result = {"failed": failed, "log": out[-300:] + err[-1200:]}
    results.add(part.name, result)
    shutil.rmtree(scratch, ignore_errors=True)


def run_system(system: str, parts: list[Part], results: Results, chosen: argparse.Namespace) -> None:
    """The parts of one system after each other, around weights that are written once and deleted after."""
    folder = chosen.scratch / f"weights-{system}"
    build = [sys.executable, __file__, "--build", system, "--folder", str(folder)] + ["--tiny"] * chosen.tiny
    seconds = seconds_for(300, chosen)
    if not seconds:
        return
    folder.mkdir(parents=True, exist_ok=True)
    code, _, err = run_limited(build, seconds, folder, {**os.environ, "HF_HUB_OFFLINE": "1"})
    for part in parts:
        if code == 0:
            start_part(part, folder, results, chosen)
        elif code is not None:
            results.add(part.name, {"failed": "its weights could not be written", "log": err[-1500:]})
    shutil.rmtree(folder, ignore_errors=True)


def run_all(chosen: argparse.Namespace) -> None:
    """What has no result yet: small things side by side, then each system by itself."""
    results = Results(chosen.out)
    done = {name for name, line in results.read().items() if "failed" not in line}
    left = [part for part in all_parts(chosen.length) if part.name not in done]
    left = [part for part in left if not chosen.only or any(part.name.startswith(begin) for begin in chosen.only)]
    small = [part for part in left if not part.system]
    with ThreadPoolExecutor(chosen.jobs) as threads:
        list(threads.map(lambda part: start_part(part, chosen.scratch, results, chosen), small))
    systems = {
        part.system: [other for other in left if other.system == part.system] for part in left if part.system
    }
    with ThreadPoolExecutor(chosen.together) as threads:
        list(threads.map(lambda item: run_system(*item, results, chosen), systems.items()))


def table(chosen: argparse.Namespace) -> str:
    """What was measured, as a table for tests/gpu/README.md; what was not says so."""
    measured = Results(chosen.out).read()
    lines = [
        "| part | result | allocated GiB | reserved GiB | tokens/s | card, date, commit |",
        "|---|---|---|---|---|---|",
    ]
    for part in all_parts(chosen.length):
        line = measured.get(part.name)
        if line is None:
            lines.append(f"| {part.name} | not run | | | | |")
            continue
        what = "out of memory" if "out_of_memory" in line else line.get("skipped", "passed")
        what = f"failed: {line['failed'][:120]}" if "failed" in line else what
        numbers = [line.get(key, "") for key in ("allocated_gib", "reserved_gib", "tokens_per_second")]
        shown = [f"{number:,.2f}" if isinstance(number, float) else "" for number in numbers]
        where = f"{line['card']}, {line['date']}, {line['commit']}"
        lines.append(f"| {part.name} | {what} | {' | '.join(shown)} | {where} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/card", help="folder of results.jsonl")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of parts, as: a 'b qwen3-vl-4b, ours'")
    parser.add_argument("--jobs", type=int, default=2, help="small parts side by side")
    parser.add_argument("--together", type=int, default=1, help="systems side by side, where memory allows")
    parser.add_argument("--minutes", type=float, default=0, help="start nothing after so many minutes")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--scratch", type=Path, help="where weights and runs lie meanwhile (60 GB for the largest)")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this script on any machine")
    parser.add_argument("--table", action="store_true", help="print what was measured and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.out = chosen.out.absolute()
    chosen.scratch = chosen.scratch or chosen.out / "scratch"
    chosen.deadline = time.time() + 60 * chosen.minutes if chosen.minutes else 0
    if chosen.part:
        part = next(part for part in all_parts(chosen.length) if part.name == chosen.part)
        child(part, chosen.folder, tiny=chosen.tiny)
    elif chosen.build:
        from weights import build

        print(build(chosen.build, chosen.folder, tiny=chosen.tiny))
    elif chosen.table:
        print(table(chosen))
    else:
        run_all(chosen)


if __name__ == "__main__":
    main()
