"""Measures: each against a reader of known behaviour or the model's own numbers, and all of them on nano."""

from dataclasses import replace

from ironlogic.data.problems import task_chat, thinks
from ironlogic.evidence import measures
from ironlogic.evidence.items import Items, items_of_chats, made_items
from ironlogic.evidence.measures import (
    context_bleeding,
    decoding_speed,
    describe,
    layer_columns,
    loops,
    measure,
    measure_losses,
    mode_switching,
    reply_scores,
    robustness,
    substituted,
)
from ironlogic.evidence.results import Measurement
from ironlogic.evidence.statistics import difference_interval
from ironlogic.generate import Completion
from ironlogic.models import add_lora, load_model
from ironlogic.presets import LoraSettings
from ironlogic.session import ROOT

import numpy as np
import pytest
import torch

ITEMS = made_items(80, seed=3)


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


def test_a_perfect_reader_of_clean_text_is_measured_as_such(monkeypatch):
    truth = {task.prompt: f"Answer: {task.answer}" for task in ITEMS.tasks}

    def oracle(loaded, prompts, **_):
        return [Completion(truth.get(prompt, "Answer: ?"), 1, True, 0.0) for prompt in prompts]

    monkeypatch.setattr(measures, "generate", oracle)
    answered = robustness(None, ITEMS.tasks, ratios=(0.0, 1.0))
    assert answered.correct[0].mean() == 1.0
    assert answered.correct[1].mean() < 0.1  # a full scramble now and then leaves a prompt as it is


@pytest.mark.slow
def test_nano_knows_its_world_in_order_and_nobody_beats_the_ceiling(nano):
    items = made_items(160, seed=3)
    columns = robustness(nano, items.tasks, seed=1).columns()
    for order in ("free", "bound"):
        clean, scrambled = (columns[f"correct@{ratio}"][items.among(order)].mean() for ratio in (0, 1))
        assert clean > 0.8
        assert scrambled < clean - 0.25
    assert columns["ceiling@0"].min() == 1.0
    assert columns["ceiling@1"].mean() < 0.85
    for ratio in (0, 0.3, 0.5, 0.7, 1):
        excess = (columns[f"correct@{ratio}"] - columns[f"ceiling@{ratio}"])[items.among("bound")]
        assert excess.mean() < 3 * excess.std() / len(excess) ** 0.5 + 1e-9, ratio


def test_losses_and_scores_are_the_models_own(nano):
    chats = [task_chat(task) for task in ITEMS.tasks[:3]]
    broken = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    columns = measure_losses(nano, [*chats, broken], ratios=(0.0, 1.0), batch_size=2)
    prompts, replies = [chat[0]["content"] for chat in chats], [chat[1]["content"] for chat in chats]
    asked = [[{"role": "user", "content": prompt}] for prompt in [*prompts, "x"]]
    scores = reply_scores(nano, asked, [*replies, "a<|im_end|>b"], batch_size=2)
    assert all(np.isnan(values[3]) for values in (columns["loss@0"], scores["sure"], scores["entropy"]))
    assert columns["loss@1"][:3].mean() > columns["loss@0"][:3].mean()
    for row, chat in enumerate(chats):
        encoded = measures.encode_chat(chat, nano.tokenizer)
        labels = torch.tensor(encoded.labels[1:])
        with torch.no_grad():
            logp = nano.model(input_ids=torch.tensor([encoded.input_ids])).logits[0, :-1].log_softmax(-1)
        logp, labels = logp[labels >= 0], labels[labels >= 0]
        reply = logp[range(len(labels)), labels]
        assert columns["loss@0"][row] == pytest.approx(-reply.mean().item(), rel=1e-3)
        assert scores["sure"][row] == pytest.approx(reply.mean().exp().item(), rel=1e-3)
        assert scores["sure of all"][row] == pytest.approx(reply.sum().exp().item(), rel=1e-3)
        assert scores["entropy"][row] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-3)


def test_a_reply_that_follows_itself_loops_and_a_long_ordinary_text_does_not():
    assert loops("so we add so we add so we add so we add it")
    assert loops("first something else. " + "Considering the game structure again. " * 3)
    assert loops("ha " * 12)
    assert not loops("very very very good")
    assert not loops("so we add two and then we add three")
    assert not loops("a b c d e f g h a b c d e f g h")  # twice
    assert not loops((ROOT / "README.md").read_text())
    assert not loops((ROOT / "LICENSE").read_text())


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
    asked = []

    def reader(loaded, chats, **_):
        asked.extend(chats)
        return [Completion(chat[0 if parrot == "first" else -1]["content"], 5, True, 0.0) for chat in chats]

    monkeypatch.setattr(measures, "generate", reader)
    bled = context_bleeding(None, ITEMS, seed=1)
    assert least <= bled.found.mean() <= most
    assert bled.permuted.mean() < 0.3  # chance
    prompts = [task.prompt for task in ITEMS.tasks]  # each item follows another one
    assert [chat[2]["content"] for chat in asked] == prompts
    assert all(chat[0]["content"] != chat[2]["content"] for chat in asked)
    assert sorted(chat[0]["content"] for chat in asked) == sorted(prompts)
    with pytest.raises(ValueError, match="3 or more"):
        context_bleeding(None, Items(ITEMS.tasks[:2], ITEMS.chats[:2]))


def test_substituted_words_leave_little_to_answer_by(nano):
    assert substituted(nano, ITEMS, ratio=0.0).mean() > 0.7
    assert substituted(nano, ITEMS, ratio=1.0).mean() < 0.2


def test_speed_is_timed_at_a_forced_length_for_every_arm(tmp_path):
    fresh = add_lora(load_model("nano", four_bit=False), LoraSettings(rank=4), seed=1)
    fresh.model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    base = load_model("nano", four_bit=False)  # its own: the adapter stays on it
    seconds = decoding_speed(base, {"SFT": tmp_path / "a"}, ["What is it?", "Who?"], tokens=8, repeats=1)
    assert {arm: values.shape for arm, values in seconds.items()} == {"base": (2,), "SFT": (2,)}
    assert all((values > 0).all() for values in seconds.values())


def test_layers_of_an_adapter_are_read_beside_its_base(nano):
    items = made_items(40, seed=5)
    of_base = layer_columns(nano, items)
    assert set(of_base) == {"silent layers", "late entropy"}  # nothing to have moved from
    read = np.isfinite(of_base["late entropy"])
    assert read.sum() == 24
    assert (of_base["late entropy"][read] > 0).all()
    fresh = add_lora(load_model("nano-moe", four_bit=False), LoraSettings(rank=4), seed=1)
    untrained = layer_columns(fresh, items)
    assert untrained["attention shift"][read] == pytest.approx(0)  # B is zero
    with torch.no_grad():
        for name, weight in fresh.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    moved = layer_columns(fresh, items)
    assert (moved["attention shift"][read] > 0.001).all()
    assert (moved["routing shift"][read] > 0.0001).all()


@pytest.mark.slow
def test_all_of_it_on_nano(nano):
    items = made_items(40, seed=4)
    columns = measure(nano, items, seed=1)
    assert {len(values) for values in columns.values()} == {40}
    assert columns["correct@0"].mean() > columns["correct@1"].mean()
    assert columns["mode@0"].mean() == pytest.approx(1 - items.among("hard").mean())  # the base never thinks
    table = describe({"a": {0: columns, 1: columns}, "a 30 rows": {0: columns}}, items)
    assert list(table.columns) == [("a", "mean"), ("a", "sd")]
    means = table["a", "mean"]
    assert table.loc["thinking: recall"].tolist() == [0, 0]
    assert "thinking: precision" not in means  # it never thinks
    assert 0 < means["share of the ceiling at 0.7, order-bound"] < 1.5
    assert means["area under the curve, order-free"] < columns["correct@0"][items.among("free")].mean()
    unmarked = replace(items, tasks=tuple(replace(task, order="unknown", hard=None) for task in items.tasks))
    of_all = describe({"a": {0: columns}}, unmarked)["a", "mean"]
    assert of_all["accuracy at 0.7"] == pytest.approx(columns["correct@0.7"].mean())
    assert not any("order-" in name or "thinking" in name for name in of_all.index)
    conversations = items_of_chats(items.chats)
    plain = measure(nano, replace(conversations, ratios=(0.0, 0.7)), seed=1)
    assert not any(name.startswith(("correct", "ceiling")) for name in plain)
    assert np.isnan(plain["mode@0"]).all()
    assert plain["loss@0"] == pytest.approx(columns["loss@0"])
    assert "tokens an answer" in describe({"a": {0: plain}}, conversations).index
    two = measure(nano, replace(items, tasks=items.tasks[:2], chats=items.chats[:2]), max_new_tokens=4)
    assert {"correct@0", "correct substituted"} <= set(two)
    assert not [name for name in two if "bleed" in name or name == "correct second"]  # needs two other items


def test_a_measurement_subtracts_by_training_and_item():
    rng = np.random.default_rng(0)
    ft = Measurement({seed: {"correct@0": rng.random(20), "x": np.ones(20)} for seed in (1, 2, 3)})
    sft = Measurement({seed: {"correct@0": rng.random(20)} for seed in (2, 3, 4)})
    gap = ft - sft
    assert list(gap) == [2, 3]
    ours, theirs = ([arm[seed]["correct@0"] for seed in (2, 3)] for arm in (ft, sft))
    assert str(gap.interval("correct@0")) == str(difference_interval(ours, theirs))
    assert str(gap) == f"accuracy, clean: {gap.interval('correct@0'):+}\n(2 trainings x 20 items)"
    base = Measurement({0: {"correct@0": np.full(20, np.nan)}})  # stands beside every training
    assert list(ft - base) == [1, 2, 3]
    assert "accuracy" not in str(ft - base)
    with pytest.raises(ValueError, match="no training seed is in both"):
        ft - Measurement({9: sft[2]})
