"""The chat without a browser: what it shows, whom it asks, what it keeps, and errors inside."""

import io
import re
from datetime import UTC, datetime
from itertools import pairwise

from ironlogic.data.problems import make_tasks
from ironlogic.generate import generate, stream
from ironlogic.models import add_lora, load_model
from ironlogic.presets import LoraSettings
from ironlogic.show.chat import answer_html, chat_box

import pytest
import torch
from eyes import on_nano
from PIL import Image

QUESTION = make_tasks(1, seed=3, split="test")[0].prompt


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", four_bit=False)


@pytest.fixture(scope="module")
def adapted():
    loaded = add_lora(load_model("nano", four_bit=False), LoraSettings(rank=4, alpha=8), seed=1)
    torch.manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1.0)
    return loaded


def test_streaming_tells_every_step_and_ends_like_generate(nano):
    chat = [{"role": "system", "content": "Think first."}, {"role": "user", "content": QUESTION}]
    told = []
    answer = stream(nano, chat, told.append, max_new_tokens=60)
    (whole,) = generate(nano, [chat], max_new_tokens=60)
    assert (answer.text, answer.tokens, answer.finished) == (whole.text, whole.tokens, True)
    assert told[-1] == answer.text
    assert len(told) == answer.tokens
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))
    assert stream(nano, chat, told.append, max_new_tokens=2).finished is False


@pytest.mark.slow
def test_answers_of_base_adapter_and_merged(nano, adapted):
    box = chat_box(adapted, merged=nano, text=QUESTION)
    assert box.controls["model"].options == ("base", "adapter", "merged")
    said = {}
    for name in box.controls["model"].options:
        box.forget()
        box.controls["model"].value = name
        box.send.click()
        said[name] = box.messages[-1]["content"]
        assert f"<b>{name}</b>" in box.talk.value
        assert "tokens/s" in box.talk.value
    assert said["base"] == said["merged"] == generate(nano, [QUESTION], max_new_tokens=256)[0].text
    assert said["adapter"] != said["base"]
    assert chat_box(nano).controls["model"].options == ("model",)


def test_the_slider_scrambles_what_is_asked(nano):
    box = chat_box(nano, text=QUESTION, ratio=1.0)
    shown = box.text.value
    assert "background" in shown, "moved words are coloured"
    box.ask()
    asked = box.messages[0]["content"]
    assert asked != QUESTION
    assert sorted(asked.split()) == sorted(QUESTION.split())
    next_one = box.text.value
    box.ask()
    assert next_one != shown, "every turn has a draw of its own"
    assert re.sub("<[^>]*>", "", next_one).endswith(f":{box.messages[2]['content']}"), "what is announced is asked"
    box.forget()
    assert box.text.value == shown
    box.controls["ratio"].value = 0.0
    assert box.text.value == "", "a question that is asked as it stands is shown once"
    box.ask()
    assert box.messages[0]["content"] == QUESTION


def test_the_system_text_opens_the_conversation_and_thinking_is_folded(nano):
    box = chat_box(nano, text=QUESTION, system="Think first.")
    box.ask()
    assert "<summary>thought:" in box.talk.value
    assert box.messages[-1]["content"].startswith("<think>")


def test_a_conversation_goes_on_until_it_is_too_long(nano):
    box = chat_box(nano, text=QUESTION)
    box.ask()
    box.controls["text"].value = "And why?"
    box.ask()
    assert [m["role"] for m in box.messages] == ["user", "assistant"] * 2
    box.controls["text"].value = "word " * 600
    box.ask()
    assert "start a new conversation" in box.talk.value
    assert len(box.messages) == 4, "the question that failed is not kept"
    assert not box.send.disabled
    box.controls["text"].value = " "
    box.ask()
    assert "the question is empty" in box.talk.value
    assert "text/html" in box._repr_mimebundle_()


def test_thinking_is_folded_and_markup_shown_as_text():
    html = answer_html("<think>\n3 + 4 = 7\n</think>\nAnswer: <b>7</b>")
    assert "<details><summary>thought: 5 words</summary>" in html
    assert html.index("3 + 4") < html.index("</details>") < html.index("Answer: &lt;b&gt;7")
    assert "<summary>thinking: 2 words so far" in answer_html("<think>so far", done=False)
    assert "<details>" in answer_html("opened by the template</think>Yes")
    assert "<details>" not in answer_html("no thought")
    assert "<script" not in answer_html("<think><script>x</script></think><script>y</script>")


def test_a_model_that_sees_gets_the_uploaded_picture():
    loaded, seen = on_nano(), []
    box = chat_box(loaded, text="What is this?", max_new_tokens=8)
    tower = next(module for name, module in loaded.model.named_modules() if name.endswith("vision_tower"))
    tower.register_forward_hook(lambda *_: seen.append(1))
    upload(box, b"no picture")
    assert "no picture of a kind that is read here" in box.text.value
    box.ask()
    assert (box.messages, seen) == ([], [])
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, format="png")
    upload(box, buffer.getvalue())
    assert "<img" in box.text.value
    box.ask()
    assert seen, box.talk.value
    assert box.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    box.ask()
    assert box.messages[2]["content"] == [{"type": "text", "text": "What is this?"}], "one picture is shown once"
    assert "Error" not in box.talk.value.partition("<img")[2]


def upload(box, content):
    file = {"name": "x.png", "type": "image/png", "size": len(content), "content": memoryview(content)}
    box.controls["image"].value = ({**file, "last_modified": datetime.now(UTC)},)
