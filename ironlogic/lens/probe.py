"""Taking states out of a running model and turning them into distributions: prompts, hooks, norm, head, sums.

Every state goes through `readout`, the last one too, so that what holds for the last (the model's own distribution)
holds for all. Logits and everything after them are float32 whatever the model's type is. Proves nothing by itself:
that is `read.check_reading`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ironlogic import IronLogicError
from ironlogic.lens.parts import adjust_logits, bare_model, decoder_layers, embedding, final_norm, output_head
from ironlogic.lens.results import ACTIVE
from ironlogic.models import LoadedModel

import numpy as np
import torch
import transformers
from torch import Tensor, nn

__all__ = [
    "LensError",
    "at_a_time",
    "embedded",
    "encode_prompt",
    "hidden_in",
    "hooked",
    "model_with_tokenizer",
    "own_logits",
    "pick_positions",
    "plain_head",
    "readout",
    "run",
    "settled",
    "sum_up",
    "token_text",
    "watch_states",
]

_BLOCK = 512  # rows of the head made float32 at a time on a CPU: block and products stay in the cache
_AT_ONCE = 2**18  # logits summed up at a time on a CPU: the temporaries stay small and in the cache
_SHARED = ("input_ids", "attention_mask", "labels")  # of a processor's output; the rest goes to the model as it is


class LensError(IronLogicError, RuntimeError):
    """A prompt that can't be read or a reading that is not what the model computes; the message says which."""


# --- prompts ----------------------------------------------------------------------------------------------------
def model_with_tokenizer(model: Any) -> LoadedModel:
    """Any transformers or PEFT model with the tokenizer of its folder or cache; with none it shows ids."""
    if isinstance(model, LoadedModel):
        return model
    source = bare_model(model).config.name_or_path
    try:
        tokenizer = (
            transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            if source
            else None
        )
    except (OSError, ValueError):  # built by hand, or its tokenizer is elsewhere
        tokenizer = None
    return LoadedModel(model, tokenizer, source=source)


def encode_prompt(loaded: LoadedModel, prompt: Any) -> dict[str, Tensor]:
    """Inputs of one forward pass, `input_ids` (1, T) first, on the model's device.

    `prompt`: text (tokenized as it stands, no chat template), messages (with the template, up to where the answer
    begins), a processor's output, or a tensor of ids (T,) or (1, T). Raises LensError when it can't be read.
    """
    extra = dict(prompt) if isinstance(prompt, Mapping) else {}
    if isinstance(prompt, Mapping):
        ids = _ids_of(prompt)
    elif isinstance(prompt, Tensor | np.ndarray):
        ids = torch.as_tensor(prompt)
    elif isinstance(prompt, str) or (
        isinstance(prompt, list | tuple) and all(isinstance(m, Mapping) for m in prompt)
    ):
        ids = torch.tensor(_tokenize(loaded, prompt), dtype=torch.long)
    else:
        raise LensError(
            f"the prompt is a {type(prompt).__name__}; expected text, messages, a processor's output or token ids"
        )
    ids = _checked_ids(ids, embedding(loaded.model))
    inputs = {"input_ids": ids} | {name: value for name, value in extra.items() if name not in _SHARED}
    return {name: v.to(loaded.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def _ids_of(prompt: Mapping) -> Tensor:
    """The token ids in what a processor returned."""
    if "input_ids" not in prompt:
        raise LensError(f"the prompt has {', '.join(map(str, prompt)) or 'nothing'} but no input_ids")
    mask = prompt.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise LensError("the prompt is padded (its attention_mask has zeros); pass it without padding")
    return torch.as_tensor(prompt["input_ids"])


def _tokenize(loaded: LoadedModel, prompt: Any) -> list[int]:
    if loaded.tokenizer is None:
        raise LensError(
            "this model came without its tokenizer; pass a LoadedModel, or the prompt as a tensor of ids"
        )
    if isinstance(prompt, str):
        return loaded.tokenizer(prompt)["input_ids"]
    if not prompt:
        raise LensError("the prompt is empty: there is no message")
    try:
        text = loaded.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own: any error may come out of it
        raise LensError(f"the chat template refuses the prompt: {type(error).__name__}: {error}") from error
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def _checked_ids(ids: Tensor, table: nn.Module) -> Tensor:
    """(1, T) whole numbers within the vocabulary."""
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise LensError(f"the prompt has shape {tuple(ids.shape)}; one sequence at a time: expected (T,) or (1, T)")
    if not ids.numel():
        raise LensError("the prompt is empty: it has no tokens")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise LensError(f"the prompt is a tensor of {ids.dtype}; expected token ids (integers)")
    rows = table.weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise LensError(f"token ids run from {low} to {high}, but the model knows 0 to {rows - 1}")
    return ids.long()


def pick_positions(positions: int | Iterable[int] | None, length: int) -> list[int]:
    """Positions from the left, 0 to T-1. None: all. Raises LensError when one is out of range."""
    if positions is None:
        return list(range(length))
    wanted = [positions] if isinstance(positions, int | np.integer) else list(positions)
    if not wanted:
        raise LensError("no position was asked for")
    for one in wanted:
        if isinstance(one, bool) or not isinstance(one, int | np.integer):
            raise LensError(f"position {one!r} is a {type(one).__name__}; expected a whole number")
        if not -length <= one < length:
            raise LensError(f"position {one} is out of range: the prompt has {length} tokens (0 to {length - 1})")
    return [int(one) % length for one in wanted]


def token_text(loaded: LoadedModel, token: int) -> str:
    """The text of one token as it stands; `<7>` for an id that the tokenizer has no text for."""
    text = "" if loaded.tokenizer is None else loaded.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text or f"<{token}>"


# --- hooks ------------------------------------------------------------------------------------------------------
@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, str, Callable]]) -> Iterator[None]:
    """Hooks of kind "before" or "after" a module's forward pass, with keywords; gone whatever happens."""
    handles = []
    try:
        for module, kind, hook in hooks:
            if kind == "before":
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_in(arguments: tuple, keywords: Mapping[str, Any]) -> Tensor:
    """The hidden states (1, T, D) that a module was called with."""
    return arguments[0] if arguments else keywords["hidden_states"]


@contextmanager
def watch_states(model: Any, positions: Tensor, length: int) -> Iterator[list[Tensor]]:
    """A list that fills with L+1 states (P, D) while the model runs: what enters each layer, and leaves the last.

    What enters, not what leaves: vision features that Qwen3-VL adds between layers belong to the state. Copies:
    Unsloth norms in place. None of them is normed yet.
    """
    layers = decoder_layers(model)
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        if hidden.dim() != 3:
            raise LensError(
                f"the states between the layers have shape {tuple(hidden.shape)}, expected (1, T, D): this model "
                "keeps several of them, and none of them alone is what the head reads"
            )
        if hidden.shape[:2] != (1, length):
            raise LensError(
                f"the model works on {hidden.shape[1]} tokens of {hidden.shape[0]} rows, but the prompt has "
                f"{length} of one row: it cut the prompt (load it with a larger max_length) or splits the batch"
            )
        states.append(hidden[0].index_select(0, positions.to(hidden.device)))

    hooks = [(layer, "before", lambda _, args, kwargs: keep(hidden_in(args, kwargs))) for layer in layers]
    hooks.append(
        (layers[-1], "after", lambda _, args, kwargs, out: keep(out[0] if isinstance(out, tuple) else out))
    )
    with hooked(hooks):
        yield states
    if len(states) != len(layers) + 1:
        raise LensError(
            f"{len(states)} states came out of {len(layers)} layers, expected {len(layers) + 1}: this model does "
            "not call its layers (a fused forward pass), or calls some of them more than once"
        )


class _Enough(Exception):
    pass


def embedded(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(T, D) what enters the first layer: the embedding of words and pictures, with whatever is added to it."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        found.append(hidden_in(args, kwargs)[0].clone())
        raise _Enough

    with hooked([(decoder_layers(model)[0], "before", stop)]), suppress(_Enough):
        run(model, inputs, 1)
    return found[0]


def run(model: nn.Module, inputs: Mapping[str, Tensor], keep: Tensor | int) -> Tensor:
    """Logits (1, .., V) of one plain forward pass; `keep` as in transformers' `logits_to_keep`."""
    return model(**inputs, use_cache=False, logits_to_keep=keep).logits


def own_logits(model: nn.Module, inputs: Mapping[str, Tensor], positions: list[int]) -> Tensor:
    """The model's own logits (P, V) at those positions, in its own type."""
    length = inputs["input_ids"].shape[1]
    if positions == list(range(length - len(positions), length)):  # Unsloth knows numbers only
        return run(model, inputs, len(positions))[0, -len(positions) :]
    rows = torch.tensor(positions, device=inputs["input_ids"].device)
    logits = run(model, inputs, rows)[0]
    return logits if logits.shape[0] == len(positions) else logits[rows]


# --- from states to distributions ---------------------------------------------------------------------------------
def readout(model: Any, states: Tensor, normed: Tensor | None = None) -> Tensor:
    """(R, V) float32 logits of R states (R, D) that no norm has touched: the final norm once, then the head.

    Rows already normed by the caller may follow, and share the one pass over the head.
    """
    rows = final_norm(model)(states.float())
    rows = rows if normed is None else torch.cat([rows, normed.to(rows)])
    return adjust_logits(model, _head_logits(output_head(model), rows, states.dtype))


def _head_logits(head: nn.Module, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 products of float32 rows (R, D) with the head.

    Rounding the logits of a 16-bit head alone moves the entropy by up to 0.1 nats. A 4-bit or adapted head is
    called as it is, in the model's type: its weights are not what `.weight` says.
    """
    if not plain_head(head):
        return head(rows.to(dtype)).float()
    if head.weight.dtype == torch.float32:
        logits = torch.mm(rows, head.weight.T)
    elif head.weight.is_cuda:
        logits = _split_product(rows, head.weight)
    else:
        logits = _blockwise(rows, head.weight)
    return logits if head.bias is None else logits.add_(head.bias)


def plain_head(head: nn.Module) -> bool:
    """A linear layer with nothing in or around it."""
    return type(head) is nn.Linear and head.weight.is_floating_point()


def _split_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T on tensor cores: each row as the sum of two 16-bit rows, products summed in float32."""
    high = rows.to(weight.dtype)
    low = (rows - high.float()).to(weight.dtype)
    both = torch.mm(torch.cat([high, low]), weight.T, out_dtype=torch.float32)
    return both[: len(rows)].add_(both[len(rows) :])


def _blockwise(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T in float32 without a float32 copy of the whole head."""
    logits = rows.new_empty(rows.shape[0], weight.shape[0])
    block = rows.new_empty(_BLOCK, weight.shape[1])
    for begin in range(0, weight.shape[0], _BLOCK):
        part = weight[begin : begin + _BLOCK]
        block[: len(part)].copy_(part)
        torch.mm(rows, block[: len(part)].T, out=logits[:, begin : begin + len(part)])
    return logits


def sum_up(logits: Tensor, top_k: int) -> dict[str, np.ndarray]:
    """Numbers of the distributions given as logits (L+1, P, V): entropy, KL(last row || each), top k, active count.

    Float32, as sums over log-probabilities: nothing cancels, an entropy of 1e-3 nats keeps its digits.
    """
    layers, count, vocabulary = logits.shape
    at_once = max(1, _AT_ONCE // vocabulary) if logits.device.type == "cpu" else layers
    found = {name: torch.empty(layers, count) for name in ("entropy", "kl_to_final", "active")}
    found["top_probs"] = torch.empty(layers, count, min(top_k, vocabulary))
    found["top_ids"] = torch.empty_like(found["top_probs"], dtype=torch.long)
    for column in range(count):
        log_final, p_final = _log_softmax(logits[-1, column])
        for begin in range(0, layers, at_once):
            here = slice(begin, begin + at_once), column
            log_p, p = _log_softmax(logits[here])
            found["active"][here] = (p > ACTIVE).sum(-1).float().cpu()
            best = p.topk(min(top_k, vocabulary), dim=-1)
            found["top_probs"][here], found["top_ids"][here] = best.values.cpu(), best.indices.cpu()
            found["entropy"][here] = -p.mul_(log_p).sum(-1).cpu()
            gaps = torch.sub(log_final, log_p, out=log_p).mul_(p_final).sum(-1)
            found["kl_to_final"][here] = gaps.clamp_min(0).cpu()
    arrays = {name: value.double().numpy() for name, value in found.items()}
    return arrays | {"active": arrays["active"].astype(int), "top_ids": found["top_ids"].numpy()}


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities over the last axis.

    torch's float32 log_softmax adds up a long row in a line and is 1e-4 off at V = 150,000; `sum` adds in pairs.
    """
    shifted = logits - logits.amax(-1, keepdim=True)
    p = shifted.exp()
    total = p.sum(-1, keepdim=True)
    return shifted.sub_(total.log()), p.div_(total)


def settled(top: np.ndarray) -> np.ndarray:
    """(P,) first of L+1 rows from which the top token (L+1, P) stays what it is at the end."""
    changes = np.vstack([np.ones((1, top.shape[1]), dtype=bool), top[1:] != top[:-1]])
    return top.shape[0] - 1 - np.argmax(changes[::-1], axis=0)


def at_a_time(layers: int, vocabulary: int) -> int:
    """Positions read together: their logits in all layers stay below 64 MiB, or are one position's."""
    return max(1, math.floor(2**26 / ((layers + 1) * vocabulary * 4)))
