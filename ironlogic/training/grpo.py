"""Reinforcement learning with verifiable rewards: TRL's GRPO around problems whose answers can be checked.

A step samples several completions of every prompt, scores them by plain functions and makes those above their
group's mean likelier. Knows what was rewarded, not whether the reward deserves trust: hence the measures of
problems held out (`sample_answers`) and the completions on disk, tags included.
"""

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ironlogic.data.problems import Task, accuracy_reward, check_answer, thinks
from ironlogic.generate import Completion, end_ids, generate, visible_text
from ironlogic.models import LoadedModel, add_lora, as_loaded
from ironlogic.presets import LoraSettings
from ironlogic.training.runs import Run, read_metrics, run_folder, save_adapter, start_or_join
from ironlogic.training.stages import (
    Watch,
    content_hash,
    describe_stage,
    finish_stage,
    fit,
    stage_callbacks,
    trainer_arguments,
)

import datasets
import numpy as np
import peft
import transformers
import trl
from scipy.special import comb

__all__ = ["GrpoSettings", "Samples", "read_completions", "rejection_chats", "sample_answers", "train_grpo"]

Reward = Callable[..., list[float | None]]
_COLUMNS = (  # of TRL's log, into metrics.jsonl; a column for every reward joins them
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "think_rate",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
)


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

    def __post_init__(self) -> None:
        if self.generations < 2:
            raise ValueError(f"GrpoSettings: generations is {self.generations}; a group needs 2 or more to compare")
        if self.batch_size * self.accumulation % self.generations:
            raise ValueError(
                f"GrpoSettings: batch_size * accumulation is {self.batch_size} * {self.accumulation} completions a "
                f"step; it has to be a multiple of generations, {self.generations}"
            )

    @property
    def prompts(self) -> int:
        """Prompts per optimizer step."""
        return self.batch_size * self.accumulation // self.generations


def train_grpo(
    loaded: LoadedModel | Any,
    tasks_or_rows: Sequence[Task] | Sequence[Mapping[str, Any]] | datasets.Dataset,
    settings: GrpoSettings,
    *,
    run: str | Path,
    rewards: Sequence[Reward] = (accuracy_reward,),
    watch: Watch | None = None,
) -> Run:
    """GRPO (Shao et al. 2024, arXiv 2402.03300) of a LoRA adapter, without a reference model.

    Rows have a `prompt` (text of a user turn, or messages) and whatever columns the rewards want, for
    `accuracy_reward` an `answer`. A reward takes `completions` and those columns, a value per completion each, and
    returns a number per completion; several are added up. A model that carries an adapter goes on training it.

    Writes, beside what every run has, completions.jsonl: every completion with its rewards (`read_completions`).
    `run` and `watch` as in `train_sft`; resumes by itself. Raises `ValueError` for rows or rewards that can't be
    used, `RunError` when the folder holds another run or can't be written.
    """
    loaded, folder = as_loaded(loaded), run_folder(run)
    names = _reward_names(rewards)
    rows, left_out = _prepare(loaded, tasks_or_rows, settings, needs_answer=accuracy_reward in rewards)
    wanted = describe_stage("grpo", loaded, len(rows), content_hash(rows), settings)
    wanted["settings"] |= {"rewards": names, "max_length": loaded.max_length}  # Run.model() wants the latter
    previous = start_or_join(folder, wanted)
    if previous.get("finished"):
        if watch and (lines := read_metrics(folder)):
            watch(lines)
        return Run(folder, previous)
    transformers.set_seed(settings.seed)  # before any weight is drawn
    loaded = _with_adapter(loaded, settings)
    trainer = _trainer(loaded, rows, settings, folder, rewards, watch)
    seconds = fit(trainer, folder)
    save_adapter(loaded, folder)
    data = f"{len(rows)} prompts" + (f", {left_out} left out: too long for the context" if left_out else "")
    return finish_stage(folder, wanted, trainer, loaded, data=data, seconds=round(seconds, 3))


def read_completions(run: Run | str | Path) -> list[dict[str, Any]]:
    """Every completion of a run: step, prompt, completion, tokens, a number per reward, the rows' columns."""
    folder = run.folder if isinstance(run, Run) else run_folder(run)
    lines = (folder / "completions.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


# --- rows and rewards -------------------------------------------------------------------------------------
def _reward_names(rewards: Sequence[Reward]) -> list[str]:
    nameless = [r for r in rewards if not callable(r) or not hasattr(r, "__name__")]
    names = [r.__name__ for r in rewards if r not in nameless]
    if nameless or not names or len(set(names)) < len(names):
        raise ValueError(
            f"train_grpo: rewards are {list(rewards)!r}; expected functions, each with a name of its own"
        )
    return names


def _prepare(
    loaded: LoadedModel, tasks_or_rows: Any, settings: GrpoSettings, *, needs_answer: bool
) -> tuple[list[dict[str, Any]], int]:
    """Rows with prompts as messages, and how many were left out, as prompt and completion exceed the context."""
    rows = [_row(row, i, needs_answer) for i, row in enumerate(tasks_or_rows)]
    texts = [
        loaded.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    room = loaded.max_length - settings.max_new_tokens
    ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    kept = [row for row, tokens in zip(rows, ids, strict=True) if len(tokens) <= room]
    if not kept:
        raise ValueError(
            f"train_grpo: none of {len(rows)} rows can be used; a prompt may have {room} tokens, which is the "
            f"context of {loaded.max_length} less max_new_tokens {settings.max_new_tokens}"
        )
    return kept, len(rows) - len(kept)


def _row(row: Any, position: int, needs_answer: bool) -> dict[str, Any]:
    where = f"train_grpo: row {position}"
    if isinstance(row, Task):
        row = {"prompt": row.prompt, "answer": row.answer, "kind": row.kind}
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}; expected a Task or a mapping with a prompt")
    needed = ("prompt", "answer") if needs_answer else ("prompt",)
    missing = [name for name in needed if row.get(name) in (None, "", [])]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}; it has {sorted(row)}")
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= {*m} for m in messages
    ):
        kind = type(prompt).__name__
        raise ValueError(f"{where} has a prompt of type {kind}; expected a text or a list of messages")
    answer = {"answer": str(row["answer"])} if "answer" in row else {}
    return {**row, **answer, "prompt": messages}


def _training_order(rows: Sequence[dict[str, Any]], settings: GrpoSettings) -> datasets.Dataset:
    """The prompts of every step, written out, so that resuming is exact: pass after pass, each in its own order."""
    needed, order = settings.steps * settings.prompts, []
    while len(order) < needed:
        once = list(range(len(rows)))
        random.Random(f"{settings.seed}-{len(order)}").shuffle(once)
        order += once
    return datasets.Dataset.from_list(list(rows)).select(order[:needed])


class _Judge(transformers.TrainerCallback):
    """Gives every reward the whole text and writes what was scored into completions.jsonl."""

    def __init__(self, rewards: Sequence[Reward], loaded: LoadedModel, folder: Path) -> None:
        self.tokenizer, self.ends = loaded.tokenizer, end_ids(loaded)
        self.rewards, self.path = rewards, folder / "completions.jsonl"
        self.scores: dict[str, list[float | None]] = {}

    def functions(self) -> list[Reward]:
        return [self._scorer(reward) for reward in self.rewards]

    def _scorer(self, reward: Reward) -> Reward:
        @functools.wraps(reward)
        def score(completions, completion_ids, **columns):
            texts = [visible_text(self.tokenizer, ids, self.ends) for ids in completion_ids]
            said = [[{"role": "assistant", "content": text}] for text in texts]
            scores = reward(completions=said, completion_ids=completion_ids, **columns)
            self.scores[reward.__name__] = list(scores)
            if reward is self.rewards[-1]:
                columns["log_metric"]("think_rate", sum(map(thinks, texts)) / len(texts))
                if columns["trainer_state"].is_world_process_zero:
                    self._write(texts, completion_ids, columns)
            return scores

        return score

    def _write(self, texts, completion_ids, columns) -> None:
        step, lines = columns["trainer_state"].global_step + 1, []
        given = {name: values for name, values in columns.items() if isinstance(values, list) and name != "prompts"}
        for i, text in enumerate(texts):
            line = {"step": step, "prompt": columns["prompts"][i][-1]["content"], "completion": text}
            line |= {"tokens": len(completion_ids[i])}
            line |= {name: scores[i] for name, scores in self.scores.items()}
            line |= {name: values[i] for name, values in given.items()}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def on_train_begin(self, args, state, control, **_):
        """After a kill, steps behind the checkpoint are trained again: their old completions go."""
        if self.path.exists():
            lines = [line for line in read_completions(self.path.parent) if line["step"] <= state.global_step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self.path.write_text(text, encoding="utf-8")


# --- training ---------------------------------------------------------------------------------------------
def _with_adapter(loaded: LoadedModel, settings: GrpoSettings) -> LoadedModel:
    if not isinstance(loaded.model, peft.PeftModel):
        return add_lora(loaded, settings.lora, seed=settings.seed)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loaded


def _trainer(loaded, rows, settings: GrpoSettings, folder: Path, rewards, watch) -> trl.GRPOTrainer:
    arguments = trl.GRPOConfig(
        **trainer_arguments(settings, folder, steps=settings.steps),
        num_generations=settings.generations,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,  # the rows are in their order already
        beta=0.0,
    )
    judge = _Judge(rewards, loaded, folder)
    columns = (*_COLUMNS, *(f"rewards/{name}/mean" for name in _reward_names(rewards)))
    return trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=judge.functions(),
        args=arguments,
        train_dataset=_training_order(rows, settings),
        processing_class=loaded.tokenizer,
        callbacks=[judge, *stage_callbacks(folder, watch, columns=columns)],
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
        [task.prompt for task in tasks for _ in range(samples)],
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


def rejection_chats(samples: Samples) -> list[list[dict[str, str]]]:
    """The right answers as conversations: one round of rejection sampling is `train_sft` on these."""
    return [
        [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": answer.text}]
        for task, answers, marks in zip(samples.tasks, samples.answers, samples.correct, strict=True)
        for answer, right in zip(answers, marks, strict=True)
        if right
    ]
