"""Behaviours: each measure against a reader of known behaviour, and all of them on nano."""

from dataclasses import replace
from pathlib import Path

from ironlogic.data.problems import thinks
from ironlogic.evidence import behaviour
from ironlogic.evidence.behaviour import (
    context_bleeding,
    decoding_speed,
    describe,
    loops,
    measure_all,
    mode_switching,
    repetition,
    substituted,
)
from ironlogic.evidence.items import Items, items_of_chats, made_items
from ironlogic.evidence.measure import reply_scores
from ironlogic.generate import Completion
from ironlogic.models import add_lora, load_model
from ironlogic.presets import LoraSettings

import numpy as np
import pytest
import torch

ITEMS = made_items(68, seed=3)


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


def test_repetition_and_loops_by_hand():
    assert repetition("one two three") == 0.0
    assert repetition("a a a a a a") == pytest.approx(2 / 3)  # three four-grams, one of them new
    thrice = Completion("so we add so we add so we add so we add it", 12, True, 0.0)
    assert loops(thrice)
    assert not loops(Completion("so we add two and then we add three", 8, True, 0.0))
    assert loops(Completion("a b c d e f g h a b c d e f g h a b c d e f g", 99, False, 0.0))


@pytest.mark.slow
def test_thinking_as_a_detector_of_hard_items():
    hard = np.arange(100) < 50
    prompts = ["a b c d e f" if i % 2 else "a b c" for i in range(100)]
    perfect = mode_switching(hard, hard, prompts)
    assert (perfect.precision, perfect.recall, perfect.f1) == (1, 1, 1)
    assert perfect.at_equal_length.mean == pytest.approx(1)
    by_length = mode_switching([i % 2 for i in range(100)], hard, prompts)
    assert by_length.at_equal_length.low < 0.05
    never = mode_switching(np.zeros(100), hard, prompts)
    assert np.isnan(never.precision)
    assert never.recall == never.f1 == 0
    assert thinks("<think>\nSo")
    assert not thinks("I think")


@pytest.mark.parametrize(("parrot", "least", "most"), [("first", 0.8, 1.0), ("own", 0.0, 0.0)])
def test_a_reader_that_repeats_the_turn_before_bleeds_and_one_that_does_not_does_not(
    monkeypatch, parrot, least, most
):
    def reader(loaded, chats, **_):
        place = 0 if parrot == "first" else -1
        return [Completion(chat[place]["content"], 5, True, 0.0) for chat in chats]

    monkeypatch.setattr(behaviour, "generate", reader)
    found = context_bleeding(None, ITEMS, seed=1)
    assert least <= found.found.mean() <= most
    assert found.permuted.mean() < 0.3  # chance
    with pytest.raises(ValueError, match="3 or more"):
        context_bleeding(None, Items(ITEMS.tasks[:2], ITEMS.chats[:2]))


def test_each_item_follows_another_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        behaviour,
        "generate",
        lambda loaded, chats, **_: asked.extend(chats) or [Completion("", 0, True, 0.0)] * len(chats),
    )
    context_bleeding(None, ITEMS, seed=1)
    assert [chat[2]["content"] for chat in asked] == [task.prompt for task in ITEMS.tasks]
    assert all(chat[0]["content"] != chat[2]["content"] for chat in asked)
    assert sorted(chat[0]["content"] for chat in asked) == sorted(task.prompt for task in ITEMS.tasks)


def test_substituted_words_leave_little_to_answer_by(nano):
    assert substituted(nano, ITEMS, ratio=0.0).mean() > 0.7
    assert substituted(nano, ITEMS, ratio=1.0).mean() < 0.2


def test_scores_of_replies_are_the_models_own(nano):
    prompts, replies = [t.prompt for t in ITEMS.tasks[:3]], [f"Answer: {t.answer}" for t in ITEMS.tasks[:3]]
    found = reply_scores(nano, [*prompts, "x"], [*replies, "a<|im_end|>b"], batch_size=2)
    assert np.isnan(found.nats[3])
    text = nano.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompts[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = nano.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = nano.tokenizer(f"{replies[0]}<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = nano.model(input_ids=torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    of_said = logp[range(len(said)), said]
    assert found.nats[0] == pytest.approx(-of_said.mean().item(), rel=1e-3)
    assert found.probability[0] == pytest.approx(of_said.sum().exp().item(), rel=1e-3)
    assert found.entropy[0] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-3)


def test_speed_is_timed_at_a_forced_length_for_every_arm(nano, tmp_path):
    fresh = add_lora(load_model("nano", four_bit=False), LoraSettings(rank=4), seed=1)
    fresh.model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    found = decoding_speed(nano, {"SFT": Path(tmp_path / "a")}, ["What is it?", "Who?"], tokens=8, repeats=1)
    assert {arm: seconds.shape for arm, seconds in found.items()} == {"base": (2,), "SFT": (2,)}
    assert all((seconds > 0).all() for seconds in found.values())


@pytest.mark.slow
def test_all_of_it_on_nano():
    nano, items = load_model("nano", four_bit=False), made_items(34, seed=4)
    columns = measure_all(nano, items, seed=1)
    assert {len(values) for values in columns.values()} == {34}
    assert columns["correct@0"].mean() > columns["correct@1"].mean()
    assert columns["mode@0"].mean() == pytest.approx(1 - items.among("hard").mean())  # the base never thinks
    told = describe({"a": {0: columns, 1: columns}, "a 30 rows": {0: columns}}, items)
    assert list(told) == ["a"]
    told = told["a"]
    assert told["thinking: recall"] == (0, 0)
    assert "thinking: precision" not in told  # it never thinks
    assert 0 < told["share of the ceiling at 0.7, order-bound"][0] < 1.5
    assert told["area under the curve, order-free"][0] < columns["correct@0"][items.among("free")].mean()
    unmarked = replace(items, tasks=tuple(replace(task, order="unknown", hard=None) for task in items.tasks))
    of_all = describe({"a": {0: columns}}, unmarked)["a"]
    assert of_all["accuracy at 0.7"][0] == pytest.approx(columns["correct@0.7"].mean())
    assert not any("order-" in name or "thinking" in name for name in of_all)
    plain = measure_all(nano, items_of_chats(items.chats), seed=1, ratios=(0.0, 0.7))
    assert not any(name.startswith(("correct", "ceiling")) for name in plain)
    assert np.isnan(plain["mode@0"]).all()
    assert plain["loss@0"] == pytest.approx(columns["loss@0"])
    assert "tokens an answer" in describe({"a": {0: plain}}, items_of_chats(items.chats))["a"]


def test_two_items_are_measured_without_an_earlier_turn():
    items = made_items(34, seed=1)
    two = replace(items, tasks=items.tasks[:2], chats=items.chats[:2])
    found = measure_all(load_model("nano"), two, ratios=(0.0, 0.7), max_new_tokens=4)
    assert "correct@0" in found
    assert "correct substituted" in found
    assert not [name for name in found if "bleed" in name or name == "correct second"]
