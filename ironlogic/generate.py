"""Batched decoding with its timing. Knows prompts and tokens, not what a good answer is."""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from ironlogic.models import (
    LoadedModel,
    ModelError,
    as_loaded,
    bare,
    free_memory,
    inference,
    model_inputs,
    need_template,
)

import torch
import transformers
from jinja2 import TemplateError

__all__ = [
    "Completion",
    "chat_ids",
    "end_ids",
    "generate",
    "prompt_text",
    "rows_can_share",
    "stream",
    "visible_text",
]

Prompt = str | Sequence[dict[str, Any]]
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_FIRST_LIMIT = 8  # tokens; answers still open then go on to 4 times as many, and so on


@dataclass(frozen=True)
class Completion:
    """One answer. `seconds` is the batch's time shared evenly among its answers."""

    text: str
    tokens: int  # with the end-of-turn token
    finished: bool  # ended by itself, not by the limit
    seconds: float


def generate(
    loaded: LoadedModel | Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Completion]:
    """One answer a prompt (text of a user turn, or messages), in the order of the prompts.

    Greedy at temperature 0. Prompts of similar length share a batch, padded on the left. Special tokens are
    not in the text. Sampling seeds torch's global generators with `seed`, and
    what is drawn then depends on `batch_size` too.
    """
    loaded = as_loaded(loaded)
    if isinstance(prompts, str):
        raise TypeError("generate: prompts is one text; expected a list of texts or of message lists")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; expected 1 or more")
    if not prompts:
        return []
    ids = chat_ids(loaded.tokenizer, prompts)
    sampling = _GREEDY
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": 1.0, "top_k": 0}
        transformers.set_seed(seed)
    ends = end_ids(loaded)
    spoken: list[list[int]] = [[] for _ in ids]
    seconds = [0.0] * len(ids)
    open_rows, limit = list(range(len(ids))), _FIRST_LIMIT
    if not rows_can_share(loaded):
        batch_size = 1
    with inference(loaded) as model:
        while open_rows:
            # a batch takes as long as its longest answer: the long ones go on among themselves
            limit = min(limit, max_new_tokens)
            open_rows.sort(key=lambda i: len(ids[i]) + len(spoken[i]))
            for begin in range(0, len(open_rows), batch_size):
                rows = open_rows[begin : begin + batch_size]
                began = time.perf_counter()
                so_far = [ids[i] + spoken[i] for i in rows]
                more = _fitting(loaded, model, so_far, limit - len(spoken[rows[0]]), sampling)
                for i, tokens in zip(rows, more, strict=True):
                    spoken[i] += tokens
                    seconds[i] += (time.perf_counter() - began) / len(rows)
            open_rows = [i for i in open_rows if spoken[i][-1] not in ends and limit < max_new_tokens]
            limit *= 4
    return [_completion(loaded.tokenizer, *answer, ends) for answer in zip(spoken, seconds, strict=True)]


def rows_can_share(loaded: LoadedModel) -> bool:
    """Whether a row of a padded batch is answered as it is alone.

    Asked of models with a recurrent state, some of which run over their padding (transformers 5.17: RWKV,
    RecurrentGemma).
    """
    if not getattr(bare(loaded.model), "_is_stateful", False):
        return True
    with inference(loaded) as model:
        row, pad = list(range(1, 4)), [0] * 4
        ids = torch.tensor([pad + row, row[:1] * 4 + row], device=loaded.device)
        mask = torch.ones_like(ids)
        mask[0, : len(pad)] = 0
        together = model(input_ids=ids, attention_mask=mask).logits[0, -1].float()
        alone = model(input_ids=ids[:1, len(pad) :]).logits[0, -1].float()
    return (together - alone).abs().max().item() < 0.1 * alone.std().item()  # padding: several times that spread


def prompt_text(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The messages as the chat template writes them, up to where the answer begins. Raises `ModelError`."""
    try:
        return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ModelError(f"the chat template refuses turns of these roles: {roles} ({error})") from error


def chat_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt (text of a user turn, or messages) up to where the answer begins."""
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    if [] in chats:
        raise ValueError(f"generate: prompt {chats.index([])} is empty")
    need_template(tokenizer)
    texts = [prompt_text(tokenizer, chat) for chat in chats]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def stream(
    loaded: LoadedModel | Any,
    messages: Sequence[dict[str, Any]],
    tell: Callable[[str], None],
    *,
    pictures: Sequence[Any] = (),
    max_new_tokens: int = 256,
) -> Completion:
    """One greedy answer; `tell` is called with all of its text so far after every token.

    `pictures` (PIL) stand for the image parts of the messages, in their order; they need a model that sees.
    """
    loaded = as_loaded(loaded)
    if pictures and loaded.processor is None:
        raise ValueError(f"stream: {loaded.source} can't see; it takes no pictures")
    if loaded.processor is None:
        inputs = {"input_ids": torch.tensor(chat_ids(loaded.tokenizer, [messages]))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        text = prompt_text(loaded.processor, messages)
        seen = {"images": list(pictures)} if pictures else {}
        inputs = loaded.processor(text=text, **seen, add_special_tokens=False, return_tensors="pt")
    ends, asked = end_ids(loaded), inputs["input_ids"].shape[1]

    def tell_and_go_on(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # called after every token
        tell(visible_text(loaded.tokenizer, ids[0, asked:].tolist(), ends))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    began = time.perf_counter()
    with inference(loaded) as model:
        ids = model.generate(
            **model_inputs(model, inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=loaded.tokenizer.pad_token_id,
            stopping_criteria=transformers.StoppingCriteriaList([tell_and_go_on]),
            **_GREEDY,
        )
    return _completion(loaded.tokenizer, ids[0, asked:].tolist(), time.perf_counter() - began, ends)


def _fitting(loaded, model, rows: list[list[int]], max_new_tokens: int, sampling: dict) -> list[list[int]]:
    """`_decode`, in halves where the card is too small for all of them."""
    try:
        return _decode(loaded, model, rows, max_new_tokens, sampling)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    free_memory()  # out of the except block: the error holds the tensors
    half = len(rows) // 2
    first = _fitting(loaded, model, rows[:half], max_new_tokens, sampling)
    return first + _fitting(loaded, model, rows[half:], max_new_tokens, sampling)


def _decode(loaded, model, rows: list[list[int]], max_new_tokens: int, sampling: dict) -> list[list[int]]:
    """New tokens of one batch of token ids padded on the left, each row up to its end token."""
    tokenizer, ends = loaded.tokenizer, end_ids(loaded)
    longest = max(map(len, rows))
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        input_ids=padded.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )[:, longest:].tolist()  # the copy to the CPU waits for the card
    stops = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in out]
    return [row[:stop] for row, stop in zip(out, stops, strict=True)]


def end_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer: the tokenizer's and the model's (Gemma ends a turn with another one)."""
    ends = loaded.model.generation_config.eos_token_id
    return {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _completion(tokenizer, ids: list[int], seconds: float, ends: set[int]) -> Completion:
    return Completion(visible_text(tokenizer, ids, ends), len(ids), ids[-1] in ends, seconds)


def visible_text(tokenizer: Any, ids: Sequence[int], ends: Container[int] = ()) -> str:
    """The text of an answer: without end and special tokens (`<think>` is none of them, in Qwen3 and in nano)."""
    return tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True)
