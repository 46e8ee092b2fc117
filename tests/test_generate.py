"""Decoding: order, independence of the batch, limits and refusals."""

import copy

from ironlogic.data.problems import make_tasks
from ironlogic.generate import chat_ids, generate
from ironlogic.models import ModelError, load_model, model_inputs

import pytest
import torch
import transformers

PROMPTS = [task.prompt for task in make_tasks(12, seed=3, split="test")]
THINK = [[{"role": "system", "content": "Think first."}, {"role": "user", "content": p}] for p in PROMPTS]


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_prompts_for_any_batch_size(nano):
    together = generate(nano, PROMPTS)
    alone = [generate(nano, [[{"role": "user", "content": prompt}]])[0] for prompt in PROMPTS]  # messages, too
    assert [(c.text, c.tokens) for c in together] == [(c.text, c.tokens) for c in alone]
    assert len({c.text for c in together}) > 5


def test_going_on_in_stages_gives_what_one_stage_gives(nano, monkeypatch):
    runs = []
    for limit in (4, 60):
        monkeypatch.setattr("ironlogic.generate._FIRST_LIMIT", limit)
        runs.append([(c.text, c.tokens, c.finished) for c in generate(nano, THINK, max_new_tokens=60)])
    assert runs[0] == runs[1]
    assert max(tokens for _, tokens, _ in runs[0]) > 16, "three stages"
    text, _, finished = runs[0][0]
    assert text.startswith("<think>")  # special tokens are not in the text, thinking is
    assert "</think>" in text
    assert "<|im_end|>" not in text
    assert finished


@pytest.mark.slow
def test_sampling_is_seeded(nano):
    one, again, other = ([c.text for c in generate(nano, PROMPTS, temperature=3, seed=s)] for s in (1, 1, 2))
    assert one == again != other


def test_limits_and_wrong_prompts(nano):
    (answer,) = generate(nano, PROMPTS[:1], max_new_tokens=1)
    assert (answer.tokens, answer.finished) == (1, False)
    assert generate(nano, []) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(nano, [PROMPTS[0], []])
    with pytest.raises(TypeError, match="expected a list"):
        generate(nano, PROMPTS[0])


def test_a_template_that_refuses_is_told_in_our_words(nano):
    strict = copy.deepcopy(nano.tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="refuses turns of these roles: user, user .roles must alternate"):
        chat_ids(strict, [[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]])


@pytest.mark.parametrize(("name", "wanted"), [("Gemma3ForConditionalGeneration", 2), ("Qwen3ForCausalLM", 1)])
def test_token_types_go_to_models_that_ask_for_them_only(name, wanted):
    """To Gemma 3 they say where a picture is; Qwen3 refuses them."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    batch = {"input_ids": torch.ones(1, 2), "token_type_ids": torch.zeros(1, 2)}
    assert len(model_inputs(model, batch)) == wanted
