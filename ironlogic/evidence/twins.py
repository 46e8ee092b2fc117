"""Fragmented Training beside its control twin: the same rows, order, steps and settings, with and without a burden.

`train_twins` trains both over seeds and gives two arms to be measured and subtracted; `train_arms` does the same
for any recipes. Every training is a run folder of its own, `<run>/<arm>-<seed>`, so an interrupted call goes on
where it stopped, and what was measured lies beside the run.

>>> train, test = load_chats("my.jsonl").split(0.1)                                            # doctest: +SKIP
>>> ft, sft = train_twins("nano", train, burden=Burden(ratio=0.7), run="first")                # doctest: +SKIP
>>> print(ft.measure(test) - sft.measure(test))                                                # doctest: +SKIP
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden
from ironlogic.data.chats import Chats, make_chats
from ironlogic.data.masking import lost_rows
from ironlogic.evidence.items import Items, delete_words, shuffle_answers
from ironlogic.evidence.measures import measure, measure_losses
from ironlogic.evidence.results import Columns, Measurement
from ironlogic.models import LoadedModel, free_memory, load_model, load_tokenizer
from ironlogic.presets import PRESETS, Preset, TrainSettings
from ironlogic.training.parallel import run_parallel
from ironlogic.training.prepared import rows_hash
from ironlogic.training.runs import Run, RunError, open_run, other_settings, run_folder, write_json
from ironlogic.training.sft import train_sft

import numpy as np

__all__ = ["Arm", "Recipe", "as_preset", "make_recipes", "train_arms", "train_twins"]

_NEFTUNE_ALPHA, _DELETED, _VERSION = 5.0, 0.3, 2
_TURN_TOKENS = 24  # what a template puts round a turn, at most


# --- recipes ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """How an arm is trained: what differs between an arm and its control stands here and nowhere else."""

    settings: TrainSettings
    burden: Burden | None = None
    deleted: float = 0.0  # share of the words of a user turn left out
    shuffled: bool = False  # every answer stands under another row's question: what the form alone teaches
    after: str = ""  # the arm whose adapter this one goes on training
    rows: int = 0  # only the first ones, for a learning curve; 0: all
    seeds: tuple[int, ...] | None = None  # fewer trainings than the other arms
    brief: bool = False  # measured by accuracy, thinking and loss alone


def make_recipes(
    settings: TrainSettings, burden: Burden, *, rates: Mapping[str, float] | None = None
) -> dict[str, Recipe]:
    """The arms of the evidence by name: SFT, the control twin, FT with `burden`, its variants and other noise.

    `rates`: learning rates found for "SFT" and "FT" (`Study.sweep_rates`), each also for the arms of its sort.
    """
    rates = rates or {}
    of_sft = replace(settings, learning_rate=rates.get("SFT", settings.learning_rate))
    of_ft = replace(settings, learning_rate=rates.get("FT", settings.learning_rate))
    plain, burdened = Recipe(of_sft), Recipe(of_ft, burden)
    as_the_seed = Burden(ratio=burden.ratio, unit="seed", redraw=False)
    main = {"SFT": plain, "FT": burdened}
    side = {  # claims ask for their accuracy at most
        "SFT then SFT": replace(plain, after="SFT"),
        "FT then SFT": replace(plain, after="FT"),
        "FT mixed": replace(burdened, burden=replace(burden, mix=0.5)),
        "FT as the seed": Recipe(replace(of_ft, loss="all"), as_the_seed),
        "deletion": replace(plain, deleted=_DELETED),
        "NEFTune": Recipe(replace(of_sft, neftune_alpha=_NEFTUNE_ALPHA)),
        "shuffled answers": replace(plain, shuffled=True),
    }
    return main | {arm: replace(recipe, brief=True) for arm, recipe in side.items()}


# --- arms ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """One recipe, trained once a seed; the untrained base has the one seed 0 and no adapter in its folder."""

    name: str
    preset: Preset
    folders: Mapping[int, Path]
    seed: int = 0  # of the scrambles in its measurements
    max_new_tokens: int = 72
    brief: bool = False  # measured as a point of a learning curve

    def load(self, adapter: str | Path = "", *, seed: int = 0) -> LoadedModel:
        """The model that all arms start from, or an adapter of it."""
        preset = self.preset
        length = preset.train.max_length
        return load_model(adapter or preset.model, four_bit=preset.four_bit, max_length=length, seed=seed)

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of their seeds."""
        return [open_run(folder) for folder in self.folders.values()]

    def measure(self, test: Items | Chats, *, processes: int | None = None) -> Measurement:
        """What every training does on the same held-out rows (loss of their answers) or items (every measure).

        What was measured before is read from the run's folder.
        """
        jobs = {
            f"{self.name}, seed {seed}": partial(_measure_folder, self, seed, test)
            for seed in self.folders
            if not self.measured(seed, test).exists()
        }
        run_parallel(jobs, processes=processes)
        return Measurement({seed: _read_columns(self.measured(seed, test)) for seed in self.folders})

    def measured(self, seed: int, test: Items | Chats) -> Path:
        """The file of that training's measurements on that test."""
        if isinstance(test, Items):
            asked = [[asdict(task) for task in test.tasks], test.chats, test.system, test.form, test.ratios]
            asked += [test.shots] if test.shots else []
        else:
            asked = [list(test)]
        asked += [self.seed, self.max_new_tokens, self.brief, _VERSION]
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        return self.folders[seed] / f"evidence-{name}.json"


def _measure_folder(arm: Arm, seed: int, test: Items | Chats, *, watch: Any = None) -> None:
    folder = arm.folders[seed]
    loaded = arm.load(folder / "adapter" if (folder / "run.json").exists() else "")
    if isinstance(test, Items):
        columns = measure(loaded, test, seed=arm.seed, max_new_tokens=arm.max_new_tokens, brief=arm.brief)
    else:
        columns = measure_losses(loaded, test, seed=arm.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(arm.measured(seed, test), {name: values.tolist() for name, values in columns.items()})
    del loaded
    free_memory()


def _read_columns(file: Path) -> Columns:
    return {name: np.array(values, float) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}


# --- training -----------------------------------------------------------------------------------------------
def train_twins(
    model: str | Preset,
    chats: Chats | Mapping[int, Chats],
    *,
    burden: Burden,
    run: str | Path,
    settings: TrainSettings | None = None,
    rates: Mapping[str, float] | None = None,
    seeds: int | Iterable[int] = 1,
    **options: Any,
) -> tuple[Arm, Arm]:
    """(FT, its control SFT): trained over seeds on the same rows, in the same order, with the same settings.

    But for the learning rate, where `rates` names the best one for each ("SFT", "FT").

    `model`: a preset, its name, or what `load_model` takes. `chats`: conversations, or other ones for each training
    seed. `settings`: by default the preset's; its seed also draws the scrambles of a test. `seeds`: how many
    trainings an arm, from `settings.seed` on, or which. `run`: a name in the results folder or a path. `options`
    as in `train_arms`.
    """
    preset = as_preset(model, settings)
    first = preset.train.seed
    recipes = make_recipes(preset.train, burden, rates=rates)
    arms = train_arms(
        preset,
        chats,
        {name: recipes[name] for name in ("FT", "SFT")},
        seeds=range(first, first + seeds) if isinstance(seeds, int) else seeds,
        run=run,
        **{"scramble_seed": first} | options,
    )
    return arms["FT"], arms["SFT"]


def as_preset(model: str | Preset, settings: TrainSettings | None = None) -> Preset:
    """The preset of that name, or one of any model that `load_model` takes; with other `settings`, if given."""
    preset = model if isinstance(model, Preset) else PRESETS.get(model)
    if preset is None:
        preset = Preset(str(model), str(model), card_gib=0, train=TrainSettings(), burden=Burden())
    return replace(preset, train=settings) if settings else preset


def train_arms(
    preset: Preset,
    chats: Chats | Mapping[int, Chats],
    recipes: Mapping[str, Recipe | None],
    *,
    seeds: Iterable[int],
    run: str | Path,
    further: Mapping[int, Chats] | None = None,
    test: Items | Chats | None = None,
    scramble_seed: int = 0,
    max_new_tokens: int = 72,
    brief: bool = False,
    beside: Mapping[str, Recipe | None] | None = None,
    **options: Any,
) -> dict[str, Arm]:
    """Every recipe trained once a seed, several at a time, what is finished left as it is; arms by name.

    A recipe None is the model as it is. `chats` as in `train_twins`; `further`: rows for recipes that go on `after`
    another, by seed. `test`: every model is measured on it in the process that trained it, so that a later
    `Arm.measure` has nothing left to do; `brief`: by accuracy, thinking and loss alone. `options` (processes,
    watch, report) as in `run_parallel`.

    A row whose answer the context cuts away in one arm, in any epoch, is left out of all; `beside`: recipes that
    are trained on these rows at another time.

    Raises `RunError` when a folder holds another run, before anything is trained, or when a training failed.
    """
    folder, seeds = run_folder(run), list(seeds)
    rows_of = chats if isinstance(chats, Mapping) else dict.fromkeys(seeds, chats)
    sharing = {**(beside or {}), **recipes}
    rows_of = {seed: _drop_in_pairs(preset, rows, sharing, seed) for seed, rows in rows_of.items()}
    arms, jobs, after = {}, {}, {}
    for name, recipe in recipes.items():
        if recipe is None:
            folders = {0: folder / name}
        else:
            folders = {seed: _arm_folder(folder, name, seed) for seed in (recipe.seeds or seeds)}
        short = brief or (recipe is not None and (recipe.brief or recipe.rows > 0))
        arms[name] = arm = Arm(name, preset, folders, scramble_seed, max_new_tokens, short)
        for seed in folders:
            rows, start = None, ""
            if recipe is not None:
                rows = _prepare_rows(further[seed] if recipe.after and further else rows_of[seed], recipe, seed)
            if recipe is not None and recipe.after:
                start = str(_arm_folder(folder, recipe.after, seed) / "adapter")
                after[f"{name}, seed {seed}"] = f"{recipe.after}, seed {seed}"
            trained = recipe is None or _is_trained(preset, folders[seed], rows, recipe, seed)
            if not trained or (test is not None and not arm.measured(seed, test).exists()):
                jobs[f"{name}, seed {seed}"] = partial(_train_and_measure, arm, seed, recipe, rows, start, test)
    run_parallel(jobs, after=after, **options)
    return arms


def _arm_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm.replace(' ', '-')}-{seed}"


def _drop_in_pairs(preset: Preset, chats: Chats, recipes: Mapping[str, Recipe | None], seed: int) -> Chats:
    """The rows that keep a trained token in every arm."""
    longest = preset.train.max_length
    at_most = [sum(len(str(turn["content"]).encode()) + _TURN_TOKENS for turn in turns) for turns in chats]
    near = [row for row, tokens in enumerate(at_most) if tokens > longest]  # a token is a byte or more
    if not near:
        return chats
    tokenizer = load_tokenizer(preset.model)
    suspects = _numbered(chats, near)
    kept = set(suspects.rows["row"][:])
    for burden, epochs in {(r.burden, r.settings.epochs) for r in recipes.values() if r is not None}:
        burdened = suspects
        if burden is not None:
            burdened = burden.apply(suspects, epochs=epochs, seed=seed, tokenizer=tokenizer)
        lost = lost_rows(burdened, tokenizer, max_length=longest)
        kept -= {burdened.rows[i]["row"] for i in lost}
    dropped = {near[i] for i, row in enumerate(suspects.rows["row"][:]) if row not in kept}
    if not dropped:
        return chats
    print(f"{len(dropped)} rows lose their answer at {longest} tokens in one arm: they are left out of all arms")
    return _numbered(chats, [row for row in range(len(chats)) if row not in dropped])


def _numbered(chats: Chats, rows: list[int]) -> Chats:
    """Those rows, each with its number among all, by which its burden is drawn; a key of the data's own stays."""
    chosen = chats.select(rows)
    if "row" in chosen.rows.column_names:
        return chosen
    return replace(chosen, rows=chosen.rows.add_column("row", rows))


def _prepare_rows(chats: Chats, recipe: Recipe, seed: int) -> Chats:
    if recipe.rows:
        chats = chats[: recipe.rows]
    if recipe.deleted:
        rows = enumerate(chats)
        return make_chats(delete_words(messages, recipe.deleted, seed=seed, row=row) for row, messages in rows)
    return make_chats(shuffle_answers(list(chats), seed=seed)) if recipe.shuffled else chats


def _is_trained(preset: Preset, folder: Path, rows: Chats, recipe: Recipe, seed: int) -> bool:
    """Raises `RunError` when another training has finished in this folder."""
    try:
        record = open_run(folder).record
    except RunError:
        return False
    settings = asdict(replace(recipe.settings, seed=seed))
    burden = recipe.burden and asdict(recipe.burden)
    same = {
        "model": bool(recipe.after) or record["model"] == preset.model,
        "four_bit": record["four_bit"] == preset.four_bit,
        "rows": record["data_sha256"] == rows_hash(rows),
        "settings": not other_settings(record["settings"], json.loads(json.dumps(settings))),
        "burden": record["burden"] == json.loads(json.dumps(burden)),
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise RunError(
            f"{folder} was trained otherwise: it differs in {', '.join(other)}. "
            "Choose another name for this run, or delete the folder"
        )
    return True


def _train_and_measure(
    arm: Arm,
    seed: int,
    recipe: Recipe | None,
    rows: Chats | None,
    start: str,
    test: Items | Chats | None,
    *,
    watch: Any = None,
) -> None:
    """What one process does. `start`: the adapter that this training goes on from."""
    folder = arm.folders[seed]
    if recipe is not None and not _is_trained(arm.preset, folder, rows, recipe, seed):
        loaded = arm.load(start, seed=seed)
        settings = replace(recipe.settings, seed=seed)
        train_sft(loaded, rows, settings, run=folder, burden=recipe.burden, watch=watch)
        del loaded  # a card has room for one model
        free_memory()
    if test is not None and not arm.measured(seed, test).exists():
        _measure_folder(arm, seed, test)
