"""Decoding: order, independence of the batch, limits and refusals."""

from ironlogic.data.problems import make_tasks
from ironlogic.generate import generate
from ironlogic.models import load_model, model_inputs

import pytest
import torch
import transformers

TASKS = make_tasks(24, seed=3, split="test")
PROMPTS = [task.prompt for task in TASKS]


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_prompts_for_any_batch_size(nano):
    together = generate(nano, PROMPTS, batch_size=24)
    alone = [generate(nano, [prompt])[0] for prompt in PROMPTS]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert len({c.text for c in together}) > 10


def test_text_and_messages_ask_the_same(nano):
    assert (
        generate(nano, PROMPTS[:2])[0].text
        == generate(nano, [[{"role": "user", "content": p}] for p in PROMPTS[:2]])[0].text
    )


def test_thinking_stays_visible_and_special_tokens_do_not(nano):
    chat = [{"role": "system", "content": "Think first."}, {"role": "user", "content": PROMPTS[0]}]
    (answer,) = generate(nano, [chat])
    assert answer.text.startswith("<think>")
    assert "</think>" in answer.text
    assert "<|im_end|>" not in answer.text
    assert answer.finished


def test_limit_is_reported(nano):
    (answer,) = generate(nano, PROMPTS[:1], max_new_tokens=1)
    assert (answer.tokens, answer.finished) == (1, False)


@pytest.mark.slow
def test_sampling_is_seeded(nano):
    def sample(seed):
        return [c.text for c in generate(nano, PROMPTS, temperature=3.0, seed=seed)]

    assert sample(1) == sample(1) != sample(2)


def test_going_on_in_stages_gives_what_one_stage_gives(nano, monkeypatch):
    chats = [[{"role": "system", "content": "Think first."}, {"role": "user", "content": p}] for p in PROMPTS]
    monkeypatch.setattr("ironlogic.generate._FIRST_LIMIT", 4)
    staged = generate(nano, chats, max_new_tokens=60)
    monkeypatch.setattr("ironlogic.generate._FIRST_LIMIT", 60)
    at_once = generate(nano, chats, max_new_tokens=60)
    assert [(c.text, c.tokens, c.finished) for c in staged] == [(c.text, c.tokens, c.finished) for c in at_once]
    assert max(c.tokens for c in staged) > 16, "three stages"


def test_empty_and_wrong_prompts(nano):
    assert generate(nano, []) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(nano, [PROMPTS[0], []])
    with pytest.raises(TypeError, match="expected a list"):
        generate(nano, PROMPTS[0])


@pytest.mark.parametrize(("name", "wanted"), [("Gemma3ForConditionalGeneration", 2), ("Qwen3ForCausalLM", 1)])
def test_token_types_go_to_models_that_ask_for_them_only(name, wanted):
    """To Gemma 3 they say where a picture is; Qwen3 refuses them."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    batch = {"input_ids": torch.ones(1, 2), "token_type_ids": torch.zeros(1, 2)}
    assert len(model_inputs(model, batch)) == wanted
