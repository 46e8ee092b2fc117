"""The parts of a language model that a reading needs: the only place that knows what architectures call them.

Works on plain, 4-bit, merged, spliced, compiled and adapted models: wrappers come off, adapters stay in place.
A part that can't be found is refused by name: a norm silently left out is what made seed 002's "Deep Silence".
Where parts are used (hooks, float32, checks) is the business of `probe` and `read`.
"""

from collections.abc import Callable
from typing import Any

from ironlogic.models import LoadedModel, ModelError

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

__all__ = [
    "TURNS",
    "adjust_logits",
    "attend",
    "bare_model",
    "decoder_layers",
    "embedding",
    "final_norm",
    "lora_factors",
    "output_head",
    "readout_is_adapted",
    "routers",
    "self_attention",
]

_ROUTERS = ("gate", "router")  # beside the experts of a mixture


def bare_model(model: Any) -> transformers.PreTrainedModel:
    """The transformers model inside a LoadedModel, PEFT, torch.compile and data-parallel wrappers."""
    while True:
        if isinstance(model, LoadedModel):
            model = model.model
        elif isinstance(model, peft.PeftModel):
            model = model.get_base_model()  # PeftModel.model is NOT the decoder: the seed's mistake
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, transformers.PreTrainedModel):
            return model
        else:
            raise ModelError(
                f"{type(model).__name__} is no transformers or PEFT model; pass what load_model returns"
            )


def _stack(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The part of the language model that holds its layers, and the layers."""
    bare = bare_model(model)
    decoder, inner = None, bare
    while isinstance(inner, transformers.PreTrainedModel) and inner is not decoder:  # may be a wrapper again
        decoder, inner = inner, inner.get_decoder()
    count = decoder.config.get_text_config().num_hidden_layers
    for owner in decoder.modules():
        for part in owner.children():
            if isinstance(part, nn.ModuleList) and len(part) == count:  # all of them, not one of several lists
                return owner, part
    raise ModelError(
        f"{type(bare).__name__}: no list of its {count} layers found in {type(decoder).__name__}, whose parts are "
        f"{', '.join(dict(decoder.named_children())) or 'none'}; this architecture can't be read"
    )


def decoder_layers(model: Any) -> nn.ModuleList:
    """The L layers of the language model, in order. Raises ModelError when there are none."""
    return _stack(model)[1]


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the head. Raises ModelError when there is none, never an identity.

    It stands beside the list of layers, mostly behind it; whether it is the right one, a reading's proof tells.
    """
    owner, layers = _stack(model)
    parts = list(owner.children())
    behind = parts.index(layers)
    norms = [part for part in parts[behind:] + parts[:behind] if "norm" in type(_original(part)).__name__.lower()]
    if not norms:
        raise ModelError(
            f"{type(bare_model(model)).__name__}: no final norm found beside its layers; {type(owner).__name__} "
            f"has {', '.join(dict(owner.named_children()))}. A norm inside layers or head can't be read"
        )
    return norms[0]


def _original(module: nn.Module) -> nn.Module:
    """What PEFT trains a copy of (`modules_to_save`), or the module itself."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def output_head(model: Any) -> nn.Module:
    """The module from width D to V logits, with the adapter it may carry. Raises ModelError when there is none."""
    head = bare_model(model).get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(bare_model(model)).__name__} has no output head; load it for causal language modelling"
        )
    return head


def embedding(model: Any) -> nn.Module:
    """The module from token ids to width D (Gemma's scales inside). Raises ModelError when there is none."""
    found = bare_model(model).get_input_embeddings()
    if found is None:
        raise ModelError(f"{type(bare_model(model)).__name__} has no table of input embeddings")
    return found


def adjust_logits(model: Any, logits: Tensor) -> Tensor:
    """What a model does to its logits after the head, in place: Granite and Cohere scale, Gemma caps softly."""
    config = bare_model(model).config.to_dict()  # not the text model's: a wrapper's forward pass ignores that one
    if scale := config.get("logit_scale"):
        logits.mul_(scale)
    if divisor := config.get("logits_scaling"):
        logits.div_(divisor)
    if cap := config.get("final_logit_softcapping"):
        logits.div_(cap).tanh_().mul_(cap)
    return logits


def readout_is_adapted(model: Any) -> bool:
    """Whether an adapter sits on embedding, final norm or head: switching it off then moves the embedding row."""
    parts = (embedding(model), final_norm(model), output_head(model))
    inner = (module for part in parts for module in part.modules())
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in inner)


def lora_factors(model: Any, adapter: str) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """(A, B, experts) of every low-rank update of that adapter; A (experts * rank, in), B (out, experts * rank)."""
    found = []
    for module in bare_model(model).modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.lora_A:
            experts = module.num_experts if isinstance(module, peft.tuners.lora.ParamWrapper) else 1
            found.append((module.lora_A[adapter].weight, module.lora_B[adapter].weight, experts))
    if not found:
        raise ModelError(f"{type(bare_model(model)).__name__} has no low-rank layers of the adapter {adapter!r}")
    return found


def routers(model: Any) -> dict[int, nn.Module]:
    """Layer number (0 is the first layer) -> its router; layers without experts have none."""
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        for block in layer.children():
            parts = dict(block.named_children())
            if (
                "experts" in parts
                and (router := next((parts[n] for n in _ROUTERS if n in parts), None)) is not None
            ):
                found[number] = router
    return found


def self_attention(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    parts = dict(layer.named_children())
    if "self_attn" not in parts or not {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(
        dict(parts["self_attn"].named_children())
    ):
        raise ModelError(
            f"{type(layer).__name__}: no self_attn with q_proj, k_proj, v_proj and o_proj; its parts are "
            f"{', '.join(parts)}. Attention of this architecture can't be read yet"
        )
    return parts["self_attn"]


Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # heads (rows, H, size), cosines and sines (rows, 1, turned)


def attend(
    attention: nn.Module,
    hidden: Tensor,
    queries: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    turn: Turn,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights (H, P, T) of P query positions over T keys in float32, and the module's output (P, D) there.

    Computed again from the module's own input (1, T, D), as fused kernels call neither projections nor norms and
    return no weights. O(H P T) memory. The output is for comparison with what the module put out: the proof.
    `turn`: how a head is turned by its position, one of `TURNS`.
    """
    size = attention.head_dim

    def heads(name: str, rows: Tensor) -> Tensor:
        """(rows, heads, size), normed head by head (Qwen3) or over all of them (OLMo 2)."""
        found = getattr(attention, f"{name}_proj")(rows)
        norm = dict(attention.named_children()).get(f"{name}_norm", nn.Identity())
        over_all = getattr(norm, "weight", None) is not None and len(norm.weight) == found.shape[-1]
        shape = (-1, found.shape[-1] // size, size)
        return norm(found).view(shape) if over_all else norm(found.view(shape))

    query, key, value = heads("q", hidden[0, queries]), heads("k", hidden[0]), heads("v", hidden[0])
    cos, sin = (part.reshape(-1, part.shape[-1])[: len(key), None] for part in position_embeddings)
    query, key = turn(query, cos[queries], sin[queries]), turn(key, cos, sin)
    groups = query.shape[1] // key.shape[1]
    query = query.float().view(len(queries), key.shape[1], groups, size)
    scores = torch.einsum("pkgd,tkd->kgpt", query, key.float()).flatten(0, 1) * attention.scaling
    scores = _masked(scores, queries, mask)
    weights = scores.softmax(-1)
    mixed = torch.einsum("kgpt,tkd->pkgd", weights.view(-1, groups, *weights.shape[1:]), value.float())
    return weights, attention.o_proj(mixed.reshape(1, len(queries), -1).to(hidden.dtype))[0]


def _turned_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension i with i + half; where there are fewer angles than dimensions, the others stay (Phi)."""
    x, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([x * cos + torch.cat([-second, first], dim=-1) * sin, still], dim=-1)


def _turned_in_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension 2 i with 2 i + 1 (Cohere, GLM)."""
    x, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    half = cos.shape[-1] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):  # the angles come in halves all the same
        cos, sin = (part[..., :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([x * cos + pairs * sin, still], dim=-1)


def _not_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Some layers of some models know no positions (SmolLM 3)."""
    return x


TURNS = (_turned_in_halves, _turned_in_pairs, _not_turned)


def _masked(scores: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (H, P, T) with the keys that each query must not see at minus infinity."""
    if mask is None:  # the kernel was told "causal"
        later = torch.arange(scores.shape[-1], device=scores.device) > queries[:, None]
        return scores.masked_fill(later, -torch.inf)
    rows = mask[0, :, queries, : scores.shape[-1]]
    return scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows.float()
