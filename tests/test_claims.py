"""Rules and verdicts: swapped labels swap them, one recipe against itself shows nothing, and no row is invented."""

from dataclasses import replace

from ironlogic.evidence.claims import CLAIMS, MARGIN, VERDICTS, Claim, compare_recipes, decide, judge, judge_claims
from ironlogic.evidence.items import items_of_chats, made_items
from ironlogic.evidence.statistics import Interval

import numpy as np
import pytest

ITEMS = made_items(170, seed=1)
ACCURACY = Claim("a", "said", "000", "accuracy", "correct@0.7", "free", checkable=True)


def arm(rate: float, *, seeds=5, spread=0.0, column="correct@0.7", at=0, items=170) -> dict:
    """Trainings of one recipe: items right at `rate`, each training off by a normal draw of `spread`."""
    rng = np.random.default_rng(at % 2**32)
    rates = np.clip(rate + rng.normal(0, spread, seeds), 0, 1)
    return {seed: {column: (rng.random(items) < r).astype(float)} for seed, r in enumerate(rates)}


def test_the_rule():
    for low, high, verdict in (
        (0.05, 0.2, "holds"),
        (0.01, 0.2, "holds in part"),
        (0.01, 0.02, "holds in part"),
        (-0.1, 0.02, "fails"),
        (-0.3, -0.1, "fails"),
        (-0.1, 0.1, "can't be told here"),
    ):
        assert decide(Interval((low + high) / 2, low, high), size=MARGIN) == verdict


def test_no_harm_needs_a_loss_ruled_out_and_is_never_in_part():
    claim = replace(ACCURACY, size=-MARGIN, form="no harm")
    equal = {0: {"correct@0.7": np.ones(170)}}
    assert judge(claim, {"FT": equal, "SFT": equal}, ITEMS).verdict == "holds"
    assert judge(claim, {"FT": equal, "SFT": equal}, ITEMS).same
    assert judge(claim, {"FT": arm(0.5, at=1), "SFT": arm(0.9)}, ITEMS).verdict == "fails"
    wide = {"FT": arm(0.78, seeds=2, spread=0.1, at=3), "SFT": arm(0.8, seeds=2, spread=0.1)}
    assert judge(claim, wide, ITEMS).verdict == "can't be told here"
    assert not judge(claim, wide, ITEMS).same


@pytest.mark.slow
def test_swapped_labels_swap_the_verdicts():
    """Arms that differ in every column: what holds fails the other way round, and the effect changes its sign."""
    better, worse = arm(0.8, at=1), arm(0.5, at=2)
    for column in ("sure", "mode@0", "bleed excess", "correct@0"):
        for some, rate, at in ((better, 0.9, 3), (worse, 0.4, 4)):
            for seed, columns in arm(rate, column=column, at=at).items():
                some[seed] |= columns
    claims = [c for c in CLAIMS if (c.ours, c.control) == ("FT", "SFT") and c.column in better[0]]
    assert {c.form for c in claims} == {"gain", "no harm"}
    one = judge_claims({"FT": better, "SFT": worse}, ITEMS, claims=claims)
    other = judge_claims({"FT": worse, "SFT": better}, ITEMS, claims=claims)
    assert [f.verdict for f in one] == ["holds"] * len(claims)
    assert [f.verdict for f in other] == ["fails"] * len(claims)
    for a, b in zip(one, other, strict=True):
        assert a.effect.mean == pytest.approx(-b.effect.mean)
        assert (a.effect.low, a.effect.high) == pytest.approx((-b.effect.high, -b.effect.low))
        assert a.ours == b.control
        assert a.p == pytest.approx(b.p)


@pytest.mark.slow
def test_one_recipe_against_itself_is_no_difference():
    """200 pairs of arms by one noisy recipe: the share of verdicts that see something is what 95 % allows."""
    seen = 0
    for k in range(200):
        arms = {"FT": arm(0.6, spread=0.05, at=2 * k), "SFT": arm(0.6, spread=0.05, at=2 * k + 1)}
        finding = judge(ACCURACY, arms, ITEMS, draws=300)
        seen += not finding.effect.low <= 0 <= finding.effect.high
    assert seen <= 16  # 10 expected at most; 16 is two standard deviations above


@pytest.mark.slow
def test_an_effect_of_the_size_called_detectable_is_found_and_a_third_of_it_is_not():
    least = np.mean(
        [
            judge(ACCURACY, {"FT": arm(0.6, at=k), "SFT": arm(0.6, at=-k)}, ITEMS, draws=300).detectable
            for k in range(1, 9)
        ]
    )

    def found(effect: float) -> float:
        pairs = [{"FT": arm(0.6 + effect, at=3 * k + 50), "SFT": arm(0.6, at=3 * k + 51)} for k in range(40)]
        return np.mean([judge(ACCURACY, arms, ITEMS, draws=300).effect.low > 0 for arms in pairs])

    assert found(least) >= 0.8
    assert found(least / 3) <= 0.6


def test_without_checkable_answers_each_row_says_so_or_is_measured():
    chats = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "r"}] for i in range(40)]
    items, arms = items_of_chats(chats), {}
    for at, name in enumerate(("FT", "SFT")):
        arms[name] = arm(0.5 + 0.4 * at, column="sure", at=at, items=40)
        for columns in arms[name].values():
            columns |= {"bleed excess": np.zeros(40), "ln tokens": np.full(40, 2.0), "tokens@0": np.full(40, 200.0)}
            columns |= {"loop@0": np.zeros(40), "mode@0": np.full(40, np.nan)}
    found = judge_claims(arms, items)
    for claim in CLAIMS:
        if claim.checkable:
            assert found[claim.key].verdict == "can't be told here"
            assert "answers can be checked" in found[claim.key].note
    assert found["sharper"].verdict == "fails"
    assert found["bleeds"].verdict == "fails"  # no reply of 5 x 40 had a foreign word
    assert found["loops"].verdict == "fails"
    assert found["faster-length"].verdict == "fails"
    assert "all of them" in found["faster-length"].note
    assert "0 items" in found["modes"].note


def test_short_answers_cannot_loop():
    arms = {"FT": arm(0.0, column="loop@0"), "SFT": arm(0.0, column="loop@0")}
    for columns in (*arms["FT"].values(), *arms["SFT"].values()):
        columns["tokens@0"] = np.full(len(ITEMS), 12.0)
    finding = judge_claims(arms, ITEMS)["loops"]
    assert finding.verdict == "can't be told here"
    assert "12 tokens" in finding.note


def test_where_no_reply_is_probable_nobody_is_surer():
    arms = {name: {0: {"sure": np.full(len(ITEMS), 1e-9)}} for name in ("FT", "SFT")}
    finding = judge_claims(arms, ITEMS)["sharper"]
    assert finding.verdict == "can't be told here"
    assert "no whole one is probable" in finding.note


def test_where_nothing_is_right_no_accuracy_is_judged():
    arms = {"FT": arm(0.9), "SFT": arm(0.4)}
    for columns in (*arms["FT"].values(), *arms["SFT"].values()):
        columns["correct@0"] = np.zeros(len(ITEMS))
    assert "at most 0% of clean prompts" in judge(ACCURACY, arms, ITEMS).note


def test_what_is_missing_is_named():
    assert "no run of SFT" in judge(ACCURACY, {"FT": arm(0.5)}, ITEMS).note
    assert "not measured for FT" in judge(ACCURACY, {"FT": arm(0.5, column="x"), "SFT": arm(0.5)}, ITEMS).note
    apart = {seed + 100: columns for seed, columns in arm(0.5).items()}
    assert "share no training seed" in judge(ACCURACY, {"FT": apart, "SFT": arm(0.5)}, ITEMS).note
    assert judge(ACCURACY, {"FT": apart, "SFT": arm(0.5)}, ITEMS).verdict == "can't be told here"


@pytest.mark.slow
def test_an_own_adapter_is_compared_with_its_base():
    arms = {"yours": arm(0.9, seeds=1), "base": arm(0.4, seeds=1, at=1)}
    findings = judge_claims(arms, ITEMS, names={"FT": "yours", "SFT": "base"})
    robust = findings["robust"]
    assert findings.control == "base"
    assert findings.table().loc["robust", "verdict"] == "holds"
    unmarked = replace(ITEMS, tasks=tuple(replace(task, order="unknown", hard=None) for task in ITEMS.tasks))
    of_all = judge_claims(arms, unmarked, names={"FT": "yours", "SFT": "base"})["robust"]
    assert (of_all.claim.key, of_all.claim.measure, of_all.items) == ("robust", "accuracy at ratio 0.7", 170)
    assert (robust.claim.ours, robust.claim.control, robust.verdict) == ("yours", "base", "holds")
    assert "over items alone" in robust.note
    many = {"yours": arm(0.9), "base": arm(0.4, seeds=1, at=1)}  # one base for all trainings
    assert judge(replace(ACCURACY, ours="yours", control="base"), many, ITEMS).repeats == 5


def test_speed_is_a_share_saved():
    rng = np.random.default_rng(0)
    times = rng.normal(0, 0.05, (2, 170))
    saved = next(claim for claim in CLAIMS if claim.key == "faster-token")
    arms = {"FT": {0: {"ln seconds": times[0] + np.log(0.7)}}, "SFT": {0: {"ln seconds": times[1]}}}
    finding = judge(saved, arms, ITEMS)
    assert finding.effect.mean == pytest.approx(0.3, abs=0.02)
    assert finding.verdict == "holds"
    half = {"FT": {0: {"ln seconds": times[0] + np.log(0.9)}}, "SFT": arms["SFT"]}
    assert judge(saved, half, ITEMS).verdict == "holds in part"
    untimed = {"FT": arms["FT"] | {1: {}}, "SFT": arms["SFT"] | {1: {}}}  # only the first training was timed
    assert judge(saved, untimed, ITEMS).repeats == 1
    partly = np.where(ITEMS.among("hard"), times[0], np.nan)  # easy items were not timed
    assert "0 items" in judge(saved, {"FT": {0: {"ln seconds": partly}}, "SFT": arms["SFT"]}, ITEMS).note


def test_samples_worth_is_read_off_the_curves_at_the_seeds_size():
    sizes, rng, arms = (30, 248, 3000, 60_000), np.random.default_rng(0), {}
    hardness = rng.normal(0, 0.1, len(ITEMS))
    worth = next(claim for claim in CLAIMS if claim.key == "worth")

    def verdict(times: float, upto: int = 4) -> str:
        """Of curves in which a sample of ours does what `times` of the control's do."""
        for name, factor in (("SFT", 1), ("FT", times)):
            for k, size in enumerate(sizes[:upto]):
                losses = 3 - 0.2 * np.log(size * factor) + hardness
                arms[name if k == upto - 1 else f"{name} {size} rows"] = {
                    seed: {"loss@0": losses + rng.normal(0, 0.01)} for seed in range(3)
                }
        return judge(worth, arms, ITEMS, sizes=sizes[:upto], draws=200)

    assert verdict(100).verdict == "holds"
    assert verdict(3).verdict == "holds in part"
    assert verdict(0.3).verdict == "fails"
    assert verdict(1).effect.mean == pytest.approx(1, rel=0.3)
    short = verdict(100, upto=3)  # the curve ends at 12 x
    assert short.verdict == "holds in part"
    assert "at 248 rows ≥ 12 x" in short.note
    assert short.at_least
    assert not verdict(3).at_least
    assert "three sizes" in judge(worth, arms, ITEMS, sizes=(248, 3000)).note
    assert "no run of" in judge(worth, {}, ITEMS, sizes=sizes).note


def test_other_recipes_stand_beside_their_control():
    both = {"correct@0": np.ones(170), "correct@0.7": np.zeros(170)}
    arms = {name: {0: both, 1: both} for name in ("SFT", "FT mixed", "FT 30 rows")}
    found = compare_recipes(arms, ITEMS)
    assert [f.claim.key for f in found] == ["FT mixed gain", "FT mixed price"]
    assert [f.claim.among for f in found] == ["free", "bound"]
    assert all(f.effect.mean == 0 for f in found)
    unmarked = replace(ITEMS, tasks=tuple(replace(task, order="unknown", hard=None) for task in ITEMS.tasks))
    of_all = compare_recipes(arms, unmarked)
    assert [(f.claim.measure, f.items) for f in of_all] == [
        ("scrambled prompts: accuracy", 170),
        ("clean prompts: accuracy", 170),
    ]
    assert compare_recipes(arms, replace(ITEMS, checkable=False)) == []


def test_claims_are_well_formed():
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.size < 0 for claim in CLAIMS if claim.form == "no harm")
    assert {decide(Interval(x, x, x), size=0.5) for x in (-1.0, 0.2, 0.9)} | {"can't be told here"} == set(VERDICTS)


@pytest.mark.slow
def test_whole_chain_sees_nothing_between_two_arms_of_one_recipe(tmp_path):
    """Trained, measured, judged: 20 times two arms of 4, drawn apart out of 10 trainings by one recipe."""
    from ironlogic.evidence.study import open_study, run_study
    from ironlogic.presets import find_preset

    study = open_study(find_preset("nano"), tmp_path, rows=96, seeds=10, questions=102)
    recipes = {"base": None, "FT 95 rows": replace(study.recipes["FT"], rows=95)}  # measured briefly
    runs = run_study(study, recipes, report=lambda line: None)
    pool = list(runs["FT 95 rows"].values())
    assert np.std([columns["correct@0.7"].mean() for columns in pool]) > 0.005  # one recipe, not one model
    claims = [
        replace(ACCURACY, column=f"correct@{ratio}", among=order)
        for ratio in ("0.7", "0")
        for order in ("free", "bound")
    ]
    rng, seen = np.random.default_rng(0), []
    for _ in range(20):
        drawn = rng.permutation(len(pool))
        arms = {
            arm: {k: pool[i] for k, i in enumerate(some)} for arm, some in (("FT", drawn[:4]), ("SFT", drawn[4:8]))
        }
        findings = judge_claims(arms, study.items, claims=claims)
        seen.append([not finding.effect.low <= 0 <= finding.effect.high for finding in findings])
    assert sum(first for first, *_ in seen) <= 2  # robustness: no difference in 90 % of 20
    assert sum(map(sum, seen)) <= 8  # all four: of 80
    loss = replace(ACCURACY, column="loss@0", among="all", sign=-1, control="base")
    learned = judge(loss, {"FT": dict(enumerate(pool[:4])), "base": runs["base"]}, study.items)
    assert learned.verdict in ("holds", "holds in part"), "blind: not even the training is seen"
