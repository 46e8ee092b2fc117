"""What the seeds claim, each as a rule written down before anything is measured, and the verdict it comes to.

A `Claim` names what was said, the column that measures it (`measures.measure`), the arm, its control, and the
smallest effect for which it counts. `judge_claims` compares the two arms item by item and training by training; for
each form of claim there is one function. Knows no model: it reads columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ironlogic.evidence.items import WORST, Items
from ironlogic.evidence.results import Arms, of_seed, paired_seeds
from ironlogic.evidence.statistics import (
    Interval,
    bootstrap_interval,
    equivalent,
    holm,
    paired_test,
    samples_worth,
    smallest_detectable,
)

import numpy as np
import pandas as pd

__all__ = ["CLAIMS", "MARGIN", "VERDICTS", "Claim", "Finding", "Findings", "compare_recipes", "judge_claims"]

Verdict = Literal["holds", "holds in part", "fails", "can't be told here"]
VERDICTS: tuple[Verdict, ...] = ("holds", "holds in part", "fails", "can't be told here")
UNKNOWN = VERDICTS[-1]
Form = Literal["gain", "no harm", "saved", "worth"]

MARGIN = 0.03  # what matters of an accuracy or a share, and what "no harm" may cost
FASTER = 0.25  # of "about 30 % faster": the share of time that has to be saved
WORTH = 50.0  # of "1 FT sample = 100 SFT samples"
EMERGES = 0.20  # how much oftener it has to think than its control, to say that the method taught it
SEEDS_ROWS = 248  # the size of the seeds' dataset
LONG_ENOUGH = 64  # tokens an answer on average: shorter ones have no room to loop
FEWEST = 8  # items
ABLE = 0.10  # right on clean prompts: below that there is no accuracy to gain or to lose


@dataclass(frozen=True)
class Claim:
    """One sentence of the seeds, and when it counts as true.

    The effect is in the claimed direction, and the verdict follows from its interval alone (`decide`). Forms:

    * gain: effect = `sign` x (ours - control). Holds if its 95 % interval lies wholly at `size` or above, in part
      if it lies wholly above 0.
    * no harm: the same effect. Holds if a loss of -`size` is ruled out (90 % interval: one of the two one-sided
      tests of equivalence; a gain does no harm), never in part.
    * saved: effect = 1 - ours / control, of columns that are logarithms. In part if wholly above MARGIN.
    * worth: effect = samples of the control that one of ours is worth, at the seeds' 248 rows. In part above 1.
    """

    key: str
    said: str
    source: str  # the seed that says it
    measure: str
    column: str
    among: str = "all"  # items: all, free, bound, easy, hard
    ours: str = "FT"
    control: str = "SFT"
    control_column: str = ""  # if it is another one than ours
    sign: int = 1
    size: float = MARGIN
    form: Form = "gain"
    checkable: bool = False  # needs answers that are right or wrong
    least_tokens: int = 0  # an answer has to be that long on average, or nothing can be seen
    least_mean: float | None = None  # one of the arms has to reach it, or nothing can be seen


def _clean(key: str, said: str, source: str, among: str, **more) -> Claim:
    measure = f"accuracy on clean {'' if among == 'all' else f'order-{among} '}prompts"
    options = {"size": -MARGIN, "form": "no harm", "checkable": True} | more
    return Claim(key, said, source, measure, "correct@0", among, **options)


def _scrambled(key: str, said: str, among: str, **more) -> Claim:
    measure = f"accuracy at ratio {WORST}, order-{among}"
    return Claim(key, said, "000, 001", measure, f"correct@{WORST}", among, checkable=True, **more)


def _worth(key: str, prompt: str, column: str) -> Claim:
    said = "1 FT sample is worth about 100 SFT samples"
    return Claim(key, said, "000, 001", f"loss of the reply, {prompt} prompt", column, size=WORTH, form="worth")


def _faster(key: str, measure: str, column: str) -> Claim:
    said = "about 30 % faster on tasks without thinking"
    return Claim(key, said, "000, 002", measure, column, "easy", sign=-1, size=FASTER, form="saved")


_ROBUST = "robust to noise: reads scrambled input"
_POLISHED = {"ours": "FT then SFT", "control": "SFT then SFT"}

CLAIMS = (
    _scrambled("robust", _ROBUST, "free"),
    _scrambled("robust-bound", _ROBUST, "bound"),
    Claim(
        "robust-loss", _ROBUST, "000, 001", f"nats a token of the reply, ratio {WORST}", f"loss@{WORST}", sign=-1
    ),
    Claim(
        "words-enough",
        "reads by words alone, wherever they stand",
        "000, 001",
        "accuracy fully scrambled against clean, order-free",
        "correct@1",
        "free",
        control="FT",
        control_column="correct@0",
        size=-MARGIN,
        form="no harm",
        checkable=True,
    ),
    _clean("decoupled", "logic is decoupled from syntax", "000, 001", "bound"),
    _clean("no-harm", "better logic at no price on plain input", "000, 001", "free"),
    _clean("polish", "a following SFT polishes the rest", "000, 001", "all", **_POLISHED),
    _scrambled("logic-stays", "the logic stays through the following SFT", "free", **_POLISHED),
    _worth("worth", "clean", "loss@0"),
    _worth("worth-scrambled", "scrambled", f"loss@{WORST}"),
    Claim(
        "emerges",
        "248 rows make it think by itself",
        "000, 001",
        f"share of hard problems it thinks on, {SEEDS_ROWS} rows",
        "think@0",
        "hard",
        ours=f"FT {SEEDS_ROWS} rows",
        control=f"SFT {SEEDS_ROWS} rows",
        size=EMERGES,
    ),
    Claim("modes", "switches modes by itself: fast or slow", "001", "share of items in the right mode", "mode@0"),
    Claim(
        "sharper",
        "sharper confidence",
        "000, 001",
        "probability of its own whole reply",
        "sure",
        least_mean=MARGIN,
    ),
    _faster("faster-token", "seconds a token, forced length", "ln seconds"),
    _faster("faster-length", "tokens an answer", "ln tokens"),
    _faster("faster", "seconds an answer", "ln time"),
    Claim(
        "bleeds",
        "admitted: words of an earlier topic bleed in",
        "000, 001",
        "replies with a word of the turn before, above chance",
        "bleed excess",
    ),
    Claim(
        "loops",
        "admitted: repeats itself in loops",
        "000, 001",
        "replies that loop",
        "loop@0",
        least_tokens=LONG_ENOUGH,
    ),
)


@dataclass(frozen=True)
class Finding:
    """A claim and what came of it. Intervals are None where nothing could be measured; `note` then says why."""

    claim: Claim
    verdict: Verdict
    effect: Interval | None = None  # in the claimed direction, as `claim.form` says
    ours: Interval | None = None
    control: Interval | None = None
    repeats: int = 0  # trainings an arm
    items: int = 0
    detectable: float = float("nan")  # the smallest effect that such data would have shown in 4 cases of 5
    each: tuple[float, ...] = ()  # effect of each training
    same: bool = False  # shown to differ by less than MARGIN either way (two one-sided tests)
    p: float | None = None  # McNemar over items, first training, Holm over all claims; decides nothing
    note: str = ""
    at_least: bool = False  # the learning curve ends before the effect does


@dataclass(frozen=True, eq=False)
class Findings:
    """A finding for every claim, and what they were judged by. Prints as a table; `show.report` makes the page."""

    rows: tuple[Finding, ...]
    arms: Arms = field(repr=False)
    items: Items = field(repr=False)
    sizes: tuple[int, ...] = ()  # rows of the learning curves
    control: str = "SFT"  # the arm in the place of the control twin

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: str) -> Finding:
        """The finding on the claim of that key."""
        return next(finding for finding in self.rows if finding.claim.key == key)

    def table(self) -> pd.DataFrame:
        """A row a claim: what was said, what was measured, effect with its interval, verdict."""
        lines = [
            {
                "said": finding.claim.said,
                "measured": finding.claim.measure,
                "effect": finding.note if finding.effect is None else f"{finding.effect:+}",
                "verdict": finding.verdict,
            }
            for finding in self.rows
        ]
        return pd.DataFrame(lines, index=[finding.claim.key for finding in self.rows])

    def __str__(self) -> str:
        return self.table().to_string()


def judge_claims(
    arms: Arms,
    items: Items,
    *,
    claims: Sequence[Claim] = CLAIMS,
    names: Mapping[str, str] | None = None,
    sizes: Sequence[int] = (),
    draws: int = 2000,
) -> Findings:
    """A finding for every claim. `sizes`: rows of the learning curves, for claims of the form "worth".

    `names` puts other arms in the place of FT and SFT: {"FT": "yours", "SFT": "base"}.
    """
    names = names or {}
    named = [replace(c, ours=names.get(c.ours, c.ours), control=names.get(c.control, c.control)) for c in claims]
    findings = [judge(claim, arms, items, sizes=sizes, draws=draws) for claim in named]
    tested = [i for i, finding in enumerate(findings) if finding.p is not None]
    for i, p in zip(tested, holm([findings[i].p for i in tested]), strict=True):
        findings[i] = replace(findings[i], p=p)
    return Findings(tuple(findings), arms, items, tuple(sizes), names.get("SFT", "SFT"))


def judge(claim: Claim, arms: Arms, items: Items, *, sizes: Sequence[int] = (), draws: int = 2000) -> Finding:
    """The finding on one claim."""
    try:
        if claim.checkable and not items.checkable:
            raise _CantTell("needs items whose answers can be checked")
        if claim.form == "worth":
            return _judge_worth(claim, arms, sizes, draws)
        claim, among, note = _choose_items(claim, items)
        pair = _pair_arms(claim, arms, among)
        if claim.checkable:
            _check_ability(claim, arms, among)
        judge_form = {"gain": _judge_gain, "no harm": _judge_no_harm, "saved": _judge_saved}[claim.form]
        finding = judge_form(claim, pair, draws)
    except _CantTell as reason:
        return Finding(claim, UNKNOWN, note=str(reason))
    blind = _nothing_to_see(claim, arms, pair)
    if blind:
        finding, note = replace(finding, verdict=UNKNOWN), blind
    if finding.repeats == 1:
        alone = "one training: the interval is over items alone, and another training would differ by more"
        note = f"{note}; {alone}" if note else alone
    return replace(finding, note=note)


def decide(effect: Interval, *, size: float, nothing: float = 0.0) -> Verdict:
    """The rule: see `Claim`. `nothing`: the effect above which a claim holds in part.

    >>> decide(Interval(0.1, 0.05, 0.15), size=0.03), decide(Interval(0.0, -0.02, 0.02), size=0.03)
    ('holds', 'fails')
    """
    if effect.low >= size:
        return "holds"
    if effect.low > nothing:
        return "holds in part"
    return "fails" if effect.high < size else UNKNOWN


# --- what is compared ---------------------------------------------------------------------------------------
class _CantTell(Exception):
    """Why a claim can't be judged on these arms and items."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """An arm and its control: arrays of shape (training, item), same trainings and items, all finite."""

    ours: np.ndarray
    control: np.ndarray


def _choose_items(claim: Claim, items: Items) -> tuple[Claim, np.ndarray, str]:
    """(claim, which items, note): the items it is about, or all of them where nobody marked any."""
    marked = {
        "free": any(task.order != "unknown" for task in items.tasks),
        "easy": any(task.hard is not None for task in items.tasks),
    }
    if marked.get(claim.among, True):
        return claim, items.among(claim.among), ""
    of_all = claim.measure.replace(", order-free", "").replace("order-free ", "")
    return replace(claim, measure=of_all), items.among("all"), f"items are not marked {claim.among}: all of them"


def _pair_arms(claim: Claim, arms: Arms, among: np.ndarray) -> _Pair:
    measured = []
    for arm, column in ((claim.ours, claim.column), (claim.control, claim.control_column or claim.column)):
        if not arms.get(arm):
            raise _CantTell(f"there is no run of {arm}")
        trainings = {seed: columns[column] for seed, columns in arms[arm].items() if column in columns}
        if not trainings:
            raise _CantTell(f"{claim.measure}: not measured for {arm}")
        measured.append(trainings)
    seeds = paired_seeds(*measured)
    if not seeds:
        raise _CantTell(f"{claim.ours} and {claim.control} share no training seed")
    ours, control = (np.stack([of_seed(trainings, seed) for seed in seeds]) for trainings in measured)
    known = among & np.isfinite(ours).all(axis=0) & np.isfinite(control).all(axis=0)
    if known.sum() < FEWEST:
        raise _CantTell(f"{known.sum()} items of the sort it is about ({claim.among}); {FEWEST} or more are needed")
    return _Pair(ours[:, known], control[:, known])


def _check_ability(claim: Claim, arms: Arms, among: np.ndarray) -> None:
    """Where nearly nothing is answered right, no accuracy can be gained or lost."""
    trainings = [columns for arm in (claim.ours, claim.control) for columns in arms[arm].values()]
    best = max((float(c["correct@0"][among].mean()) for c in trainings if "correct@0" in c), default=1.0)
    if best < ABLE:
        raise _CantTell(f"at most {best:.0%} of clean prompts answered right: does a reply end in `Answer: ...`?")


def _nothing_to_see(claim: Claim, arms: Arms, pair: _Pair) -> str:
    """Why an effect that was measured says nothing all the same; "" if it does."""
    lengths = [columns["tokens@0"].mean() for columns in arms[claim.ours].values() if "tokens@0" in columns]
    length = np.mean(lengths) if lengths else 0.0
    if length < claim.least_tokens:
        return f"answers have {length:.0f} tokens on average: no room to loop"
    if claim.least_mean is not None and max(pair.ours.mean(), pair.control.mean()) < claim.least_mean:
        return "replies are so long that no whole one is probable, in either arm"
    return ""


# --- the forms of claim -------------------------------------------------------------------------------------
def _judge_gain(claim: Claim, pair: _Pair, draws: int, *, level: float = 0.95, nothing: float = 0.0) -> Finding:
    differences = claim.sign * (pair.ours - pair.control)
    effect = bootstrap_interval(differences, level=level, draws=draws)
    right_or_wrong = np.isin(pair.ours, (0, 1)).all() and np.isin(pair.control, (0, 1)).all()
    return Finding(
        claim,
        decide(effect, size=claim.size, nothing=nothing),
        effect,
        ours=_bounded_interval(pair.ours, draws),
        control=_bounded_interval(pair.control, draws),
        repeats=differences.shape[0],
        items=differences.shape[1],
        detectable=smallest_detectable(effect, level=level),
        each=tuple(differences.mean(axis=1).tolist()),
        same=equivalent(pair.ours, pair.control, margin=MARGIN, draws=draws),
        p=paired_test(pair.ours[0], pair.control[0]) if right_or_wrong else None,
    )


def _judge_no_harm(claim: Claim, pair: _Pair, draws: int) -> Finding:
    return _judge_gain(claim, pair, draws, level=0.90, nothing=np.inf)


def _judge_saved(claim: Claim, pair: _Pair, draws: int) -> Finding:
    """Of logarithms: a difference is a ratio, a mean the geometric one."""

    def saved(log_ratio: float) -> float:
        """The share saved, 1 - ours / control, of -ln(ours / control)."""
        return float(1 - np.exp(-log_ratio))

    differences = claim.sign * (pair.ours - pair.control)
    log_ratio = bootstrap_interval(differences, draws=draws)
    effect = _transform(log_ratio, saved)
    return Finding(
        claim,
        decide(effect, size=claim.size, nothing=MARGIN),
        effect,
        ours=_transform(bootstrap_interval(pair.ours, draws=draws), np.exp),
        control=_transform(bootstrap_interval(pair.control, draws=draws), np.exp),
        repeats=differences.shape[0],
        items=differences.shape[1],
        detectable=saved(smallest_detectable(log_ratio)),
        each=tuple(saved(mean) for mean in differences.mean(axis=1)),
    )


def _transform(interval: Interval, function) -> Interval:
    return Interval(*(float(function(value)) for value in (interval.mean, interval.low, interval.high)))


def _bounded_interval(values: np.ndarray, draws: int) -> Interval:
    interval = bootstrap_interval(values, draws=draws)
    if values.min() >= 0 and values.max() <= 1:  # a share: Student's t knows no bounds
        return Interval(interval.mean, max(interval.low, 0.0), min(interval.high, 1.0))
    return interval


def _judge_worth(claim: Claim, arms: Arms, sizes: Sequence[int], draws: int) -> Finding:
    """By learning curves: the control's size that does what ours does at 248 rows, over 248."""
    if len(sizes) < 3 or SEEDS_ROWS not in sizes:
        raise _CantTell(f"needs learning curves of three sizes or more, {SEEDS_ROWS} rows among them")
    ours, control = _learning_curves(claim, arms, sizes)
    worths = [samples_worth(sizes, ours, control, at=size, draws=min(draws, 500)) for size in sizes]
    effect = worths[list(sizes).index(SEEDS_ROWS)]
    most = sizes[-1] / SEEDS_ROWS
    at_least = effect.mean > 0.99 * most
    verdict = decide(effect, size=claim.size, nothing=1.0)
    if verdict == "fails" and effect.high > 0.99 * most:
        verdict = UNKNOWN  # the curve ends before the claim does
    told = ", ".join(
        f"at {size} rows {_times(worth.mean, sizes[0] / size, sizes[-1] / size)}"
        for size, worth in zip(sizes, worths, strict=True)
    )
    return Finding(
        claim,
        verdict,
        effect,
        repeats=ours.shape[1],
        items=ours.shape[2],
        note=f"a sample of ours is worth, {told}",
        at_least=at_least,
    )


def _learning_curves(claim: Claim, arms: Arms, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ours, control), each (size, training, item), of the trainings that every size has."""
    names = [(f"{claim.ours} {size} rows", f"{claim.control} {size} rows") for size in sizes[:-1]]
    names.append((claim.ours, claim.control))  # trained on all rows
    seeds = set.intersection(*(set(arms.get(arm, ())) for pair in names for arm in pair))
    pairs = []
    for ours, control in names:
        shared = {arm: {seed: arms[arm][seed] for seed in seeds} for arm in (ours, control) if seeds}
        columns = next(iter(shared[ours].values())) if shared else {}
        every_item = np.ones(len(columns.get(claim.column, ())), dtype=bool)
        pairs.append(_pair_arms(replace(claim, ours=ours, control=control), shared, every_item))
    return np.stack([pair.ours for pair in pairs]), np.stack([pair.control for pair in pairs])


def _times(worth: float, least: float, most: float) -> str:
    """The worth, marked where the learning curve ends."""
    if worth >= most * 0.999:
        return f"≥ {worth:.2g} x"
    return f"≤ {worth:.2g} x" if worth <= least * 1.001 else f"{worth:.2g} x"


# --- other recipes ------------------------------------------------------------------------------------------
def compare_recipes(arms: Arms, items: Items, *, control: str = "SFT", ratio: float = WORST) -> list[Finding]:
    """What every other arm gains on scrambled order-free items, and what it costs on clean order-bound ones.

    Of all items where nobody marked them. Keys: "<arm> gain" and "<arm> price"; nothing without checkable answers.
    """
    if not items.checkable:
        return []
    findings = []
    for arm in arms:
        if arm == control or arm.endswith(" rows"):
            continue
        for key, at, order in (("gain", ratio, "free"), ("price", 0.0, "bound")):
            among = order if items.among(order).any() else "all"
            prompts = f"{'scrambled' if at else 'clean'} {'' if among == 'all' else f'order-{among} '}prompts"
            measure = f"{prompts}: accuracy"
            claim = Claim(f"{arm} {key}", arm, "", measure, f"correct@{at:g}", among, arm, control, checkable=True)
            findings.append(judge(claim, arms, items))
    return findings
