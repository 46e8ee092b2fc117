"""A study: the recipes of the evidence on one model and its data, and the items that all arms are asked.

Runs lie in one folder, that of notebook 02, so notebook 05 reads what it trained. `run_study` trains and measures
what is missing; `measure_adapters` measures a user's own adapters instead.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ironlogic.data.chats import ChatError, Chats, load_chats, make_chats
from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.evidence.items import Items, items_of_chats, made_items
from ironlogic.evidence.measures import decoding_speed
from ironlogic.evidence.results import Measurement
from ironlogic.evidence.twins import Arm, Recipe, as_preset, make_recipes, train_arms
from ironlogic.models import LoadedModel, free_memory, resolve, split_adapter
from ironlogic.presets import Preset, TrainSettings
from ironlogic.training.runs import RunError, open_run
from ironlogic.training.stages import content_hash

import numpy as np

__all__ = ["Study", "add_speed", "measure_adapters", "open_study", "run_study", "time_twins"]

MAIN = ("SFT", "FT", "FT mixed", "FT as the seed", "SFT then SFT", "FT then SFT")
SIDE = ("FT 0.3", "deletion", "NEFTune")  # other sorts of noise; three trainings
CURVE = (30, 100, 248, 1000)  # rows of the learning curves below the whole; 248 is the seeds' dataset
Recipes = dict[str, Recipe | None]


@dataclass(frozen=True)
class Study:
    """What all arms share. `folder` holds a run `<arm>-<seed>` each."""

    folder: Path
    preset: Preset
    items: Items
    chats: dict[int, Chats]  # rows by training seed
    further: dict[int, Chats]  # rows of the stage after, by training seed
    held_out: Chats  # conversations that no arm is trained on
    ratio: float = 0.7
    seed: int = 0  # of the items' scrambles
    max_new_tokens: int = 72

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the trainings."""
        return tuple(self.chats)

    @property
    def recipes(self) -> dict[str, Recipe]:
        return make_recipes(self.preset.train, replace(self.preset.burden, ratio=self.ratio))

    def twins(self, *once: str) -> Recipes:
        """The base, SFT and FT, and other arms trained `once`."""
        single = {arm: replace(self.recipes[arm], seeds=self.seeds[:1]) for arm in once}
        return {"base": None, "SFT": self.recipes["SFT"], "FT": self.recipes["FT"], **single}

    def short(self) -> Recipes:
        """The base, SFT and FT, and every other arm that was trained, with the seeds that were."""
        trained = {arm: replace(self.recipes[arm], seeds=self.trained(arm)) for arm in (*MAIN[2:], *SIDE)}
        return self.twins() | {arm: recipe for arm, recipe in trained.items() if recipe.seeds}

    def full(self) -> tuple[Recipes, tuple[int, ...]]:
        """Every arm of the full table, and the sizes of its learning curves."""
        most = min(map(len, self.chats.values()))
        sizes = tuple(size for size in CURVE if size < most)
        curve = {
            f"{arm} {size} rows": replace(self.recipes[arm], rows=size) for size in sizes for arm in ("SFT", "FT")
        }
        main = {arm: self.recipes[arm] for arm in MAIN}
        side = {arm: replace(self.recipes[arm], seeds=self.seeds[:3]) for arm in SIDE}
        return {"base": None, **main, **curve, **side}, (*sizes, most)

    def train(self, recipes: Recipes, *, test: Items | Chats | None = None, **options: Any) -> dict[str, Arm]:
        """The arms of these recipes, see `train_arms`; measured on `test`, if any, in the same processes."""
        return train_arms(
            self.preset,
            self.chats,
            recipes,
            seeds=self.seeds,
            run=self.folder,
            further=self.further,
            test=test,
            scramble_seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            **options,
        )

    def trained(self, arm: str) -> tuple[int, ...]:
        """Seeds for which a finished run of that arm is there."""
        return tuple(seed for seed in self.seeds if _finished(self.folder / f"{arm.replace(' ', '-')}-{seed}"))

    def has_twins(self) -> bool:
        """Whether SFT and FT are there for every seed (notebook 02 has run)."""
        return all(self.trained(arm) == self.seeds for arm in ("SFT", "FT"))

    def summary(self) -> list[str]:
        """What was done with what, for the report."""
        items = self.items
        counts = {sort: items.among(sort).sum() for sort in ("free", "bound", "easy", "hard")}
        marked = ", ".join(f"{count} {sort}" for sort, count in counts.items() if count)
        marked = marked or "not marked free or bound, easy or hard"
        answers = "answers checked by exact match" if items.checkable else "no checkable answers"
        return [
            f"Model {self.preset.model}; {len(self.chats[self.seeds[0]]):,} rows an arm, burden ratio "
            f"{self.ratio:g}. Training seeds {', '.join(map(str, self.seeds))}; every arm has its control twin on "
            "the same rows.",
            f"{len(items)} held-out items ({marked}), {answers}; scrambles of seed {self.seed}.",
            "The rules stand in ironlogic/evidence/claims.py. They are evidence about this model, at this size.",
        ]


def _finished(folder: Path) -> bool:
    try:
        open_run(folder)
    except RunError:
        return False
    return True


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
    """The study of a preset in the results folder `runs`, for notebooks 02 and 05.

    `data`: your conversations, "": the preset's own. `rows`: conversations an arm, at most. `seeds`: trainings an
    arm; 0: the preset's number, of conversations one. `items`: your own items; else made problems, or the rows held
    out. Raises `ChatError` when there are too few.
    """
    source = data or preset.data
    if source == "problems":
        numbers = range(seed, seed + (seeds or preset.evaluation_seeds))
        chats = {n: make_chats(map(task_chat, make_tasks(rows, seed=n))) for n in numbers}
        further = {n: make_chats(map(task_chat, make_tasks(max(1, rows // 3), seed=n + 10_000))) for n in numbers}
        items = items or made_items(questions, seed=seed)
        held_out, max_new_tokens = make_chats(items.chats), 72
    else:
        loaded = load_chats(source)
        print(f"{len(loaded)} conversations. {loaded.rejected}")
        kept, held_out = loaded.split(0.1, seed=seed)
        if min(len(kept), len(held_out)) == 0:
            raise ChatError(f"{source}: {len(loaded)} rows are too few to hold some out; bring 20 or more")
        chosen = kept[:rows]
        numbers = range(seed, seed + (seeds or 1))
        chats = dict.fromkeys(numbers, chosen)
        further = dict.fromkeys(numbers, chosen[: max(1, len(chosen) // 3)])
        max_new_tokens = 512
        items = items or items_of_chats(held_out[:questions])
    # your own rows, once corrected, are another study
    mark = f"-{content_hash(chats[seed])[:6]}" if data else ""
    folder = runs / f"02_{preset.name}_{Path(source).stem}{mark}_{rows}_{ratio:g}"
    return Study(folder, preset, items, chats, further, held_out, ratio, seed, max_new_tokens)


def run_study(study: Study, recipes: Recipes, **options: Any) -> dict[str, Measurement]:
    """Trains and measures what is missing; what was measured of every arm. `options` as in `run_parallel`."""
    arms = study.train(recipes, test=study.items, **options)
    return {name: arm.measure(study.items) for name, arm in arms.items()}


def time_twins(study: Study, measured: Mapping[str, Measurement]) -> None:
    """Adds columns of speed to the first training of base, SFT and FT."""
    seed = study.seeds[0]
    adapters = {arm: study.folder / f"{arm}-{seed}" / "adapter" for arm in ("SFT", "FT") if arm in measured}
    base = Arm("base", study.preset, {}).load()
    add_speed(measured, base, adapters, study.items, seed=seed)
    free_memory()


def add_speed(
    measured: Mapping[str, Measurement],
    base: LoadedModel,
    adapters: Mapping[str, Path],
    items: Items,
    *,
    seed: int = 0,
    prompts: int = 12,
) -> None:
    """Times base and adapters on some easy items (any, if nobody marked them); the other items are NaN there."""
    timed = np.flatnonzero(items.among("easy"))
    timed = (timed if len(timed) else np.arange(len(items)))[:prompts]
    for arm, seconds in decoding_speed(base, adapters, [items.tasks[i].prompt for i in timed]).items():
        columns = measured[arm].get(seed, measured[arm].get(0))
        columns["ln seconds"], columns["ln time"] = np.full((2, len(items)), np.nan)
        columns["ln seconds"][timed] = np.log(seconds)
        columns["ln time"][timed] = np.log(seconds) + columns["ln tokens"][timed]


def measure_adapters(
    adapters: Mapping[str, str | Path],
    items: Items,
    folder: Path,
    *,
    four_bit: bool = True,
    max_length: int = 2048,
    seed: int = 0,
    max_new_tokens: int = 512,
) -> dict[str, Measurement]:
    """Your own adapters by name, and the base of the first one; all measured on the same items.

    What was measured lies in `folder`, by adapter. Raises `RunError`, before anything is measured, for a folder
    that holds no adapter and for adapters of several bases.
    """
    adapters = {name: Path(resolve(source)) for name, source in adapters.items()}
    bases = {}
    for name, adapter in adapters.items():
        bases[name], is_adapter = split_adapter(str(adapter))
        if is_adapter is None:
            raise RunError(f"{name}: {adapter} holds no adapter (adapter_config.json)")
    base = next(iter(bases.values()))
    for name, other in bases.items():
        if other != base:
            raise RunError(f"{name} is an adapter of {other}, not of {base}; compare twins of one base")
    measured = {}
    for name, model in {**adapters, "base": base}.items():
        weights = base.encode() if name == "base" else (model / "adapter_model.safetensors").read_bytes()
        digest = hashlib.sha256(weights + bytes([four_bit])).hexdigest()[:12]
        preset = replace(as_preset(str(model), TrainSettings(max_length=max_length)), four_bit=four_bit)
        arm = Arm(name, preset, {0: folder / digest}, seed, max_new_tokens)
        measured[name] = arm.measure(items)
    add_speed(measured, arm.load(), adapters, items)  # the last one is the base
    free_memory()
    return measured
