"""A study: the recipes of the evidence on one model and its data, and the items that all arms are asked.

Runs lie in one folder, that of notebook 02, so notebook 05 reads what it trained. `run_study` trains and measures
what is missing; `measure_adapters` measures a user's own adapters instead.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ironlogic.data.chats import ChatError, Chats, load_chats, make_chats
from ironlogic.data.problems import WORLDS, make_tasks, task_chat
from ironlogic.evidence.claims import FEWEST, SEEDS_ROWS
from ironlogic.evidence.items import RATIOS, WORST, Items, items_of_chats, made_items
from ironlogic.evidence.measures import decoding_speed
from ironlogic.evidence.results import Measurement
from ironlogic.evidence.twins import Arm, Recipe, as_preset, make_recipes, train_arms
from ironlogic.models import LoadedModel, free_memory, resolve, split_adapter
from ironlogic.presets import Preset, TrainSettings
from ironlogic.training.prepared import rows_hash
from ironlogic.training.runs import RunError, open_run, write_json

import numpy as np

__all__ = [
    "Study",
    "add_speed",
    "check_adapters",
    "measure_adapters",
    "open_study",
    "run_full_study",
    "run_study",
    "shown_base",
    "time_twins",
]

MAIN = ("SFT", "FT", "SFT then SFT", "FT then SFT")  # of which claims speak
SIDE = ("FT mixed", "FT as the seed", "deletion", "NEFTune", "shuffled answers")
SIZES = (SEEDS_ROWS, 10 * SEEDS_ROWS, 100 * SEEDS_ROWS)  # rows of the learning curves
SEEDS_STEPS = 744  # optimizer steps of the seeds' script; points of the learning curves have as many, or more
FEW = 3  # trainings of side arms, learning curves and timings
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
    validation: Items | None  # what learning rates are chosen on; no claim is judged on it
    ratio: float = 0.7
    seed: int = 0  # of the items' scrambles
    max_new_tokens: int = 72
    rates: Mapping[str, float] = field(default_factory=dict)  # learning rates chosen for SFT and FT
    made: bool = False  # the rows are made problems, of which there are as many as one likes

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the trainings."""
        return tuple(self.chats)

    @property
    def recipes(self) -> dict[str, Recipe]:
        burden = replace(self.preset.burden, ratio=self.ratio)
        return make_recipes(self.preset.train, burden, rates=self.rates)

    def twins(self, *once: str) -> Recipes:
        """The base, SFT and FT, and other arms trained `once`."""
        single = {arm: replace(self.recipes[arm], seeds=self.seeds[:1]) for arm in once}
        return {"base": None, "SFT": self.recipes["SFT"], "FT": self.recipes["FT"], **single}

    def short(self) -> Recipes:
        """The base, SFT and FT, and every other arm that was trained, with the seeds that were."""
        trained = {arm: replace(self.recipes[arm], seeds=self.trained(arm)) for arm in (*MAIN[2:], *SIDE)}
        return self.twins() | {arm: recipe for arm, recipe in trained.items() if recipe.seeds}

    def full(self) -> Recipes:
        """Every arm of the full table but the learning curves."""
        main = {arm: self.recipes[arm] for arm in MAIN}
        side = {arm: replace(self.recipes[arm], seeds=self.seeds[:FEW]) for arm in SIDE}
        return {"base": None, **main, **side}

    def arm(self, name: str) -> Recipe | None:
        """One arm of the full table. Raises `RunError` with the names that exist."""
        arms = self.full()
        if name not in arms:
            raise RunError(f"no arm {name!r}; expected one of {', '.join(arms)}")
        return arms[name]

    def curves(self) -> tuple[Recipes, tuple[int, ...]]:
        """The control's learning curve and FT at the seeds' size, and the sizes; the longest training first."""
        most = SIZES[-1] if self.made else min(map(len, self.chats.values()))
        sizes = tuple(size for size in SIZES if size <= most)
        arms = [("SFT", size) for size in reversed(sizes)]
        if SEEDS_ROWS in sizes:
            arms.append(("FT", SEEDS_ROWS))
        return {f"{arm} {size} rows": self._at_size(arm, size) for arm, size in arms}, sizes

    def curve_rows(self) -> dict[int, Chats]:
        """The rows of which learning curves take the first ones, by training seed."""
        return (
            {seed: _made_rows(self.preset.data, SIZES[-1], seed) for seed in self.seeds[:FEW]}
            if self.made
            else self.chats
        )

    def _at_size(self, arm: str, size: int) -> Recipe:
        recipe = self.recipes[arm]
        rows_a_step = recipe.settings.batch_size * recipe.settings.accumulation
        epochs = math.ceil(SEEDS_STEPS / math.ceil(size / rows_a_step))
        return replace(recipe, settings=replace(recipe.settings, epochs=epochs), rows=size, seeds=self.seeds[:FEW])

    @property
    def can_sweep(self) -> bool:
        """Whether there are learning rates to choose from, and rows to choose them on."""
        return bool(self.preset.sweep) and self.validation is not None

    def sweep_rates(self, *, trainings: int = 1, **options: Any) -> "Study":
        """The study with the best learning rate for each arm, of `preset.sweep`, by its validation items.

        SFT and FT are trained at every rate, with seeds of their own, and judged alike: by accuracy, mean of clean
        and scrambled prompts (without checkable answers: by the loss of the reply); the base stands beside them.
        Writes `rates.json` into the study's folder, which `open_study` reads. `options` as in `run_parallel`.
        """
        if not self.can_sweep:
            lacking = "rows to validate on" if self.preset.sweep else "learning rates to choose from (Preset.sweep)"
            raise RunError(f"{self.folder.name} has no {lacking}")
        numbers = range(self.seed + 20_000, self.seed + 20_000 + trainings)
        rows = dict(zip(numbers, itertools.cycle(self.chats.values()), strict=False))
        recipes: Recipes = {"base": None}  # a rate of 0
        for rate in self.preset.sweep:
            swept = replace(self, rates={"SFT": rate, "FT": rate}).recipes
            recipes |= {f"{arm} at {rate:g}": replace(swept[arm], seeds=tuple(numbers)) for arm in ("SFT", "FT")}
        arms = self.train(recipes, chats=rows, test=self.validation, brief=True, **options)
        points = [_sweep_point(name, arm.measure(self.validation), self.validation) for name, arm in arms.items()]
        rates = {
            arm: max((point for point in points if point["arm"] == arm), key=lambda point: point["score"])["rate"]
            for arm in ("SFT", "FT")
        }
        write_json(self.folder / "rates.json", {"rates": rates, "points": points})
        return replace(self, rates=rates)

    def _edges(self) -> str:
        """A warning where the best rate is the lowest or highest that was tried."""
        ends = {min(self.preset.sweep, default=0): "lowest", max(self.preset.sweep, default=0): "highest"}
        told = [f"{arm}'s is the {ends[rate]} of them" for arm, rate in self.rates.items() if rate in ends]
        return f" ({', '.join(told)})" if told else ""

    def sweep_points(self) -> list[dict[str, Any]]:
        """What the sweep found: arm, rate, clean, scrambled and score of each; [] where there was none."""
        file = self.folder / "rates.json"
        return json.loads(file.read_text(encoding="utf-8"))["points"] if file.is_file() else []

    def train(
        self,
        recipes: Recipes,
        *,
        chats: Mapping[int, Chats] | None = None,
        test: Items | Chats | None = None,
        **options: Any,
    ) -> dict[str, Arm]:
        """The arms of these recipes, see `train_arms`; measured on `test`, if any, in the same processes."""
        return train_arms(
            self.preset,
            chats or self.chats,
            recipes,
            beside=self.full(),
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
        kinds = items.kinds(items.among("all"))
        marked += "" if kinds is None else f"; {len(set(kinds))} kinds"
        answers = "answers checked by exact match" if items.checkable else "no checkable answers"
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in self.rates.items())
        chosen = f"{self.preset.train.learning_rate:g} for all arms, not chosen by a sweep"
        if rates:
            chosen = f"{rates}, each the best of {len(self.preset.sweep)} on validation problems{self._edges()}"
        return [
            f"Model {self.preset.model}; {len(self.chats[self.seeds[0]]):,} rows an arm, burden ratio "
            f"{self.ratio:g}. Training seeds {', '.join(map(str, self.seeds))}; every arm has its control twin on "
            "the same rows.",
            f"Learning rates: {chosen}.",
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
    rows: int = 0,
    ratio: float = 0.7,
    seeds: int = 0,
    seed: int = 3407,
    items: Items | None = None,
    questions: int = 0,
    swept: bool = True,
) -> Study:
    """The study of a preset in the results folder `runs`, for notebooks 02 and 05.

    `data`: your conversations, "": the preset's own. `rows`: conversations an arm, at most. `seeds`: trainings an
    arm; of conversations one, if not told. `items`: your own items, and no row is held out; else made problems or
    rows held out: `questions` of them. 0: the preset's number. `swept`: at the rates that `Study.sweep_rates` chose
    in this folder, if it did.
    Raises `ChatError` when there are too few rows.
    """
    source, rows, questions = data or preset.data, rows or preset.rows, questions or preset.questions
    items_given = items is not None
    made = source in WORLDS
    if made:
        numbers = range(seed, seed + (seeds or preset.evaluation_seeds))
        chats = {n: _made_rows(source, rows, n) for n in numbers}
        further = {n: _made_rows(source, max(1, rows // 3), n + 10_000) for n in numbers}
        items = items or replace(made_items(questions, seed=seed, world=source), ratios=preset.ratios or RATIOS)
        validation = made_items(questions, seed=seed, split="validation", world=source)
        held_out, max_new_tokens = make_chats(items.chats), 72
    else:
        loaded = load_chats(source)
        print(f"{len(loaded)} conversations. {loaded.rejected}")
        kept, held_out = loaded.split(0.0 if items else 0.1, seed=seed)  # the seeds trained on all of their 248
        if not len(kept) or not (items or len(held_out)):
            raise ChatError(f"{source}: {len(loaded)} rows are too few to hold some out; bring 20 or more")
        third = len(held_out) // 3
        validation, held_out = _questions(held_out[:third][:questions]), held_out[third:]
        chosen = kept[:rows]
        numbers = range(seed, seed + (seeds or 1))
        chats = dict.fromkeys(numbers, chosen)
        further = dict.fromkeys(numbers, chosen[: max(1, len(chosen) // 3)])
        max_new_tokens = 512
        items = items or items_of_chats(held_out[:questions])
    # your own rows, once corrected, are another study
    mark = f"-{rows_hash(chats[seed])[:6]}" if data or (items_given and not made) else ""
    folder = runs / f"02_{preset.name}_{Path(source).stem}{mark}_{rows}_{ratio:g}"
    study = Study(
        folder,
        preset,
        items,
        chats,
        further,
        held_out,
        validation,
        ratio=ratio,
        seed=seed,
        max_new_tokens=max_new_tokens,
        made=made,
    )
    chosen = folder / "rates.json"
    if swept and chosen.is_file():
        study = replace(study, rates=json.loads(chosen.read_text(encoding="utf-8"))["rates"])
    return study


def _made_rows(world: str, count: int, seed: int) -> Chats:
    return make_chats(map(task_chat, make_tasks(count, seed=seed, world=world)))


def _questions(chats: Chats) -> Items | None:
    """The conversations as items; None where none begins with a question in text."""
    try:
        return items_of_chats(chats)
    except ChatError:
        return None


def _sweep_point(name: str, measured: Measurement, items: Items) -> dict[str, Any]:
    """One arm at one rate: higher is better, clean, scrambled and their mean (without answers: minus the loss)."""
    arm, _, rate = name.partition(" at ")  # the base has none
    column, sign = ("correct", 1) if items.checkable else ("loss", -1)
    clean, scrambled = (
        sign * float(np.nanmean([columns[f"{column}@{ratio:g}"] for columns in measured.values()]))
        for ratio in (0.0, WORST)
    )
    score = (clean + scrambled) / 2
    return {"arm": arm, "rate": float(rate or 0), "clean": clean, "scrambled": scrambled, "score": score}


def run_study(study: Study, recipes: Recipes, **options: Any) -> dict[str, Measurement]:
    """Trains and measures what is missing; what was measured of every arm. `options` as in `Study.train`."""
    arms = study.train(recipes, test=study.items, **options)
    return {name: arm.measure(study.items) for name, arm in arms.items()}


def shown_base(study: Study) -> dict[str, Measurement]:
    """The base with `preset.shots` solved examples before every question, as an arm; {} where there are none."""
    count = study.preset.shots
    if not (count and study.made and study.items.checkable):
        return {}
    solved = make_tasks(20 * count, seed=study.seed, world=study.preset.world)[:count]
    shots = tuple(turn for task in solved for turn in task_chat(task)[-2:])
    base = Arm("base", study.preset, {0: study.folder / "base"}, study.seed, study.max_new_tokens, brief=True)
    return {f"base, {count} examples": base.measure(replace(study.items, shots=shots))}


def run_full_study(study: Study, **options: Any) -> tuple[Study, dict[str, Measurement], tuple[int, ...]]:
    """(study at the learning rates it chose, what was measured of every arm, sizes of its learning curves).

    `options` as in `run_parallel`.
    """
    if study.can_sweep and not study.rates:
        study = study.sweep_rates(**options)
    measured = run_study(study, study.full(), **options) | shown_base(study)
    curves, sizes = study.curves()
    measured |= run_study(study, curves, chats=study.curve_rows(), **options)
    time_twins(study, measured)
    return study, measured, sizes


def time_twins(study: Study, measured: Mapping[str, Measurement]) -> None:
    """Adds columns of speed to base, SFT and FT, of the first trainings."""
    adapters = {
        (arm, seed): study.folder / f"{arm}-{seed}" / "adapter"
        for arm in ("SFT", "FT")
        for seed in list(measured.get(arm, ()))[:FEW]
    }
    add_speed(measured, Arm("base", study.preset, {}).load(), adapters, study.items)
    free_memory()


def add_speed(
    measured: Mapping[str, Measurement],
    base: LoadedModel,
    adapters: Mapping[tuple[str, int], Path],
    items: Items,
    *,
    prompts: int = 12,
) -> None:
    """Times base and adapters, by (arm, training), on some easy items (any, if nobody marked them); NaN elsewhere.

    `base` is of no further use.
    """
    timed = np.flatnonzero(items.among("easy"))
    timed = (timed if len(timed) else np.arange(len(items)))[:prompts]
    names = {f"{arm}-{seed}": (arm, seed) for arm, seed in adapters}
    folders = {name: adapters[key] for name, key in names.items()}
    for name, seconds in decoding_speed(base, folders, [items.tasks[i].prompt for i in timed]).items():
        arm, seed = names.get(name, ("base", 0))
        columns = measured[arm][seed]
        columns["ln seconds"] = np.full(len(items), np.nan)
        columns["ln seconds"][timed] = np.log(seconds)


def check_adapters(arms: Mapping[str, str | Path | Sequence[str | Path]]) -> tuple[str, dict[str, list[Path]]]:
    """(base, folders by arm) of your own adapters or merged models; an arm has one training or several.

    The base is "" where all are merged. Raises `ModelError` for a folder that holds neither, `RunError` for
    adapters of several bases and for weights that stand in an arm twice. Loads nothing.
    """
    folders = {
        arm: [Path(resolve(source)) for source in ([sources] if isinstance(sources, str | Path) else sources)]
        for arm, sources in arms.items()
    }
    first = ""
    for arm, models in folders.items():
        for model in models:
            if not model.is_dir():
                raise RunError(f"{arm}: {model} is no folder here; download the adapter and name its folder")
            if not any(model.glob("*.safetensors")):
                raise RunError(f"{arm}: {model} holds no weights in safetensors, of an adapter or a merged model")
            base, adapter = split_adapter(str(model))
            if adapter and base != (first or base):
                raise RunError(f"{arm} is an adapter of {base}, not of {first}; compare twins of one base")
            first = base if adapter else first
        if len(set(map(_weights_digest, models))) < len(models):
            raise RunError(f"{arm}: the same weights stand there twice; trainings are runs with seeds of their own")
    return first, folders


def _weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def measure_adapters(
    arms: Mapping[str, str | Path | Sequence[str | Path]],
    items: Items,
    folder: Path,
    *,
    four_bit: bool = True,
    max_length: int = 2048,
    seed: int = 0,
    max_new_tokens: int = 512,
) -> dict[str, Measurement]:
    """Your own adapters or merged models by arm, and the adapters' base; all measured on the same items.

    An arm has one training or several, numbered from 1 and paired by number. What was measured lies in `folder`, by
    weights. Speed is timed where all are adapters. Raises `RunError`, before anything is measured, as
    `check_adapters`, and for fewer items than a claim needs.
    """
    if len(items) < FEWEST:
        raise RunError(f"{len(items)} items; {FEWEST} or more are needed to tell anything")
    base, folders = check_adapters(arms)

    def arm_of(name: str, model: str, key: str) -> Arm:
        preset = replace(as_preset(model, TrainSettings(max_length=max_length)), four_bit=four_bit)
        kept = folder / f"{key}-{'4bit' if four_bit else '16bit'}"
        return Arm(name, preset, {0: kept}, seed, max_new_tokens)

    measured = {}
    for arm, models in folders.items():
        runs = {n: arm_of(arm, str(model), _weights_digest(model)) for n, model in enumerate(models, 1)}
        measured[arm] = Measurement({n: run.measure(items)[0] for n, run in runs.items()})
    if base:
        of_base = arm_of("base", base, hashlib.sha256(base.encode()).hexdigest()[:12])
        measured["base"] = of_base.measure(items)
        adapters = {(arm, n): model for arm, models in folders.items() for n, model in enumerate(models, 1)}
        if all(split_adapter(str(model))[1] for model in adapters.values()):
            add_speed(measured, of_base.load(), adapters, items)
            free_memory()
    return measured
