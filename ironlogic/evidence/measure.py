"""What training did, measured against a control: first of all, robustness to scrambled input.

Every measure takes any model and returns plain numbers per item, so that arms can be compared item by item and
seed by seed (`statistics`). Draws nothing: that is `plots`. Knows no claim: that is `claims`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden, burden_messages
from ironlogic.data.chats import ChatError
from ironlogic.data.masking import encode_chat
from ironlogic.data.problems import Task, bayes_ceiling, check_answer
from ironlogic.evidence.items import RATIOS, scramble
from ironlogic.evidence.statistics import Interval, bootstrap_interval, difference_interval
from ironlogic.generate import Completion, generate
from ironlogic.models import LoadedModel, as_loaded, free_memory, inference, load_model
from ironlogic.presets import Preset, TrainSettings
from ironlogic.training.runs import Run, open_run
from ironlogic.training.sft import Watch, train_sft

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "RATIOS",
    "AnswerLoss",
    "ReplyScores",
    "Robustness",
    "accuracy",
    "answer_loss",
    "difference",
    "reply_scores",
    "robustness",
    "scramble",
    "train_and_measure",
]


@dataclass(frozen=True, eq=False)
class Robustness:
    """One model on scrambled problems; arrays of shape (ratio, item)."""

    ratios: tuple[float, ...]
    tasks: tuple[Task, ...]
    correct: np.ndarray  # 0 or 1
    ceiling: np.ndarray  # chance that an ideal reader of the scrambled prompt is right; NaN where nobody knows
    answers: tuple[tuple[Completion, ...], ...]

    def pick(self, ratio: float, order: str) -> np.ndarray:
        """Correctness of the order-"free" or order-"bound" items at that ratio, of shape (item,)."""
        if ratio not in self.ratios:
            raise ValueError(f"Robustness: ratio {ratio} was not measured; measured are {self.ratios}")
        return self.correct[self.ratios.index(ratio)][[task.order == order for task in self.tasks]]


def robustness(
    loaded: LoadedModel | Any,
    tasks: Sequence[Task],
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    max_new_tokens: int = 72,
    batch_size: int = 128,
) -> Robustness:
    """Answers every problem at every scramble ratio, greedily, and checks it by exact match."""
    prompts = [[scramble(t.prompt, r, seed=seed, item=i) for i, t in enumerate(tasks)] for r in ratios]
    flat = generate(
        loaded,
        [prompt for row in prompts for prompt in row],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    n = len(tasks)
    answers = tuple(tuple(flat[i * n : (i + 1) * n]) for i in range(len(ratios)))
    correct = [[check_answer(t, a.text) for t, a in zip(tasks, row, strict=True)] for row in answers]
    ceiling = [
        [_ceiling(t, p, r) for t, p in zip(tasks, row, strict=True)] for r, row in zip(ratios, prompts, strict=True)
    ]
    return Robustness(tuple(ratios), tuple(tasks), np.array(correct, float), np.array(ceiling), answers)


def _ceiling(task: Task, prompt: str, ratio: float) -> float:
    if not ratio or task.order == "free":
        return 1.0
    return bayes_ceiling(task, prompt, ratio) if task.rearrangements else float("nan")


def accuracy(repeats: Sequence[Robustness], ratio: float, order: str) -> Interval:
    """Accuracy of one arm over its repeats (training seeds) and items."""
    return bootstrap_interval(np.stack([repeat.pick(ratio, order) for repeat in repeats]))


def difference(ours: Sequence[Robustness], theirs: Sequence[Robustness], ratio: float, order: str) -> Interval:
    """Accuracy of one arm minus another's, paired by repeat and item."""
    return difference_interval(
        np.stack([repeat.pick(ratio, order) for repeat in ours]),
        np.stack([repeat.pick(ratio, order) for repeat in theirs]),
    )


def train_and_measure(
    preset: Preset,
    chats: Any,
    settings: TrainSettings,
    *,
    run: str | Path,
    burden: Burden | None,
    measure: Callable[[LoadedModel], Any],
    watch: Watch | None = None,
) -> tuple[Run, Any]:
    """One arm: load the preset's model, train it (or find it trained), measure it, give its memory back."""
    loaded = load_model(preset.model, four_bit=preset.four_bit, max_length=settings.max_length, seed=settings.seed)
    trained = train_sft(loaded, chats, settings, run=run, burden=burden, watch=watch)
    del loaded  # a card has room for one model: if the run was there already, it is loaded now
    free_memory()
    result = measure(trained.model())
    trained = open_run(trained.folder)
    free_memory()
    return trained, result


@dataclass(frozen=True, eq=False)
class AnswerLoss:
    """How surprised a model is by the reference answers: nats per answer token, of shape (ratio, row)."""

    ratios: tuple[float, ...]
    nats: np.ndarray
    skipped: int  # rows that could not be encoded or have no answer within the context
    kept: tuple[int, ...] = ()  # the others: which row of `chats` each row of `nats` is


def answer_loss(
    loaded: LoadedModel | Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    batch_size: int | None = None,
) -> AnswerLoss:
    """For data without checkable answers: loss of the clean answers, user turns scrambled at each ratio."""
    loaded = as_loaded(loaded)
    batch_size = batch_size or (1 if loaded.device.type == "cuda" else 16)  # logits of a row take gibibytes
    columns: list[list[float]] = []
    rows: list[list[tuple[list[int], list[int]]]] = []
    skipped, kept = 0, []
    for i, messages in enumerate(chats):
        try:
            versions = [
                encode_chat(burden_messages(messages, Burden(ratio=r), seed=seed, row=i), loaded.tokenizer)
                for r in ratios
            ]
        except ChatError:
            skipped += 1
            continue
        cut = [(v.input_ids[: loaded.max_length], v.labels[: loaded.max_length]) for v in versions]
        if all(any(label >= 0 for label in labels[1:]) for _, labels in cut):
            rows.append(cut)
            kept.append(i)
        else:
            skipped += 1
    for k in range(len(ratios)):
        columns.append([row[0] for row in _row_scores(loaded, [row[k] for row in rows], batch_size)])
    return AnswerLoss(tuple(ratios), np.array(columns), skipped, tuple(kept))


@dataclass(frozen=True, eq=False)
class ReplyScores:
    """How sure a model is of given replies; arrays of shape (reply,), NaN where a reply can't be encoded."""

    nats: np.ndarray  # loss a token
    entropy: np.ndarray  # of the next-token distribution in nats, mean over the reply's tokens
    probability: np.ndarray  # of the whole reply


def reply_scores(
    loaded: LoadedModel | Any, prompts: Sequence[str], replies: Sequence[str], *, batch_size: int | None = None
) -> ReplyScores:
    """Reads replies (a model's own greedy ones, say) with their end-of-turn token in one pass."""
    loaded = as_loaded(loaded)
    batch_size = batch_size or (1 if loaded.device.type == "cuda" else 16)
    rows, places = [], []
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        try:
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            encoded = encode_chat(chat, loaded.tokenizer)
        except ChatError:
            continue
        rows.append((encoded.input_ids[: loaded.max_length], encoded.labels[: loaded.max_length]))
        places.append(i)
    found = np.full((len(prompts), 3), np.nan)
    if rows:
        found[places] = _row_scores(loaded, rows, batch_size)
    return ReplyScores(found[:, 0], found[:, 1], np.exp(-found[:, 0] * found[:, 2]))


def _row_scores(
    loaded: LoadedModel, rows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, float, int]]:
    """(loss, entropy, tokens) of each row: means in nats over its labelled tokens, and how many those are."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = [(0.0, 0.0, 0)] * len(rows)
    with inference(loaded) as model:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            longest = max(len(rows[i][0]) for i in batch)
            pad = loaded.tokenizer.pad_token_id
            ids = torch.tensor([rows[i][0] + [pad] * (longest - len(rows[i][0])) for i in batch])
            labels = torch.tensor([rows[i][1] + [-100] * (longest - len(rows[i][1])) for i in batch])
            real = torch.tensor([[1] * len(rows[i][0]) + [0] * (longest - len(rows[i][0])) for i in batch])
            logits = model(
                input_ids=ids.to(loaded.device), attention_mask=real.to(loaded.device), use_cache=False
            ).logits
            for i, row_logits, row_labels in zip(batch, logits, labels.to(loaded.device), strict=True):
                said = row_labels[1:] >= 0
                parts = zip(row_logits[:-1][said].split(512), row_labels[1:][said].split(512), strict=True)
                loss = entropy = 0.0
                for part, target in parts:  # only so many rows of a large vocabulary are ever float32
                    logp = part.float().log_softmax(-1)
                    loss += F.nll_loss(logp, target, reduction="sum").item()
                    entropy -= (logp.exp() * logp).sum().item()
                count = int(said.sum())
                scores[i] = (loss / count, entropy / count, count) if count else (math.nan, math.nan, 0)
    return scores
