"""Reinforcement learning with verifiable rewards: TRL's GRPO around problems whose answers can be checked.

A step samples several completions of every prompt, scores them by plain functions and makes those above their
group's mean likelier. Whether a reward deserves trust, only problems held out (`sample_answers`) and the
completions themselves can tell: they are on disk, tags included.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ironlogic import IronLogicError
from ironlogic.data.chats import Chats, make_chats
from ironlogic.data.problems import Task, accuracy_reward, check_answer, normal_answer, thinks
from ironlogic.generate import Completion, chat_ids, generate, rows_can_share
from ironlogic.models import LoadedModel, as_loaded, bare, free_memory, load_model
from ironlogic.presets import LoraSettings, TrainSettings
from ironlogic.training.runs import Run, drop_later_steps, read_steps, run_folder, save_adapter, start_or_join
from ironlogic.training.sft import train_sft
from ironlogic.training.stages import (
    Watch,
    content_hash,
    describe_stage,
    finish_stage,
    finished_run,
    fit,
    trainer_arguments,
    with_trained_adapter,
)

import datasets
import numpy as np
import pyarrow as pa
import transformers
import trl
from scipy.special import comb

__all__ = [
    "GrpoError",
    "GrpoSettings",
    "RandomReward",
    "Samples",
    "read_completions",
    "rejection_chats",
    "rejection_sampling",
    "sample_answers",
    "train_and_sample",
    "train_grpo",
]

Reward = Callable[..., Sequence[float | None]]
_LOGGED = (  # of TRL's log, into metrics.jsonl; a column for every reward joins them
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "think_rate",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
)
_RECORDED = {"step", "prompt", "completion", "tokens"}  # of every line of completions.jsonl
_OF_TRL = set(  # what it passes to a reward, or drops
    "completion prompts completions completion_ids trainer_state log_extra log_metric environments".split()
)


class GrpoError(IronLogicError, ValueError):
    """Settings, rows or rewards that GRPO can't use; the message names them."""


@dataclass(frozen=True)
class GrpoSettings:
    """One stage of GRPO. Lengths in tokens, `warmup_steps` in optimizer steps (a share of them below 1)."""

    steps: int = 100
    generations: int = 8  # completions of one prompt: the group that a completion is compared with
    batch_size: int = 8  # completions per device and forward pass
    accumulation: int = 4  # forward passes per optimizer step
    max_new_tokens: int = 512
    temperature: float = 1.0
    learning_rate: float = 5e-6
    warmup_steps: float = 0.0
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    save_steps: int = 20
    log_steps: int = 1
    seed: int = 3407
    lora: LoraSettings = field(default_factory=LoraSettings)
    report_to: str = "none"  # a tracker that is installed, by transformers' name

    def __post_init__(self) -> None:
        if self.generations < 2:
            raise GrpoError(f"GrpoSettings: generations is {self.generations}; a group needs 2 or more to compare")
        if self.batch_size * self.accumulation % self.generations:
            raise GrpoError(
                f"GrpoSettings: batch_size * accumulation is {self.batch_size} * {self.accumulation} completions a "
                f"step; it has to be a multiple of generations, {self.generations}"
            )

    @property
    def prompts(self) -> int:
        """Prompts per optimizer step."""
        return self.batch_size * self.accumulation // self.generations


def train_grpo(
    loaded: LoadedModel | Any,
    problems: Sequence[Task] | Sequence[Mapping[str, Any]] | datasets.Dataset,
    settings: GrpoSettings,
    *,
    run: str | Path,
    rewards: Sequence[Reward] = (accuracy_reward,),
    watch: Watch | None = None,
) -> Run:
    """GRPO (Shao et al. 2024, arXiv 2402.03300) of a LoRA adapter, without a reference model.

    A problem is a `Task`, or a row with a `prompt` (text of a user turn, or messages) and whatever columns the
    rewards want; an `answer` becomes text (`normal_answer`). A reward takes `completions` and those columns, a
    value per completion each, and returns a number per completion, None where it does not apply; several are added
    up. A model that carries an adapter goes on training it.

    Writes, beside what every run has, completions.jsonl: every completion with its rewards (`read_completions`).
    `run` and `watch` as in `train_sft`; resumes by itself. Raises `GrpoError` for rows or rewards that can't be
    used, `RunError` when the folder holds another run or can't be written.
    """
    loaded, folder = as_loaded(loaded), run_folder(run)
    if not rows_can_share(loaded):
        name = type(bare(loaded.model)).__name__
        raise GrpoError(
            f"train_grpo: {name} takes padding for text, so its completions would be wrong; take another"
        )
    rows, left_out = _prepare(loaded, problems, settings, needs_answer=accuracy_reward in rewards)
    names = _reward_names(rewards, rows)
    record = describe_stage("grpo", loaded, len(rows), content_hash(rows), settings)
    record["settings"] |= {"rewards": names, "max_length": loaded.max_length}  # Run.load_model wants the latter
    if finished := finished_run(folder, record, watch):
        return finished
    start_or_join(folder, record)
    loaded = with_trained_adapter(loaded, settings.lora, seed=settings.seed)
    trainer = _trainer(loaded, rows, settings, folder, rewards)
    columns = (*_LOGGED, *(f"rewards/{name}/mean" for name in names))
    seconds = fit(trainer, folder, watch, columns=columns)
    save_adapter(loaded, folder)
    data = f"{len(rows)} prompts" + (f", {left_out} left out: too long for the context" if left_out else "")
    if all(line.get("frac_reward_zero_std") == 1 for line in read_steps(folder / "metrics.jsonl")):
        data += "; NOTHING WAS LEARNED: in no group of completions did the rewards differ"
        print(f"{folder.name}: {data}. Read them with read_completions")
    return finish_stage(folder, record, trainer, loaded, data=data, seconds=round(seconds, 3))


def read_completions(run: Run | str | Path) -> list[dict[str, Any]]:
    """Every completion of a run: step, prompt, completion, tokens, a number per reward, the rows' columns.

    A column of the rows that is called step or tokens is there as row_step or row_tokens.
    """
    folder = run.folder if isinstance(run, Run) else run_folder(run)
    return read_steps(folder / "completions.jsonl")


def rejection_sampling(
    loaded: LoadedModel | Any,
    problems: Sequence[Task],
    settings: TrainSettings,
    *,
    run: str | Path,
    samples: int = 8,
    max_new_tokens: int = 72,
    watch: Watch | None = None,
) -> Run:
    """One round: every problem answered `samples` times, and SFT on the right answers.

    The sampling has the settings' seed; `run` and `watch` as in `train_sft`.
    """
    answers = sample_answers(loaded, problems, samples=samples, max_new_tokens=max_new_tokens, seed=settings.seed)
    return train_sft(loaded, rejection_chats(answers), settings, run=run, watch=watch)


def train_and_sample(
    source: str | Path,
    train: Callable[..., Run],
    test: Sequence[Task],
    *,
    seed: int,
    load: Mapping[str, Any],
    watch: Watch | None = None,
) -> "Samples":
    """`train(model, watch=watch)` of that model or adapter, then its answers to problems held out.

    A job of `run_parallel`: it keeps no model. `load`: options of `load_model`; `seed`: of the sampling.
    """
    run = train(load_model(source, **load), watch=watch)
    adapter = run.adapter
    del run  # with its model: a card has room for one
    free_memory()
    return sample_answers(load_model(adapter, **load), test, seed=seed)


# --- rows -------------------------------------------------------------------------------------------------
def _prepare(
    loaded: LoadedModel, problems: Any, settings: GrpoSettings, *, needs_answer: bool
) -> tuple[list[dict[str, Any]], int]:
    """Rows with prompts as messages, and how many were left out, as prompt and completion exceed the context."""
    rows = [_row(problem, i, needs_answer) for i, problem in enumerate(problems)]
    room = loaded.max_length - settings.max_new_tokens
    ids = chat_ids(loaded.tokenizer, [row["prompt"] for row in rows]) if rows else []
    kept = [row for row, tokens in zip(rows, ids, strict=True) if len(tokens) <= room]
    if not kept:
        raise GrpoError(
            f"train_grpo: none of {len(rows)} rows can be used; a prompt may have {room} tokens, which is the "
            f"context of {loaded.max_length} less max_new_tokens {settings.max_new_tokens}"
        )
    return kept, len(rows) - len(kept)


def _row(problem: Any, position: int, needs_answer: bool) -> dict[str, Any]:
    where = f"train_grpo: row {position}"
    if isinstance(problem, Task):
        prompt = problem.ask() if problem.system else problem.prompt
        problem = {"prompt": prompt, "answer": problem.answer, "kind": problem.kind}
    if not isinstance(problem, Mapping):
        raise GrpoError(f"{where} is a {type(problem).__name__}; expected a Task or a mapping with a prompt")
    row = dict(problem)
    needed = ("prompt", "answer") if needs_answer else ("prompt",)
    if missing := [name for name in needed if row.get(name) in (None, "", [])]:
        raise GrpoError(f"{where} has no {' and no '.join(missing)}; it has {sorted(row)}")
    if taken := sorted(row.keys() & _OF_TRL):
        raise GrpoError(f"{where} has a column {taken[0]!r}, a name that TRL gives to something else; rename it")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        row["prompt"] = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    ):
        kind = type(prompt).__name__
        raise GrpoError(f"{where} has a prompt of type {kind}; expected a text or a list of messages")
    if "answer" in row:
        try:
            row["answer"] = normal_answer(row["answer"])
        except ValueError as error:
            raise GrpoError(f"{where}: {error}") from None
    return row


def _training_order(rows: Sequence[dict[str, Any]], settings: GrpoSettings) -> datasets.Dataset:
    """The prompts of every step, written out, so that resuming is exact: pass after pass, each in its own order."""
    needed, order = settings.steps * settings.prompts, []
    while len(order) < needed:
        once = list(range(len(rows)))
        random.Random(f"{settings.seed}-{len(order)}").shuffle(once)
        order += once
    try:
        return datasets.Dataset.from_list(list(rows)).select(order[:needed])
    except (pa.ArrowException, TypeError) as error:
        raise GrpoError(f"train_grpo: a column holds values of several types ({error})") from error


# --- rewards ----------------------------------------------------------------------------------------------
def _reward_names(rewards: Sequence[Reward], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [getattr(reward, "__name__", "") if callable(reward) else "" for reward in rewards]
    if not all(names) or not names or len(set(names)) < len(names):
        raise GrpoError(
            f"train_grpo: rewards are {list(rewards)!r}; expected functions, each with a name of its own"
        )
    if taken := [name for name in names if name in _RECORDED or any(name in row for row in rows)]:
        raise GrpoError(
            f"train_grpo: the reward {taken[0]!r} has the name of a column of the rows or of completions.jsonl; "
            "rename the function"
        )
    return names


@dataclass(frozen=True)
class RandomReward:
    """A reward that is a coin for every completion, whatever it says: a control for what any reward brings."""

    seed: int
    __name__ = "random_reward"

    def __call__(self, completions: Sequence[Any], trainer_state: Any, **_: Any) -> list[float]:
        coin = random.Random(f"{self.seed}-{trainer_state.global_step}")
        return [float(coin.random() < 0.5) for _ in completions]


class _Rewards(transformers.TrainerCallback):
    """The rewards as TRL calls them, their scores checked and written into completions.jsonl."""

    def __init__(self, rewards: Sequence[Reward], folder: Path) -> None:
        self.rewards, self.path = rewards, folder / "completions.jsonl"
        self.scores: dict[str, list[float | None]] = {}  # of this step, by reward

    def checked(self, reward: Reward) -> Reward:
        @functools.wraps(reward)
        def score(prompts, completions, completion_ids, **columns):
            returned = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            asked, texts = ([messages[-1]["content"] for messages in chats] for chats in (prompts, completions))
            scores = self.scores[reward.__name__] = _check_scores(reward.__name__, returned, asked, texts)
            if reward is self.rewards[-1]:
                self._end_step(asked, texts, list(map(len, completion_ids)), columns)
            return scores

        return score

    def _end_step(self, asked: list[str], texts: list[str], tokens: list[int], columns: dict[str, Any]) -> None:
        state = columns["trainer_state"]
        if state.global_step == 0 and all(score is None for scores in self.scores.values() for score in scores):
            raise GrpoError(
                f"train_grpo: no completion of the first step got a reward: {', '.join(self.scores)} returned None "
                f"for each of {len(texts)}" + _example(asked[0], texts[0])
            )
        columns["log_metric"]("think_rate", sum(map(thinks, texts)) / len(texts))
        if not state.is_world_process_zero:
            return
        record = {"prompt": asked, "completion": texts, "tokens": tokens, **self.scores}
        for name, values in columns.items():
            if isinstance(values, list):  # a column of the rows
                record[f"row_{name}" if name in _RECORDED else name] = values
        with self.path.open("a", encoding="utf-8") as file:
            for i in range(len(texts)):
                line = {"step": state.global_step + 1} | {name: values[i] for name, values in record.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_train_begin(self, args, state, control, **_):
        drop_later_steps(self.path, state.global_step)


def _check_scores(name: str, returned: Any, asked: list[str], texts: list[str]) -> list[float | None]:
    """What a reward returned, as plain numbers; None for a completion that it passed over."""
    try:
        values = list(returned)
    except TypeError:
        values = []
    if len(values) != len(texts):
        raise GrpoError(
            f"the reward {name} returned {returned!r:.100} ({type(returned).__name__}); expected a list with a "
            f"number for each of {len(texts)} completions" + _example(asked[0], texts[0])
        )
    for value, prompt, text in zip(values, asked, texts, strict=True):
        if value is not None and not _is_finite(value):
            raise GrpoError(
                f"the reward {name} returned {value!r:.100} for a completion; expected a finite number, or None "
                "where it does not apply" + _example(prompt, text)
            )
    return [None if value is None else float(value) for value in values]


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # a text, a list, a number beyond floats
        return False


def _example(prompt: str, completion: str) -> str:
    return f"\n  prompt: {prompt!r:.300}\n  completion: {completion!r:.300}"


# --- training ---------------------------------------------------------------------------------------------
def _trainer(
    loaded: LoadedModel,
    rows: Sequence[dict[str, Any]],
    settings: GrpoSettings,
    folder: Path,
    rewards: Sequence[Reward],
) -> trl.GRPOTrainer:
    arguments = trl.GRPOConfig(
        **trainer_arguments(settings, folder, steps=settings.steps),
        num_generations=settings.generations,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,  # the rows are in their order already
        beta=0.0,
    )
    record = _Rewards(rewards, folder)
    return trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=[record.checked(reward) for reward in rewards],
        args=arguments,
        train_dataset=_training_order(rows, settings),
        processing_class=loaded.tokenizer,
        callbacks=[record],
    )


# --- what it brought ----------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Samples:
    """Several sampled answers to each of some problems; arrays of shape (item, sample)."""

    tasks: tuple[Task, ...]
    answers: tuple[tuple[Completion, ...], ...]
    correct: np.ndarray  # 0 or 1
    thinks: np.ndarray  # 0 or 1
    tokens: np.ndarray

    def pass_at(self, k: int) -> np.ndarray:
        """The chance that one of `k` answers is right, of shape (item,).

        Unbiased (Chen et al. 2021, arXiv 2107.03374).
        """
        n = self.correct.shape[1]
        if not 1 <= k <= n:
            raise ValueError(f"Samples: pass at {k} was asked for, but every problem was answered {n} times")
        return 1 - comb(n - self.correct.sum(axis=1), k) / comb(n, k)


def sample_answers(
    loaded: LoadedModel | Any,
    tasks: Sequence[Task],
    *,
    samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 72,
    seed: int = 0,
    batch_size: int = 256,
) -> Samples:
    """Answers every problem `samples` times (greedily at temperature 0) and checks by exact match."""
    flat = generate(
        loaded,
        [task.ask() for task in tasks for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    answers = tuple(tuple(flat[i * samples : (i + 1) * samples]) for i in range(len(tasks)))
    pairs = list(zip(tasks, answers, strict=True))
    return Samples(
        tuple(tasks),
        answers,
        correct=np.array([[check_answer(task, a.text) for a in row] for task, row in pairs], float),
        thinks=np.array([[thinks(a.text) for a in row] for row in answers], float),
        tokens=np.array([[a.tokens for a in row] for row in answers]),
    )


def rejection_chats(samples: Samples) -> Chats:
    """The right answers as conversations: one round of rejection sampling is `train_sft` on these."""
    return make_chats(
        [*task.ask(), {"role": "assistant", "content": answer.text}]
        for task, answers, marks in zip(samples.tasks, samples.answers, samples.correct, strict=True)
        for answer, right in zip(answers, marks, strict=True)
        if right
    )
