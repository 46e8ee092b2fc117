"""Batched decoding with its timing. Knows prompts and tokens, not what a good answer is."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ironlogic.models import LoadedModel, as_loaded, inference

import torch  # isort: skip  (models comes first: it imports Unsloth before transformers)
import transformers  # isort: skip

__all__ = ["Completion", "generate"]

Prompt = str | Sequence[dict[str, Any]]
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
    not in the text, except `<think>` and `</think>`. Sampling seeds torch's global generators with `seed`, and
    what is drawn then depends on `batch_size` too.
    """
    loaded = as_loaded(loaded)
    if isinstance(prompts, str):
        raise TypeError("generate: prompts is one text; expected a list of texts or of message lists")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; expected 1 or more")
    if not prompts:
        return []
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    if empty := [i for i, chat in enumerate(chats) if not chat]:
        raise ValueError(f"generate: prompt {empty[0]} is empty")
    texts = [
        loaded.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        transformers.set_seed(seed)
    ends = _end_ids(loaded)
    spoken: list[list[int]] = [[] for _ in ids]
    seconds = [0.0] * len(ids)
    open_rows, limit = list(range(len(ids))), _FIRST_LIMIT
    with inference(loaded) as model:
        while open_rows:
            # a batch takes as long as its longest answer: the long ones go on among themselves
            limit = min(limit, max_new_tokens)
            open_rows.sort(key=lambda i: len(ids[i]) + len(spoken[i]))
            for begin in range(0, len(open_rows), batch_size):
                rows = open_rows[begin : begin + batch_size]
                began = time.perf_counter()
                so_far = [ids[i] + spoken[i] for i in rows]
                more = _decode(loaded, model, so_far, limit - len(spoken[rows[0]]), sampling)
                for i, tokens in zip(rows, more, strict=True):
                    spoken[i] += tokens
                    seconds[i] += (time.perf_counter() - began) / len(rows)
            open_rows = [i for i in open_rows if spoken[i][-1] not in ends and limit < max_new_tokens]
            limit *= 4
    return [_completion(loaded.tokenizer, *answer, ends) for answer in zip(spoken, seconds, strict=True)]


def _decode(loaded, model, rows: list[list[int]], max_new_tokens: int, sampling: dict) -> list[list[int]]:
    """New tokens of one batch of token ids padded on the left, each row up to its end token."""
    tokenizer, ends = loaded.tokenizer, _end_ids(loaded)
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


def _end_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer: the tokenizer's and the model's (Gemma ends a turn with another one)."""
    ends = loaded.model.generation_config.eos_token_id
    return {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _completion(tokenizer, ids: list[int], seconds: float, ends: set[int]) -> Completion:
    hidden = (set(tokenizer.all_special_ids) | ends) - set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    text = tokenizer.decode([i for i in ids if i not in hidden])
    return Completion(text, len(ids), ids[-1] in ends, seconds)
