"""Rules and verdicts: swapped labels swap them, one recipe against itself shows nothing, and no row is invented."""

import re
from dataclasses import replace

from ironlogic.evidence.claims import CLAIMS, MARGIN, VERDICTS, Claim, compare_recipes, decide, judge, judge_claims
from ironlogic.evidence.items import items_of_chats, made_items
from ironlogic.evidence.statistics import Interval

import numpy as np
import pytest

ITEMS = made_items(200, seed=1)
ACCURACY = Claim("a", "said", "000", "accuracy", "correct@0.7", "free", checkable=True)


def arm(rate: float, *, seeds=5, spread=0.0, by_kind=0.0, column="correct@0.7", at=0, items=ITEMS) -> dict:
    """Trainings of one recipe, able on clean prompts: items right at `rate`, off by a normal draw of `spread` for
    each training and of `by_kind` for each kind of items."""
    rng = np.random.default_rng(at % 2**32)
    _, kinds = np.unique([task.kind for task in items.tasks], return_inverse=True)
    of_kind = rng.normal(0, by_kind, kinds.max() + 1)[kinds]
    rates = [np.clip(rate + off + of_kind, 0, 1) for off in rng.normal(0, spread, seeds)]
    trainings = [{"correct@0": np.ones(len(items)), "correct substituted": np.zeros(len(items))} for _ in rates]
    for columns, r in zip(trainings, rates, strict=True):
        columns[column] = (rng.random(len(items)) < r).astype(float)
    return dict(enumerate(trainings))


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
    equal = {seed: {"correct@0.7": np.ones(200), "correct@0": np.ones(200)} for seed in (0, 1)}
    assert judge(claim, {"FT": equal, "SFT": equal}, ITEMS).verdict == "holds"
    assert judge(claim, {"FT": arm(0.5, at=1), "SFT": arm(0.9)}, ITEMS).verdict == "fails"
    wide = {"FT": arm(0.78, seeds=2, spread=0.1, at=3), "SFT": arm(0.8, seeds=2, spread=0.1)}
    assert judge(claim, wide, ITEMS).verdict == "can't be told here"


@pytest.mark.slow
def test_swapped_labels_swap_the_verdicts():
    """Arms that differ in every column: what holds fails the other way round, and the effect changes its sign."""
    better, worse = arm(0.8, at=1), arm(0.5, at=2)
    for column in ("sure", "mode@0", "bleed excess", "correct@0"):
        for some, rate, at in ((better, 0.9, 3), (worse, 0.4, 4)):
            for seed, columns in arm(rate, column=column, at=at).items():
                some[seed][column] = columns[column]
    claims = [
        c for c in CLAIMS if (c.ours, c.control) == ("FT", "SFT") and c.form != "worth" and c.column in better[0]
    ]
    assert {c.form for c in claims} == {"gain", "no harm"}
    one = judge_claims({"FT": better, "SFT": worse}, ITEMS, claims=claims)
    other = judge_claims({"FT": worse, "SFT": better}, ITEMS, claims=claims)
    assert [f.verdict for f in one] == ["holds"] * len(claims)
    assert [f.verdict for f in other] == ["fails"] * len(claims)
    for a, b in zip(one, other, strict=True):
        assert a.effect.mean == pytest.approx(-b.effect.mean)
        assert (a.effect.low, a.effect.high) == pytest.approx((-b.effect.high, -b.effect.low))
        assert a.ours == b.control
        if a.claim.form == "gain":  # of no effect; of no harm it is of a loss, which only one of them is near
            assert a.p == pytest.approx(b.p)


@pytest.mark.parametrize("by_kind", [0.0, 0.15])
def test_one_recipe_against_itself_is_no_difference(by_kind):
    """400 pairs of arms by one noisy recipe whose kinds part ways too: what 95 % allows is seen, and no more."""
    seen = 0
    for k in range(2500, 2900):
        options = {"spread": 0.05, "by_kind": by_kind}
        arms = {"FT": arm(0.6, at=2 * k, **options), "SFT": arm(0.6, at=2 * k + 1, **options)}
        finding = judge(ACCURACY, arms, ITEMS)
        assert finding.kinds == 10
        seen += not finding.effect.low <= 0 <= finding.effect.high
    assert seen <= 29  # 20 expected at most; 29 is two standard deviations above


def test_an_effect_of_the_size_called_detectable_is_found_and_a_third_of_it_is_not():
    pairs = [{"FT": arm(0.6, at=k), "SFT": arm(0.6, at=-k)} for k in range(1, 9)]
    least = np.mean([judge(ACCURACY, arms, ITEMS).detectable for arms in pairs])

    def found(effect: float) -> float:
        pairs = [{"FT": arm(0.6 + effect, at=3 * k + 50), "SFT": arm(0.6, at=3 * k + 51)} for k in range(40)]
        return np.mean([judge(ACCURACY, arms, ITEMS).effect.low > 0 for arms in pairs])

    assert found(least) >= 0.75
    assert found(least / 3) <= 0.6


def test_p_is_of_the_test_that_the_interval_stands_for_and_holm_looks_at_all_rows():
    arms = {"FT": arm(0.7, at=1), "SFT": arm(0.55, at=2)}
    finding = judge(ACCURACY, arms, ITEMS)
    assert (finding.p < 0.05) == (finding.effect.low > 0 or finding.effect.high < 0)
    harmless = judge(replace(ACCURACY, size=-MARGIN, form="no harm"), arms, ITEMS)
    assert harmless.p < finding.p  # of a loss of 3 points, further away than no effect
    rows = [replace(ACCURACY, key=key) for key in "abc"]
    assert judge_claims(arms, ITEMS, claims=rows)["a"].p == pytest.approx(3 * finding.p)


def test_without_checkable_answers_each_row_says_so_or_is_measured():
    chats = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "r"}] for i in range(40)]
    items, arms = items_of_chats(chats), {}
    for at, name in enumerate(("FT", "SFT")):
        arms[name] = arm(0.5 + 0.4 * at, column="sure", at=at, items=items)
        for columns in arms[name].values():
            columns |= {"bleed excess": np.zeros(40), "ln tokens": np.full(40, 2.0), "tokens@0": np.full(40, 200.0)}
            columns |= {"loop@0": np.zeros(40), "mode@0": np.full(40, np.nan)}
    found = judge_claims(arms, items)
    for claim in CLAIMS:
        if claim.checkable:
            assert found[claim.key].verdict == "can't be told here"
            assert "answers can be checked" in found[claim.key].note
    assert found["sharper-twin"].verdict == "fails"
    assert "no run of base" in found["sharper"].note
    assert found["bleeds"].verdict == "fails"  # no reply of 5 x 40 had a foreign word
    assert found["loops"].verdict == "fails"
    assert found["faster-length"].verdict == "fails"
    assert "all of them" in found["faster-length"].note
    assert "measured on 0 items;" in found["modes"].note


# -- room: what could not be seen whatever is true


def test_short_answers_cannot_loop():
    arms = {"FT": arm(0.0, column="loop@0"), "SFT": arm(0.0, column="loop@0")}
    for columns in (*arms["FT"].values(), *arms["SFT"].values()):
        columns["tokens@0"] = np.full(len(ITEMS), 12.0)
    finding = judge_claims(arms, ITEMS)["loops"]
    assert finding.verdict == "no room to tell"
    assert "12 tokens" in finding.note


def test_a_control_at_the_ceiling_leaves_no_room():
    arms = {"FT": arm(1.0, column="mode@0"), "SFT": arm(1.0, column="mode@0")}
    finding = judge_claims(arms, ITEMS)["modes"]
    assert (finding.verdict, finding.note) == ("no room to tell", "the control is at 1.000, of at most 1.000")
    for columns in (*arms["FT"].values(), *arms["SFT"].values()):
        columns |= {"correct@0.7": columns["mode@0"] * 0.75, "ceiling@0.7": np.full(len(ITEMS), 0.75)}
    bound = judge_claims(arms, ITEMS)["robust-bound"]
    assert (bound.verdict, bound.note) == ("no room to tell", "the control is at 0.750, of at most 0.750")
    assert bound.p is None
    arms["FT"] = arm(0.3, column="mode@0")  # but a plain loss is seen from there
    assert judge_claims(arms, ITEMS)["modes"].verdict == "fails"


def test_where_little_is_right_or_words_do_not_matter_nothing_is_judged():
    """60 foreign items, a tenth of them right: nothing to lose is no proof of no harm."""
    for clean, substituted in ((0.1, 0.0), (0.6, 0.55)):
        arms = {"FT": arm(clean, at=1), "SFT": arm(clean, at=2)}
        for trainings in arms.values():
            for columns in trainings.values():
                columns |= {"correct@0": np.full(len(ITEMS), clean), "correct@1": columns["correct@0.7"]}
                columns |= {"correct substituted": np.full(len(ITEMS), substituted)}
        found = judge_claims(arms, ITEMS)
        assert {found[key].verdict for key in ("robust", "words-enough", "decoupled", "no-harm")} == {
            "no room to tell"
        }
        assert f"{clean:.0%} of clean prompts are answered right, {substituted:.0%} with" in found["no-harm"].note


def test_what_is_missing_is_named():
    assert "no run of SFT" in judge(ACCURACY, {"FT": arm(0.5)}, ITEMS).note
    assert "not measured for FT" in judge(ACCURACY, {"FT": arm(0.5, column="x"), "SFT": arm(0.5)}, ITEMS).note
    apart = {seed + 100: columns for seed, columns in arm(0.5).items()}
    assert "share no training seed" in judge(ACCURACY, {"FT": apart, "SFT": arm(0.5)}, ITEMS).note
    assert judge(ACCURACY, {"FT": apart, "SFT": arm(0.5)}, ITEMS).verdict == "can't be told here"


def test_one_training_is_not_judged_and_says_how_alike_two_would_have_to_be():
    """Two trainings by one recipe that differ by less than that would bear the verdict, and by more would not."""
    finding = judge(ACCURACY, {"FT": arm(0.9, seeds=1, at=1), "SFT": arm(0.5, seeds=1, at=2)}, ITEMS)
    assert finding.verdict == "one training: not judged"
    assert finding.effect.low > MARGIN
    spread = float(re.search(r"for 'holds' trainings .* by less than (0\.\d+)", finding.note)[1])
    error = (finding.effect.high - finding.effect.low) / 2 / 1.96
    assert finding.effect.mean - 1.96 * np.sqrt(error**2 + 2 * spread**2) == pytest.approx(MARGIN, abs=0.002)
    equal = judge(ACCURACY, {"FT": arm(0.5, seeds=1, at=1), "SFT": arm(0.5, seeds=1, at=2)}, ITEMS)
    assert equal.note == "one training an arm, and another would differ"
    assert finding.p is None


def test_an_adapter_against_its_base_gets_no_verdict():
    """A plain SFT adapter that learned the form of an answer looks robust, decoupled and surer beside its base."""
    plain_sft, base = arm(0.9, seeds=3), arm(0.0, seeds=1, at=1)
    for rate, trainings in ((0.9, plain_sft), (0.0, base)):
        for columns in trainings.values():
            columns |= {"correct@0": np.full(len(ITEMS), rate), "sure": np.full(len(ITEMS), 0.1 + rate)}
    findings = judge_claims({"yours": plain_sft, "base": base}, ITEMS, names={"FT": "yours", "SFT": "base"})
    assert len(findings) == 0
    assert "There is no control" in findings.note
    assert str(findings) == findings.note
    assert compare_recipes({"yours": plain_sft, "base": base}, ITEMS, control=findings.control) == []
    assert not judge_claims({"FT": plain_sft, "base": base}, ITEMS).rows


def test_own_adapters_beside_their_control():
    arms = {"yours": arm(0.9), "control": arm(0.4, at=1), "base": arm(0.4, seeds=1, at=2)}
    findings = judge_claims(arms, ITEMS, names={"FT": "yours", "SFT": "control"})
    robust = findings["robust"]
    assert (robust.claim.ours, robust.claim.control, robust.verdict) == ("yours", "control", "holds")
    keys = {finding.claim.key for finding in findings}
    assert not keys & {"polish", "logic-stays", "worth", "emerges", "routing"}  # nothing can ever fill these
    unmarked = replace(ITEMS, tasks=tuple(replace(task, order="unknown", hard=None) for task in ITEMS.tasks))
    of_all = judge_claims(arms, unmarked, names={"FT": "yours", "SFT": "control"})["robust"]
    assert (of_all.claim.key, of_all.claim.measure, of_all.items) == ("robust", "accuracy at ratio 0.7", 200)
    many = {"yours": arm(0.9), "base": arm(0.4, seeds=1, at=1)}  # one base for all trainings
    assert judge(replace(ACCURACY, ours="yours", control="base"), many, ITEMS).repeats == 5


def test_speed_is_a_share_saved():
    rng = np.random.default_rng(0)
    times = rng.normal(0, 0.05, (4, 200))
    saved = next(claim for claim in CLAIMS if claim.key == "faster-token")
    base = {0: {"ln seconds": times[3]}}
    arms = {"FT": {seed: {"ln seconds": times[seed] + np.log(0.7)} for seed in range(3)}, "base": base}
    finding = judge(saved, arms, ITEMS)
    assert finding.effect.mean == pytest.approx(0.3, abs=0.02)
    assert finding.verdict == "holds"
    half = {"FT": {seed: {"ln seconds": times[seed] + np.log(0.9)} for seed in range(3)}, "base": base}
    assert judge(saved, half, ITEMS).verdict == "holds in part"
    untimed = {"FT": arms["FT"] | {3: {}}, "base": base}  # only the first trainings were timed
    assert judge(saved, untimed, ITEMS).repeats == 3
    partly = np.where(ITEMS.among("hard"), times[0], np.nan)  # easy items were not timed
    assert "on 0 items" in judge(saved, {"FT": {0: {"ln seconds": partly}}, "base": base}, ITEMS).note


def test_samples_worth_is_read_off_the_controls_curve_at_the_seeds_size():
    sizes, rng = (100, 248, 2480, 24_800), np.random.default_rng(0)
    worth = next(claim for claim in CLAIMS if claim.key == "worth")

    def finding(times: float, *, rise: float = 0.1, upto: int = 4, seeds: int = 3):
        """Of a control whose accuracy rises with the logarithm of its rows; an FT row is worth `times` of them."""

        def trainings(rows: float) -> dict:
            level = np.clip(0.3 + rise * np.log(rows / 100), 0, 1)
            noisy = {seed: level + rng.normal(0, 0.005) + rng.normal(0, 0.02, 200) for seed in range(seeds)}
            return {seed: {"correct@0": values} for seed, values in noisy.items()}

        arms = {f"SFT {size} rows": trainings(size) for size in sizes[:upto]}
        arms["FT 248 rows"] = trainings(248 * times)
        return judge(worth, arms, ITEMS, sizes=sizes[:upto])

    assert finding(99).verdict == "holds"
    assert finding(5).verdict == "holds in part"
    assert finding(1).effect.mean == pytest.approx(1, rel=0.3)
    assert finding(0.4).verdict == "fails"
    short = finding(40, upto=3)  # the curve ends at 10 x
    assert short.at_least
    assert short.verdict == "holds in part"
    assert "SFT by rows: 100: 0.3" in short.note
    assert not finding(5).at_least
    flat = finding(1, rise=0.001)
    assert flat.verdict == "no room to tell"
    assert "rises by" in flat.note
    assert finding(5, seeds=1).verdict == "one training: not judged"
    assert "three sizes" in judge(worth, {}, ITEMS, sizes=(248, 3000)).note
    assert "no run of" in judge(worth, {}, ITEMS, sizes=sizes).note


def test_other_recipes_stand_beside_their_control():
    both = {"correct@0": np.ones(200), "correct@0.7": np.zeros(200)}
    arms = {name: {0: both, 1: both} for name in ("SFT", "FT mixed", "FT 30 rows")}
    found = compare_recipes(arms, ITEMS)
    assert [f.claim.key for f in found] == ["FT mixed gain", "FT mixed price"]
    assert [f.claim.among for f in found] == ["free", "bound"]
    assert all(f.effect.mean == 0 for f in found)
    unmarked = replace(ITEMS, tasks=tuple(replace(task, order="unknown", hard=None) for task in ITEMS.tasks))
    of_all = compare_recipes(arms, unmarked)
    assert [(f.claim.measure, f.items) for f in of_all] == [
        ("scrambled prompts: accuracy", 200),
        ("clean prompts: accuracy", 200),
    ]
    assert compare_recipes(arms, replace(ITEMS, checkable=False)) == []
    assert compare_recipes({"FT mixed": arms["FT mixed"]}, ITEMS) == []


def test_claims_are_well_formed():
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.size < 0 for claim in CLAIMS if claim.form == "no harm")
    assert [decide(Interval(x, x, x), size=0.5) for x in (0.9, 0.2, -1.0)] == list(VERDICTS[:3])


@pytest.mark.slow
def test_whole_chain_sees_nothing_between_two_arms_of_one_recipe(tmp_path):
    """Trained, measured, judged: 20 times two arms of 4, drawn apart out of 10 trainings by one recipe."""
    from ironlogic.evidence.study import open_study, run_study
    from ironlogic.presets import find_preset

    study = open_study(find_preset("nano"), tmp_path, rows=96, seeds=10, questions=100)
    recipes = {"FT 95 rows": replace(study.recipes["FT"], rows=95)}  # measured briefly
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
    loss = replace(ACCURACY, column="loss@0", control_column="loss@0.7", among="all", sign=-1, checkable=False)
    arms = {arm: dict(enumerate(pool[:4])) for arm in ("FT", "SFT")}
    assert judge(loss, arms, study.items).verdict == "holds", "blind: not even the scramble is seen"
