"""How a model behaves beside being right: when it thinks, loops, lets an earlier topic in, is sure, is quick.

One function a measure; each returns numbers per item, so that arms are compared item by item. `measure_all` takes
them all on one model and returns the columns that `claims` compares. Knows no claim and trains nothing.
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironlogic.data.problems import check_answer, thinks
from ironlogic.evidence.items import WORST, Columns, Items, substitute_words
from ironlogic.evidence.measure import RATIOS, answer_loss, reply_scores, robustness
from ironlogic.evidence.statistics import Interval, adjusted_effect, calibration_error, curve_area
from ironlogic.generate import Completion, generate
from ironlogic.models import LoadedModel, as_loaded, inference, use_adapter, with_adapters

import numpy as np

__all__ = [
    "Bleeding",
    "ModeSwitching",
    "context_bleeding",
    "decoding_speed",
    "describe",
    "loops",
    "measure_all",
    "mode_switching",
    "repetition",
    "substituted",
]

FEWEST = 3  # items for context bleeding: each needs two others


# --- thinking ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModeSwitching:
    """Thinking on hard items and not on easy ones, as a detector of hard items."""

    precision: float  # share of thinking replies that were to hard items; NaN if it never thinks
    recall: float  # share of hard items that it thinks on
    f1: float
    at_equal_length: Interval  # how much likelier it thinks on a hard item than on an easy one as long


def mode_switching(thought: Sequence[float], hard: Sequence[bool], prompts: Sequence[str]) -> ModeSwitching:
    """Does it think where it should? The length of the prompt (words) is taken out: it may give the class away."""
    thought, due = np.array(thought, dtype=bool), np.array(hard, dtype=bool)
    hits = float((thought & due).sum())
    precision = hits / thought.sum() if thought.any() else float("nan")
    length = [len(prompt.split()) for prompt in prompts]
    return ModeSwitching(
        precision, hits / due.sum(), 2 * hits / (thought.sum() + due.sum()), adjusted_effect(thought, due, length)
    )


# --- loops ------------------------------------------------------------------------------------------------
def repetition(reply: str, *, n: int = 4) -> float:
    """Share of the word n-grams of a reply that stood in it before (seq-rep-n, Welleck et al. 2020).

    >>> repetition("a b c d a b c d")  # 5 four-grams, the last repeats the first
    0.2
    """
    words = reply.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def loops(completion: Completion, *, n: int = 4, times: int = 3) -> bool:
    """Whether a reply says the same four words three times, or repeats half of itself until the limit stops it."""
    words = completion.text.split()
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return max(counts.values(), default=0) >= times or (
        not completion.finished and repetition(completion.text) > 0.5
    )


# --- an earlier topic -------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Bleeding:
    """Second turns after an unrelated first one; arrays of shape (item,)."""

    found: np.ndarray  # 1 where the reply has a word of the first turn that its own question does not give
    permuted: np.ndarray  # the same with the words of another first turn: what chance finds
    replies: tuple[Completion, ...]


def _content_words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]{3,}", text)}


def context_bleeding(
    loaded: LoadedModel | Any, items: Items, *, seed: int = 0, max_new_tokens: int = 72, batch_size: int = 64
) -> Bleeding:
    """Asks each item after an unrelated turn and looks for that turn's words in the reply.

    A word counts if it is in the first turn (question or reply), in less than a tenth of all conversations, and
    neither in the second question nor in its reference reply.
    """
    n = len(items)
    if n < FEWEST:
        raise ValueError(f"context_bleeding: {n} items; expected {FEWEST} or more")
    said = [_content_words(" ".join(m["content"] for m in chat)) for chat in items.chats]
    common = {word for word, count in Counter(w for words in said for w in words).items() if count > max(2, n / 10)}
    ring = np.random.default_rng(seed).permutation(n)  # first turn: the next in the ring; chance: the one after
    place = np.argsort(ring)
    first, other = ring[(place + 1) % n], ring[(place + 2) % n]
    asked = [[*items.chats[first[i]], items.chats[i][0]] for i in range(n)]
    replies = generate(loaded, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    heard = [_content_words(reply.text) for reply in replies]

    def share(turns) -> np.ndarray:
        return np.array([float(bool(heard[i] & (said[turns[i]] - said[i] - common))) for i in range(n)])

    return Bleeding(share(first), share(other), tuple(replies))


# --- the floor --------------------------------------------------------------------------------------------
def substituted(
    loaded: LoadedModel | Any,
    items: Items,
    *,
    ratio: float = WORST,
    seed: int = 0,
    max_new_tokens: int = 72,
    batch_size: int = 64,
) -> np.ndarray:
    """Correctness where, instead of being moved, as many words are replaced by words of other questions."""
    words = [word for task in items.tasks for word in task.prompt.split()]
    prompts = [substitute_words(t.prompt, ratio, words, seed=seed, item=i) for i, t in enumerate(items.tasks)]
    replies = generate(loaded, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return np.array([check_answer(t, r.text) for t, r in zip(items.tasks, replies, strict=True)], float)


# --- speed ------------------------------------------------------------------------------------------------
def decoding_speed(
    loaded: LoadedModel, adapters: Mapping[str, Path], prompts: Sequence[str], *, tokens: int = 24, repeats: int = 4
) -> dict[str, np.ndarray]:
    """Seconds a token at a forced length, by arm ("base" is the model without adapter); arrays of shape (prompt,).

    All arms answer a prompt in turn, in every order, the repeats far apart in time, so that whatever else the
    machine does hits all alike; the median over `repeats` is kept. The length is forced, or an arm that says less
    would look quicker.
    """
    loaded = with_adapters(loaded, adapters)
    arms = [None, *adapters]
    orders = list(itertools.permutations(range(len(arms))))
    seconds = np.zeros((len(arms), repeats, len(prompts)))
    with inference(loaded) as model:
        for repeat in range(-1, repeats):  # -1: warm up
            for p, prompt in enumerate(prompts if repeat >= 0 else prompts[:1]):
                text = loaded.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                inputs = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(loaded.device)
                for arm in orders[(p + repeat) % len(orders)]:
                    with use_adapter(loaded, arms[arm]):
                        spent = _forced(model, inputs, tokens, loaded.tokenizer.pad_token_id)
                    if repeat >= 0:
                        seconds[arm, repeat, p] = spent / tokens
    return {arm or "base": np.median(seconds[k], axis=0) for k, arm in enumerate(arms)}


def _forced(model, inputs, tokens: int, pad: int) -> float:
    """Seconds of decoding exactly `tokens` tokens."""
    began = time.perf_counter()
    out = model.generate(
        **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, use_cache=True
    ).cpu()  # the copy waits for the card
    spent = time.perf_counter() - began
    if (said := out.shape[1] - inputs["input_ids"].shape[1]) != tokens:
        raise RuntimeError(f"decoding_speed: {said} tokens came where {tokens} were forced")
    return spent


# --- all of it --------------------------------------------------------------------------------------------
def measure_all(
    loaded: LoadedModel | Any,
    items: Items,
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    max_new_tokens: int = 72,
    brief: bool = False,
) -> Columns:
    """Every measure on one model. Columns that need a checkable answer are absent where there is none.

    `brief`: only what a learning curve needs (loss of the reference replies, thinking, being right).
    """
    loaded = as_loaded(loaded)
    ratios = (0.0, WORST) if brief else tuple(ratios)
    batch = 64 if loaded.device.type == "cuda" else 512  # small models: a batch takes hardly longer than a row
    found = robustness(
        loaded, items.tasks, ratios=ratios, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch
    )
    columns: Columns = {}
    due = np.array([np.nan if task.hard is None else float(task.hard) for task in items.tasks])
    for k, ratio in enumerate(ratios):
        replies = found.answers[k]
        tokens, thought = [reply.tokens for reply in replies], [float(thinks(reply.text)) for reply in replies]
        columns[f"tokens@{ratio:g}"], columns[f"think@{ratio:g}"] = np.array(tokens, float), np.array(thought)
        columns[f"mode@{ratio:g}"] = np.where(np.isnan(due), np.nan, thought == due)
        columns[f"loop@{ratio:g}"] = np.array([float(loops(reply)) for reply in replies])
        if items.checkable:
            columns[f"correct@{ratio:g}"] = found.correct[k]
            columns[f"ceiling@{ratio:g}"] = found.ceiling[k]
    losses = answer_loss(loaded, items.chats, ratios=(0.0, WORST), seed=seed)
    for k, ratio in enumerate(losses.ratios):
        columns[f"loss@{ratio:g}"] = np.full(len(items), np.nan)
        columns[f"loss@{ratio:g}"][list(losses.kept)] = losses.nats[k]
    if brief:
        return columns
    prompts = [task.prompt for task in items.tasks]
    scores = reply_scores(loaded, prompts, [reply.text for reply in found.answers[ratios.index(0.0)]])
    columns |= {"entropy": scores.entropy, "sure": scores.probability, "ln tokens": np.log(columns["tokens@0"])}
    if len(items) >= FEWEST:
        bled = context_bleeding(loaded, items, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch)
        excess = bled.found - bled.permuted
        columns |= {"bleed": bled.found, "bleed by chance": bled.permuted, "bleed excess": excess}
        if items.checkable:
            after = [check_answer(t, r.text) for t, r in zip(items.tasks, bled.replies, strict=True)]
            columns["correct second"] = np.array(after, float)
    if items.checkable:
        columns["correct substituted"] = substituted(
            loaded, items, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch
        )
    return columns


def describe(
    arms: Mapping[str, Mapping[int, Columns]], items: Items, *, ratios: Sequence[float] = RATIOS
) -> dict[str, dict[str, tuple[float, float]]]:
    """Every arm in figures: mean and standard deviation over its trainings (NaN: one only).

    What can't be measured on these items is absent.
    """
    whole = {arm: list(repeats.values()) for arm, repeats in arms.items() if not arm.endswith(" rows")}
    return {arm: _with_spread(repeats, items, ratios) for arm, repeats in whole.items()}


def _with_spread(
    repeats: Sequence[Columns], items: Items, ratios: Sequence[float]
) -> dict[str, tuple[float, float]]:
    each = [_describe([columns], items, ratios) for columns in repeats]
    known = {name: [told[name] for told in each if name in told] for name in set().union(*each)}
    spread = {name: float(np.std(found, ddof=1)) for name, found in known.items() if len(found) > 1}
    return {name: (v, spread.get(name, float("nan"))) for name, v in _describe(repeats, items, ratios).items()}


def _describe(repeats: Sequence[Columns], items: Items, ratios: Sequence[float]) -> dict[str, float]:
    def pooled(column: str, among: str = "all") -> np.ndarray:
        return np.concatenate([c[column][items.among(among)] for c in repeats if column in c] or [np.array([])])

    def mean(column: str, among: str = "all") -> float:
        values = pooled(column, among)
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else float("nan")

    told: dict[str, float] = {}
    sorts = [sort for sort in ("free", "bound") if items.among(sort).any()] or ["all"]  # all: nobody marked them
    name = {"free": ", order-free", "bound": ", order-bound", "all": ""}
    for sort in sorts:
        heights = [mean(f"correct@{ratio:g}", sort) for ratio in ratios]
        told[f"accuracy, clean{name[sort]}"] = heights[0]
        told[f"accuracy at {WORST}{name[sort]}"] = mean(f"correct@{WORST}", sort)
        told[f"area under the curve{name[sort]}"] = float(curve_area(ratios, heights))
        told[f"retention at {ratios[-1]:g}{name[sort]}"] = heights[-1] / heights[0] if heights[0] else float("nan")
    floor = mean("correct substituted", sorts[0])
    above = mean("correct@0", sorts[0]) - floor
    told[f"accuracy at {WORST}, words substituted{name[sorts[0]]}"] = floor
    told[f"kept above that floor at {WORST}{name[sorts[0]]}"] = (
        (mean(f"correct@{WORST}", sorts[0]) - floor) / above if above > 0 else float("nan")
    )
    ceiling = (
        pooled(f"ceiling@{WORST}", "bound").mean() if pooled(f"ceiling@{WORST}", "bound").size else float("nan")
    )
    told[f"share of the ceiling at {WORST}, order-bound"] = mean(f"correct@{WORST}", "bound") / ceiling
    told["accuracy after an unrelated turn"] = mean("correct second")
    told["loss of the reply, clean (nats a token)"] = mean("loss@0")
    told[f"loss of the reply at {WORST} (nats a token)"] = mean(f"loss@{WORST}")
    told["entropy of its own reply (nats a token)"] = mean("entropy")
    told["probability of its own reply"] = mean("sure")
    sort = "easy" if items.among("easy").any() else "all"  # after its own reasoning every model is sure
    sure, right = pooled("sure", sort), pooled("correct@0", sort)
    if sure.size and sure.size == right.size:
        told["calibration error, clean"] = calibration_error(sure[np.isfinite(sure)], right[np.isfinite(sure)])
    if items.among("easy").any() and items.among("hard").any():
        marked = items.among("hard") | items.among("easy")
        asked = [task.prompt for task, m in zip(items.tasks, marked, strict=True) if m]
        hard = items.among("hard")[marked]
        modes = [mode_switching(columns["think@0"][marked], hard, asked) for columns in repeats]
        told["thinking: precision"] = float(np.mean([mode.precision for mode in modes]))
        told["thinking: recall"] = float(np.mean([mode.recall for mode in modes]))
        told["thinking: F1"] = float(np.mean([mode.f1 for mode in modes]))
        told["thinking: hard minus easy at equal length"] = float(np.mean([m.at_equal_length.mean for m in modes]))
    told["replies that think"] = mean("think@0")
    told["replies that loop"] = mean("loop@0")
    told["replies with a word of the turn before"] = mean("bleed")
    told["the same by chance"] = mean("bleed by chance")
    told["tokens an answer"] = mean("tokens@0")
    told["milliseconds a token, forced length"] = float(1e3 * np.exp(mean("ln seconds")))
    return {name: value for name, value in told.items() if np.isfinite(value)}
