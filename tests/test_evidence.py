"""Robustness and answer loss: against a reader of known ability and against the model's own loss."""

from ironlogic.data.problems import make_tasks, task_chat
from ironlogic.evidence import measure as evidence
from ironlogic.evidence.measure import accuracy, answer_loss, difference, robustness, scramble
from ironlogic.generate import Completion
from ironlogic.models import load_model

import numpy as np
import pytest
import torch

TASKS = make_tasks(136, seed=3, split="test")


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


@pytest.fixture(scope="module")
def measured(nano):
    return robustness(nano, TASKS, seed=1)


def test_base_model_knows_its_world_in_order_and_suffers_from_scrambling(measured):
    for order in ("free", "bound"):
        assert measured.pick(0.0, order).mean() > 0.8
        assert measured.pick(1.0, order).mean() < measured.pick(0.0, order).mean() - 0.25
    assert measured.ceiling[0].min() == 1.0
    assert measured.ceiling[-1].mean() < 0.85


def test_no_reader_beats_the_ceiling(measured):
    bound = [task.order == "bound" for task in TASKS]
    for k, ratio in enumerate(measured.ratios):
        excess = measured.correct[k][bound] - measured.ceiling[k][bound]
        assert excess.mean() < 3 * excess.std() / len(excess) ** 0.5 + 1e-9, ratio


def test_perfect_reader_of_clean_text_is_measured_as_such(monkeypatch, nano):
    truth = {task.prompt: f"Answer: {task.answer}" for task in TASKS}

    def oracle(loaded, prompts, **_):
        return [Completion(truth.get(p, "Answer: ?"), 1, True, 0.0) for p in prompts]

    monkeypatch.setattr(evidence, "generate", oracle)
    found = robustness(nano, TASKS, ratios=(0.0, 1.0))
    assert found.correct[0].mean() == 1.0
    assert found.correct[1].mean() < 0.1  # a full scramble now and then leaves a prompt as it is
    assert accuracy([found], 0.0, "free").low == 1.0
    assert difference([found], [found], 0.0, "free").mean == 0.0


def test_test_scrambles_are_seeded_and_apart_from_training():
    assert scramble(TASKS[0].prompt, 0.7, seed=1, item=0) == scramble(TASKS[0].prompt, 0.7, seed=1, item=0)
    found = {scramble(TASKS[0].prompt, 0.7, seed=seed, item=item) for seed in range(4) for item in range(4)}
    assert len(found) > 12


def test_unmeasured_ratio_is_named(measured):
    with pytest.raises(ValueError, match="ratio 0.2 was not measured"):
        measured.pick(0.2, "free")


def test_answer_loss_is_the_models_own_loss(nano):
    chats = [task_chat(task) for task in TASKS[:5]]
    found = answer_loss(nano, chats, ratios=(0.0,), batch_size=3)
    assert found.nats.shape == (1, 5)
    for row, chat in enumerate(chats):
        encoded = evidence.encode_chat(chat, nano.tokenizer)
        with torch.no_grad():
            ids = torch.tensor([encoded.input_ids])
            loss = nano.model(input_ids=ids, labels=torch.tensor([encoded.labels])).loss.item()
        assert found.nats[0, row] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_answer_loss_rises_with_the_burden_and_counts_what_it_skips(nano):
    chats = [task_chat(task) for task in TASKS]
    broken = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    found = answer_loss(nano, [*chats, broken], ratios=(0.0, 1.0))
    assert found.skipped == 1
    assert found.nats.shape == (2, len(chats))
    assert found.nats[1].mean() > found.nats[0].mean() + 0.3
    assert np.isfinite(found.nats).all()
