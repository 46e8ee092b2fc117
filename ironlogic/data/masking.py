"""Chats -> token ids and labels: what a model is trained on, made here and shown to the user.

The mask is read off the chat template itself, so it depends on no library's version and needs no `{% generation %}`
in the template. An answer begins where the whole rendered chat and the rendered prompt for that answer (what the
model is given when it has to answer) part, and ends with the template's end-of-turn token, which is trained.
Whatever would make that doubtful is refused: texts that hold a token by which the template marks turns, templates
that write the prompt otherwise once its answer is there, templates that leave a text out.

What this module does not know: models, batches, padding, pictures (an image is what the template writes for it).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import groupby, takewhile
from typing import Any, Literal

from ironlogic.data.chats import ChatError, Chats, Rejected, check_chat, plain_turns

from datasets import Dataset, List, Value

__all__ = ["IGNORED", "EncodeReport", "Encoded", "encode_chat", "encode_chats", "show_mask"]

Loss = Literal["assistant", "all"]
IGNORED = -100  # the label that PyTorch's cross entropy leaves out

_PROBES = ("Zq1 asks", "Zq2 answers", "Zq3 asks", "Zq4 answers")  # found again whatever a template puts around them
_SEEN = {name: Value("int64") for name in ("length", "trained", "straddling")}
_SEEN |= {name: Value("string") for name in ("field", "value", "reason")}


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
        said = [f"all {self.rows} rows fit in {self.max_length} tokens (longest {self.longest})"]
        if self.cut:
            longer, cut = ("is", "was") if self.cut == 1 else ("are", "were")
            said = [f"{self.cut} of {self.rows} rows {longer} longer than {self.max_length} tokens and {cut} cut"]
            said[0] += f" (longest {self.longest})"
        if self.dropped:
            dropped = "was" if self.dropped == 1 else "were"
            said.append(f"{self.dropped} had no trained token left and {dropped} dropped")
        if self.straddling:
            said.append(f"tokens not trained because they begin before their answer: {self.straddling}")
        if self.rejected:
            said.append(f"{len(self.rejected)} could not be encoded and left out, first {self.rejected[0]}")
        return "; ".join(said)


def encode_chat(messages: Any, tokenizer: Any, *, loss: Loss = "assistant") -> Encoded:
    """The chat as the chat template of the (fast) tokenizer writes it, with labels.

    `loss="assistant"` trains every answer and its end-of-turn token: not the header before it, nor what follows.
    `loss="all"` trains every token, as the seeds' scripts do.

    Raises ChatError if `messages` is no chat, the template refuses it, or the answers can't be told without doubt.
    """
    return _encode(check_chat(messages), tokenizer, _read_template(tokenizer, loss), loss)


def encode_chats(
    chats: Chats, tokenizer: Any, *, loss: Loss = "assistant", max_length: int, num_proc: int | None = None
) -> tuple[Dataset, EncodeReport]:
    """The chats as `input_ids` and `labels`, cut to `max_length` tokens on the right.

    All other columns stay. A chat that can't be encoded, or has nothing left to train, is left out and reported.
    Raises ChatError if that leaves no row, or if the tokenizer or its template can't be used at all.
    """
    if type(max_length) is not int or max_length < 1:
        raise ChatError(f"max_length is {max_length!r}; expected a number of tokens, 1 or more")
    if not len(chats):
        raise ChatError("there are no rows; expected one chat or more")
    template = _read_template(tokenizer, loss)
    dataset = chats.rows
    replaced = {"messages", "images", "input_ids", "labels", "_seen"}
    kept = {name: kind for name, kind in dataset.features.items() if name not in replaced}
    made = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "_seen": _SEEN}
    encoded = dataset.map(
        _encode_batch,
        batched=True,
        batch_size=100,
        fn_kwargs={"tokenizer": tokenizer, "template": template, "loss": loss, "max_length": max_length},
        remove_columns=list(replaced.intersection(dataset.column_names)),
        features=type(dataset.features)(kept | made),
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="tokens and labels",
    )
    seen = encoded["_seen"][:]
    report = _report(seen, chats, max_length)
    good = [row for row, one in enumerate(seen) if one["trained"]]
    if not good:
        raise ChatError(f"no row is left to train on: {report}")
    return encoded.select(good).remove_columns("_seen"), report


def show_mask(encoded: Encoded | Mapping, tokenizer: Any, *, html: bool = False) -> str:
    """One row, span by span: what is only read and what is trained. Text, or HTML (trained spans are marked).

    `encoded` is an `Encoded` or a row of the dataset made by `encode_chats`. Everything in it is escaped.
    """
    if isinstance(encoded, Mapping):
        encoded = Encoded(encoded["input_ids"], encoded["labels"])
    spans, pairs = [], zip(encoded.input_ids, encoded.labels, strict=True)
    for trained, run in groupby(pairs, lambda pair: pair[1] != IGNORED):
        spans.append((trained, tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)))
    trained = sum(label != IGNORED for label in encoded.labels)
    title = f"{trained} of {len(encoded.labels)} tokens are trained"
    if not html:
        return "\n".join([title, *(f"{'trained' if trained else '   read'} | {text!r}" for trained, text in spans)])
    tags = {True: '<mark title="trained">{}</mark>', False: '<span title="read, not trained">{}</span>'}
    body = "".join(tags[trained].format(_escape(text)) for trained, text in spans)
    return f'<figure><figcaption>{title}</figcaption><pre style="white-space: pre-wrap">{body}</pre></figure>'


def _escape(text: str) -> str:
    """HTML without control characters and without the invisible ones that turn the direction of writing."""
    shown = (one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)
    return escape("".join(shown))


# --- what a chat template writes around the texts


@dataclass(frozen=True)
class _Template:
    parts: bool  # does it want contents as lists of parts? Else as strings where there is only text
    opening: str  # what it appends when an answer is asked for
    cuts: tuple[int, ...]  # the token borders in the opening, in characters from its end, from 0 upwards
    ends: tuple[list[str], list[str]]  # the end-of-turn tokens behind the last answer and behind those before
    reserved: re.Pattern  # the tokens by which it marks turns


def _read_template(tokenizer: Any, loss: Loss) -> _Template:
    """Reads the template's own wording off two short exchanges."""
    if loss not in ("assistant", "all"):
        raise ChatError(f"loss is {loss!r}; expected assistant or all")
    if not tokenizer.is_fast:
        raise ChatError(f"{type(tokenizer).__name__} can't tell where its tokens come from; load a fast tokenizer")
    if not tokenizer.chat_template:
        raise ChatError("the tokenizer has no chat template; set one, or load the tokenizer of an instruct model")
    chat, text = _render_probes(tokenizer)
    plain, prompt = _render(chat[:1], tokenizer), _render(chat[:1], tokenizer, opened=True)
    common, offsets = _common(plain, prompt), _tokenize(prompt, tokenizer)[1]
    opening = prompt[max((start for start, end in offsets if start <= common < end), default=common) :]
    cuts = {0} | {len(prompt) - end for _, end in offsets if len(prompt) - end < len(opening)}

    own = [token for token in tokenizer.get_added_vocab() if token.strip() and token in text + prompt]
    tokens = _any_of(own)
    _, _, between, _, last = re.split("|".join(_PROBES), text)
    marks = {mark for part in (plain, between, last) for mark in tokens.findall(part)}
    marks |= set(tokens.findall(opening)[:1])  # the header; a later one begins a thought, such as <think>
    marks |= {token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
    ends = _read_ends(last.lstrip(), between.lstrip(), tokens)
    if loss == "assistant" and not all(ends):
        raise ChatError(
            "the chat template puts no special token behind an answer, so its end can't be told nor trained; "
            'use loss="all", or a template that ends every turn with such a token'
        )
    parts = isinstance(chat[0]["content"], list)
    return _Template(parts, opening, tuple(sorted(cuts)), ends, _any_of(marks))


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches any of them, a longer one first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _render_probes(tokenizer: Any) -> tuple[list[dict], str]:
    """Two exchanges in the form of content that the template reads, and how it writes them."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(_PROBES)]
    why = "it leaves their texts out"
    for parts in (False, True):
        chat = _shape(turns, parts)
        try:
            text = _render(chat, tokenizer)
        except ChatError as error:
            why = error.reason
            continue
        if re.findall("|".join(_PROBES), text) == list(_PROBES):
            return chat, text
    raise ChatError(f"the chat template can't be used for two plain exchanges: {why}")


def _read_ends(last: str, between: str, tokens: re.Pattern) -> tuple[list[str], list[str]]:
    """The tokens with which both begin, most often one; else the first of each (so in gpt-oss)."""
    runs = [tokens.findall(re.match(f"(?:{tokens.pattern})*", part)[0]) for part in (last, between)]
    same = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*runs, strict=False))]
    return (same, same) if same else (runs[0][:1], runs[1][:1])


def _shape(messages: list[dict], parts: bool) -> list[dict]:
    """The same messages, strings as lists of one text part if the template wants `parts`."""
    shaped = []
    for turn in messages:
        content = turn["content"]
        if parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        shaped.append({"role": turn["role"], "content": content})
    return shaped


def _render(messages: list[dict], tokenizer: Any, *, opened: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # a template is a program of others: sandboxed, but free to fail in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ChatError(f"are refused by the chat template: {why}", field="messages") from error


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return tokens["input_ids"], tokens["offset_mapping"]


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    if other.startswith(one):
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


# --- one chat


def _encode(messages: Any, tokenizer: Any, template: _Template, loss: Loss) -> Encoded:
    messages = _shape(messages, template.parts)
    for index, turn in enumerate(messages):
        if found := template.reserved.search("".join(_texts(turn))):
            reason = f"holds {found[0]!r}, by which the chat template marks turns; rewrite it"
            raise ChatError(reason, field=f"messages[{index}].content")
    text = _render(messages, tokenizer)
    _check_texts(messages, text)
    ids, offsets = _tokenize(text, tokenizer)
    if loss == "all":
        return Encoded(ids, list(ids))
    return _label(ids, offsets, _find_answers(messages, text, tokenizer, template), tokenizer)


def _texts(turn: dict) -> list[str]:
    if isinstance(turn["content"], str):
        return [turn["content"]]
    return [part["text"] for part in turn["content"] if part["type"] == "text"]


def _tail(text: str) -> str:
    """The last word and the signs behind it; what stands before, a template may rewrite."""
    word = re.search(r"\w+\W*$", text.strip()[-100:])
    return word[0] if word else text.strip()[-1:]


def _head(text: str) -> str:
    """The first word that is no tag."""
    word = re.search(r"(?<![\w<])\w+", text)
    return word[0][:20] if word else ""


def _check_texts(messages: list[dict], rendered: str) -> None:
    """The end of every text is there, in order; the beginning need not be (templates strip old thoughts)."""
    place = 0
    for index, turn in enumerate(messages):
        for tail in map(_tail, _texts(turn)):
            found = rendered.find(tail, place)
            if found < 0:
                raise ChatError("is left out or moved by the chat template", field=f"messages[{index}].content")
            place = found + len(tail)


def _find_answers(
    messages: list[dict], text: str, tokenizer: Any, template: _Template
) -> Iterator[tuple[int, int, list[int]]]:
    """Of each answer its first character, its end, and the ids of the end-of-turn tokens that follow."""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        prompt = _render(messages[:index], tokenizer, opened=True)
        common = _common(prompt, text)
        # The chat may leave the opening early: it can hold a thought that this turn does not begin with.
        cuts = template.cuts if prompt.endswith(template.opening) else (0,)
        start = next((len(prompt) - cut for cut in cuts if len(prompt) - cut <= common), -1)
        mark = template.ends[index < len(messages) - 1]
        end = text.find("".join(mark), start)
        answer, field = "".join(_texts(turn)), f"messages[{index}]"
        if min(start, end) < 0 or not text[start:end].rstrip().endswith(_tail(answer)):
            reason = "can't be told from what is around it: the chat template does not write it as it wrote others"
            raise ChatError(reason, field=field)
        if turn is messages[-1] and _head(answer) not in text[len(prompt) - len(template.opening) : end]:
            reason = "loses its beginning in the chat template; a thought? Use a template that keeps it"
            raise ChatError(reason, field=field)
        yield start, end, tokenizer.convert_tokens_to_ids(mark)


def _label(ids: list[int], offsets: list, answers: Iterator[tuple[int, int, list[int]]], tokenizer: Any) -> Encoded:
    labels, straddling, at = [IGNORED] * len(ids), 0, 0
    for start, end, mark in answers:
        while at < len(ids) and offsets[at][1] <= start:
            at += 1
        while at < len(ids) and offsets[at][1] <= end:
            if _begins_before(start, ids, offsets, at, tokenizer):
                straddling += 1
            else:
                labels[at] = ids[at]
            at += 1
        if ids[at : at + len(mark)] != mark:
            raise ChatError("hold an answer whose end-of-turn token is merged with something", field="messages")
        labels[at : at + len(mark)] = mark
        at += len(mark)
    return Encoded(ids, labels, straddling)


def _begins_before(start: int, ids: list[int], offsets: list, at: int, tokenizer: Any) -> bool:
    before = offsets[at - 1][1] if at else 0
    if before < start <= offsets[at][0]:  # the blanks between were dropped, or trimmed off this token's offsets
        return tokenizer.decode([ids[at]])[:1].isspace()
    return offsets[at][0] < start


# --- many chats


def _encode_batch(batch: dict, *, tokenizer: Any, template: _Template, loss: Loss, max_length: int) -> dict:
    rows: dict[str, list] = {"input_ids": [], "labels": [], "_seen": []}
    for messages in batch["messages"]:
        one, problem = Encoded([], []), ChatError("")
        try:
            one = _encode(plain_turns(messages), tokenizer, template, loss)
        except ChatError as error:
            problem = error
        labels = one.labels[:max_length]
        trained = sum(label != IGNORED for label in labels[1:])  # nothing predicts the first token
        seen = {"length": len(one.labels), "trained": trained, "straddling": one.straddling}
        rows["input_ids"].append(one.input_ids[:max_length])
        rows["labels"].append(labels)
        rows["_seen"].append(seen | {"field": problem.field, "value": problem.value, "reason": problem.reason})
    return rows


def _report(seen: list[dict], chats: Chats, max_length: int) -> EncodeReport:
    rejected = []
    for index, one in enumerate(seen):
        if one["reason"]:
            error = ChatError(one["reason"], field=one["field"], value=one["value"])
            rejected.append(chats.reject(index, error))
    whole = [one for one in seen if not one["reason"]]
    out = [one for one in whole if one["trained"]]
    return EncodeReport(
        rows=len(seen),
        max_length=max_length,
        longest=max((one["length"] for one in whole), default=0),
        cut=sum(one["length"] > max_length for one in whole),
        dropped=len(whole) - len(out),
        tokens=sum(min(one["length"], max_length) for one in out),
        trained=sum(one["trained"] for one in out),
        straddling=sum(one["straddling"] for one in out),
        rejected=tuple(rejected),
    )
