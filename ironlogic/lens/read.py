"""Layer reading (the logit lens): what each layer would say next, proved before it is returned.

The logit lens (nostalgebraist 2020) sends the state after every layer through the model's own final norm and head.
A reading that leaves the norm out, applies it twice or takes the wrong state looks just as plausible, so none is
returned before `check_reading` has found both ends right. What a right reading does not show: that a layer "thinks"
its top token. Early layers live in another basis (tuned lens, arXiv 2303.08112), and one prompt is one sample.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ironlogic.lens.parts import final_norm, output_head
from ironlogic.lens.probe import (
    LensError,
    at_a_time,
    embedded,
    encode_prompt,
    model_with_tokenizer,
    own_logits,
    pick_positions,
    plain_head,
    readout,
    settled,
    sum_up,
    token_text,
    watch_states,
)
from ironlogic.lens.results import ACTIVE, LayerReading
from ironlogic.models import LoadedModel, inference

import numpy as np
import torch
from torch import Tensor

__all__ = ["Proof", "check_reading", "entropy_without_norm", "read_generation", "read_layers"]

_CHECKED = 8  # positions of a reading that are proved; all of them went through the same code
FLOOR = 1e-4  # nats that float32 may be off


# --- layers -----------------------------------------------------------------------------------------------------
def read_layers(
    loaded: LoadedModel | Any, prompt: Any, *, positions: int | Iterable[int] | None = -1, top_k: int = 5
) -> LayerReading:
    """What every layer would say next at `positions` (None: all), checked.

    `loaded`: a LoadedModel or any transformers or PEFT model. `prompt`: text (as it stands, without chat template),
    messages, a processor's output, or a tensor of ids. One forward pass and one pass over the head; memory beyond
    them is O(L V), whatever T is.

    Raises LensError on a prompt or position that can't be read and on a reading that is not what the model
    computes, ModelError on a model whose layers, norm or head can't be found.
    """
    loaded = model_with_tokenizer(loaded)
    if top_k < 1:
        raise LensError(f"top_k is {top_k}; expected 1 or more")
    inputs = encode_prompt(loaded, prompt)
    with inference(loaded) as model:
        return _read(loaded, model, inputs, positions, top_k)


def _read(
    loaded: LoadedModel, model: Any, inputs: Mapping[str, Tensor], positions: Any, top_k: int
) -> LayerReading:
    head, norm = output_head(model), final_norm(model)  # refused before any work if not there
    ids = inputs["input_ids"][0].tolist()
    asked = pick_positions(positions, len(ids))
    checked = np.linspace(0, len(asked) - 1, min(len(asked), _CHECKED)).round().astype(int).tolist()
    with watch_states(model, torch.tensor(asked), len(ids)) as found:
        own = own_logits(model, inputs, [asked[column] for column in checked])
    device = head.weight.device
    states = torch.stack([state.to(device) for state in found])
    lookup = embedded(model, inputs)[[asked[column] for column in checked]].to(states)
    numbers, lookup_logits = _distributions(model, states, norm(lookup.float()), top_k)
    exact = plain_head(head) or states.dtype == torch.float32
    proof = Proof(tuple(checked), own, lookup_logits, _slack(own.dtype), 1e-5 if exact else _slack(states.dtype))
    reading = _reading(loaded, numbers, asked, ids, own.shape[-1])
    checks, allowed = check_reading(reading, proof)
    return replace(reading, checks=checks, allowed=allowed)


def _slack(dtype: torch.dtype) -> float:
    """How far two computations of one logit may part, as a share of the largest: two roundings, or float32 sums."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def _distributions(model: Any, states: Tensor, lookup: Tensor, top_k: int) -> tuple[dict[str, np.ndarray], Tensor]:
    """Numbers of all states (L+1, P, D), each (L+1, P, ..), and the logits (C, V) of the normed lookup rows."""
    layers, count, width = states.shape
    vocabulary = output_head(model).weight.shape[0] if plain_head(output_head(model)) else 2**17
    step = at_a_time(layers - 1, vocabulary)
    parts, lookup_logits = [], None
    for begin in range(0, count, step):
        block = states[:, begin : begin + step]
        rows = layers * block.shape[1]
        logits = readout(model, block.reshape(rows, width), lookup if lookup_logits is None else None)
        if lookup_logits is None:
            lookup_logits, logits = logits[rows:], logits[:rows]
        parts.append(sum_up(logits.view(layers, block.shape[1], -1), top_k))
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}, lookup_logits


def _reading(
    loaded: LoadedModel, numbers: dict[str, np.ndarray], rows: list[int], ids: list[int], vocabulary: int
) -> LayerReading:
    text = {token: token_text(loaded, token) for token in {*ids, *numbers["top_ids"].ravel().tolist()}}
    return LayerReading(
        **numbers,
        top_tokens=tuple(
            tuple(tuple(text[t] for t in one) for one in line) for line in numbers["top_ids"].tolist()
        ),
        settle_layer=settled(numbers["top_ids"][:, :, 0]),
        layers=tuple(range(len(numbers["entropy"]))),
        positions=tuple(rows),
        ids=tuple(ids),
        tokens=tuple(text[token] for token in ids),
        vocabulary=vocabulary,
    )


# --- the proof --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Proof:
    """What a reading has to agree with at C of its columns, obtained without the code that made the reading."""

    columns: tuple[int, ...]
    own: Tensor  # (C, V) logits of the model's own forward pass, in its own type
    lookup: Tensor  # (C, V) float32 logits of head(norm(what enters the first layer))
    own_slack: float  # relative: rounding that two right computations of a logit may differ by
    lookup_slack: float


def check_reading(reading: LayerReading, proof: Proof) -> tuple[dict[str, float], dict[str, float]]:
    """The largest gaps found and those allowed, if the reading is right at both ends; LensError if it is not.

    The last row has to be the model's own next-token distribution and the embedding row that of head(norm(what
    enters the first layer)). Either alone lets mistakes through (a norm missed on hidden states, one scale for all
    rows, layers shifted by one); together they catch every one that is known.
    """
    if not np.isfinite(reading.entropy).all():
        raise LensError("the reading has entropies that are not finite: the model puts out NaN or infinity")
    if reading.entropy.max() > reading.ln_vocabulary + FLOOR:
        raise LensError(
            f"the reading has an entropy of {reading.entropy.max():.4f} nats, more than ln V, "
            f"{reading.ln_vocabulary:.4f}"
        )
    ends = (
        ("last", -1, proof.own, proof.own_slack, "the model's own next-token distribution"),
        ("embedding", 0, proof.lookup, proof.lookup_slack, "head(norm(what enters the first layer))"),
    )
    gaps: dict[str, float] = {}
    limits: dict[str, float] = {}
    for name, row, logits, slack, meaning in ends:
        for column, right in zip(proof.columns, logits, strict=True):
            for what, (gap, allowed) in _gaps(reading, row, column, right, slack).items():
                if not gap <= allowed:
                    raise LensError(
                        f"the {name} row at position {reading.positions[column]} is not {meaning}: {what} is off "
                        f"by {gap:.2g}, allowed is {allowed:.2g}. It would show a false picture, so it is refused"
                    )
                gaps[f"{name}_{what}"] = max(gap, gaps.get(f"{name}_{what}", 0.0))
                limits[f"{name}_{what}"] = max(allowed, limits.get(f"{name}_{what}", 0.0))
    return gaps, limits


def _gaps(
    reading: LayerReading, row: int, column: int, logits: Tensor, slack: float
) -> dict[str, tuple[float, float]]:
    """(gap, allowed) of one distribution's numbers against logits (V,), computed anew in float64."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum()
    off = slack * max(1.0, logits.abs().max().item())  # nats that each logit may be off
    sensitivity = (p * (log_p + entropy).abs()).sum().item()  # of the entropy to that, at first order
    ids = torch.as_tensor(reading.top_ids[row, column], device=logits.device)
    best = log_p.topk(len(ids)).values
    said = torch.as_tensor(reading.top_probs[row, column], device=logits.device).log()
    low, high = ((log_p > np.log(ACTIVE) + shift).sum().item() for shift in (2 * off + FLOOR, -2 * off - FLOOR))
    active = float(reading.active[row, column])
    tiny = -27.0  # float32 probabilities below e^-27 tell nothing
    return {
        "entropy": (abs(float(reading.entropy[row, column]) - entropy.item()), FLOOR + 2 * off * sensitivity),
        "ranking": ((best.clamp_min(tiny) - log_p[ids].clamp_min(tiny)).abs().max().item(), FLOOR + 2 * off),
        "log probability": (
            (said.clamp_min(tiny) - log_p[ids].clamp_min(tiny)).abs().max().item(),
            FLOOR + 2 * off,
        ),
        "active count": (max(low - active, active - high, 0.0), 0.0),
    }


# --- the mistake ------------------------------------------------------------------------------------------------
def entropy_without_norm(
    loaded: LoadedModel | Any, prompt: Any, *, positions: int | Iterable[int] | None = -1
) -> np.ndarray:
    """WRONG on purpose, to show beside the right reading: entropy (L+1, P) in nats with the final norm left out.

    Seed 002's "Deep Silence". Without the norm the length of a state acts as an inverse temperature: rows of short
    states come out near ln V, whatever they hold, and rows of long ones too sure.
    """
    loaded = model_with_tokenizer(loaded)
    inputs = encode_prompt(loaded, prompt)
    length = inputs["input_ids"].shape[1]
    asked = pick_positions(positions, length)
    with inference(loaded) as model:
        with watch_states(model, torch.tensor(asked), length) as states:
            own_logits(model, inputs, asked[-1:])
        logits = torch.stack([output_head(model)(state).float() for state in states])
        return sum_up(logits, 1)["entropy"]


# --- a whole answer ---------------------------------------------------------------------------------------------
def read_generation(
    loaded: LoadedModel | Any, prompt: Any, *, max_new_tokens: int = 32, top_k: int = 5
) -> LayerReading:
    """The greedy answer, read at the positions that predicted its tokens, in one pass over prompt and answer."""
    loaded = model_with_tokenizer(loaded)
    inputs = encode_prompt(loaded, prompt)
    length = inputs["input_ids"].shape[1]
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with inference(loaded) as model:
        mask = torch.ones_like(inputs["input_ids"])
        ids = model.generate(**inputs, attention_mask=mask, max_new_tokens=max_new_tokens, **greedy)
        said = ids.shape[1] - length
        longer = {name: _lengthened(value, length, said) for name, value in inputs.items()} | {"input_ids": ids}
        return _read(loaded, model, longer, range(length - 1, length - 1 + said), top_k)


def _lengthened(value: Any, length: int, more: int) -> Any:
    """A tensor that says something about each token, with zeros (plain text) for the tokens of the answer."""
    if isinstance(value, Tensor) and value.shape == (1, length) and not value.is_floating_point():
        return torch.cat([value, value.new_zeros(1, more)], dim=1)
    return value
