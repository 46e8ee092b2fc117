"""Where the layers look (attention) and whom they ask (routing of a mixture of experts).

Both are read from what a layer was given and compared with what it put out before they are returned. Large weights
on the first token are a sink that most models have whatever that token is; a router moves with its input, so that a
shift of routing says nothing without the null of `compare.compare_layers`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ironlogic.lens.parts import TURNS, attend, bare_model, decoder_layers, routers, self_attention
from ironlogic.lens.probe import (
    LensError,
    encode_prompt,
    hidden_in,
    hooked,
    model_with_tokenizer,
    pick_positions,
    run,
    token_text,
)
from ironlogic.lens.results import AttentionReading, RoutingReading
from ironlogic.models import LoadedModel, inference

import torch
from torch import Tensor

__all__ = ["read_attention", "read_routing"]

_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")  # experts a token is sent to, as configurations call it
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def read_attention(
    loaded: LoadedModel | Any, prompt: Any, *, positions: int | Iterable[int] | None = -1
) -> AttentionReading:
    """Where the asked positions look, in all layers and heads, on any attention kernel; O(L H P T) memory.

    Every layer is proved: its weights, applied to its values, have to give what the layer's attention put out.
    """
    loaded = model_with_tokenizer(loaded)
    inputs = encode_prompt(loaded, prompt)
    ids = inputs["input_ids"][0].tolist()
    asked = pick_positions(positions, len(ids))
    weights: list[Tensor] = []
    gaps: list[float] = []

    def watch(module: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        hidden, mask = hidden_in(args, kwargs), kwargs.get("attention_mask")
        where = torch.tensor(asked, device=hidden.device)
        right = out[0][0, where].float()
        tried: list[float] = []
        try:
            for turn in TURNS:
                found, mixed = attend(
                    module,
                    hidden,
                    where,
                    position_embeddings=kwargs["position_embeddings"],
                    turn=turn,
                    mask=mask if mask is not None and mask.dim() == 4 else None,
                )
                gap = ((mixed.float() - right).abs().max() / right.abs().max().clamp_min(1e-9)).item()
                tried.append(gap)
                if gap <= max(1e-4, 8 * torch.finfo(out[0].dtype).eps):
                    break
            else:
                off = f"what they give is off by {min(tried):.2g} of what it puts out"
                raise ValueError(f"{off}: it has a part that is not known here")
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise LensError(
                f"layer {len(weights) + 1}: the attention weights of {type(module).__name__} can't be read from "
                f"its parts ({error}), so they are refused"
            ) from error
        gaps.append(gap)
        weights.append(found.cpu())

    with inference(loaded) as model:
        layers = decoder_layers(model)
        with hooked((self_attention(layer), "after", watch) for layer in layers):
            run(model, inputs, 1)
    if len(weights) != len(layers):
        raise LensError(f"{len(weights)} of {len(layers)} layers called their attention (a fused forward pass?)")
    tokens = tuple(token_text(loaded, token) for token in ids)
    return AttentionReading(
        torch.stack(weights).numpy(), tuple(range(1, len(layers) + 1)), tuple(asked), tokens, {"output": max(gaps)}
    )


def read_routing(
    loaded: LoadedModel | Any, prompt: Any, *, positions: int | Iterable[int] | None = None
) -> RoutingReading:
    """Which experts each layer asks at the positions (None: all). Raises LensError when there are none."""
    loaded = model_with_tokenizer(loaded)
    inputs = encode_prompt(loaded, prompt)
    ids = inputs["input_ids"][0].tolist()
    asked = pick_positions(positions, len(ids))
    found: dict[int, tuple[Tensor, Tensor]] = {}

    with inference(loaded) as model:
        gates = routers(model)
        if not gates:
            raise LensError(f"{type(bare_model(model)).__name__} has no routers: it is no mixture of experts")
        config = bare_model(model).config.get_text_config()
        used, experts = _setting(config, *_CHOSEN), _setting(config, *_EXPERTS)

        def watch(number: int) -> Callable:
            def keep(module: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
                found[number] = _routes(out, asked, used, number, experts)

            return keep

        with hooked((gate, "after", watch(number)) for number, gate in gates.items()):
            run(model, inputs, 1)
    if missing := sorted(set(gates) - set(found)):
        raise LensError(f"the routers of layers {[number + 1 for number in missing]} were not called")
    return RoutingReading(
        torch.stack([found[number][0] for number in sorted(found)]).numpy(),
        torch.stack([found[number][1] for number in sorted(found)]).numpy(),
        tuple(number + 1 for number in sorted(found)),
        tuple(asked),
        tuple(token_text(loaded, token) for token in ids),
    )


def _setting(config: Any, *names: str) -> int:
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    if not isinstance(found, int):
        raise LensError(f"{type(config).__name__} has no number as {', '.join(names)}; its routing can't be read")
    return found


def _routes(out: Any, asked: list[int], used: int, number: int, experts: int) -> tuple[Tensor, Tensor]:
    """Probabilities (P, E) and chosen experts (P, k) of what a router returned, in whatever order.

    The logits are what is as wide as there are experts; the chosen are whole numbers, as many a token as are used.
    Some versions return softmaxed "logits": not done twice.
    """
    parts = [part for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, Tensor)]
    wide = [part for part in parts if part.is_floating_point() and part.shape[-1] == experts]
    whole = [part for part in parts if not part.is_floating_point() and part.shape[-1] == used]
    if not wide:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise LensError(f"layer {number + 1}: the router returns {shapes}, nothing for each of {experts} experts")
    logits = wide[-1].float()
    logits = logits.reshape(-1, experts)[asked].cpu()
    ready = bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), torch.ones(len(asked)), atol=1e-3)
    probabilities = logits if ready else logits.softmax(-1)
    best = probabilities.topk(used, dim=-1)
    if whole:
        chosen = whole[-1].reshape(-1, used)[asked].cpu()
        if not torch.allclose(probabilities.gather(-1, chosen).sum(-1), best.values.sum(-1), atol=1e-3):
            raise LensError(f"layer {number + 1}: the router does not choose by its softmax; it can't be read yet")
        return probabilities, chosen
    return probabilities, best.indices
