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
    not in the text, except `<think>` and `</think>`.
    """
    loaded = as_loaded(loaded)
    if isinstance(prompts, str):
        raise TypeError("generate: prompts is one text; expected a list of texts or of message lists")
    if not prompts:
        return []
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    if empty := [i for i, chat in enumerate(chats) if not chat]:
        raise ValueError(f"generate: prompt {empty[0]} is empty")
    texts = [
        loaded.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        transformers.set_seed(seed)
    answers: dict[int, Completion] = {}
    with inference(loaded) as model:
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            answers |= zip(
                rows, _decode(loaded, model, [ids[i] for i in rows], max_new_tokens, sampling), strict=True
            )
    return [answers[i] for i in range(len(ids))]


def _decode(loaded, model, rows: list[list[int]], max_new_tokens: int, sampling: dict) -> list[Completion]:
    """One batch of token ids, padded on the left."""
    tokenizer = loaded.tokenizer
    longest = max(map(len, rows))
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    began = time.perf_counter()
    out = model.generate(
        input_ids=padded.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(_end_ids(loaded)),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )[:, longest:].tolist()  # the copy to the CPU waits for the card
    seconds = (time.perf_counter() - began) / len(rows)
    return [_completion(tokenizer, answer, _end_ids(loaded), seconds) for answer in out]


def _end_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer: the tokenizer's and the model's (Gemma ends a turn with another one)."""
    ends = loaded.model.generation_config.eos_token_id
    return {loaded.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _completion(tokenizer, ids: list[int], ends: set[int], seconds: float) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    finished = stop is not None
    spoken = ids[:stop]
    hidden = set(tokenizer.all_special_ids) - set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    text = tokenizer.decode([i for i in spoken if i not in hidden])
    return Completion(text, len(spoken) + finished, finished, seconds)
