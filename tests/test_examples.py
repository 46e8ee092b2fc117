"""The five jobs in ten lines each, as README and the rooms' docstrings show them, on nano."""

import json
from dataclasses import replace

import ironlogic
from ironlogic import (
    Burden,
    check_splice,
    compare_layers,
    judge_claims,
    load_chats,
    load_model,
    make_chats,
    read_layers,
    splice,
    train_instruct,
    train_projector,
    train_twins,
)
from ironlogic.data import scene_chats
from ironlogic.evidence import made_items
from ironlogic.models import DATA
from ironlogic.presets import PRESETS, VISION_PRESETS

import pytest

SMALL = replace(PRESETS["nano"].train, max_length=128)


def test_the_front_door_is_instant_and_every_name_behind_it_is_there():
    assert len(ironlogic.__all__) <= 24
    for name in ironlogic.__all__:
        assert callable(getattr(ironlogic, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ironlogic.nothing  # noqa: B018


def test_burden(tmp_path):
    chats = load_chats(DATA / "reasoning-248.jsonl")
    burdened = Burden(ratio=0.7).apply(chats, epochs=3)
    burdened.to_json(tmp_path / "burdened.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "burdened.jsonl").read_text().splitlines()]
    assert (len(rows), len(chats.rejected)) == (3 * 248, 0)
    assert rows[0]["messages"][-1] == chats[0][-1]


@pytest.mark.slow
def test_control_and_evidence(tmp_runs):
    train, test = load_chats(DATA / "reasoning-248.jsonl").split(0.2)
    train, test = train[:32], test[:12]
    here = {"processes": 1}  # starting others takes longer than so small a training
    options = {"settings": SMALL, "run": "first", "max_new_tokens": 12, **here}
    ft, sft = train_twins("nano", train, burden=Burden(ratio=0.7), **options)
    difference = ft.measure(test, **here) - sft.measure(test, **here)
    printed = str(difference).splitlines()
    assert printed[0].startswith("loss of the answer, clean (nats a token): ")
    assert printed[1].startswith("loss of the answer at 0.7 (nats a token): ")
    assert "1 training x " in printed[2]
    items = made_items(17, seed=1)
    findings = judge_claims({"FT": ft.measure(items, **here), "SFT": sft.measure(items, **here)}, items)
    table = findings.table()
    assert {"said", "effect", "verdict"} <= set(table.columns)
    assert len(table) == len(findings)


@pytest.mark.slow
def test_splice(tmp_runs):
    stage = VISION_PRESETS["nano-vision"]
    shown = tmp_runs / "pictures"
    model = splice("nano-vision", "nano")
    assert check_splice(model).passed
    captions = make_chats(scene_chats(32, shown, kinds=["caption"], seed=1))
    one = train_projector(model, captions, stage.projector_stage, run="eyes-1")
    questions = make_chats(scene_chats(32, shown, kinds=["number"], seed=1))
    two = train_instruct(one.loaded, questions, stage.instruct_stage, run="eyes-2")
    assert (two.folder / "run.json").is_file()


def test_lens(small_run):
    model = load_model(small_run.adapter)
    reading = read_layers(model, "Who is taller, Ann or Bob?")
    comparison = compare_layers(model, "Who is taller, Ann or Bob?", null_adapters=2)
    assert reading.proved
    assert comparison.entropy_change.shape == reading.entropy.shape
