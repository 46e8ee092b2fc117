"""What is measured on a model: right answers, loss, thinking, loops, bleeding topics, certainty, speed.

One function a measure; each gives numbers per item, so that arms are compared item by item. `measure` takes them
all on one model and returns columns, `describe` makes the table of everything.
"""

import itertools
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironlogic.burden import Burden, burden_messages
from ironlogic.data.chats import ChatError
from ironlogic.data.masking import encode_chat
from ironlogic.data.problems import Task, answer_mark, bayes_ceiling, check_answer, thinks
from ironlogic.evidence.items import RATIOS, WORST, Items, scramble, substitute_words
from ironlogic.evidence.results import Arms, Columns
from ironlogic.evidence.statistics import Interval, adjusted_effect, calibration_error, curve_area
from ironlogic.generate import Completion, generate
from ironlogic.lens.attention import read_attention, read_routing
from ironlogic.lens.compare import routing_distance
from ironlogic.lens.parts import routers
from ironlogic.lens.probe import LensError
from ironlogic.lens.read import read_layers
from ironlogic.models import LoadedModel, ModelError, as_loaded, inference, with_adapters

import numpy as np
import pandas as pd
import peft
import torch
import torch.nn.functional as F

__all__ = [
    "Bleeding",
    "ModeSwitching",
    "Robustness",
    "context_bleeding",
    "decoding_speed",
    "describe",
    "layer_columns",
    "loops",
    "measure",
    "measure_losses",
    "mode_switching",
    "reply_scores",
    "robustness",
    "substituted",
]

FEWEST = 3  # items for context bleeding: each needs two others


# --- right answers ------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Robustness:
    """One model on scrambled problems; arrays of shape (ratio, item)."""

    ratios: tuple[float, ...]
    tasks: tuple[Task, ...]
    correct: np.ndarray  # 0 or 1
    ceiling: np.ndarray  # chance that an ideal reader of the scrambled prompt is right; NaN where nobody knows
    answers: tuple[tuple[Completion, ...], ...]

    def columns(self) -> Columns:
        """Of shape (item,), each as `name@ratio`: accuracy, ceiling, tokens, thinking, the right mode, loops.

        `cut`: replies that the limit ended; `unmarked`: those that don't say which part is the answer.
        """
        columns: Columns = {}
        hard = np.array([np.nan if task.hard is None else float(task.hard) for task in self.tasks])
        for row, ratio in enumerate(self.ratios):
            replies = self.answers[row]
            thought = np.array([thinks(reply.text) for reply in replies], float)
            columns[f"correct@{ratio:g}"] = self.correct[row]
            columns[f"ceiling@{ratio:g}"] = self.ceiling[row]
            columns[f"tokens@{ratio:g}"] = np.array([reply.tokens for reply in replies], float)
            columns[f"think@{ratio:g}"] = thought
            columns[f"mode@{ratio:g}"] = np.where(np.isnan(hard), np.nan, thought == hard)
            columns[f"loop@{ratio:g}"] = np.array([loops(reply.text) for reply in replies], float)
            columns[f"cut@{ratio:g}"] = np.array([not reply.finished for reply in replies], float)
            columns[f"unmarked@{ratio:g}"] = np.array([not answer_mark(reply.text) for reply in replies], float)
        return columns


def robustness(
    loaded: LoadedModel | Any,
    tasks: Sequence[Task],
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    max_new_tokens: int = 72,
    batch_size: int = 128,
    ask: Callable[[str], Any] = str,
) -> Robustness:
    """Answers every problem at every scramble ratio, greedily, and grades it (`check_answer`).

    `ask` makes the messages of a scrambled question (`Items.ask`).
    """
    prompts = [
        [scramble(task.prompt, ratio, seed=seed, item=i) for i, task in enumerate(tasks)] for ratio in ratios
    ]
    asked = [ask(prompt) for prompt in itertools.chain(*prompts)]
    replies = generate(loaded, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    count = len(tasks)
    answers = tuple(tuple(replies[row * count : (row + 1) * count]) for row in range(len(ratios)))
    correct = [_right(tasks, row) for row in answers]
    ceiling = [
        [bayes_ceiling(task, prompt, ratio) for task, prompt in zip(tasks, row, strict=True)]
        for ratio, row in zip(ratios, prompts, strict=True)
    ]
    return Robustness(tuple(ratios), tuple(tasks), np.array(correct), np.array(ceiling), answers)


def _right(tasks: Sequence[Task], replies: Sequence[Completion]) -> np.ndarray:
    """1 where a reply has the answer, else 0; of shape (item,)."""
    return np.array([check_answer(task, reply.text) for task, reply in zip(tasks, replies, strict=True)], float)


def substituted(
    loaded: LoadedModel | Any,
    items: Items,
    *,
    ratio: float = WORST,
    seed: int = 0,
    max_new_tokens: int = 72,
    batch_size: int = 64,
) -> np.ndarray:
    """The floor: correctness where as many words are replaced by words of other questions instead of moved."""
    words = [word for task in items.tasks for word in task.prompt.split()]
    prompts = [substitute_words(t.prompt, ratio, words, seed=seed, item=i) for i, t in enumerate(items.tasks)]
    asked = [items.ask(prompt) for prompt in prompts]
    replies = generate(loaded, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return _right(items.tasks, replies)


# --- loss and certainty -------------------------------------------------------------------------------------
def measure_losses(
    loaded: LoadedModel | Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    batch_size: int | None = None,
) -> Columns:
    """How surprised a model is by the reference answers, with user turns scrambled: columns `loss@ratio` of (row,).

    Nats per answer token; NaN for rows that can't be encoded or have no answer within the context.
    """
    loaded = as_loaded(loaded)
    rows, versions = [], []  # versions: of each row (ids, labels) at every ratio
    for i, messages in enumerate(chats):
        try:
            encoded = [
                _encode(loaded, burden_messages(messages, Burden(ratio=ratio), seed=seed, row=i))
                for ratio in ratios
            ]
        except ChatError:
            continue
        if all(any(label >= 0 for label in labels[1:]) for _, labels in encoded):
            rows.append(i)
            versions.append(encoded)
    columns: Columns = {}
    for k, ratio in enumerate(ratios):
        scores = _row_scores(loaded, [encoded[k] for encoded in versions], batch_size)
        columns[f"loss@{ratio:g}"] = np.full(len(chats), np.nan)
        columns[f"loss@{ratio:g}"][rows] = [loss for loss, _, _ in scores]
    return columns


def reply_scores(
    loaded: LoadedModel | Any,
    asked: Sequence[Sequence[dict[str, Any]]],
    replies: Sequence[str],
    *,
    batch_size: int | None = None,
) -> Columns:
    """How sure a model is of given replies (its own greedy ones, say) to messages, end-of-turn token included.

    Columns of shape (reply,), NaN where a reply can't be encoded: `entropy` of the next-token distribution in nats,
    mean over the reply's tokens; `sure`, the probability of the next token (geometric mean over them);
    `sure of all`, that of the whole reply.
    """
    loaded = as_loaded(loaded)
    rows, encoded = [], []
    for i, (messages, reply) in enumerate(zip(asked, replies, strict=True)):
        try:
            encoded.append(_encode(loaded, [*messages, {"role": "assistant", "content": reply}]))
        except ChatError:
            continue
        rows.append(i)
    scores = np.full((len(asked), 3), np.nan)
    if rows:
        scores[rows] = _row_scores(loaded, encoded, batch_size)
    loss, entropy, tokens = scores.T
    return {"entropy": entropy, "sure": np.exp(-loss), "sure of all": np.exp(-loss * tokens)}


def _encode(loaded: LoadedModel, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation, cut to the context."""
    encoded = encode_chat(messages, loaded.tokenizer)
    return encoded.input_ids[: loaded.max_length], encoded.labels[: loaded.max_length]


def _row_scores(
    loaded: LoadedModel, rows: Sequence[tuple[list[int], list[int]]], batch_size: int | None
) -> list[tuple[float, float, int]]:
    """(loss, entropy, tokens) of each row: means in nats over its labelled tokens, and how many those are."""
    batch_size = batch_size or (1 if loaded.device.type == "cuda" else 16)  # logits of a row take gibibytes
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = [(0.0, 0.0, 0)] * len(rows)
    pad = loaded.tokenizer.pad_token_id
    with inference(loaded) as model:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            longest = max(len(rows[i][0]) for i in batch)

            def padded(lists: Sequence[list[int]], value: int, longest=longest) -> torch.Tensor:
                full = [row + [value] * (longest - len(row)) for row in lists]
                return torch.tensor(full).to(loaded.device)

            ids = padded([rows[i][0] for i in batch], pad)
            labels = padded([rows[i][1] for i in batch], -100)
            mask = padded([[1] * len(rows[i][0]) for i in batch], 0)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, row_logits, row_labels in zip(batch, logits, labels, strict=True):
                scores[i] = _mean_scores(row_logits[:-1], row_labels[1:])
    return scores


def _mean_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, int]:
    """(loss, entropy, tokens) over the labelled tokens; logits of shape (token, vocabulary)."""
    labelled = labels >= 0
    count = int(labelled.sum())
    if not count:
        return math.nan, math.nan, 0
    loss = entropy = 0.0
    # only so many rows of a large vocabulary are ever float32
    for part, target in zip(logits[labelled].split(512), labels[labelled].split(512), strict=True):
        logp = part.float().log_softmax(-1)
        loss += F.nll_loss(logp, target, reduction="sum").item()
        entropy -= (logp.exp() * logp).sum().item()
    return loss / count, entropy / count, count


# --- thinking -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModeSwitching:
    """Thinking on hard items and not on easy ones, as a detector of hard items."""

    precision: float  # share of thinking replies that were to hard items; NaN if it never thinks
    recall: float  # share of hard items that it thinks on
    f1: float
    at_equal_length: Interval  # how much likelier it thinks on a hard item than on an easy one as long


def mode_switching(thought: Sequence[float], hard: Sequence[bool], prompts: Sequence[str]) -> ModeSwitching:
    """Does it think where it should? The length of the prompt (words) is taken out: it may give the class away."""
    thought, hard = np.array(thought, dtype=bool), np.array(hard, dtype=bool)
    hits = float((thought & hard).sum())
    length = [len(prompt.split()) for prompt in prompts]
    return ModeSwitching(
        precision=hits / thought.sum() if thought.any() else float("nan"),
        recall=hits / hard.sum(),
        f1=2 * hits / (thought.sum() + hard.sum()),
        at_equal_length=adjusted_effect(thought, hard, length),
    )


# --- loops --------------------------------------------------------------------------------------------------
def loops(reply: str, *, times: int = 3, least: int = 12) -> bool:
    """Whether a stretch of words follows itself, `times` in a row and over `least` words together.

    Repeated words that do not follow themselves are no loop: long ordinary texts are full of them.

    >>> loops("so we add " * 4), loops("we add two and then we add three and then we add four and so on")
    (True, False)
    """
    words = np.array(reply.split())
    for length in range(1, len(words) // times + 1):
        same = np.concatenate([[0], words[length:] == words[:-length], [0]])
        changes = np.flatnonzero(
            np.diff(same)
        )  # begins and ends of the runs that repeat what stands `length` before
        longest = max(changes[1::2] - changes[::2], default=0)
        if longest + length >= max(times * length, least):
            return True
    return False


# --- an earlier topic ---------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Bleeding:
    """Second turns after an unrelated first one; arrays of shape (item,)."""

    found: np.ndarray  # 1 where the reply has a word of the first turn that its own question does not give
    permuted: np.ndarray  # the same with the words of another first turn: what chance finds
    replies: tuple[Completion, ...]


def context_bleeding(
    loaded: LoadedModel | Any, items: Items, *, seed: int = 0, max_new_tokens: int = 72, batch_size: int = 64
) -> Bleeding:
    """Asks each item after an unrelated turn and looks for that turn's words in the reply.

    A word counts if it is in the first turn (question or reply), in less than a tenth of all conversations, and
    neither in the second question nor in its reference reply.
    """
    count = len(items)
    if count < FEWEST:
        raise ValueError(f"context_bleeding: {count} items; expected {FEWEST} or more")
    words = [_content_words(" ".join(message["content"] for message in chat)) for chat in items.chats]
    frequency = Counter(word for chat_words in words for word in chat_words)
    common = {word for word, chats in frequency.items() if chats > max(2, count / 10)}
    ring = np.random.default_rng(seed).permutation(count)
    position = np.argsort(ring)
    first, other = ring[(position + 1) % count], ring[(position + 2) % count]  # turn before; turn for chance
    system = [{"role": "system", "content": items.system}] if items.system else []
    turns = [[items.ask(chat[0]["content"])[-1], *chat[1:]] for chat in items.chats]  # with the form of an answer
    asked = [[*system, *turns[first[i]], turns[i][0]] for i in range(count)]
    replies = generate(loaded, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    reply_words = [_content_words(reply.text) for reply in replies]

    def bled(before: np.ndarray) -> np.ndarray:
        foreign = [words[before[i]] - words[i] - common for i in range(count)]
        return np.array([bool(reply_words[i] & foreign[i]) for i in range(count)], float)

    return Bleeding(bled(first), bled(other), tuple(replies))


def _content_words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]{3,}", text)}


# --- speed --------------------------------------------------------------------------------------------------
def decoding_speed(
    loaded: LoadedModel, adapters: Mapping[str, Path], prompts: Sequence[str], *, tokens: int = 24, repeats: int = 4
) -> dict[str, np.ndarray]:
    """Seconds a token at a forced length, by arm ("base" is the model without adapter); arrays of shape (prompt,).

    An adapter is merged into the weights while it is timed, as people run it: else its own matrices would be timed
    too. The arms take turns, in another order each time, so that whatever else the machine does hits all alike; the
    median over `repeats` is kept. The length is forced, or an arm that says less would look quicker. Merging into
    4-bit weights rounds them, so the model is of no further use.
    """
    loaded = with_adapters(loaded, adapters)
    asked = [
        loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(loaded.device)
        for text in (
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        )
    ]
    arms = ["base", *adapters]
    seconds = np.zeros((len(arms), repeats, len(prompts)))
    with inference(loaded) as model:
        for repeat in range(-1, repeats):  # -1: warm up
            for place in range(len(arms)):
                arm, timed = (place + repeat) % len(arms), asked if repeat >= 0 else asked[:1]
                with _merged(model, arms[arm]):
                    spent = [_decode(model, inputs, tokens, loaded.tokenizer.pad_token_id) for inputs in timed]
                if repeat >= 0:
                    seconds[arm, repeat] = np.array(spent) / tokens
    return {arm: np.median(seconds[k], axis=0) for k, arm in enumerate(arms)}


@contextmanager
def _merged(model: Any, arm: str) -> Iterator[None]:
    """The model with that adapter inside its weights; "base": with none."""
    if arm == "base":
        with model.disable_adapter():
            yield
        return
    model.set_adapter(arm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*may get different generations")  # rounding; only time counts
        model.merge_adapter([arm])
        yield
        model.unmerge_adapter()


def _decode(model, inputs, tokens: int, pad: int) -> float:
    """Seconds of decoding exactly `tokens` tokens."""
    began = time.perf_counter()
    out = model.generate(
        **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, use_cache=True
    ).cpu()  # the copy waits for the card
    spent = time.perf_counter() - began
    decoded = out.shape[1] - inputs["input_ids"].shape[1]
    if decoded != tokens:
        raise RuntimeError(f"decoding_speed: {decoded} tokens came where {tokens} were forced")
    return spent


# --- layers -------------------------------------------------------------------------------------------------
_EARLY, _SILENT = 0.8, 0.92  # seed 002: the first 80 % of the depth; entropy above 11.0 of ln 151,936 = 11.9 nats
_READ = 24  # items whose layers are read
_SHIFTS = ("attention shift", "routing shift")


def layer_columns(loaded: LoadedModel, items: Items) -> Columns:
    """What the layers hold where the answer begins, on some items (NaN on the others).

    `silent layers`: share of the first 80 % of them whose next-token entropy is above .92 of the most it could be.
    `late entropy`: mean of the others, in nats. Of an adapter against its base in the same model:
    `attention shift`, the total variation distance of the last layer's attention, mean over heads, and
    `routing shift`, the Jensen-Shannon divergence of the routers in nats, where there are experts.
    """
    columns = {name: np.full(len(items), np.nan) for name in ("silent layers", "late entropy", *_SHIFTS)}
    try:
        for i in np.unique(np.linspace(0, len(items) - 1, _READ).astype(int)):
            asked = items.ask(items.tasks[i].prompt)
            reading = read_layers(loaded, asked)
            entropy = reading.entropy[1:, 0]
            early = max(1, math.floor(_EARLY * len(entropy)))
            columns["silent layers"][i] = (entropy[:early] > _SILENT * reading.ln_vocabulary).mean()
            columns["late entropy"][i] = entropy[early:].mean()
            for name, shift in zip(_SHIFTS, _shifts(loaded, asked), strict=True):
                columns[name][i] = shift
    except (LensError, ModelError) as error:  # a family that the lens can't read, or not all of it
        print(f"not all layers were read: {error}")
    return {name: values for name, values in columns.items() if np.isfinite(values).any()}


def _shifts(loaded: LoadedModel, asked: list[dict[str, Any]]) -> tuple[float, float]:
    """(attention, routing) of an adapter against its base; NaN without an adapter, for routing without experts."""
    mixture = bool(routers(loaded.model))
    if not isinstance(loaded.model, peft.PeftModel):
        return math.nan, math.nan

    def read() -> tuple[np.ndarray, Any]:
        attention = read_attention(loaded, asked).weights[-1, :, 0]
        return attention, read_routing(loaded, asked) if mixture else None

    ours, our_routing = read()
    with loaded.model.disable_adapter():
        base, base_routing = read()
    routing = routing_distance(base_routing, our_routing).mean() if mixture else math.nan
    return 0.5 * np.abs(ours - base).sum(axis=-1).mean(), routing


# --- all of it on one model ---------------------------------------------------------------------------------
def measure(
    loaded: LoadedModel | Any,
    items: Items,
    *,
    seed: int = 0,
    max_new_tokens: int = 72,
    brief: bool = False,
) -> Columns:
    """Every measure on one model. Columns that need a checkable answer are absent where there is none.

    `brief`: only accuracy, thinking and the loss of the reference replies, clean and at the ratio WORST.
    """
    loaded = as_loaded(loaded)
    ratios = (0.0, WORST) if brief else items.ratios
    batch_size = 64 if loaded.device.type == "cuda" else 512  # small models: a batch takes hardly longer than a row
    options = {"seed": seed, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answered = robustness(loaded, items.tasks, ratios=ratios, ask=items.ask, **options)
    columns = answered.columns()
    if not items.checkable:
        of_answers = ("correct", "ceiling", "unmarked")
        columns = {name: c for name, c in columns.items() if not name.startswith(of_answers)}
    system = [{"role": "system", "content": items.system}] if items.system else []
    columns |= measure_losses(loaded, [[*system, *chat] for chat in items.chats], ratios=(0.0, WORST), seed=seed)
    if brief:
        return columns
    asked = [items.ask(task.prompt) for task in items.tasks]
    columns |= reply_scores(loaded, asked, [reply.text for reply in answered.answers[ratios.index(0.0)]])
    columns |= layer_columns(loaded, items)
    columns["ln tokens"] = np.log(columns["tokens@0"])
    if len(items) >= FEWEST:
        bled = context_bleeding(loaded, items, **options)
        columns |= {"bleed": bled.found, "bleed by chance": bled.permuted}
        columns["bleed excess"] = bled.found - bled.permuted
        if items.checkable:
            columns["correct second"] = _right(items.tasks, bled.replies)
    if items.checkable:
        columns["correct substituted"] = substituted(loaded, items, **options)
    return columns


# --- every measure in figures -------------------------------------------------------------------------------
# Means over items and trainings: label, column, items
_MEANS = (
    ("accuracy after an unrelated turn", "correct second", "all"),
    ("loss of the reply, clean (nats a token)", "loss@0", "all"),
    (f"loss of the reply at {WORST} (nats a token)", f"loss@{WORST}", "all"),
    ("entropy of its own reply (nats a token)", "entropy", "all"),
    ("probability of its next token", "sure", "all"),
    ("early layers without a favourite", "silent layers", "all"),
    ("entropy of the late layers (nats)", "late entropy", "all"),
    ("shift of the last attention against the base", "attention shift", "all"),
    ("shift of the routing against the base (nats)", "routing shift", "all"),
    ("replies that think", "think@0", "all"),
    ("replies that loop", "loop@0", "all"),
    ("replies with a word of the turn before", "bleed", "all"),
    ("the same by chance", "bleed by chance", "all"),
    ("tokens an answer", "tokens@0", "all"),
    ("replies cut at the limit", "cut@0", "all"),
    ("replies that don't say what the answer is", "unmarked@0", "all"),
)


def describe(arms: Arms, items: Items) -> pd.DataFrame:
    """Every measure of every arm: a row each, columns (arm, "mean") and (arm, "sd") over its trainings.

    NaN: can't be measured on these items, or (the deviation) one training only. Learning curves are left out.
    """
    columns = {}
    for arm, trainings in arms.items():
        if arm.endswith(" rows"):
            continue
        each = [dict(_figures([training], items)) for training in trainings.values()]
        columns[arm, "mean"] = pd.Series(dict(_figures(list(trainings.values()), items)))
        columns[arm, "sd"] = pd.DataFrame(each).std()
    return pd.DataFrame(columns).dropna(how="all")


def _figures(trainings: Sequence[Columns], items: Items) -> Iterator[tuple[str, float]]:
    """(label, value) of every measure, pooled over trainings; NaN where it was not measured."""
    ratios = items.ratios

    def pooled(column: str, among: str) -> np.ndarray:
        parts = [columns[column][items.among(among)] for columns in trainings if column in columns]
        return np.concatenate(parts or [np.array([])])

    def mean(column: str, among: str = "all") -> float:
        values = pooled(column, among)
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else float("nan")

    sorts = [sort for sort in ("free", "bound") if items.among(sort).any()] or ["all"]  # all: nobody marked them
    for sort in sorts:
        ending = "" if sort == "all" else f", order-{sort}"
        accuracy = [mean(f"correct@{ratio:g}", sort) for ratio in ratios]
        yield f"accuracy, clean{ending}", accuracy[0]
        yield f"accuracy at {WORST}{ending}", mean(f"correct@{WORST}", sort)
        yield f"area under the curve{ending}", float(curve_area(ratios, accuracy))
        yield f"retention at {ratios[-1]:g}{ending}", accuracy[-1] / (accuracy[0] or float("nan"))
        if sort == "bound":
            ceiling = mean(f"ceiling@{WORST}", sort)
            yield f"share of the ceiling at {WORST}{ending}", mean(f"correct@{WORST}", sort) / ceiling
        else:
            floor = mean("correct substituted", sort)
            above = mean("correct@0", sort) - floor
            kept = (mean(f"correct@{WORST}", sort) - floor) / above if above > 0 else float("nan")
            yield f"accuracy at {WORST}, words substituted{ending}", floor
            yield f"kept above that floor at {WORST}{ending}", kept
    for label, column, among in _MEANS:
        yield label, mean(column, among)
    yield "milliseconds a token, forced length", 1e3 * math.exp(mean("ln seconds"))
    sort = "easy" if items.among("easy").any() else "all"  # after its own reasoning every model is sure
    sure, right = pooled("sure of all", sort), pooled("correct@0", sort)
    known = np.isfinite(sure)
    calibrated = known.any() and sure.size == right.size
    error = calibration_error(sure[known], right[known]) if calibrated else float("nan")
    yield "calibration error, clean", error
    if items.among("easy").any() and items.among("hard").any():
        marked = items.among("hard") | items.among("easy")
        prompts = [task.prompt for task in np.array(items.tasks, dtype=object)[marked]]
        hard = items.among("hard")[marked]
        modes = [mode_switching(columns["think@0"][marked], hard, prompts) for columns in trainings]
        yield "thinking: precision", float(np.mean([mode.precision for mode in modes]))
        yield "thinking: recall", float(np.mean([mode.recall for mode in modes]))
        yield "thinking: F1", float(np.mean([mode.f1 for mode in modes]))
        gaps = [mode.at_equal_length.mean for mode in modes]
        yield "thinking: hard minus easy at equal length", float(np.mean(gaps))
