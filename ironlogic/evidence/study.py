"""The arms of a study: trains what is missing, measures what was not measured, reads what is there.

An arm is one recipe, trained once a seed; SFT is the control twin of all others. Runs lie where notebook 02 puts
them, so those are read, not made again. What was measured lies beside each run (`evidence-*.json`).
Knows no claim.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden
from ironlogic.data.chats import ChatError, describe_rejected, load_chats, split_chats
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.evidence.behaviour import decoding_speed, measure_all
from ironlogic.evidence.items import Columns, Items, delete_words, items_of_chats, made_items
from ironlogic.models import LoadedModel, free_memory, load_model, resolve, split_adapter
from ironlogic.presets import Preset, TrainSettings
from ironlogic.training.runs import RunError, open_run, write_json
from ironlogic.training.sft import train_sft
from ironlogic.training.stages import content_hash

import numpy as np
import torch

__all__ = [
    "CURVE",
    "MAIN",
    "SIDE",
    "Job",
    "Study",
    "add_speed",
    "measure_adapters",
    "measure_once",
    "open_study",
    "run_jobs",
    "seen_before",
    "study_name",
]

MAIN = ("SFT", "FT", "FT mixed", "FT as the seed", "SFT then SFT", "FT then SFT")
SIDE = ("FT 0.3", "deletion", "NEFTune")  # other sorts of noise
CURVE = (30, 100, 248, 1000)  # rows of the learning curves below the whole; 248 is the seeds' dataset
_DELETED, _NEFTUNE, _VERSION = 0.3, 5.0, 1
Chats = Sequence[Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One training and its measurement. `rows`: only the first ones, for a learning curve; 0: all."""

    arm: str
    seed: int
    rows: int = 0

    @property
    def name(self) -> str:
        """The arm as the claims call it."""
        return f"{self.arm} {self.rows} rows" if self.rows else self.arm

    @property
    def before(self) -> "Job | None":
        """The job whose adapter this one goes on from."""
        first, then, _ = self.arm.partition(" then ")
        return Job(first, self.seed) if then else None


@dataclass(frozen=True)
class Study:
    """What all arms share. `folder` holds a run `<arm>-<seed>` each."""

    folder: Path
    preset: Preset
    items: Items
    chats: dict[int, Chats]  # rows by training seed
    further: dict[int, Chats]  # rows of the stage after, by training seed
    ratio: float = 0.7
    seed: int = 0  # of the items' damage
    max_new_tokens: int = 72

    def recipe(self, arm: str) -> tuple[TrainSettings, Burden | None]:
        train, burden = self.preset.train, replace(self.preset.burden, ratio=self.ratio)
        return {
            "SFT": (train, None),
            "FT": (train, burden),
            "FT mixed": (train, replace(burden, mix=0.5)),
            "FT as the seed": (replace(train, loss="all"), Burden(ratio=self.ratio, unit="seed", redraw=False)),
            "FT 0.3": (train, replace(burden, ratio=0.3)),
            "deletion": (train, None),
            "NEFTune": (replace(train, neftune_alpha=_NEFTUNE), None),
            "SFT then SFT": (train, None),
            "FT then SFT": (train, None),
        }[arm]

    def run(self, job: Job) -> Path:
        return self.folder / f"{job.name.replace(' ', '-')}-{job.seed}"

    def folder_of(self, job: Job) -> Path:
        """Where the job's measurements lie."""
        return self.folder / "base" if job.arm == "base" else self.run(job)

    def was_measured(self, job: Job) -> bool:
        file = _measured(self.items, self.seed, self.max_new_tokens, bool(job.rows))
        return (self.folder_of(job) / file).exists()

    def jobs(self, arms: Iterable[str], seeds: Iterable[int], *, sizes: Iterable[int] = ()) -> list[Job]:
        seeds = list(seeds)
        small = [Job(arm, seed, rows) for rows in sizes for seed in seeds for arm in ("SFT", "FT")]
        return [Job(arm, seed) for arm in arms for seed in seeds] + small

    def train(self, job: Job) -> Path:
        """The job's adapter, trained now if it was not."""
        settings, burden = self.recipe(job.arm)
        loaded = self.load(self.run(job.before) / "adapter" if job.before else self.preset.model, job.seed)
        settings = replace(settings, seed=job.seed)
        return train_sft(loaded, self.rows(job), settings, run=self.run(job), burden=burden).adapter

    def rows(self, job: Job) -> Chats:
        """What the job is trained on."""
        if job.before:
            return self.further[job.seed]
        chats = self.chats[job.seed][: job.rows or None]
        if job.arm == "deletion":
            return [delete_words(chat, _DELETED, seed=job.seed, row=row) for row, chat in enumerate(chats)]
        return chats

    def load(self, source: str | Path, seed: int = 0) -> LoadedModel:
        preset = self.preset
        return load_model(source, four_bit=preset.four_bit, max_length=preset.train.max_length, seed=seed)

    def do(self, job: Job) -> tuple[Job, Columns, float]:
        """Trains and measures what is not there; (job, columns, seconds it took).

        Raises `RunError` when the run that is there was trained on other rows.
        """
        began, folder = time.perf_counter(), self.folder_of(job)
        source = self.preset.model if job.arm == "base" else folder / "adapter"
        if job.arm != "base":
            if not _finished(folder):
                self.train(job)
                free_memory()
            elif open_run(folder).record["data_sha256"] != content_hash(self.rows(job)):
                raise RunError(
                    f"{folder} was trained on other rows; choose other ROWS or SEED, or delete the folder"
                )
        columns = measure_once(
            lambda: self.load(source),
            self.items,
            folder,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            brief=bool(job.rows),
        )
        free_memory()
        return job, columns, time.perf_counter() - began

    def trained(self, arm: str) -> list[int]:
        """Seeds for which a finished run of that arm is there."""
        return [seed for seed in self.chats if _finished(self.run(Job(arm, seed)))]

    def full(self) -> tuple[list[Job], tuple[int, ...]]:
        """Every job of the full table, and the sizes of its learning curves. Side arms have three trainings."""
        seeds, most = list(self.chats), min(map(len, self.chats.values()))
        sizes = tuple(size for size in CURVE if size < most)
        jobs = [Job("base", 0), *self.jobs(MAIN, seeds, sizes=sizes), *self.jobs(SIDE, seeds[:3])]
        return jobs, (*sizes, most)

    def short(self) -> list[Job]:
        """The base and every arm that was trained whole; SFT and FT are trained where they are missing."""
        found = [Job(arm, seed) for arm in (*MAIN[2:], *SIDE) for seed in self.trained(arm)]
        return [Job("base", 0), *self.jobs(MAIN[:2], self.chats), *found]

    def told(self) -> list[str]:
        """What was done with what, for the report."""
        items, first = self.items, next(iter(self.chats))
        counts = {sort: items.among(sort).sum() for sort in ("free", "bound", "easy", "hard")}
        marked = (
            ", ".join(f"{n} {sort}" for sort, n in counts.items() if n) or "not marked free or bound, easy or hard"
        )
        answers = "answers checked by exact match" if items.checkable else "no checkable answers"
        return [
            f"Model {self.preset.model}; {len(self.chats[first]):,} rows an arm, burden ratio {self.ratio:g}. "
            f"Training seeds {', '.join(map(str, self.chats))}; every arm has its control twin on the same rows.",
            f"{len(items)} held-out items ({marked}), {answers}; scrambles of seed {self.seed}.",
            "The rules stand in ironlogic/evidence/claims.py. They are evidence about this model, at this size.",
        ]

    def time_arms(self, arms: dict[str, dict[int, Columns]]) -> None:
        """Adds columns of speed to the first training of base, SFT and FT."""
        seed = next(iter(self.chats))
        adapters = {arm: self.run(Job(arm, seed)) / "adapter" for arm in ("SFT", "FT") if seed in arms.get(arm, {})}
        add_speed(arms, self.load(self.preset.model), adapters, self.items, seed=seed)
        free_memory()


def add_speed(
    arms: dict[str, dict[int, Columns]],
    base: LoadedModel,
    adapters: Mapping[str, Path],
    items: Items,
    *,
    seed: int = 0,
    prompts: int = 12,
) -> None:
    """Times base and adapters on some easy items (any, if nobody marked them); the other items are NaN there."""
    places = np.flatnonzero(items.among("easy"))
    places = (places if len(places) else np.arange(len(items)))[:prompts]
    found = decoding_speed(base, adapters, [items.tasks[place].prompt for place in places])
    for arm, seconds in found.items():
        columns = arms[arm].get(seed, arms[arm].get(0))
        columns["ln seconds"], columns["ln time"] = np.full((2, len(items)), np.nan)
        columns["ln seconds"][places] = np.log(seconds)
        columns["ln time"][places] = np.log(seconds) + columns["ln tokens"][places]


def measure_adapters(
    adapters: Mapping[str, str | Path],
    items: Items,
    folder: Path,
    *,
    four_bit: bool = True,
    max_length: int = 2048,
    seed: int = 0,
    max_new_tokens: int = 512,
) -> dict[str, dict[int, Columns]]:
    """Your own adapters by name, and the base of the first one; all measured on the same items.

    What was measured lies in `folder`, by adapter. Raises `RunError`, before anything is measured, for a folder
    that holds no adapter and for adapters of several bases.
    """
    places = {name: Path(resolve(source)) for name, source in adapters.items()}
    bases = {name: split_adapter(str(place)) for name, place in places.items()}
    if plain := [name for name, (_, adapter) in bases.items() if adapter is None]:
        raise RunError(f"{plain[0]}: {places[plain[0]]} holds no adapter (adapter_config.json)")
    base = next(iter(bases.values()))[0]
    if other := [name for name, (found, _) in bases.items() if found != base]:
        raise RunError(
            f"{other[0]} is an adapter of {bases[other[0]][0]}, not of {base}; compare twins of one base"
        )
    arms, options = {}, {"seed": seed, "max_new_tokens": max_new_tokens}
    for name, source in {**places, "base": base}.items():
        weights = source / "adapter_model.safetensors" if name != "base" else None
        content = weights.read_bytes() if weights else base.encode()
        mark = hashlib.sha256(content + bytes([four_bit])).hexdigest()[:12]
        load = partial(load_model, source, four_bit=four_bit, max_length=max_length)
        arms[name] = {0: measure_once(load, items, folder / mark, **options)}
        free_memory()
    add_speed(arms, load_model(base, four_bit=four_bit, max_length=max_length), places, items)
    return arms


def open_study(
    preset: Preset,
    runs: Path,
    *,
    data: str = "",
    rows: int = 3000,
    ratio: float = 0.7,
    seeds: int = 0,
    seed: int = 3407,
    items: Items | None = None,
    questions: int = 170,
) -> Study:
    """The study of a preset in the results folder `runs`: the rows, folder and names of notebook 02.

    `data`: your conversations, "": the preset's own. `seeds`: trainings an arm; 0: the preset's number, of
    conversations one. `items`: your own items; else made problems, or the rows held out. Raises `ChatError` when
    there are too few.
    """
    source = data or preset.data
    usual = preset.evaluation_seeds if source == "problems" else 1
    numbers = [seed + i for i in range(seeds or usual)]
    if source == "problems":
        chats = {n: [task_chat(task) for task in make_tasks(rows, seed=n)] for n in numbers}
        further = {n: [task_chat(task) for task in make_tasks(rows // 3, seed=n + 10_000)] for n in numbers}
        items = items or made_items(questions, seed=seed)
        folder = runs / study_name(preset, chats[seed], data=data, rows=rows, ratio=ratio)
        return Study(folder, preset, items, chats, further, ratio, seed)
    table, rejected = load_chats(source)
    print(f"{len(table)} conversations. {describe_rejected(rejected)}")
    kept, held_out = split_chats(table, holdout=0.1, seed=seed)
    if min(len(kept), len(held_out)) == 0:
        raise ChatError(f"{source}: {len(table)} rows are too few to hold some out; bring 20 or more")
    chosen = kept.select(range(min(rows, len(kept))))["messages"]
    items = items or items_of_chats(held_out["messages"][:questions])
    further = dict.fromkeys(numbers, chosen[: max(1, len(chosen) // 3)])
    folder = runs / study_name(preset, chosen, data=data, rows=rows, ratio=ratio)
    return Study(folder, preset, items, dict.fromkeys(numbers, chosen), further, ratio, seed, max_new_tokens=512)


def study_name(preset: Preset, chats: Chats, *, data: str = "", rows: int = 3000, ratio: float = 0.7) -> str:
    """Of the folder that notebooks 02 and 05 share. Your own rows, once corrected, are another study."""
    mark = f"-{content_hash(chats)[:6]}" if data else ""
    return f"02_{preset.name}_{Path(data or preset.data).stem}{mark}_{rows}_{ratio:g}"


def _finished(folder: Path) -> bool:
    try:
        open_run(folder)
    except RunError:
        return False
    return True


def measure_once(
    load: Callable[[], LoadedModel],
    items: Items,
    folder: Path,
    *,
    seed: int,
    max_new_tokens: int,
    brief: bool = False,
) -> Columns:
    """`measure_all`, or what it gave for the same model folder and items before; a file for each set of items."""
    file = folder / _measured(items, seed, max_new_tokens, brief)
    if not file.exists():
        columns = measure_all(load(), items, seed=seed, max_new_tokens=max_new_tokens, brief=brief)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {name: values.tolist() for name, values in columns.items()})
    known = json.loads(file.read_text(encoding="utf-8"))
    return {name: np.array(values, float) for name, values in known.items()}


def _measured(items: Items, seed: int, max_new_tokens: int, brief: bool) -> str:
    asked = [[asdict(task) for task in items.tasks], items.chats, seed, max_new_tokens, brief, _VERSION]
    return f"evidence-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.json"


def run_jobs(
    study: Study, jobs: Sequence[Job], *, workers: int = 1, report: Callable[[str], None] = print
) -> dict[str, dict[int, Columns]]:
    """Does the jobs, those that go on from another arm after the others; arm -> seed -> columns.

    More than one worker only without a card: each is a process with a thread of its own.
    """
    arms: dict[str, dict[int, Columns]] = {job.name: {} for job in jobs}
    new = [job for job in jobs if not study.was_measured(job)]
    ordered = sorted(new, key=lambda job: job.before is not None)
    several = 1 if torch.cuda.is_available() else min(workers, len(new))
    with _pool(several) if several > 1 else contextlib.nullcontext() as pool:
        done = _in_turn(pool, study, ordered) if pool else map(study.do, ordered)
        for k, (job, columns, seconds) in enumerate(done, 1):
            arms[job.name][job.seed] = columns
            report(f"{k} of {len(new)}: {job.name}, seed {job.seed}, {seconds:.0f} s")
    for job in jobs:
        if job not in new:
            arms[job.name][job.seed] = study.do(job)[1]
    return {arm: {seed: runs[seed] for seed in sorted(runs)} for arm, runs in arms.items()}


def _pool(workers: int) -> ProcessPoolExecutor:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # several write over each other
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _in_turn(pool: ProcessPoolExecutor, study: Study, jobs: Sequence[Job]) -> Iterator[tuple[Job, Columns, float]]:
    """Results in the order of the jobs; one that goes on from another joins the queue when that one is done."""
    waiting = [job for job in jobs if job.before in jobs]
    asked = {job: pool.submit(study.do, job) for job in jobs if job not in waiting}
    for job in jobs:
        yield asked[job].result()
        asked |= {later: pool.submit(study.do, later) for later in waiting if later.before == job}


def seen_before(study: Study) -> bool:
    """Whether notebook 02's SFT and FT are there for every seed."""
    return all(set(study.trained(arm)) == set(study.chats) for arm in MAIN[:2])
