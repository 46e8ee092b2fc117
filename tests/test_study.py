"""A study: its recipes and folders, nothing done twice or mixed up; small ones from training to verdict."""

import json
from dataclasses import replace
from types import SimpleNamespace

from ironlogic.data.chats import ChatError
from ironlogic.evidence import study as study_module
from ironlogic.evidence.claims import CLAIMS, find_all
from ironlogic.evidence.items import load_items
from ironlogic.evidence.study import (
    CURVE,
    MAIN,
    SIDE,
    Job,
    measure_adapters,
    measure_once,
    open_study,
    run_jobs,
    seen_before,
)
from ironlogic.presets import find_preset
from ironlogic.show.evidence import finding_pictures
from ironlogic.show.report import findings_html
from ironlogic.training.runs import RunError

import numpy as np
import pytest

NANO = find_preset("nano")


def small(folder, **more):
    return open_study(NANO, folder, **({"rows": 40, "seeds": 2, "questions": 34} | more))


def test_folders_are_those_of_notebook_02(tmp_path):
    study = open_study(NANO, tmp_path, rows=3000, seeds=1)
    assert study.run(Job("FT as the seed", 3407)) == tmp_path / "02_nano_problems_3000_0.7/FT-as-the-seed-3407"
    assert study.run(Job("SFT", 3407, 248)).name == "SFT-248-rows-3407"


def test_twins_differ_in_what_their_name_says_and_in_nothing_else(tmp_path):
    study = small(tmp_path)
    plain, _ = study.recipe("SFT")
    for arm in (*MAIN, *SIDE):
        settings, burden = study.recipe(arm)
        changed = {"FT as the seed": {"loss": "all"}, "NEFTune": {"neftune_alpha": 5.0}}.get(arm, {})
        assert settings == replace(plain, **changed)
        assert (burden is not None) == (arm.startswith("FT") and "then" not in arm)
        rows = study.rows(Job(arm, 3408))
        if arm == "deletion":
            assert all(
                len(a[0]["content"]) < len(b[0]["content"]) for a, b in zip(rows, study.chats[3408], strict=True)
            )
        elif "then" in arm:
            assert rows == study.further[3408]
        else:
            assert rows == study.chats[3408]
    assert study.recipe("FT 0.3")[1].ratio == 0.3
    assert study.recipe("FT mixed")[1].mix == 0.5
    assert study.rows(Job("FT", 3407, 7)) == study.chats[3407][:7]
    asked = {task.prompt for task in study.items.tasks}
    assert not asked & {chat[0]["content"] for rows in study.chats.values() for chat in rows}


@pytest.mark.slow
def test_every_claim_has_its_runs_in_the_full_plan(tmp_path):
    study = open_study(NANO, tmp_path, seeds=5, rows=3000)
    jobs, sizes = study.full()
    names = {job.name for job in jobs}
    assert {arm for claim in CLAIMS for arm in (claim.ours, claim.control)} <= names
    assert sizes == (*CURVE, 3000)
    assert len(jobs) == len(set(jobs))
    for arm in ("FT", "SFT", "FT then SFT", "FT 30 rows", "FT 248 rows", "SFT 1000 rows"):
        assert sum(job.name == arm for job in jobs) == 5
    assert open_study(NANO, tmp_path, seeds=1, rows=100).full()[1] == (30, 100)
    assert not seen_before(study)
    assert [job.arm for job in study.short()] == ["base"] + ["SFT"] * 5 + ["FT"] * 5


def test_stage_after_comes_after_whatever_the_order_asked(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        study_module.Study, "do", lambda self, job: done.append(job.name) or (job, {"x": np.ones(1)}, 0.0)
    )
    lines = []
    arms = run_jobs(small(tmp_path), [Job("FT then SFT", 1), Job("FT", 1), Job("FT", 2)], report=lines.append)
    assert done == ["FT", "FT", "FT then SFT"]
    assert sorted(arms["FT"]) == [1, 2]
    assert lines[0] == "1 of 3: FT, seed 1, 0 s"


def test_a_stage_after_is_queued_when_its_base_is_done_and_not_before(tmp_path):
    told = []

    class Pool:
        def submit(self, do, job):
            told.append(("asked", job.name, job.seed))
            return SimpleNamespace(result=lambda: told.append(("done", job.name, job.seed)))

    study = small(tmp_path)
    jobs = [Job("FT", 1), Job("FT", 2), Job("FT then SFT", 1), Job("SFT then SFT", 1)]  # SFT was there before
    list(study_module._in_turn(Pool(), study, jobs))
    first, then = ("done", "FT", 1), ("asked", "FT then SFT", 1)
    assert told.index(then) == told.index(first) + 1
    assert told.index(("asked", "SFT then SFT", 1)) < told.index(first)
    assert [name for what, name, _ in told if what == "done"] == ["FT", "FT", "FT then SFT", "SFT then SFT"]


def test_what_was_measured_is_not_measured_again_unless_something_else_is_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        study_module, "measure_all", lambda *_, **o: calls.append(o) or {"a": np.array([1.0, np.nan])}
    )
    items = small(tmp_path).items
    options = {"seed": 1, "max_new_tokens": 72}
    for _ in range(2):
        found = measure_once(lambda: None, items, tmp_path / "run", **options)
        assert found["a"][0] == 1
        assert np.isnan(found["a"][1])
    assert len(calls) == 1
    measure_once(lambda: None, items, tmp_path / "run", **options | {"seed": 2})
    measure_once(lambda: None, small(tmp_path, questions=17).items, tmp_path / "run", **options)
    assert len(calls) == 3


def test_own_data_that_is_too_small_is_refused(tmp_path):
    path = tmp_path / "two.jsonl"
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    path.write_text(json.dumps(chat) + "\n")
    with pytest.raises(ChatError, match="too few to hold some out"):
        open_study(NANO, tmp_path, data=str(path))


@pytest.mark.slow
def test_from_training_to_verdict_in_two_processes_and_again_from_disk(tmp_path):
    study, said = small(tmp_path, rows=24, seeds=1, questions=17), []
    jobs = [Job("FT then SFT", 3407), Job("base", 0), *study.jobs(("SFT", "FT"), study.chats)]
    arms = run_jobs(study, jobs, workers=2, report=said.append)
    study.time_arms(arms)
    assert {arm: list(runs) for arm, runs in arms.items()} == {
        "FT then SFT": [3407],
        "base": [0],
        "SFT": [3407],
        "FT": [3407],
    }
    assert len(said) == 4
    assert seen_before(study)
    findings = {f.claim.key: f for f in find_all(arms, study.items)}
    assert findings["faster"].effect
    assert findings["emerges"].verdict == "can't be told here"
    times = []
    again = run_jobs(study, jobs, report=times.append)
    for arm, runs in again.items():
        for seed, columns in runs.items():
            for name, values in columns.items():
                assert np.array_equal(values, arms[arm][seed][name], equal_nan=True), (arm, seed, name)
    assert not times
    other = replace(study, chats={3407: study.chats[3407][::-1]})
    with pytest.raises(RunError, match="trained on other rows"):
        other.do(Job("SFT", 3407))


@pytest.mark.slow
def test_own_adapter_own_items_and_own_chats(tmp_path):
    """Items in JSONL and an adapter give the same table; conversations are told what they lack."""
    made = small(tmp_path, seeds=1, rows=24)
    adapter = made.train(Job("FT", 3407))
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": t.prompt, "answer": t.answer, "order": t.order, "hard": t.hard} for t in made.items.tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, rejected = load_items(path)
    assert not rejected
    arms = measure_adapters({"yours": adapter}, items, tmp_path / "own", max_new_tokens=72, seed=made.seed)
    own = made.do(Job("FT", 3407))[1]
    assert np.array_equal(arms["yours"][0]["correct@0.7"], own["correct@0.7"])
    findings = find_all(arms, items, names={"FT": "yours", "SFT": "base"})
    assert all(
        f.effect
        for f in findings
        if (f.claim.ours, f.claim.control) == ("yours", "base") and f.claim.form != "worth"
    )
    assert "yours" in findings_html(findings, finding_pictures(findings, arms, items))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in made.chats[3407]))
    assert list(open_study(NANO, tmp_path, data=str(chats), seeds=2).chats) == [3407, 3408]
    plain = replace(open_study(NANO, tmp_path, data=str(chats), rows=30), max_new_tokens=24)
    found = {f.claim.key: f for f in find_all(run_jobs(plain, plain.jobs(("SFT", "FT"), plain.chats)), plain.items)}
    assert "answers can be checked" in found["robust"].note
    assert len(plain.items) < 8 or found["sharper"].effect


def test_the_command_says_what_is_wrong_before_it_trains(tmp_path, capsys):
    from ironlogic.__main__ import main

    assert main(["evidence", "--preset", "huge", "--out", str(tmp_path)]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
    assert (
        main(["evidence", "--preset", "nano", "--items", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    )
    assert "can't be read" in capsys.readouterr().err
    assert not list(tmp_path.glob("02_*"))
