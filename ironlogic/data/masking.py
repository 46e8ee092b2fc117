"""Chats -> token ids and labels: what a model is trained on, made here and shown to the user.

The mask is read off the chat template itself, so it depends on no library's version and needs no `{% generation %}`
in the template. An answer begins where the whole rendered chat and the rendered prompt for that answer (what the
model is given when it has to answer) part, and ends with the template's end-of-turn token, which is trained.
Whatever would make that doubtful is refused: texts that hold a token by which the template marks turns, templates
that write the prompt otherwise once its answer is there, templates that leave a text out.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import groupby, takewhile
from typing import Any, Literal
from weakref import WeakKeyDictionary

from ironlogic.data.chats import ChatError, Chats, Rejected, check_chat, plain_turns

from datasets import Dataset, Features, List, Value

__all__ = [
    "IGNORED",
    "EncodeReport",
    "Encoded",
    "encode_chat",
    "encode_chats",
    "lost_rows",
    "show_mask",
    "turn_end",
]

Loss = Literal["assistant", "all"]
IGNORED = -100  # the label that PyTorch's cross entropy leaves out

_REPLACED = {"messages", "images", "input_ids", "labels", "outcome"}  # columns of the chats that do not stay
_OUTCOME = {name: Value("int64") for name in ("length", "trained", "straddling")}  # tokens
_OUTCOME |= {name: Value("string") for name in ("field", "value", "reason")}  # of a row that can't be encoded


@dataclass(frozen=True)
class Encoded:
    """One chat. `labels` is `input_ids` where trained and IGNORED elsewhere, not shifted; both (T,)."""

    input_ids: list[int]
    labels: list[int]
    straddling: int = 0  # tokens across the beginning of an answer, not trained: a part of each is the header's


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows. Prints as a sentence."""

    rows: int  # that came in
    max_length: int  # tokens
    longest: int  # tokens of the longest row before it was cut
    cut: int  # rows longer than max_length, cut on the right
    dropped: int  # rows left out because no trained token was left
    tokens: int  # in the rows that came out
    trained: int  # of these tokens
    straddling: int  # tokens across the beginning of an answer, not trained
    rejected: tuple[Rejected, ...]  # rows left out because they can't be encoded

    def __str__(self) -> str:
        if self.cut:
            longer, cut = ("is", "was") if self.cut == 1 else ("are", "were")
            fits = f"{self.cut} of {self.rows} rows {longer} longer than {self.max_length} tokens and {cut} cut"
        else:
            fits = f"all {self.rows} rows fit in {self.max_length} tokens"
        sentences = [f"{fits} (longest {self.longest})"]
        if self.dropped:
            dropped = "was" if self.dropped == 1 else "were"
            sentences.append(f"{self.dropped} had no trained token left and {dropped} dropped")
        if self.straddling:
            sentences.append(f"tokens not trained because they begin before their answer: {self.straddling}")
        if self.rejected:
            count, first = len(self.rejected), self.rejected[0]
            sentences.append(f"{count} could not be encoded and left out, first {first}")
        return "; ".join(sentences)


def encode_chat(messages: Any, tokenizer: Any, *, loss: Loss = "assistant") -> Encoded:
    """The chat as the chat template of the (fast) tokenizer writes it, with labels.

    `loss="assistant"` trains every answer and its end-of-turn token: not the header before it, nor what follows.
    `loss="all"` trains every token, as the seeds' scripts do.

    Raises ChatError if `messages` is no chat, the template refuses it, or the answers can't be told without doubt.
    """
    return _encode(check_chat(messages), tokenizer, _template_of(tokenizer, loss), loss)


def encode_chats(
    chats: Chats, tokenizer: Any, *, loss: Loss = "assistant", max_length: int, num_proc: int | None = None
) -> tuple[Dataset, EncodeReport]:
    """The chats as `input_ids` and `labels`, cut to `max_length` tokens on the right.

    All other columns stay, but for the bytes of pictures. A chat that can't be encoded, or has nothing left to
    train, is left out and reported. Raises ChatError if that leaves no row, or if the tokenizer or its template
    can't be used at all.
    """
    if type(max_length) is not int or max_length < 1:
        raise ChatError(f"max_length is {max_length!r}; expected a number of tokens, 1 or more")
    if not len(chats):
        raise ChatError("there are no rows; expected one chat or more")
    template = _template_of(tokenizer, loss)
    kept = {name: kind for name, kind in chats.rows.features.items() if name not in _REPLACED}
    made = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "outcome": _OUTCOME}
    encoded = chats.rows.map(
        _encode_row,
        fn_kwargs={"tokenizer": tokenizer, "template": template, "loss": loss, "max_length": max_length},
        remove_columns=[name for name in chats.rows.column_names if name in _REPLACED],
        features=Features(kept | made),
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="tokens and labels",
    )
    outcomes = encoded["outcome"][:]
    report = _report(outcomes, chats, max_length)
    good = [row for row, outcome in enumerate(outcomes) if outcome["trained"]]
    if not good:
        raise ChatError(f"no row is left to train on: {report}")
    return encoded.select(good).remove_columns("outcome"), report


def turn_end(tokenizer: Any) -> str | None:
    """The token that the chat template puts behind a last answer, with which training ends it; None without one.

    Raises ChatError when the template can't be used at all.
    """
    return next(iter(_template_of(tokenizer, "all").last_end), None)


def lost_rows(chats: Chats, tokenizer: Any, *, max_length: int) -> list[int]:
    """Indices of the chats that have no token left to train once they are cut to `max_length`."""
    options = {"template": _template_of(tokenizer, "assistant"), "loss": "assistant", "max_length": max_length}
    rows = (_encode_row({"messages": messages}, tokenizer=tokenizer, **options) for messages in chats)
    return [index for index, row in enumerate(rows) if not row["outcome"]["trained"]]


def show_mask(encoded: Encoded | Mapping, tokenizer: Any, *, html: bool = False) -> str:
    """One row, span by span: what is only read and what is trained. Text, or HTML (trained spans are marked).

    `encoded` is an `Encoded` or a row of the dataset made by `encode_chats`. Everything in it is escaped.
    """
    if isinstance(encoded, Mapping):
        encoded = Encoded(encoded["input_ids"], encoded["labels"])
    spans = []  # (trained?, text)
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for trained, span in groupby(pairs, lambda pair: pair[1] != IGNORED):
        spans.append((trained, tokenizer.decode([token for token, _ in span], clean_up_tokenization_spaces=False)))
    count = sum(label != IGNORED for label in encoded.labels)
    title = f"{count} of {len(encoded.labels)} tokens are trained"
    if not html:
        lines = [f"{'trained' if trained else '   read'} | {text!r}" for trained, text in spans]
        return "\n".join([title, *lines])
    tags = {True: '<mark title="trained">{}</mark>', False: '<span title="read, not trained">{}</span>'}
    body = "".join(tags[trained].format(_escape(text)) for trained, text in spans)
    return f'<figure><figcaption>{title}</figcaption><pre style="white-space: pre-wrap">{body}</pre></figure>'


def _escape(text: str) -> str:
    """HTML without control characters and without the invisible ones that turn the direction of writing."""
    visible = (char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    return escape("".join(visible))


# --- what a chat template writes around the texts
_PROBES = ("Zq1 asks", "Zq2 answers", "Zq3 asks", "Zq4 answers")  # found again whatever a template puts around them


@dataclass(frozen=True)
class _Template:
    """A chat template's own wording, read off two short exchanges."""

    parts: bool  # it wants contents as lists of parts, not as strings
    opening: str  # what it appends when an answer is asked for
    last_end: list[str]  # end-of-turn tokens behind the last answer
    inner_end: list[str]  # and behind an answer that another turn follows; empty where it writes none
    reserved: re.Pattern  # the tokens by which it marks turns


_templates: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> (what the template depends on, template)


def _template_of(tokenizer: Any, loss: Loss) -> _Template:
    """The template of the tokenizer, read once. Raises ChatError where it can't be used for this loss."""
    if loss not in ("assistant", "all"):
        raise ChatError(f"loss is {loss!r}; expected assistant or all")
    if not tokenizer.is_fast:
        raise ChatError(f"{type(tokenizer).__name__} can't tell where its tokens come from; load a fast tokenizer")
    if not tokenizer.chat_template:
        raise ChatError("the tokenizer has no chat template; set one, or load the tokenizer of an instruct model")
    state = (tokenizer.chat_template, tokenizer.special_tokens_map)
    known_state, template = _templates.get(tokenizer, (None, None))
    if known_state != state:
        template = _read_template(tokenizer)
        _templates[tokenizer] = (state, template)
    if loss == "assistant" and not template.last_end:
        raise ChatError(
            "the chat template puts no special token behind an answer, so its end can't be told nor trained; "
            'use loss="all", or a template that ends every turn with such a token'
        )
    return template


def _read_template(tokenizer: Any) -> _Template:
    chat, text = _render_probes(tokenizer)
    question, prompt = _render(chat[:1], tokenizer), _render(chat[:1], tokenizer, opened=True)
    common = _common_length(question, prompt)
    across = [start for start, end in _tokenize(prompt, tokenizer)[1] if start <= common < end]
    opening = prompt[across[0] if across else common :]  # all of a token that lies across belongs to it

    used = [token for token in tokenizer.get_added_vocab() if token.strip() and token in text + prompt]
    tokens = _any_of(used)
    before, after_question, between, _, last = re.split("|".join(_PROBES), text)
    marks = {mark for part in (before, between, last) for mark in tokens.findall(part)}
    marks |= set(tokens.findall(opening)[:1])  # the header; a later one begins a thought, such as <think>
    marks |= {token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
    last_end, inner_end = _read_ends(*(_leading(tokens, part) for part in (last, between, after_question)))
    parts = isinstance(chat[0]["content"], list)
    return _Template(parts, opening, last_end, inner_end, _any_of(marks))


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches any of them, a longer one first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _leading(tokens: re.Pattern, text: str) -> list[str]:
    """The tokens with which the text begins."""
    return tokens.findall(re.match(f"(?:{tokens.pattern})*", text.lstrip())[0])


def _read_ends(last: list[str], between: list[str], after_question: list[str]) -> tuple[list[str], list[str]]:
    """The end-of-turn tokens of the last answer and of those before, from the tokens that follow the texts."""
    same = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(last, between, strict=False))]
    if same:
        return same, same
    # Two kinds of end, as in gpt-oss; the inner one ends questions too, or it is the next turn's header.
    ends_turns = bool(between) and between[:1] == after_question[:1]
    return last[:1], between[:1] if ends_turns else []


def _render_probes(tokenizer: Any) -> tuple[list[dict], str]:
    """Two exchanges in the form of content that the template reads, and how it writes them."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(_PROBES)]
    why = "it leaves their texts out"
    for parts in (False, True):
        chat = _as_parts(turns) if parts else turns
        try:
            text = _render(chat, tokenizer)
        except ChatError as error:
            why = error.reason
            continue
        if re.findall("|".join(_PROBES), text) == list(_PROBES):
            return chat, text
    raise ChatError(f"the chat template can't be used for two plain exchanges: {why}")


def _as_parts(messages: list[dict]) -> list[dict]:
    """The same messages, strings as lists of one text part."""
    turns = []
    for turn in messages:
        content = turn["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        turns.append({"role": turn["role"], "content": content})
    return turns


def _render(messages: list[dict], tokenizer: Any, *, opened: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # a template is a program of others: sandboxed, but free to fail in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ChatError(f"are refused by the chat template: {why}", field="messages") from error


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the (start, end) of each in the text."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return tokens["input_ids"], tokens["offset_mapping"]


def _common_length(a: str, b: str) -> int:
    """Characters of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- one chat
def _encode(messages: list[dict], tokenizer: Any, template: _Template, loss: Loss) -> Encoded:
    if template.parts:
        messages = _as_parts(messages)
    for index, turn in enumerate(messages):
        if mark := template.reserved.search("".join(_texts(turn))):
            reason = f"holds {mark[0]!r}, by which the chat template marks turns; rewrite it"
            raise ChatError(reason, field=f"messages[{index}].content")
    text = _render(messages, tokenizer)
    _check_texts(messages, text)
    ids, offsets = _tokenize(text, tokenizer)
    if loss == "all":
        return Encoded(ids, list(ids))
    labels, straddling, at = [IGNORED] * len(ids), 0, 0
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        start, end, end_ids = _find_answer(messages, index, text, tokenizer, template)
        while at < len(ids) and offsets[at][1] <= start:
            at += 1
        while at < len(ids) and offsets[at][1] <= end:
            if _begins_before(start, ids, offsets, at, tokenizer):
                straddling += 1
            else:
                labels[at] = ids[at]
            at += 1
        behind = at + len(end_ids)
        if ids[at:behind] != end_ids:
            raise ChatError("hold an answer whose end-of-turn token is merged with something", field="messages")
        labels[at:behind] = end_ids
        at = behind
    return Encoded(ids, labels, straddling)


def _texts(turn: dict) -> list[str]:
    if isinstance(turn["content"], str):
        return [turn["content"]]
    return [part["text"] for part in turn["content"] if part["type"] == "text"]


def _last_word(text: str) -> str:
    """The last word and the signs behind it; what stands before, a template may rewrite."""
    word = re.search(r"\w+\W*$", text.strip()[-100:])
    return word[0] if word else text.strip()[-1:]


def _first_word(text: str) -> str:
    """The first word that is no tag."""
    word = re.search(r"(?<![\w<])\w+", text)
    return word[0][:20] if word else ""


def _check_texts(messages: list[dict], rendered: str) -> None:
    """The end of every text is there, in order; the beginning need not be (templates strip old thoughts)."""
    position = 0
    for index, turn in enumerate(messages):
        for word in map(_last_word, _texts(turn)):
            start = rendered.find(word, position)
            if start < 0:
                raise ChatError("is left out or moved by the chat template", field=f"messages[{index}].content")
            position = start + len(word)


def _find_answer(
    messages: list[dict], index: int, text: str, tokenizer: Any, template: _Template
) -> tuple[int, int, list[int]]:
    """Where the answer of turn `index` begins and ends in the rendered chat `text`, and the ids that end it.

    Raises ChatError where that is in doubt.
    """
    field, is_last = f"messages[{index}]", index == len(messages) - 1
    end_tokens = template.last_end if is_last else template.inner_end
    if not end_tokens:
        reason = (
            "is not ended by a special token in this chat template when a turn follows; train it as the last one"
        )
        raise ChatError(reason, field=field)
    prompt = _render(messages[:index], tokenizer, opened=True)
    start, opening_start = len(prompt), len(prompt) - len(template.opening)
    if not text.startswith(prompt):  # it leaves the opening early, which may begin a thought that this turn has not
        common = _common_length(prompt, text) if prompt.endswith(template.opening) else 0
        ends = [end for _, end in _tokenize(prompt, tokenizer)[1]]
        start = max((end for end in ends if opening_start < end <= common), default=-1)
    end = text.find("".join(end_tokens), start)
    answer = "".join(_texts(messages[index]))
    if start < 0 or end < 0 or not text[start:end].rstrip().endswith(_last_word(answer)):
        reason = "can't be told from what is around it: the chat template does not write it as it wrote others"
        raise ChatError(reason, field=field)
    if is_last and _first_word(answer) not in text[opening_start:end]:
        reason = "loses its beginning in the chat template; a thought? Use a template that keeps it"
        raise ChatError(reason, field=field)
    return start, end, tokenizer.convert_tokens_to_ids(end_tokens)


def _begins_before(start: int, ids: list[int], offsets: list[tuple[int, int]], at: int, tokenizer: Any) -> bool:
    """Whether a part of token `at` belongs to what stands before character `start`."""
    previous_end = offsets[at - 1][1] if at else 0
    if previous_end < start <= offsets[at][0]:  # the blanks between were dropped, or trimmed off its offsets
        return tokenizer.decode([ids[at]])[:1].isspace()
    return offsets[at][0] < start


# --- many chats
def _encode_row(row: Mapping, *, tokenizer: Any, template: _Template, loss: Loss, max_length: int) -> dict:
    encoded, problem = Encoded([], []), ChatError("")
    try:
        encoded = _encode(plain_turns(row["messages"]), tokenizer, template, loss)
    except ChatError as error:
        problem = error
    labels = encoded.labels[:max_length]
    outcome = {
        "length": len(encoded.labels),
        "trained": sum(label != IGNORED for label in labels[1:]),  # nothing predicts the first token
        "straddling": encoded.straddling,
        "field": problem.field,
        "value": problem.value,
        "reason": problem.reason,
    }
    return {"input_ids": encoded.input_ids[:max_length], "labels": labels, "outcome": outcome}


def _report(outcomes: list[dict], chats: Chats, max_length: int) -> EncodeReport:
    rejected = []
    for index, outcome in enumerate(outcomes):
        if outcome["reason"]:
            error = ChatError(outcome["reason"], field=outcome["field"], value=outcome["value"])
            rejected.append(chats.reject(index, error))
    whole = [outcome for outcome in outcomes if not outcome["reason"]]
    good = [outcome for outcome in whole if outcome["trained"]]
    return EncodeReport(
        rows=len(outcomes),
        max_length=max_length,
        longest=max((outcome["length"] for outcome in whole), default=0),
        cut=sum(outcome["length"] > max_length for outcome in whole),
        dropped=len(whole) - len(good),
        tokens=sum(min(outcome["length"], max_length) for outcome in good),
        trained=sum(outcome["trained"] for outcome in good),
        straddling=sum(outcome["straddling"] for outcome in good),
        rejected=tuple(rejected),
    )
