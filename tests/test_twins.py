"""Arms and studies: twins differ in their burden alone, nothing is done twice; one small study up to verdicts."""

import json
import shutil
from dataclasses import replace
from functools import partial

from ironlogic.data.chats import ChatError, make_chats
from ironlogic.evidence import twins
from ironlogic.evidence.claims import CLAIMS, judge_claims
from ironlogic.evidence.items import load_items
from ironlogic.evidence.measures import decoding_speed
from ironlogic.evidence.study import (
    SEEDS_STEPS,
    SIZES,
    check_adapters,
    measure_adapters,
    open_study,
    run_study,
    shown_base,
    time_twins,
)
from ironlogic.evidence.twins import Recipe, make_recipes, train_twins
from ironlogic.export import merge_adapter
from ironlogic.models import ModelError
from ironlogic.presets import find_preset
from ironlogic.show.evidence import plot_frontier
from ironlogic.show.report import findings_html
from ironlogic.training.runs import RunError

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

NANO = find_preset("nano")


@pytest.fixture(scope="module", autouse=True)
def brief_timing():
    """Speed is timed on two tokens, once: test_measures.py tests the timing."""
    with pytest.MonkeyPatch.context() as patch:
        brief = partial(decoding_speed, tokens=2, repeats=1)
        patch.setattr("ironlogic.evidence.study.decoding_speed", brief)
        yield


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(study, recipes, measured, lines): base, SFT, FT and FT then SFT; notebook 02 trains in several processes."""
    study = open_study(NANO, tmp_path_factory.mktemp("runs"), rows=24, seeds=1, questions=20)
    study = replace(study, max_new_tokens=12)  # so little trained, most answers have no end
    recipes = {"FT then SFT": study.recipes["FT then SFT"]} | study.twins()
    lines = []
    measured = run_study(study, recipes, processes=1, report=lines.append)
    time_twins(study, measured)
    return study, recipes, measured, lines


# -- plans


def test_twins_differ_in_what_their_name_says_and_in_nothing_else(tmp_path):
    study = open_study(NANO, tmp_path, rows=40, seeds=2, questions=40)
    recipes = make_recipes(NANO.train, replace(NANO.burden, ratio=0.7))
    for arm, recipe in recipes.items():
        changed = {"FT as the seed": {"loss": "all"}, "NEFTune": {"neftune_alpha": 5.0}}.get(arm, {})
        assert recipe.settings == replace(NANO.train, **changed)
        assert (recipe.burden is not None) == (arm.startswith("FT") and "then" not in arm)
        assert (recipe.deleted > 0) == (arm == "deletion")
        assert recipe.shuffled == (arm == "shuffled answers")
        assert recipe.after == (arm.partition(" then ")[0] if " then " in arm else "")
    assert recipes["FT"].burden == replace(NANO.burden, ratio=0.7)
    assert recipes["FT mixed"].burden == replace(NANO.burden, ratio=0.7, mix=0.5)
    asked = {task.prompt for task in study.items.tasks}
    assert not asked & {chat[0]["content"] for rows in study.chats.values() for chat in rows}
    path = tmp_path / "few.jsonl"
    chats = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "r"}] for i in range(20)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    assert study.arm("deletion") == replace(recipes["deletion"], seeds=study.seeds[:3])
    with pytest.raises(RunError, match="no arm 'FT then'; expected one of base, SFT, FT"):
        study.arm("FT then")
    small = open_study(NANO, tmp_path, data=str(path))
    assert len(small.held_out) >= 1
    assert small.can_sweep == (small.validation is not None)
    assert not open_study(NANO, tmp_path, data=str(path), items=study.items).can_sweep  # every row is trained on
    path.write_text(json.dumps({"messages": chats[0]}) + "\n")
    with pytest.raises(ChatError, match="too few to hold some out"):
        open_study(NANO, tmp_path, data=str(path))


@pytest.mark.slow
def test_the_base_is_shown_examples_where_the_preset_says_so(tmp_path):
    study = open_study(replace(NANO, shots=2), tmp_path, rows=24, seeds=1, questions=10)
    (name, shown), *_ = shown_base(study).items()
    assert name == "base, 2 examples"
    assert set(shown[0]) >= {"correct@0", "correct@0.7", "loss@0"}
    assert shown_base(open_study(NANO, tmp_path, rows=24, seeds=1, questions=10)) == {}


@pytest.mark.slow
def test_every_claim_has_its_runs_in_the_full_plan(tmp_path):
    study = open_study(NANO, tmp_path, seeds=5, rows=1200)
    curves, sizes = study.curves()
    assert {arm for claim in CLAIMS for arm in (claim.ours, claim.control)} <= set(study.full()) | set(curves)
    assert sizes == SIZES  # problems are made, however few an arm is trained on
    at_the_seeds = curves["FT 248 rows"]
    assert at_the_seeds == replace(
        study.recipes["FT"], rows=248, seeds=study.seeds[:3], settings=at_the_seeds.settings
    )
    for arm, recipe in curves.items():
        size = int(arm.split()[1])
        assert recipe.settings.epochs * -(-size // 16) >= SEEDS_STEPS
        assert replace(recipe.settings, epochs=1) == NANO.train
    rows = [study.curve_rows()[seed][:248] for seed in study.seeds[:3]]
    assert len({tuple(chat[0]["content"] for chat in chats) for chats in rows}) == 3
    assert not study.has_twins()
    assert list(study.short()) == ["base", "SFT", "FT"]


def test_each_training_gets_its_rows_and_its_start_and_lies_where_notebook_02_puts_it(tmp_path, monkeypatch):
    plans = {}

    def note(jobs, *, after, **options):
        for name, job in jobs.items():
            arm, seed, _, rows, start, _ = job.args
            place = arm.folders[seed].relative_to(tmp_path).as_posix()
            plans[name] = (place, list(rows), start, after.get(name))

    monkeypatch.setattr(twins, "run_parallel", note)
    study = open_study(NANO, tmp_path, rows=40, seeds=2, questions=20)
    recipes = {arm: study.recipes[arm] for arm in ("FT as the seed", "deletion", "FT then SFT")}
    study.train(recipes | {"base": None, "FT 7 rows": replace(study.recipes["FT"], rows=7)})
    folder = "02_nano_problems_40_0.7"
    assert plans["FT as the seed, seed 3408"] == (
        f"{folder}/FT-as-the-seed-3408",
        list(study.chats[3408]),
        "",
        None,
    )
    assert plans["FT 7 rows, seed 3407"][:2] == (f"{folder}/FT-7-rows-3407", list(study.chats[3407][:7]))
    start = str(tmp_path / folder / "FT-3408/adapter")
    assert plans["FT then SFT, seed 3408"][1:] == (list(study.further[3408]), start, "FT, seed 3408")
    deleted = plans["deletion, seed 3407"][1]
    assert all(len(a[0]["content"]) < len(b[0]["content"]) for a, b in zip(deleted, study.chats[3407], strict=True))
    assert "base, seed 0" not in plans  # nothing is measured here


# -- one small study


@pytest.mark.slow
def test_from_training_to_verdict_and_again_from_disk(studied):
    study, recipes, measured, lines = studied
    seeds = {arm: list(trainings) for arm, trainings in measured.items()}
    assert seeds == {"FT then SFT": [3407], "base": [0], "SFT": [3407], "FT": [3407]}
    assert len(lines) == 4
    assert study.has_twins()
    findings = judge_claims(measured, study.items)
    assert findings["faster-length"].effect
    assert findings["faster-token"].verdict == findings["silence"].verdict == "one training: not judged"
    assert "no experts" not in str(findings)
    assert "routing" not in {finding.claim.key for finding in findings}  # nano has none
    assert findings["emerges"].verdict == "can't be told here"
    again = run_study(study, recipes, report=lines.append)
    assert len(lines) == 4
    for arm, trainings in again.items():
        for seed, columns in trainings.items():
            for name, values in columns.items():
                assert np.array_equal(values, measured[arm][seed][name], equal_nan=True), (arm, seed, name)
    assert set(study.short()) == set(recipes)
    arms = study.train(recipes)
    ft, sft = (arms[name].runs[0].record for name in ("FT", "SFT"))
    assert {name for name in ft if ft[name] != sft[name]} <= {"stage", "burden", "seconds", "peak_gib", "data"}
    with pytest.raises(RunError, match="trained otherwise: it differs in model"):
        replace(study, preset=replace(NANO, model="nano-moe")).train(recipes)
    other = replace(study, chats={3407: study.chats[3407][::-1]})
    with pytest.raises(RunError, match="trained otherwise: it differs in rows"):
        run_study(other, study.twins())
    hotter = Recipe(replace(NANO.train, learning_rate=1e-3))
    with pytest.raises(RunError, match="it differs in settings"):
        study.train({"SFT": hotter})


@pytest.mark.slow
def test_other_questions_are_measured_anew(studied, monkeypatch):
    study, _, measured, _ = studied
    arm = study.train({"SFT": study.recipes["SFT"]})["SFT"]
    calls = []
    monkeypatch.setattr(twins, "measure", lambda *_, **options: calls.append(options) or {"a": np.array([np.nan])})
    assert arm.measure(study.items)[3407].keys() == {name for name in measured["SFT"][3407] if name != "ln seconds"}
    assert not calls
    fewer = replace(study.items, tasks=study.items.tasks[:3], chats=study.items.chats[:3])
    for _ in range(2):
        assert np.isnan(arm.measure(fewer)[3407]["a"][0])
    assert len(calls) == 1
    replace(arm, seed=99).measure(fewer)
    assert [options["seed"] for options in calls] == [3407, 99]


@pytest.mark.slow
def test_own_adapter_and_own_items_give_the_same_table(studied, tmp_path):
    study, _, measured, _ = studied
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": t.prompt, "answer": t.answer, "order": t.order, "hard": t.hard} for t in study.items.tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, rejected = load_items(path)
    assert not rejected
    adapter = study.folder / "FT-3407/adapter"
    twin = study.folder / "SFT-3407/adapter"
    other = tmp_path / "other"  # another training of the control
    shutil.copytree(twin, other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    own = {"yours": [adapter, twin], "control": [twin, other]}
    arms = measure_adapters(own, items, tmp_path / "own", max_new_tokens=12, seed=study.seed)
    assert {arm: list(trainings) for arm, trainings in arms.items()} == {
        "yours": [1, 2],
        "control": [1, 2],
        "base": [0],
    }
    assert np.array_equal(arms["yours"][1]["correct@0.7"], measured["FT"][3407]["correct@0.7"])
    assert np.array_equal(arms["yours"][2]["correct@0.7"], measured["SFT"][3407]["correct@0.7"])
    findings = judge_claims(arms, items, names={"FT": "yours", "SFT": "control"})
    for finding in findings:
        assert finding.effect or "needed" in finding.note, finding.claim.key
    assert "yours" in findings_html(findings)
    alone = judge_claims(
        {"yours": arms["yours"], "base": arms["base"]}, items, names={"FT": "yours", "SFT": "base"}
    )
    assert "There is no control" in findings_html(alone)
    with pytest.raises(ModelError, match="holds no model"):
        check_adapters({"yours": adapter, "control": study.folder})
    with pytest.raises(RunError, match="is no folder here"):
        check_adapters({"yours": "someone/adapter"})
    with pytest.raises(RunError, match="the same weights stand there twice"):
        check_adapters({"yours": [adapter, adapter]})
    merged = merge_adapter(adapter, tmp_path / "merged")
    whole = measure_adapters(
        {"yours": merged}, items, tmp_path / "own", four_bit=False, max_new_tokens=12, seed=study.seed
    )
    assert list(whole) == ["yours"]  # nobody knows its base
    assert not {"ln seconds", "attention shift"} & set(whole["yours"][1])
    assert whole["yours"][1]["correct@0"].mean() == pytest.approx(arms["yours"][1]["correct@0"].mean(), abs=0.15)
    few = replace(items, tasks=items.tasks[:6], chats=items.chats[:6])
    with pytest.raises(RunError, match="6 items; 8 or more"):
        measure_adapters(own, few, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_each_arm_gets_the_rate_that_is_best_for_it(tmp_path):
    """A rate that breaks the model is not chosen for either; the study, and who opens it later, take the best."""
    preset = replace(NANO, sweep=(1e-3, 5.0))
    study = open_study(preset, tmp_path, rows=32, seeds=1, questions=20)
    swept = replace(study, max_new_tokens=12).sweep_rates(processes=1, report=lambda line: None)
    points = study.sweep_points()
    expected = [("base", 0), *((arm, rate) for rate in (1e-3, 5.0) for arm in ("SFT", "FT"))]
    assert [(point["arm"], point["rate"]) for point in points] == expected
    for arm in ("SFT", "FT"):
        best = max((point for point in points if point["arm"] == arm), key=lambda point: point["score"])
        assert swept.rates[arm] == best["rate"] == 1e-3
        assert swept.recipes[arm].settings.learning_rate == 1e-3
    assert open_study(preset, tmp_path, rows=32, seeds=1, questions=20).rates == swept.rates
    assert "SFT 0.001, FT 0.001, each the best of 2" in "".join(swept.summary())
    asked = {task.prompt for task in study.validation.tasks}
    assert not asked & {task.prompt for task in study.items.tasks}
    assert not asked & {chat[0]["content"] for chat in study.chats[3407]}
    (axes,) = plot_frontier(points).axes
    assert sorted(text.get_text() for text in axes.texts) == ["0.001", "0.001", "5", "5"]
    assert open_study(preset, tmp_path, rows=32, seeds=1, questions=20, swept=False).rates == {}
    assert "SFT's is the lowest of them" in "".join(swept.summary())
    with pytest.raises(RunError, match="no learning rates to choose from"):
        open_study(replace(NANO, sweep=()), tmp_path, rows=20, seeds=1).sweep_rates()


def test_a_row_that_one_arm_would_lose_is_left_out_of_all(tmp_path, monkeypatch):
    """The burden moves a long word of the question behind the cut in some epoch, and the answer with it."""
    plans = {}
    monkeypatch.setattr(
        twins, "run_parallel", lambda jobs, **_: plans.update({name: job.args[3] for name, job in jobs.items()})
    )
    long = "zebra " * 60 + "why?"
    rows = [(f"Is it {word}?", "yes") for word in ("hot", "cold", "wet")]
    rows.insert(1, (long, "no"))
    chats = make_chats(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in rows
    )
    settings = replace(NANO.train, max_length=100)
    train_twins(replace(NANO, train=settings), chats, burden=NANO.burden, run=tmp_path / "twins")
    kept = [[chat[0]["content"] for chat in plans[name]] for name in ("FT, seed 3407", "SFT, seed 3407")]
    assert kept[0] == kept[1] == [question for question, _ in rows if question != long]
    assert plans["FT, seed 3407"].rows["row"][:] == [0, 2, 3]  # the number draws the burden


def test_the_command_says_what_is_wrong_before_it_trains(tmp_path, capsys):
    from ironlogic.__main__ import main

    assert main(["evidence", "--preset", "huge", "--out", str(tmp_path)]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
    assert (
        main(["evidence", "--preset", "nano", "--items", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    )
    assert "can't be read" in capsys.readouterr().err
    assert not list(tmp_path.glob("02_*"))
