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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

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
Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`run(**settings)` gives what goes into the results; `system`: whose weights it needs; `cap` in GiB."""

    name: str
    seconds: int
    run: Callable[..., Result]
    settings: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    cap: float = 0.0
    float16: bool = False  # as on a card without bfloat16


# --- a: notebooks -----------------------------------------------------------------------------------------------
def run_notebook(name: str, parameters: dict[str, Any]) -> Result:
    """Executes the code cells one after the other, as a kernel would; the last one holds the notebook's checks."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    os.chdir(ROOT / "notebooks")
    scope: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            assert all(f"{key} = " in source for key in parameters), f"{name} has not all of {[*parameters]}"
            source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        try:
            exec(compile(source, f"{name}, code cell {number}", "exec"), scope)
        except BaseException as error:
            raise RuntimeError(f"code cell {number} of {len(code)}") from error
    return {"cells": len(code)}


# --- b, d: a stage on a model of true shapes --------------------------------------------------------------------
def our_stage(folder: Path, system: str, length: int, steps: int) -> Result:
    """Our stage with the preset's settings, one row a step."""
    from ironlogic.data.chats import make_chats
    from ironlogic.models import load_model
    from ironlogic.presets import PRESETS
    from ironlogic.training.sft import train_sft

    import torch
    from weights import conversations

    preset = PRESETS[system]
    settings = replace(preset.train, epochs=1, accumulation=1, max_length=length, log_steps=1)
    loaded = load_model(folder, four_bit=True, max_length=length)
    result: Result = {"backend": loaded.backend, "four_bit_share": round(loaded.four_bit_share, 4)}
    if torch.cuda.is_available():
        result["loaded_gib"] = gib(torch.cuda.memory_allocated())
        result["loading_peak_gib"] = gib(torch.cuda.max_memory_allocated())
    rows = make_chats(conversations(length, steps))
    run = train_sft(loaded, rows, settings, run=folder / f"run-{time.time_ns()}", burden=preset.burden)
    return result | {"tokens_per_second": length / step_seconds([line["seconds"] for line in run.metrics])}


def step_seconds(times: list[float]) -> float:
    """Seconds of a usual step: the median, as the first ones compile."""
    return max(statistics.median(later - earlier for earlier, later in pairwise(times)), 1e-9)


def gib(size: int) -> float:
    return round(size / 2**30, 2)


def largest_allocations(folder: Path, system: str, length: int, steps: int) -> Result:
    """What lies on the card at the moment of the peak, by the lines of code that took it, in GiB."""
    import torch

    if not torch.cuda.is_available():
        return our_stage(folder, system, length, steps)
    torch.cuda.memory._record_memory_history(max_entries=2_000_000, context="alloc", stacks="python")
    result = our_stage(folder, system, length, steps)
    total, peak, live, at_peak = 0, 0, {}, {}
    for event in torch.cuda.memory._snapshot()["device_traces"][0]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
            total -= event["size"]
        if total > peak + 2**24:  # a copy at every byte would take forever
            peak, at_peak = total, dict(live)
    taken: dict[str, list[int]] = {}
    for event in at_peak.values():
        frames = [frame for frame in event["frames"] if "site-packages/torch/" not in frame["filename"]]
        lines = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in frames[:5]]
        taken.setdefault(" < ".join(lines), []).append(event["size"])
    largest = sorted(taken.items(), key=lambda item: -sum(item[1]))[:40]
    return result | {"at_peak": [[gib(sum(sizes)), len(sizes), where] for where, sizes in largest]}


def seed_script(folder: Path, system: str, length: int, steps: int) -> Result:
    """The published script (seed 001) with `max_steps`; its own reading of text."""
    import torch
    from seed import seed_trainer
    from weights import conversations

    if not torch.cuda.is_available() and system != "qwen3-30b-a3b":
        return {"skipped": "without a card Unsloth takes no model that sees"}
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in conversations(length, steps)))
    template = "gemma-3" if "gemma" in system else ""
    trainer = seed_trainer(folder, rows, length=length, template=template, max_steps=steps)
    times, step = [], trainer.training_step

    def timed(*given: Any) -> Any:
        loss = step(*given)
        loss.item()  # waits for the card
        times.append(time.perf_counter())
        return loss

    trainer.training_step = timed
    trainer.train()
    return {"tokens_per_second": length / step_seconds(times)}


def read_in_4_bit(folder: Path, system: str, length: int) -> Result:
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
def ft_in_float16() -> Result:
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
    return {"losses": losses}


def splice_in_float16() -> Result:
    from ironlogic.data.chats import make_chats
    from ironlogic.data.scenes import scene_chats
    from ironlogic.presets import VISION_PRESETS
    from ironlogic.vision.check import check_splice
    from ironlogic.vision.splice import splice
    from ironlogic.vision.train import train_instruct, train_projector

    preset, runs = VISION_PRESETS["nano-vision"], Path(os.environ["IRONLOGIC_RUNS"])
    loaded = splice(preset.tower, preset.language_model, projector=preset.projector, four_bit=True, seed=1)
    report = check_splice(loaded)
    assert report.passed, str(report)
    captions = make_chats(scene_chats(160, runs / "pictures", kinds=["caption"], seed=1))
    questions = make_chats(scene_chats(320, runs / "pictures", seed=1)[160:])
    one = train_projector(loaded, captions, preset.projector_stage, run="float16-1")
    two = train_instruct(one.loaded, questions, preset.instruct_stage, run="float16-2")
    return {"losses": [round(run.metrics[-1]["loss"], 3) for run in (one, two)]}


def grpo_in_float16() -> Result:
    from ironlogic.data.problems import make_tasks
    from ironlogic.models import load_model
    from ironlogic.training.grpo import GrpoSettings, train_grpo

    settings = GrpoSettings(steps=3, max_new_tokens=64)
    loaded = load_model("nano", four_bit=False, max_length=256)
    run = train_grpo(loaded, make_tasks(32, seed=5), settings, run="float16-grpo")
    return {"reward": run.metrics[-1].get("reward")}


# --- e: splices -------------------------------------------------------------------------------------------------
def splice_stage(folder: Path, system: str, stage: int, length: int, steps: int) -> Result:
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
    looks = {"projector": preset.projector, "tiles": preset.tiles, "four_bit": preset.four_bit}
    tower = tower_of(system, tiny=(folder / "tiny").exists())
    loaded = splice(tower, folder, max_length=settings.max_length, **looks)
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
    for name, run in (("ours", our_stage), ("the seed's script", seed_script)):
        parts.append(Part(f"b qwen3-vl-4b, {name}", 150, run, {"length": length, "steps": 8}, "qwen3-vl-4b", 14.7))
    parts.append(Part("b qwen3-vl-4b, layer reading", 100, read_in_4_bit, {"length": length}, "qwen3-vl-4b", 14.7))
    for name, run in (("FT", ft_in_float16), ("splice", splice_in_float16), ("GRPO", grpo_in_float16)):
        parts.append(Part(f"c float16, {name}", 200, run, float16=True))
    systems, large = ("gemma-3-27b", "qwen3-30b-a3b"), {"length": length, "steps": 6}
    for cap in (31.4, 23.5):
        for system in systems:
            parts.append(Part(f"d {system}, ours, {cap:g} GiB", 220, our_stage, large, system, cap))
            parts.append(Part(f"d {system}, the seed's script, {cap:g} GiB", 220, seed_script, large, system, cap))
    for system in systems:
        trace = large | {"steps": 2}
        parts.append(Part(f"d {system}, largest allocations", 240, largest_allocations, trace, system, 31.4))
    for system in ("vqwen3-4b", "qwen3-smvl"):
        for stage in (1, 2):
            settings = {"stage": stage, "length": 2048, "steps": 5}
            parts.append(Part(f"e {system}, stage {stage}", 130, splice_stage, settings, system, 23.5))
    return parts


# --- one part, in a process of its own --------------------------------------------------------------------------
def run_part(part: Part, folder: Path, *, tiny: bool) -> Result:
    """The part's result with the memory that it took, or what went wrong where."""
    import torch

    on_card = torch.cuda.is_available()
    if part.cap and on_card:
        be_as_small_as(part.cap)
    if part.float16 and on_card:
        look_like_a_t4()
    settings = part.settings | ({"folder": folder, "system": part.system} if part.system else {})
    if tiny and "length" in settings:
        settings["length"] = 128
    began = time.perf_counter()
    try:
        result = part.run(**settings)
    except BaseException as error:
        causes = [error]
        while following := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(following)
        told = " <- ".join(f"{type(cause).__name__}: {str(cause)[:300]}" for cause in causes)
        kind = "out_of_memory" if "out of memory" in told else "failed"  # torch's words, or the package's
        result = {kind: told, "traceback": traceback.format_exc()[-3000:]}
    result["seconds_in_all"] = round(time.perf_counter() - began, 1)
    return result | (memory_taken() if on_card else {})


def be_as_small_as(cap_gib: float) -> None:
    """Takes no more than that, and says so: Unsloth cuts its loss into pieces by the memory that is free."""
    import torch

    asked, cap = torch.cuda.mem_get_info, int(cap_gib * 2**30)
    total = torch.cuda.get_device_properties(0).total_memory
    if cap >= total:
        return
    torch.cuda.set_per_process_memory_fraction(cap / total)

    def mem_get_info(*device: Any, **named: Any) -> tuple[int, int]:
        free, _ = asked(*device, **named)
        return max(min(free, cap - torch.cuda.memory_reserved()), 0), cap

    torch.cuda.mem_get_info = mem_get_info


def look_like_a_t4() -> None:
    """No bfloat16, for Unsloth and for us; Triton goes on compiling for the card that is there."""
    import torch

    capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: (7, 5)
    from ironlogic import models  # Unsloth decides when it is imported

    torch.cuda.get_device_capability = capability
    models.card_has_bfloat16 = lambda: False


def memory_taken() -> Result:
    """Peaks of this process in GiB, and what the CUDA context takes on top of what torch has reserved."""
    import torch

    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    used = re.search(rf"^{os.getpid()}, (\d+)$", told, flags=re.MULTILINE)  # MiB; containers hide the ids
    return {
        "allocated_gib": gib(torch.cuda.max_memory_allocated()),
        "reserved_gib": gib(torch.cuda.max_memory_reserved()),
        "context_gib": used and gib(int(used[1]) * 2**20 - torch.cuda.memory_reserved()),
    }


# --- all of them ------------------------------------------------------------------------------------------------
def read_results(out: Path) -> dict[str, Result]:
    """By part: of several lines of one part the last counts."""
    path, measured = out / "results.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut while it was written
            measured[json.loads(line)["part"]] = json.loads(line)
    return measured


def add_result(out: Path, part: str, result: Result) -> None:
    line = {"part": part, "date": str(date.today()), "card": card_name(), "commit": commit()} | result
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(line)}\n")  # a line of its own, also after one that was cut
    shown = {key: value for key, value in result.items() if key not in ("traceback", "log", "at_peak")}
    print(f"{part}: {json.dumps(shown)[:600]}", flush=True)


def card_name() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no card"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "no card"


def commit() -> str:
    """The commit that is measured, "-dirty" when files differ; IRONLOGIC_COMMIT where the tree came without it."""
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return os.environ.get("IRONLOGIC_COMMIT") or done.stdout.strip() or "unknown"


def run_limited(arguments: list[str], limit: float, scratch: Path, chosen: argparse.Namespace) -> Result | None:
    """This script with `arguments`, in a process: its result, what went wrong, or None if no time is left."""
    seconds = min(limit, chosen.deadline - time.time())
    if seconds < 20:
        return None
    environ = os.environ | {
        **{"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "IRONLOGIC_NO_INSTALL": "1"},
        **{"IRONLOGIC_PRESET": "nano", "IRONLOGIC_RUNS": str(scratch / "runs"), "MPLBACKEND": "agg"},
        "COLAB_RELEASE_TAG": "card",  # a host with a torch and a front end of its own
    }
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *arguments, "--length", str(chosen.length), *["--tiny"] * chosen.tiny]
    answer, log = scratch / "answer.json", scratch / "log.txt"
    answer.unlink(missing_ok=True)
    with log.open("wb") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environ, cwd=scratch)
        try:
            ended = f"ended with code {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {seconds:.0f} s"
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
    result = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {"failed": ended}
    tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return result | ({"log": tail} if "failed" in result else {})


def run_unit(parts: list[Part], chosen: argparse.Namespace) -> None:
    """Parts of one system after each other, around weights that are written once and deleted after; or one part."""
    system, built = parts[0].system, {}
    weights = chosen.scratch / f"weights-{system}"
    if system:
        built = run_limited(["--build", system, "--folder", str(weights)], 300, weights, chosen)
    for part in parts:
        result = built
        if built is not None and "failed" not in built:
            scratch = chosen.scratch / re.sub(r"\W+", "-", part.name)
            result = run_limited(["--part", part.name, "--folder", str(weights)], part.seconds, scratch, chosen)
            shutil.rmtree(scratch, ignore_errors=True)
        if result is not None:
            add_result(chosen.out, part.name, result)
    shutil.rmtree(weights, ignore_errors=True)


def run_all(chosen: argparse.Namespace) -> None:
    """What has no result yet or failed (out of memory is a result): small things side by side, then each system."""
    done = {name for name, line in read_results(chosen.out).items() if "failed" not in line}
    left = [part for part in all_parts(chosen.length) if part.name not in done]
    left = [part for part in left if part.name.startswith(tuple(chosen.only or [""]))]
    small = [[part] for part in left if not part.system]
    names = dict.fromkeys(part.system for part in left if part.system)
    systems = [[part for part in left if part.system == name] for name in names]
    for units, together in ((small, chosen.jobs), (systems, chosen.together)):
        with ThreadPoolExecutor(together) as threads:
            list(threads.map(lambda parts: run_unit(parts, chosen), units))


def table(chosen: argparse.Namespace) -> str:
    """What was measured, as a table for tests/gpu/README.md; what was not says so."""
    measured = read_results(chosen.out)
    lines = [
        "| part | result | allocated GiB | reserved GiB | tokens/s | card, date, commit |",
        "|---|---|---|---|---|---|",
    ]
    for part in all_parts(chosen.length):
        if not (line := measured.get(part.name)):
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many minutes")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--scratch", type=Path, help="where weights and runs lie meanwhile (60 GB for the largest)")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this script on any machine")
    parser.add_argument("--table", action="store_true", help="print what was measured and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part or chosen.build:
        answer = Path("answer.json").absolute()
        if chosen.build:
            from weights import build

            result = {"gib": build(chosen.build, chosen.folder, tiny=chosen.tiny)}
        else:
            part = next(part for part in all_parts(chosen.length) if part.name == chosen.part)
            result = run_part(part, chosen.folder, tiny=chosen.tiny)
        answer.write_text(json.dumps(result), encoding="utf-8")
        return
    chosen.out = chosen.out.absolute()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.table:
        print(table(chosen))
        return
    chosen.scratch = (chosen.scratch or chosen.out / "scratch").absolute()
    chosen.deadline = time.time() + 60 * chosen.minutes
    run_all(chosen)


if __name__ == "__main__":
    main()
