"""The mask, held against literals, transformers' own mask and real chat templates; for hostile texts too."""

import copy
import html
import re
from functools import cache
from itertools import groupby
from pathlib import Path

from ironlogic.data.chats import ChatError, Chats, load_chats
from ironlogic.data.masking import IGNORED, Encoded, encode_chat, encode_chats, show_mask

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# --- small tokenizers and templates

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "</s>"]
SPECIALS += ["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|reply_end|>", "<|assistant|>"]
CORPUS = ["user\n", "assistant\n", "model\n", "a\n\nb\n\n\nc", "the answer is four, the question is what.", "\n\n"]


@cache
def train_tokenizer(trim_offsets: bool, rstrip: bool) -> Tokenizer:
    """Byte-level BPE that has merged newlines; 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(one, rstrip=rstrip, special=True) for one in SPECIALS])
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in ("<think>", "</think>")])
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def make_tokenizer(template: str, *, trim_offsets: bool = False, rstrip: bool = False, **options):
    copied = Tokenizer.from_str(train_tokenizer(trim_offsets, rstrip).to_str())
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copied, **options)
    tokenizer.chat_template = template
    assert len(tokenizer) < 400
    return tokenizer


CHATML = """{%- for m in messages -%}
<|im_start|>{{ m.role + '\\n' }}
{%- if m.role == 'assistant' -%}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# Old answers lose their thought, the last one is given an empty one if it has none.
THINKING = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- if m.role != 'assistant' -%}{{ m.content }}
{%- elif not loop.last -%}{{ said }}
{%- else -%}
  {%- set thought = m.content.split('</think>')[0].replace('<think>', '') if '</think>' in m.content else '' -%}
  {{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said }}
{%- endif -%}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# The same, but the thought is begun for the model.
OPENED = THINKING.replace("assistant\\n' }}{%- endif -%}", "assistant\\n<think>\\n' }}{%- endif -%}")

GEMMA = """{{ bos_token }}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

MISTRAL = """{{ bos_token }}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ ' ' + m.content + '</s>' }}
{%- else -%}{{ '[INST] ' + m.content + ' [/INST]' }}{%- endif -%}
{%- endfor -%}"""

# The system prompt goes into the last turn if a user has it: with the answer behind it, it is gone.
WANDERING = """{%- if messages[0].role == 'system' -%}
{%- set first, rest = messages[0].content + '. ', messages[1:] -%}
{%- else -%}{%- set first, rest = '', messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'assistant' -%}{{ ' ' + m.content + '</s>' }}
{%- else -%}{{ '[INST] ' + (first if loop.last else '') + m.content + ' [/INST]' }}{%- endif -%}
{%- endfor -%}"""

# Another end for the last answer than for those before.
TWO_ENDS = """{%- for m in messages -%}
{{ '<|start|>' + m.role }}{%- if m.role == 'assistant' -%}{{ ' final' }}{%- endif -%}
{{ '<|message|>' + m.content }}
{{- '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""

PARTS_ONLY = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + ':' }}
{%- for part in m.content -%}
{%- if part['type'] == 'image' or 'image' in part -%}<image>{%- else -%}{{ ' ' + part['text'] }}{%- endif -%}
{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant:' }}{%- endif -%}"""

NO_END = "{%- for m in messages -%}{{ m.role + ': ' + m.content + '\\n' }}{%- endfor -%}"
NO_END += "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"


def turns(*texts, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def trained(encoded: Encoded, tokenizer) -> list[str]:
    """The text of each unbroken run of trained tokens; every label is checked on the way."""
    assert len(encoded.input_ids) == len(encoded.labels)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    runs = groupby(encoded.labels, lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for is_trained, run in runs if is_trained]


def refuse(messages, tokenizer, *parts: str, **options) -> None:
    with pytest.raises(ChatError) as caught:
        encode_chat(messages, tokenizer, **options)
    for part in parts:
        assert part in str(caught.value)


# --- what is trained, by kind of template

SAID = "<think>\nadd\n</think>\n\nFour."
GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}
# Its closing token and the header begin with the same two characters, and a thought is begun in the prompt
ANOTHER_CLOSE = """{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endfor -%}
{{- '<|assistant|><think>' if add_generation_prompt else '<|endoftext|>' -}}"""
TWO_TOKENS = CHATML.replace("'<|im_end|>' }}{% end", "'<|reply_end|><|im_end|>' }}{% end")
BY_QUESTION = "{%- set opening = 'xyz' if '/no' in messages[-1].content else '<think>' -%}" + CHATML.replace(
    "assistant\\n' }}{%- endif", "assistant\\n' + opening }}{%- endif"
)
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
TRAINED = [
    (CHATML, turns("What?", "Four.", "And?", "你好 🙂"), ["Four.<|im_end|>", "你好 🙂<|im_end|>"]),
    (CHATML, turns("What?", "Four.", system="Be kind."), ["Four.<|im_end|>"]),
    (CHATML, [*turns("q", "a"), {"role": "assistant", "content": "b"}], ["a<|im_end|>", "b<|im_end|>"]),
    (CHATML, turns("q", "<|im_end |> and <end_of_turn>"), ["<|im_end |> and <end_of_turn><|im_end|>"]),
    (CHATML, turns(PARTS, [{"type": "text", "text": "Four."}]), ["Four.<|im_end|>"]),
    (PARTS_ONLY, turns("What?", "Four."), [" Four.<|im_end|>"]),
    # thoughts that the template strips from old answers, or gives to the last one
    (THINKING, turns("What?", SAID), [SAID + "<|im_end|>"]),
    (THINKING, turns("What?", SAID, "And?", SAID), ["Four.<|im_end|>", SAID + "<|im_end|>"]),
    (THINKING, turns("q", SAID, "r", "b"), ["Four.<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]),
    # a thought that the prompt begins is not trained again, and "<b" is not taken for a part of "<think>"
    (OPENED, turns("What?", SAID), ["add\n</think>\n\nFour.<|im_end|>"]),
    (OPENED, turns("q", "<b>2</b>", "r", SAID), ["<b>2</b><|im_end|>", "add\n</think>\n\nFour.<|im_end|>"]),
    (BY_QUESTION, turns("q", "a"), ["a<|im_end|>"]),
    (BY_QUESTION, turns("q /no", "xyz a"), [" a<|im_end|>"]),
    (ANOTHER_CLOSE, turns("q", "<think>a</think>b"), ["a</think>b<|end|>"]),
    (GEMMA, turns(" q", " Four.\n", "r\n", "\n Five. "), ["Four.<end_of_turn>", "Five.<end_of_turn>"]),
    (MISTRAL, turns("What?", "Four.", "And?", "Five."), [" Four.</s>", " Five.</s>"]),
    (WANDERING, turns("What?", "Four.", "And?", "Five."), [" Four.</s>", " Five.</s>"]),
    (TWO_ENDS, turns("q", "a", "r", "b"), [" final<|message|>a<|end|>", " final<|message|>b<|return|>"]),
    (TWO_TOKENS, turns("q", "a", "r", "b"), ["a<|reply_end|><|im_end|>", "b<|reply_end|><|im_end|>"]),
]
TOKENS = {
    GEMMA: GEMMA_TOKENS,
    MISTRAL: {"bos_token": "<bos>", "eos_token": "</s>"},
    WANDERING: {"eos_token": "</s>"},
}


@pytest.mark.parametrize(("template", "messages", "expected"), TRAINED)
def test_the_answers_and_their_ends_are_trained_and_nothing_else(template, messages, expected):
    tokenizer = make_tokenizer(template, **TOKENS.get(template, {}))
    before = copy.deepcopy(messages)
    assert trained(encode_chat(messages, tokenizer), tokenizer) == expected
    assert messages == before


def test_the_tokens_are_those_of_the_library_itself():
    for template in (CHATML, THINKING, OPENED, GEMMA, MISTRAL, TWO_ENDS):
        tokenizer = make_tokenizer(template, bos_token="<bos>")
        messages = turns("What?\n\n", "<think>\nhm\n</think>\n\nFour.", "And\n?", "Five\n.")
        expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert encode_chat(messages, tokenizer).input_ids == expected
        everything = encode_chat(messages, tokenizer, loss="all")
        assert everything.input_ids == everything.labels == expected


def test_templates_that_want_parts_get_them():
    picture = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]
    dataset = load_chats([{"messages": turns(picture, "A cat.")}])  # absent keys are null in it, not absent
    tokenizer = make_tokenizer(PARTS_ONLY)
    encoded, _ = encode_chats(dataset, tokenizer, max_length=99)
    assert tokenizer.decode(encoded[0]["input_ids"]) == (
        "<|im_start|>user:<image> What?<|im_end|>\n<|im_start|>assistant: A cat.<|im_end|>\n"
    )


# --- refusals: never a wrong mask

STRIPS = CHATML.replace("{{ m.content +", "{{ m.content.split('</think>')[-1] +")
CUTS = CHATML.replace("{{ m.content + '<|im_end|>\\n' }}", "{{ m.content[:9] + '<|im_end|>\\n' }}")
OPEN_IF_LONG = CHATML.replace(
    "m.content + '<|im_end|>' }}{% end",
    "m.content + ('<|im_end|>' if m.content | length < 20 else '') }}{% end",
)
UNANSWERED = CHATML.replace("{%- for m in", "{{ 'to be answered\\n' if messages[-1].role == 'user' }}{%- for m in")
NOW = MISTRAL.replace("m.content + ' [/INST]'", "m.content + (' now' if loop.last else '') + ' [/INST]'")
SHOWN = WANDERING.replace("loop.last", "loop.last or loop.nextitem == rest[-1]")
LONG = "An answer of some length."
SPLIT = [{"type": "text", "text": "<|im"}, {"type": "text", "text": "_end|>"}]
DOUBT = "can't be told from what is around it"
REFUSED = [
    *((CHATML, turns("q", f"so {one} it is"), f"messages[1].content holds '{one}'") for one in SPECIALS[:3]),
    (CHATML, turns("x<|im_end|>", "a"), "messages[0].content holds '<|im_end|>', by which the chat template marks"),
    (CHATML, turns("q", "a", system="<|im_end|>"), "messages[0].content holds"),
    (CHATML, turns("q", SPLIT), "messages[1].content holds"),
    (PARTS_ONLY, turns([{"type": "image"}, *SPLIT], "a"), "messages[0].content holds"),
    (ANOTHER_CLOSE, turns("q", "a <|assistant|> b"), "holds '<|assistant|>'"),
    (CHATML, turns([{"type": "image"}, *PARTS], "A cat."), "are refused by the chat template"),
    (GEMMA, turns("q", "a", system="s"), "messages are refused by the chat template: System role not supported"),
    (GEMMA, [*turns("q"), *turns("q", "a")], "Roles must alternate"),
    (STRIPS, turns("What?", SAID), "messages[1] loses its beginning in the chat"),
    (STRIPS, turns("Shall I add?", SAID), "messages[1] loses its beginning in the chat"),
    (
        CUTS,
        turns("a question of some length", "a"),
        "messages[0].content is left out or moved by the chat template",
    ),
    (CUTS, turns("?????????!", "a"), "messages[0].content is left out or moved by the chat template"),
    (WANDERING, turns("q", "a", system="Be kind"), "messages[0].content is left out or moved by the chat template"),
    (SHOWN, turns("q", "a", "r", "b", system="Be kind"), "messages[1].content is left out or moved by"),
    (UNANSWERED, turns("q", "a"), f"messages[1] {DOUBT}"),
    (NOW, turns("q", "a"), f"messages[1] {DOUBT}"),
    (OPEN_IF_LONG, turns("q", LONG, "r", "b"), f"messages[1] {DOUBT}"),
    (OPEN_IF_LONG, turns("q", "a", "r", LONG), f"messages[3] {DOUBT}"),
    (BY_QUESTION, turns("q /no", "a"), f"messages[1] {DOUBT}"),
    (CHATML, "hello", "messages is 'hello'; expected a list of turns"),
    (CHATML, turns("q"), "messages has no assistant turn"),
    (CHATML, turns("\ud800", "a"), "messages[0].content holds half a surrogate pair"),
]


@pytest.mark.parametrize(("template", "messages", "reason"), REFUSED)
def test_what_would_make_the_mask_doubtful_is_refused(template, messages, reason):
    refuse(messages, make_tokenizer(template, **TOKENS.get(template, {"bos_token": "<bos>"})), reason)


def test_a_template_without_an_end_is_refused_and_still_good_for_loss_all():
    tokenizer = make_tokenizer(NO_END)
    refuse(turns("q", "a"), tokenizer, "no special token behind an answer", 'use loss="all"')
    assert tokenizer.decode(encode_chat(turns("q", "a"), tokenizer, loss="all").labels) == "user: q\nassistant: a\n"


BROKEN = {
    "syntax": "{% for m in %}",
    "undefined": "{{ messages[0].nothing.at.all }}",
    "type": "{{ 1 + messages[0].content }}",
    "zero": "{{ 1 // 0 }}",
    "attack": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "endless": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deaf": "<|im_start|><|im_end|>",
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_whatever_a_template_does_it_is_a_chat_error(template):
    refuse(turns("q", "a"), make_tokenizer(template), "the chat template can't be used for two plain exchanges: ")


def test_tokenizers_that_cannot_be_used(monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    refuse(turns("q", "a"), tokenizer, "loss is 'user'; expected assistant or all", loss="user")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    refuse(turns("q", "a"), tokenizer, "the tokenizer has no chat template; set one")
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    refuse(turns("q", "a"), tokenizer, "can't tell where its tokens come from; load a fast tokenizer")


# --- tokens and borders


def test_a_token_across_the_beginning_of_an_answer_is_not_trained():
    tokenizer = make_tokenizer(CHATML)
    assert len(tokenizer("\n\n")["input_ids"]) == 1  # else this tests nothing
    encoded = encode_chat(turns("q", "\n\nFour."), tokenizer)
    assert trained(encoded, tokenizer) == ["\nFour.<|im_end|>"]  # the first newline is in a token with the header's
    assert encoded.straddling == 1
    assert "not trained because they begin before their answer: 1" in str(
        encode_chats(dataset_of(turns("q", "\n\nFour.")), tokenizer, max_length=99)[1]
    )
    assert encode_chat(turns("q", "Four.\n"), tokenizer).straddling == 0


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_blank_of_the_header_is_not_trained_when_offsets_are_trimmed(trim_offsets):
    template = CHATML.replace("m.role + '\\n'", "m.role + ': '").replace("assistant\\n", "assistant: ")
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    first = tokenizer("x the", return_offsets_mapping=True)["offset_mapping"][1]
    assert first[0] == (2 if trim_offsets else 1)  # else this tests nothing
    encoded = encode_chat(turns("q", "the answer"), tokenizer)
    assert (trained(encoded, tokenizer), encoded.straddling) == ([" answer<|im_end|>"], 1)
    encoded = encode_chat(turns("q", "Four."), make_tokenizer(CHATML, trim_offsets=trim_offsets))
    assert (trained(encoded, tokenizer), encoded.straddling) == (["Four.<|im_end|>"], 0)


def test_a_tokenizer_that_drops_blanks_still_trains_the_first_word():
    words = Tokenizer(
        models.WordLevel({one: at for at, one in enumerate(["?", "Four.", "user", "assistant"])}, "?")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    labels = encode_chat(turns("q", "Four. Four."), tokenizer).labels
    said = tokenizer.convert_tokens_to_ids(["Four.", "Four.", "<|im_end|>"])
    assert [label for label in labels if label != IGNORED] == said


def test_a_tokenizer_that_adds_tokens_by_itself_adds_none_here():
    tokenizer = make_tokenizer(GEMMA, bos_token="<bos>", eos_token="<end_of_turn>")
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[bos])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # else this tests nothing
    assert encode_chat(turns("q", "a"), tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_an_end_token_that_swallows_the_newline_is_still_trained():
    tokenizer = make_tokenizer(CHATML, rstrip=True)
    assert tokenizer("<|im_end|>\n", return_offsets_mapping=True)["offset_mapping"] == [(0, 11)]
    assert trained(encode_chat(turns("q", "a", "r", "b"), tokenizer), tokenizer) == ["a<|im_end|>", "b<|im_end|>"]


def test_an_end_that_is_no_token_of_its_own_there_is_refused():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken("!<|im_end|>", special=False, normalized=False)])
    refuse(turns("q", "Four!"), tokenizer, "end-of-turn token is merged with something")


# --- against others

ANY = st.text(max_size=40) | st.text("\n \t<>|thinka.é你🙂", max_size=20)
TEXT = ANY.filter(lambda text: text.strip() and "\0" not in text)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2]))
def test_the_mask_is_that_of_transformers_where_the_template_tells_it(texts):
    tokenizer = make_tokenizer(CHATML)
    encoded = encode_chat(turns(*texts), tokenizer)
    theirs = tokenizer.apply_chat_template(turns(*texts), return_dict=True, return_assistant_tokens_mask=True)
    ours = [int(label != IGNORED) for label in encoded.labels]
    assert encoded.input_ids == theirs["input_ids"]
    # They train a token that begins in the header, we do not.
    assert sum(theirs["assistant_masks"]) - sum(ours) == encoded.straddling
    assert all(mine <= other for mine, other in zip(ours, theirs["assistant_masks"], strict=True))
    spans = trained(encoded, tokenizer)
    wanted = [text + "<|im_end|>" for text in texts[1::2]]
    assert len(spans) == len(wanted)
    assert encoded.straddling or spans == wanted
    assert all(want.endswith(span) for span, want in zip(spans, wanted, strict=True))


REAL = ["qwen3", "qwen3_instruct_2507", "llama3", "gemma3", "cohere2", "phi3", "qwen2_5_vl"]


@pytest.mark.parametrize("name", REAL)
def test_real_templates_against_the_tagged_form_that_trl_ships(name):
    """Our mask for the maker's template is what TRL's copy with the tag gives, less what it tags behind the end."""
    folder = Path(trl.__file__).parent / "chat_templates"
    makers, tagged = ((folder / f"{name}{form}.jinja").read_text() for form in ("", "_training"))
    marks = "<|eot_id|> <|start_header_id|> <|end_header_id|> <|START_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|user|>"
    marks = [*marks.split(), "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|assistant|>"]
    ours, theirs = (make_tokenizer(text, bos_token="<bos>", eos_token="</s>") for text in (makers, tagged))
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    for messages in (
        turns("What?", "<think>\nadd\n</think>\n\nFour."),
        turns("What?", "Four."),
        turns("q", "a", "r", "b"),
    ):
        encoded = encode_chat(messages, ours)
        other = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if encoded.input_ids != other["input_ids"]:  # TRL's Qwen3 gives old answers a thought
            assert (name, len(messages)) == ("qwen3", 4)
            continue
        runs = groupby(zip(other["input_ids"], other["assistant_masks"], strict=True), lambda pair: pair[1])
        expected = [theirs.decode([token for token, _ in run]) for tagged, run in runs if tagged]
        assert trained(encoded, ours) == [one.removesuffix("</s>").removesuffix("\n") for one in expected]


HOSTILE = TEXT | st.sampled_from(
    ["<|im_end|>", "<think>", "</think>x", "a</think>", "[/INST]", " </s>", "user: ", "\r\n"]
)
TEMPLATES = dict.fromkeys([CHATML, THINKING, OPENED, PARTS_ONLY], r"<\|im_end\|>")
TEMPLATES |= {GEMMA: "<end_of_turn>", MISTRAL: "</s>", WANDERING: "</s>", TWO_ENDS: r"<\|end\|>|<\|return\|>"}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(TEMPLATES)),
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), HOSTILE), min_size=2, max_size=6),
)
def test_any_chat_with_any_template_is_refused_or_right(template, said):
    tokenizer = make_tokenizer(template, bos_token="<bos>", eos_token="</s>")
    messages = [{"role": role, "content": text} for role, text in said]
    try:
        encoded = encode_chat(messages, tokenizer)
    except ChatError:
        return
    spans = trained(encoded, tokenizer)
    ends = TEMPLATES[template]
    pieces = re.split(ends, "".join(spans))  # answers in a row are one span where there is no header between them
    answers = [text for role, text in said if role == "assistant"]
    assert pieces.pop() == ""
    assert len(pieces) == len(answers)
    assert all(re.search(f"({ends})$", span) for span in spans)
    assert not re.search(r"<\|im_start\|>|<start_of_turn>|\[INST\]|<\|start\|>", "".join(spans))
    for piece, answer in zip(pieces, answers, strict=True):
        assert encoded.straddling or answer.split("</think>")[-1].strip() in piece


# --- many rows


def dataset_of(*chats: list[dict], **columns) -> Chats:
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(chats))]
    return load_chats([{"messages": chat, **row} for chat, row in zip(chats, rows, strict=True)])


def test_rows_are_cut_dropped_refused_and_counted():
    tokenizer = make_tokenizer(CHATML)
    whole, long, hopeless = turns("q", "Four."), turns("q", "Four. " * 30), turns("q " * 100, "a")
    bad = turns("q", "<|im_end|>")
    dataset = dataset_of(whole, long, hopeless, bad, epoch=[0, 0, 1, 1], row=[4, 3, 2, 1])
    encoded, report = encode_chats(dataset, tokenizer, max_length=40)
    assert encoded.column_names == ["source_row", "epoch", "row", "input_ids", "labels"]
    assert encoded["source_row"][:] == [1, 2]
    assert encoded["row"][:] == [4, 3]
    alone = [encode_chat(messages, tokenizer) for messages in (whole, long, hopeless)]
    assert encoded[0]["input_ids"] == alone[0].input_ids
    assert encoded[0]["labels"] == alone[0].labels
    assert encoded[1]["input_ids"] == alone[1].input_ids[:40]
    assert encoded[1]["labels"] == alone[1].labels[:40]
    longest = max(len(one.input_ids) for one in alone)
    assert (report.rows, report.longest, report.cut, report.dropped) == (4, longest, 2, 1)
    assert report.tokens == len(alone[0].input_ids) + 40
    assert report.trained == sum(label != IGNORED for row in encoded["labels"] for label in row)
    assert str(report) == (
        f"2 of 4 rows are longer than 40 tokens and were cut (longest {longest}); "
        "1 had no trained token left and was dropped; 1 could not be encoded and left out, first row 4: "
        "messages[1].content holds '<|im_end|>', by which the chat template marks turns; rewrite it"
    )
    exact = len(alone[0].input_ids)
    fits = encode_chats(dataset_of(whole), tokenizer, max_length=exact)[1]
    assert str(fits) == f"all 1 rows fit in {exact} tokens (longest {exact})"


def test_the_prompt_alone_and_the_first_token_train_nothing():
    tokenizer = make_tokenizer(CHATML)
    labels = encode_chat(turns("q", "Four."), tokenizer).labels
    first = next(at for at, label in enumerate(labels) if label != IGNORED)
    with pytest.raises(ChatError, match=r"no row is left to train on: 1 of 1 rows is longer than .* and was cut"):
        encode_chats(dataset_of(turns("q", "Four.")), tokenizer, max_length=first)
    assert encode_chats(dataset_of(turns("q", "Four.")), tokenizer, max_length=first + 1)[1].trained == 1
    with pytest.raises(ChatError, match="no row is left"):
        encode_chats(dataset_of(turns("q", "a")), tokenizer, max_length=1, loss="all")
    with pytest.raises(ChatError, match=r"max_length is 0; expected a number of tokens, 1 or more"):
        encode_chats(dataset_of(turns("q", "a")), tokenizer, max_length=0)


def test_processes_and_formats_change_nothing():
    tokenizer = make_tokenizer(CHATML)
    dataset = dataset_of(*[turns(f"question {i}", f"answer {i} " * (i % 7) or "<|im_end|>") for i in range(40)])
    one, report = encode_chats(dataset, tokenizer, max_length=30)
    two, same = encode_chats(dataset, tokenizer, max_length=30, num_proc=2)
    assert one.to_list() == two.to_list()
    assert report == same
    assert [one.line for one in report.rejected] == [1, 8, 15, 22, 29, 36]


# --- the picture of it


def test_a_row_is_shown_span_by_span():
    tokenizer = make_tokenizer(CHATML)
    encoded, _ = encode_chats(
        dataset_of(turns("What\x1b[31m?", "Four.\n", "And?", "你好")), tokenizer, max_length=99
    )
    lines = show_mask(encoded[0], tokenizer).split("\n")
    count = sum(label != IGNORED for label in encoded[0]["labels"])
    assert lines == [
        f"{count} of {len(encoded[0]['labels'])} tokens are trained",
        r"   read | '<|im_start|>user\nWhat\x1b[31m?<|im_end|>\n<|im_start|>assistant\n'",
        r"trained | 'Four.\n<|im_end|>'",
        r"   read | '\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n'",
        "trained | '你好<|im_end|>'",
        r"   read | '\n'",
    ]


def test_html_shows_the_same_and_runs_nothing():
    tokenizer = make_tokenizer(CHATML)
    attack = "</pre><script>alert(1)</script><img src=x onerror='a'>&lt;\u202e\x07"
    page = show_mask(encode_chat(turns(attack, "</mark> 你好"), tokenizer), tokenizer, html=True)
    assert page.isprintable() or "\n" in page
    ours = (
        r'</?(?:figure|figcaption|pre style="white-space: pre-wrap"|pre|(?:span|mark) title="[a-z, ]+"|span|mark)>'
    )
    assert "<" not in re.sub(ours, "", page)
    assert attack[:-2] + "\\u202e\\x07" in html.unescape(page)
    assert '<mark title="trained">&lt;/mark&gt; 你好&lt;|im_end|&gt;</mark>' in page
