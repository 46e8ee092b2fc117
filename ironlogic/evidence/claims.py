"""What the seeds claim, each as a rule written down before anything is measured, and the verdict it comes to.

A `Claim` names what was said, the column that measures it (`behaviour.measure_all`), the arm, its control, and the
smallest effect for which it counts. `judge` compares the two arms item by item and training by training. Knows no
model: it reads columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ironlogic.evidence.items import WORST, Columns, Items
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

__all__ = ["CLAIMS", "MARGIN", "VERDICTS", "Arms", "Claim", "Finding", "compare_recipes", "find_all", "judge"]

Verdict = Literal["holds", "holds in part", "fails", "can't be told here"]
VERDICTS: tuple[Verdict, ...] = ("holds", "holds in part", "fails", "can't be told here")
Arms = Mapping[str, Mapping[int, Columns]]  # arm -> training seed -> columns; an untrained model has the one seed 0

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

    effect = `sign` x (ours - control), in the claimed direction. The verdict follows from its 95 % interval alone:
    wholly at `size` or above: holds; wholly above no effect (a saving: above MARGIN): holds in part; wholly below
    `size`: fails; else it can't be told. `harmless` claims are about no loss: they hold when a loss of MARGIN is
    ruled out (90 % interval: one of the two one-sided tests of equivalence; a gain does no harm), never in part.
    A claim of the form "worth" is judged at the seeds' 248 rows.
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
    harmless: bool = False
    form: Literal["difference", "saved", "worth"] = "difference"  # saved: 1 - ours/control; worth: samples a sample
    checkable: bool = False  # needs answers that are right or wrong


def _clean(key: str, said: str, source: str, among: str, **more) -> Claim:
    measure = f"accuracy on clean {'' if among == 'all' else f'order-{among} '}prompts"
    return Claim(
        key, said, source, measure, "correct@0", among, size=-MARGIN, harmless=True, checkable=True, **more
    )


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
        harmless=True,
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
    Claim("sharper", "sharper confidence", "000, 001", "probability of its own whole reply", "sure"),
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
    Claim("loops", "admitted: repeats itself in loops", "000, 001", "replies that loop", "loop@0"),
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


def decide(effect: Interval, *, size: float, nothing: float = 0.0) -> Verdict:
    """The rule: see `Claim`.

    >>> decide(Interval(0.1, 0.05, 0.15), size=0.03), decide(Interval(0.0, -0.02, 0.02), size=0.03)
    ('holds', 'fails')
    """
    if effect.low >= size:
        return "holds"
    if effect.low > nothing:
        return "holds in part"
    return "fails" if effect.high < size else "can't be told here"


def _stacked(arms: Arms, arm: str, seeds: Sequence[int], column: str) -> np.ndarray:
    mine = arms[arm]
    return np.stack([mine[seed if seed in mine else 0][column] for seed in seeds])


def _paired(claim: Claim, arms: Arms, among: np.ndarray) -> tuple[np.ndarray, np.ndarray] | str:
    """(ours, control), each (repeat, item), same trainings and items; or why there is no such pair."""
    seeds = []
    for arm, name in ((claim.ours, claim.column), (claim.control, claim.control_column or claim.column)):
        if not arms.get(arm):
            return f"there is no run of {arm}"
        seeds.append({seed for seed, columns in arms[arm].items() if name in columns})
        if not seeds[-1]:
            return f"{claim.measure}: not measured for {arm}"
    ours, theirs = seeds
    shared = sorted(ours if theirs == {0} else theirs if ours == {0} else ours & theirs)
    if not shared:
        return f"{claim.ours} and {claim.control} share no training seed"
    a = _stacked(arms, claim.ours, shared, claim.column)
    b = _stacked(arms, claim.control, shared, claim.control_column or claim.column)
    good = among & np.isfinite(a).all(axis=0) & np.isfinite(b).all(axis=0)
    if good.sum() < FEWEST:
        return f"{good.sum()} items of the sort it is about ({claim.among}); {FEWEST} or more are needed"
    return a[:, good], b[:, good]


def judge(claim: Claim, arms: Arms, items: Items, *, sizes: Sequence[int] = (), draws: int = 2000) -> Finding:
    """The finding on one claim. `sizes`: rows of the learning curves, for claims of the form "worth"."""

    def unknown(why: str) -> Finding:
        return Finding(claim, "can't be told here", note=why)

    if claim.checkable and not items.checkable:
        return unknown("needs items whose answers can be checked")
    if claim.form == "worth":
        return _judge_worth(claim, arms, sizes, draws)
    among, note = items.among(claim.among), ""
    marks = [task.order != "unknown" if claim.among == "free" else task.hard is not None for task in items.tasks]
    if claim.among in ("free", "easy") and not any(marks):  # nobody marked the items: what can be said of all
        among, note = items.among("all"), f"items are not marked {claim.among}: all of them"
        claim = replace(claim, measure=claim.measure.replace(", order-free", "").replace("order-free ", ""))
    pair = _paired(claim, arms, among)
    if isinstance(pair, str):
        return unknown(pair)
    ours, control = pair
    known = [
        c["correct@0"][among] for arm in (claim.ours, claim.control) for c in arms[arm].values() if "correct@0" in c
    ]
    best = max((float(right.mean()) for right in known), default=1.0)
    if claim.checkable and best < ABLE:
        return unknown(f"at most {best:.0%} of clean prompts answered right: does a reply end in `Answer: ...`?")
    level = 0.90 if claim.harmless else 0.95
    effect = bootstrap_interval(claim.sign * (ours - control), level=level, draws=draws)
    detectable = smallest_detectable(effect, level=level)
    each = claim.sign * (ours - control).mean(axis=1)
    if claim.form == "saved":
        effect, each, detectable = _saved(effect), 1 - np.exp(-each), 1 - float(np.exp(-detectable))
    verdict = decide(
        effect, size=claim.size, nothing=np.inf if claim.harmless else MARGIN if claim.form == "saved" else 0.0
    )
    length = np.mean(
        [columns["tokens@0"].mean() for columns in arms[claim.ours].values() if "tokens@0" in columns] or 0
    )
    if claim.key == "loops" and length < LONG_ENOUGH:
        verdict, note = "can't be told here", f"answers have {length:.0f} tokens on average: no room to loop"
    if claim.column == "sure" and max(ours.mean(), control.mean()) < MARGIN:
        verdict, note = "can't be told here", "replies are so long that no whole one is probable, in either arm"
    if len(ours) == 1:
        alone = "one training: the interval is over items alone, and another training would differ by more"
        note = "; ".join(filter(None, [note, alone]))
    return Finding(
        claim,
        verdict,
        effect,
        _shown(claim, ours, draws),
        _shown(claim, control, draws),
        len(ours),
        ours.shape[1],
        detectable,
        tuple(each.tolist()),
        claim.form == "difference" and equivalent(ours, control, margin=MARGIN, draws=draws),
        paired_test(ours[0], control[0]) if np.isin(np.stack([ours, control]), (0, 1)).all() else None,
        note,
    )


def _saved(effect: Interval) -> Interval:
    """-ln(ours / control) as the share saved, 1 - ours / control."""
    return Interval(*(float(1 - np.exp(-value)) for value in (effect.mean, effect.low, effect.high)))


def _shown(claim: Claim, values: np.ndarray, draws: int) -> Interval:
    found = bootstrap_interval(values, draws=draws)
    if claim.form == "saved":  # logarithms: the geometric mean
        return Interval(*(float(np.exp(value)) for value in (found.mean, found.low, found.high)))
    if values.min() >= 0 and values.max() <= 1:  # a share: Student's t knows no bounds
        return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))
    return found


def _judge_worth(claim: Claim, arms: Arms, sizes: Sequence[int], draws: int) -> Finding:
    """By learning curves: the control's size that does what ours does at 248 rows, over 248."""
    if len(sizes) < 3 or SEEDS_ROWS not in sizes:
        note = f"needs learning curves of three sizes or more, {SEEDS_ROWS} rows among them"
        return Finding(claim, "can't be told here", note=note)
    curve = {size: (f"{claim.ours} {size} rows", f"{claim.control} {size} rows") for size in sizes[:-1]}
    curve[sizes[-1]] = (claim.ours, claim.control)
    seeds = set.intersection(*(set(arms.get(arm, ())) for names in curve.values() for arm in names))
    pairs = []
    for ours, control in curve.values():
        few = {arm: {seed: arms[arm][seed] for seed in seeds} for arm in (ours, control) if seeds}
        columns = next(iter(few[ours].values())) if few else {}
        everyone = np.ones(len(columns.get(claim.column, ())), dtype=bool)
        pair = _paired(replace(claim, ours=ours, control=control), few, everyone)
        if isinstance(pair, str):
            return Finding(claim, "can't be told here", note=pair)
        pairs.append(pair)
    ours, control = (np.stack([pair[k] for pair in pairs]) for k in (0, 1))
    found = [samples_worth(sizes, ours, control, at=size, draws=min(draws, 500)) for size in sizes]
    told = [f"at {s} rows {_times(w, sizes[0] / s, sizes[-1] / s)}" for s, w in zip(sizes, found, strict=True)]
    effect = found[list(sizes).index(SEEDS_ROWS)]
    verdict = decide(effect, size=claim.size, nothing=1.0)
    end = 0.99 * sizes[-1] / SEEDS_ROWS
    if verdict == "fails" and effect.high > end:
        verdict = "can't be told here"  # the curve ends before the claim does
    shape, note = ours.shape, f"a sample of ours is worth, {', '.join(told)}"
    return Finding(claim, verdict, effect, repeats=shape[1], items=shape[2], note=note, at_least=effect.mean > end)


def _times(worth: Interval, least: float, most: float) -> str:
    sign = "≥ " if worth.mean >= most * 0.999 else "≤ " if worth.mean <= least * 1.001 else ""
    return f"{sign}{worth.mean:.2g} x"


def find_all(
    arms: Arms,
    items: Items,
    *,
    claims: Sequence[Claim] = CLAIMS,
    names: Mapping[str, str] | None = None,
    sizes: Sequence[int] = (),
    draws: int = 2000,
) -> list[Finding]:
    """A finding for every claim. `names` puts other arms in place of FT and SFT: {"FT": "yours", "SFT": "base"}."""
    named = names or {}
    renamed = [replace(c, ours=named.get(c.ours, c.ours), control=named.get(c.control, c.control)) for c in claims]
    findings = [judge(claim, arms, items, sizes=sizes, draws=draws) for claim in renamed]
    tested = [i for i, finding in enumerate(findings) if finding.p is not None]
    for i, p in zip(tested, holm([findings[i].p for i in tested]), strict=True):
        findings[i] = replace(findings[i], p=p)
    return findings


def compare_recipes(arms: Arms, items: Items, *, control: str = "SFT", ratio: float = WORST) -> list[Finding]:
    """What every other arm gains on scrambled order-free items, and what it costs on clean order-bound ones.

    Of all items where nobody marked them. Keys: "<arm> gain" and "<arm> price"; nothing without checkable answers.
    """
    cells = [("gain", ratio, "free"), ("price", 0.0, "bound")] if items.checkable else []
    found = []
    for arm in arms:
        for key, at, order in cells if arm != control and not arm.endswith(" rows") else ():
            among = order if items.among(order).any() else "all"
            measure = (
                f"{'scrambled' if at else 'clean'} {'' if among == 'all' else f'order-{among} '}prompts: accuracy"
            )
            claim = Claim(f"{arm} {key}", arm, "", measure, f"correct@{at:g}", among, arm, control, checkable=True)
            found.append(judge(claim, arms, items))
    return found
