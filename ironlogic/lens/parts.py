"""The parts of a language model that a reading needs: the only place that knows what architectures call them.

Works on plain, 4-bit, merged, spliced, compiled and adapted models: wrappers come off, adapters stay in place.
A part that can't be found is refused by name: a norm silently left out is what made seed 002's "Deep Silence".
Where parts are used (hooks, float32, checks) is the business of `probe` and `read`.
"""

from typing import Any

from ironlogic.models import LoadedModel, ModelError

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

__all__ = [
    "adjust_logits",
    "attend",
    "bare_model",
    "decoder_layers",
    "embedding",
    "embedding_extras",
    "final_norm",
    "lora_factors",
    "media_ids",
    "output_head",
    "readout_is_adapted",
    "routers",
    "self_attention",
]

_STACKS = ("layers", "h")  # the list of layers in a decoder
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")  # the norm after the last of them
_EXTRAS = ("wpe", "embed_positions", "position_embeddings", "word_embeddings_layernorm", "project_in")
_ROUTERS = ("gate", "router")  # beside the experts of a mixture
_MEDIA = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


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


def _decoder(model: Any) -> nn.Module:
    """The language model's stack, below head and vision."""
    bare = bare_model(model)
    decoder, inner = None, bare
    while inner is not None and inner is not decoder:  # a wrapper's decoder may be a wrapper again
        decoder, inner = inner, inner.get_decoder()
    return decoder


def _child(model: Any, names: tuple[str, ...], what: str) -> nn.Module:
    decoder = _decoder(model)
    children = dict(decoder.named_children())
    found = next((children[name] for name in names if name in children), None)
    if found is None:
        raise ModelError(
            f"{type(bare_model(model)).__name__}: no {what} found; its decoder {type(decoder).__name__} has "
            f"{', '.join(children) or 'no parts'}, expected one of {', '.join(names)} (add it to lens/parts.py)"
        )
    return found


def decoder_layers(model: Any) -> nn.ModuleList:
    """The L layers of the language model, in order. Raises ModelError when there are none."""
    layers = _child(model, _STACKS, "list of layers")
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(f"{type(bare_model(model)).__name__}: its layers are a {type(layers).__name__}, no list")
    return layers


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the head. Raises ModelError when there is none, never an identity."""
    return _child(model, _NORMS, "final norm")


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


def embedding_extras(model: Any) -> list[str]:
    """Names of what a decoder adds to the rows of its table before the first layer: learned positions, a norm."""
    return [name for name, _ in _decoder(model).named_children() if name in _EXTRAS]


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


def media_ids(model: Any) -> set[int]:
    """Placeholder tokens whose embedding is not the table's but comes from a picture, video or sound."""
    config = bare_model(model).config.to_dict()
    return {config[name] for name in _MEDIA if isinstance(config.get(name), int)}


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


def attend(
    attention: nn.Module,
    hidden: Tensor,
    queries: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights (H, P, T) of P query positions over T keys in float32, and the module's output (P, D) there.

    Computed again from the module's own input (1, T, D), as fused kernels call neither projections nor norms and
    return no weights. O(H P T) memory. The output is for comparison with what the module put out: the proof.
    """
    size = attention.head_dim
    steps = hidden.shape[1]
    query = attention.q_proj(hidden[:, queries]).view(len(queries), -1, size)
    key = attention.k_proj(hidden).view(steps, -1, size)
    value = attention.v_proj(hidden).view(steps, -1, size)
    if "q_norm" in dict(attention.named_children()):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (part.reshape(-1, part.shape[-1])[:steps].unsqueeze(1) for part in position_embeddings)
    query = query * cos[queries] + _rotate_half(query) * sin[queries]
    key = key * cos + _rotate_half(key) * sin
    groups = query.shape[1] // key.shape[1]
    query = query.float().view(len(queries), key.shape[1], groups, size)
    scores = torch.einsum("pkgd,tkd->kgpt", query, key.float()).flatten(0, 1) * attention.scaling
    scores = _masked(scores, queries, mask)
    weights = scores.softmax(-1)
    mixed = torch.einsum("kgpt,tkd->pkgd", weights.view(-1, groups, *weights.shape[1:]), value.float())
    return weights, attention.o_proj(mixed.reshape(1, len(queries), -1).to(hidden.dtype))[0]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _masked(scores: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (H, P, T) with the keys that each query must not see at minus infinity."""
    if mask is None:  # the kernel was told "causal"
        later = torch.arange(scores.shape[-1], device=scores.device) > queries[:, None]
        return scores.masked_fill(later, -torch.inf)
    rows = mask[0, :, queries, : scores.shape[-1]]
    return scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows.float()
