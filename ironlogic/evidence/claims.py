"""What the seeds claim, each as a rule written down before anything is measured, and the verdict it comes to.

A `Claim` names what was said, the column that measures it (`measures.measure`), the arm, its control, and the
smallest effect for which it counts. `judge_claims` compares the two arms item by item and training by training; for
each form of claim there is one function. Knows no model: it reads columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ironlogic.evidence.items import WORST, Items
from ironlogic.evidence.results import Arms, of_seed, paired_seeds
from ironlogic.evidence.statistics import (
    Interval,
    holm,
    mean_interval,
    p_value,
    samples_worth,
    share_interval,
    smallest_detectable,
)

import numpy as np
import pandas as pd

__all__ = ["CLAIMS", "MARGIN", "VERDICTS", "Claim", "Finding", "Findings", "compare_recipes", "judge_claims"]

Verdict = Literal[
    "holds", "holds in part", "fails", "can't be told here", "no room to tell", "one training: not judged"
]
VERDICTS: tuple[Verdict, ...] = Verdict.__args__
UNKNOWN, NO_ROOM, ONE_TRAINING = VERDICTS[3:]
Form = Literal["gain", "no harm", "saved", "worth"]

MARGIN = 0.03  # what matters of an accuracy or a share, and what "no harm" may cost
FASTER = 0.25  # of "about 30 % faster": the share of time that has to be saved
WORTH = 50.0  # of "1 FT sample = 100 SFT samples"
EMERGES = 0.20  # how much oftener it has to think than its control, to say that the method taught it
SILENT = 0.20  # how many more of the early layers have to be silent
PARALLEL = 0.10  # nats that the late layers have to stay less decided
REROUTED = 0.01  # nats (Jensen-Shannon) that the routing has to move further than the control's
SEEDS_ROWS = 248  # the size of the seeds' dataset
LONG_ENOUGH = 64  # tokens an answer on average: shorter ones have no room to loop
FEWEST = 8  # items
ABLE = 0.20  # how much oftener a clean prompt has to be answered right than one with its words replaced


@dataclass(frozen=True)
class Claim:
    """One sentence of the seeds, and when it counts as true.

    The effect is in the claimed direction, and the verdict follows from its 95 % interval alone (`decide`). Forms:

    * gain: effect = `sign` x (ours - control). Holds if its interval lies wholly at `size` or above, in part if it
      lies wholly above 0.
    * no harm: the same effect. Holds if a loss of -`size` is ruled out (a gain does no harm), never in part.
    * saved: effect = 1 - ours / control, of columns that are logarithms. In part if wholly above MARGIN.
    * worth: effect = samples of the control that one of ours is worth, at the seeds' 248 rows. In part above 1.

    Before that comes the room: a claim that could not hold or could not fail with these arms is "no room to tell".
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
    share: bool = False  # of items: cannot pass 1
    least_tokens: int = 0  # an answer has to be that long on average, or nothing can be seen


def _clean(key: str, said: str, source: str, among: str, **more) -> Claim:
    measure = f"accuracy on clean {'' if among == 'all' else f'order-{among} '}prompts"
    options = {"size": -MARGIN, "form": "no harm", "checkable": True, "share": True} | more
    return Claim(key, said, source, measure, "correct@0", among, **options)


def _scrambled(key: str, said: str, among: str, **more) -> Claim:
    measure, column = f"accuracy at ratio {WORST}, order-{among}", f"correct@{WORST}"
    return Claim(key, said, "000, 001", measure, column, among, checkable=True, share=True, **more)


def _faster(key: str, measure: str, column: str, **more) -> Claim:
    said = "about 30 % faster on tasks without thinking"
    return Claim(key, said, "000, 002", measure, column, "easy", sign=-1, size=FASTER, form="saved", **more)


def _layers(key: str, said: str, measure: str, column: str, **more) -> Claim:
    return Claim(key, said, "002", measure, column, **more)


_ROBUST = "robust to noise: reads scrambled input"
_SHARPER = "sharper confidence"
_POLISHED = {"ours": "FT then SFT", "control": "SFT then SFT"}
_SEEDS_SIZE = {"ours": f"FT {SEEDS_ROWS} rows", "control": f"SFT {SEEDS_ROWS} rows"}

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
    Claim(
        "worth",
        "1 FT sample is worth about 100 SFT samples",
        "000, 001",
        f"accuracy on clean prompts, {SEEDS_ROWS} rows",
        "correct@0",
        size=WORTH,
        form="worth",
        checkable=True,
    ),
    Claim(
        "emerges",
        f"{SEEDS_ROWS} rows make it think by itself",
        "000, 001",
        f"share of hard problems it thinks on, {SEEDS_ROWS} rows",
        "think@0",
        "hard",
        size=EMERGES,
        share=True,
        **_SEEDS_SIZE,
    ),
    Claim(
        "modes",
        "switches modes by itself: fast or slow",
        "001",
        "share of items in the right mode",
        "mode@0",
        share=True,
    ),
    Claim(
        "sharper",
        _SHARPER,
        "000, 001, 002",
        "probability of its next token, against the base",
        "sure",
        control="base",
    ),
    Claim("sharper-twin", _SHARPER, "000, 001, 002", "probability of its next token", "sure"),
    _faster("faster-token", "seconds a token, weights merged, against the base", "ln seconds", control="base"),
    _faster("faster-length", "tokens an answer", "ln tokens"),
    _layers(
        "silence",
        '"Deep Silence" in the first 80 % of the layers',
        "share of those layers without a favourite (entropy above .92 of the most)",
        "silent layers",
        size=SILENT,
        share=True,
    ),
    _layers(
        "parallel",
        "keeps several readings alive until the end",
        "entropy of the last fifth of the layers (nats)",
        "late entropy",
        size=PARALLEL,
    ),
    _layers(
        "attention",
        "attention stays as it was",
        "shift of the last layer's attention against the base, no further than by plain SFT",
        "attention shift",
        sign=-1,
        size=-MARGIN,
        form="no harm",
    ),
    _layers(
        "routing",
        "experts are asked anew",
        "shift of the routing against the base (nats)",
        "routing shift",
        size=REROUTED,
    ),
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
    kinds: int = 0  # of items, if the interval is over kinds
    detectable: float = float("nan")  # the smallest effect that such data would have shown in 4 cases of 5
    each: tuple[float, ...] = ()  # effect of each training
    p: float | None = None  # of no effect (no harm: of a loss of -`size`), by the interval's own test, after Holm
    note: str = ""
    at_least: bool = False  # the learning curve ends before the effect does

    @property
    def power(self) -> str:
        """Beside what can't be told: the effect that would have been seen, or the loss that is ruled out."""
        if self.verdict != UNKNOWN or not math.isfinite(self.detectable):
            return ""
        if self.claim.form == "no harm":
            return f"a loss of {-self.effect.low:.3f} is ruled out"
        shown = f"{self.detectable:.1%}" if self.claim.form == "saved" else f"{self.detectable:.3f}"
        return f"an effect of {shown} would have shown"


@dataclass(frozen=True, eq=False)
class Findings:
    """A finding for every claim, and what they were judged by. Prints as a table; `show.report` makes the page."""

    rows: tuple[Finding, ...]
    arms: Arms = field(repr=False)
    items: Items = field(repr=False)
    sizes: tuple[int, ...] = ()  # rows of the learning curves
    control: str = "SFT"  # the arm in the place of the control twin
    note: str = ""  # why there are no findings

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: str) -> Finding:
        """The finding on the claim of that key."""
        return next(finding for finding in self.rows if finding.claim.key == key)

    def table(self) -> pd.DataFrame:
        """A row a claim: what was said, what was measured, effect with its interval, verdict and power."""
        lines = [
            {
                "said": finding.claim.said,
                "measured": finding.claim.measure,
                "effect": finding.note if finding.effect is None else f"{finding.effect:+}",
                "verdict": f"{finding.verdict} ({finding.power})" if finding.power else finding.verdict,
            }
            for finding in self.rows
        ]
        return pd.DataFrame(lines, index=[finding.claim.key for finding in self.rows])

    def __str__(self) -> str:
        return self.note or self.table().to_string()


def judge_claims(
    arms: Arms,
    items: Items,
    *,
    claims: Sequence[Claim] = CLAIMS,
    names: Mapping[str, str] | None = None,
    sizes: Sequence[int] = (),
) -> Findings:
    """A finding for every claim. `sizes`: rows of the learning curves, for claims of the form "worth".

    `names` puts other arms in the place of FT and SFT: {"FT": "yours", "SFT": "control"}; claims about arms that
    are not there are then left out. Without a control there are no findings, and `note` says why.
    """
    names = dict(names or {})
    control = names.get("SFT", "SFT")
    if control == "base" or not arms.get(control):
        return Findings((), arms, items, control=control, note=_NO_CONTROL)
    named = [replace(c, ours=names.get(c.ours, c.ours), control=names.get(c.control, c.control)) for c in claims]
    named = [claim for claim in named if _can_be_filled(claim, arms, own=bool(names))]
    findings = [judge(claim, arms, items, sizes=sizes) for claim in named]
    tested = [i for i, finding in enumerate(findings) if finding.p is not None]
    for i, p in zip(tested, holm([findings[i].p for i in tested]), strict=True):
        findings[i] = replace(findings[i], p=p)
    return Findings(tuple(findings), arms, items, tuple(sizes), control)


_NO_CONTROL = (
    "There is no control: an adapter trained on the same rows without a burden. Against the base model alone, what "
    "any training teaches (the form of an answer above all) would be credited to the burden, so no claim is judged."
)


def _can_be_filled(claim: Claim, arms: Arms, *, own: bool) -> bool:
    """Whether the row makes sense at all: routing only with experts, of own adapters only arms that are there."""
    columns = {name for trainings in arms.values() for columns in trainings.values() for name in columns}
    if claim.column == "routing shift":
        return claim.column in columns
    return not own or (claim.form != "worth" and bool(arms.get(claim.ours)) and bool(arms.get(claim.control)))


def judge(claim: Claim, arms: Arms, items: Items, *, sizes: Sequence[int] = ()) -> Finding:
    """The finding on one claim."""
    try:
        if claim.checkable and not items.checkable:
            raise _CantTell("needs items whose answers can be checked")
        if claim.form == "worth":
            return _judge_worth(claim, arms, items, sizes)
        claim, among, note = _choose_items(claim, items)
        pair = _pair_arms(claim, arms, items, among)
    except _CantTell as reason:
        return Finding(claim, UNKNOWN, note=str(reason))
    finding = (_judge_saved if claim.form == "saved" else _judge_difference)(claim, pair)
    reasons = [note]
    if no_room := _no_room(claim, arms, items, pair, finding.effect):
        finding = replace(finding, verdict=NO_ROOM, p=None)
        reasons.append(no_room)
    elif finding.repeats == 1:
        reasons.append(_spread_needed(finding))
        finding = replace(finding, verdict=ONE_TRAINING, p=None)
    return replace(finding, note="; ".join(filter(None, reasons)))


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
    among: np.ndarray  # which of all items those are
    kinds: np.ndarray | None  # of shape (item,); None: too few kinds, the interval is over items


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


def _pair_arms(claim: Claim, arms: Arms, items: Items, among: np.ndarray) -> _Pair:
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
        sort = "" if claim.among == "all" else f" of the sort it is about ({claim.among})"
        raise _CantTell(f"measured on {known.sum()} items{sort}; {FEWEST} or more are needed")
    return _Pair(ours[:, known], control[:, known], known, items.kinds(known))


def _no_room(claim: Claim, arms: Arms, items: Items, pair: _Pair, effect: Interval) -> str:
    """Why such an effect could not be seen in these arms, whatever is true; "" if it could."""
    lengths = [columns["tokens@0"].mean() for columns in arms[claim.ours].values() if "tokens@0" in columns]
    length = np.mean(lengths) if lengths else 0.0
    if length < claim.least_tokens:
        return f"answers have {length:.0f} tokens on average: too short to loop"
    if claim.checkable:
        right = max(_mean(arms[arm], "correct@0", pair.among) for arm in (claim.ours, claim.control))
        floor = max(_mean(arms[arm], "correct substituted", pair.among) for arm in (claim.ours, claim.control))
        if right - floor < ABLE:
            return (
                f"{right:.0%} of clean prompts are answered right, {floor:.0%} with words replaced: too little to "
                "lose or to gain. Does a reply end in `Answer: ...`?"
            )
    if claim.share and claim.form == "gain" and effect.high >= 0:
        ratio = claim.column.partition("@")[2]
        most = _mean(arms[claim.ours], f"ceiling@{ratio}", pair.among, missing=1.0) if claim.checkable else 1.0
        most = 1.0 if math.isnan(most) else most
        if pair.control.mean() + claim.size > most:
            return f"the control is at {pair.control.mean():.3f}, of at most {most:.3f}"
    return ""


def _mean(trainings: Mapping[int, dict], column: str, among: np.ndarray, *, missing: float = 0.0) -> float:
    values = [columns[column][among] for columns in trainings.values() if column in columns]
    return float(np.mean(values)) if values else missing


def _spread_needed(finding: Finding) -> str:
    """How alike two trainings of one recipe would have to be for the interval over items alone to decide."""
    effect, claim = finding.effect, finding.claim
    alone = "one training an arm, and another would differ"
    by_items = decide(effect, size=claim.size, nothing=math.inf if claim.form == "no harm" else 0.0)
    if claim.form == "saved" or by_items == UNKNOWN:
        return alone
    border = 0.0 if by_items == "holds in part" else claim.size
    error = (effect.high - effect.low) / 2 / 1.96
    room = ((effect.mean - border) / 1.96) ** 2 - error**2
    spread = math.sqrt(max(room, 0.0) / 2)  # both arms are one training each
    return f"{alone}: for {by_items!r} trainings of one recipe would have to differ by less than {spread:.3f} (SD)"


# --- the forms of claim -------------------------------------------------------------------------------------
def _judge_difference(claim: Claim, pair: _Pair) -> Finding:
    """Of a gain, or of no harm."""
    differences = claim.sign * (pair.ours - pair.control)
    effect = mean_interval(differences, pair.kinds)
    return Finding(
        claim,
        decide(effect, size=claim.size, nothing=math.inf if claim.form == "no harm" else 0.0),
        effect,
        ours=_level(pair.ours, pair.kinds),
        control=_level(pair.control, pair.kinds),
        detectable=smallest_detectable(effect),
        each=tuple(differences.mean(axis=1).tolist()),
        **_counts(claim, differences, pair),
    )


def _counts(claim: Claim, differences: np.ndarray, pair: _Pair) -> dict:
    nothing = claim.size if claim.form == "no harm" else 0.0
    return {
        "repeats": differences.shape[0],
        "items": differences.shape[1],
        "kinds": 0 if pair.kinds is None else len(set(pair.kinds)),
        "p": p_value(differences, pair.kinds, nothing=nothing),
    }


def _judge_saved(claim: Claim, pair: _Pair) -> Finding:
    """Of logarithms: a difference is a ratio, a mean the geometric one."""

    def saved(log_ratio: float) -> float:
        """The share saved, 1 - ours / control, of -ln(ours / control)."""
        return float(1 - np.exp(-log_ratio))

    differences = claim.sign * (pair.ours - pair.control)
    log_ratio = mean_interval(differences, pair.kinds)
    effect = _transform(log_ratio, saved)
    return Finding(
        claim,
        decide(effect, size=claim.size, nothing=MARGIN),
        effect,
        ours=_transform(mean_interval(pair.ours, pair.kinds), np.exp),
        control=_transform(mean_interval(pair.control, pair.kinds), np.exp),
        detectable=saved(smallest_detectable(log_ratio)),
        each=tuple(saved(mean) for mean in differences.mean(axis=1)),
        **_counts(claim, differences, pair),
    )


def _transform(interval: Interval, function) -> Interval:
    return Interval(*(float(function(value)) for value in (interval.mean, interval.low, interval.high)))


def _level(values: np.ndarray, kinds: np.ndarray | None) -> Interval:
    is_share = values.min() >= 0 and values.max() <= 1
    return (share_interval if is_share else mean_interval)(values, kinds)


def _judge_worth(claim: Claim, arms: Arms, items: Items, sizes: Sequence[int]) -> Finding:
    """By the control's learning curve: the size that is as accurate as ours at 248 rows, over 248."""
    if len(sizes) < 3 or SEEDS_ROWS not in sizes:
        raise _CantTell(f"needs learning curves of three sizes or more, {SEEDS_ROWS} rows among them")
    ours = f"{claim.ours} {SEEDS_ROWS} rows"
    everything = items.among("all")
    pairs = []
    for size in sizes:
        at_size = replace(claim, ours=ours, control=f"{claim.control} {size} rows")
        pairs.append(_pair_arms(at_size, arms, items, everything))
    curve = np.stack([pair.control for pair in pairs])
    effect = samples_worth(sizes, pairs[0].ours, curve, at=SEEDS_ROWS, kinds=pairs[0].kinds)
    finding = Finding(
        claim,
        decide(effect, size=claim.size, nothing=1.0),
        effect,
        ours=_level(pairs[0].ours, pairs[0].kinds),
        repeats=curve.shape[1],
        items=curve.shape[2],
        kinds=0 if pairs[0].kinds is None else len(set(pairs[0].kinds)),
        at_least=effect.mean > 0.99 * sizes[-1] / SEEDS_ROWS,
        note=f"{claim.control} by rows: "
        + ", ".join(f"{size:,}: {level:.3f}" for size, level in zip(sizes, curve.mean(axis=(1, 2)), strict=True)),
    )
    rise = float(curve[-1].mean() - curve[0].mean())
    if rise < MARGIN:
        told = f"{finding.note}; from {sizes[0]:,} to {sizes[-1]:,} rows the control rises by {rise:.3f} only"
        return replace(finding, verdict=NO_ROOM, note=told)
    if finding.repeats == 1:
        return replace(finding, verdict=ONE_TRAINING)
    if finding.verdict == "fails" and effect.high > 0.99 * sizes[-1] / SEEDS_ROWS:
        return replace(finding, verdict=UNKNOWN)  # the curve ends before the claim does
    return finding


# --- other recipes ------------------------------------------------------------------------------------------
def compare_recipes(arms: Arms, items: Items, *, control: str = "SFT", ratio: float = WORST) -> list[Finding]:
    """What every other arm gains on scrambled order-free items, and what it costs on clean order-bound ones.

    Of all items where nobody marked them. Keys: "<arm> gain" and "<arm> price"; nothing without checkable answers
    or without the control.
    """
    if not items.checkable or control == "base" or not arms.get(control):
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
