"""Base and adapter read in one loaded model, beside random adapters of the same size: the null band.

Any change of the weights changes the readings a little. Only what leaves the band of the random adapters says
something about what was learned.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ironlogic.lens.attention import read_routing
from ironlogic.lens.parts import lora_factors, readout_is_adapted, routers
from ironlogic.lens.probe import LensError, model_with_tokenizer
from ironlogic.lens.read import FLOOR, read_layers
from ironlogic.lens.results import Comparison, LayerReading, RoutingReading
from ironlogic.models import LoadedModel, use_adapter

import numpy as np
import peft
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

__all__ = ["compare_layers", "routing_distance"]


def compare_layers(
    loaded: LoadedModel | Any,
    prompt: Any,
    *,
    positions: int | Iterable[int] | None = -1,
    top_k: int = 5,
    adapter: str | None = None,
    null_adapters: int = 8,
    seed: int = 0,
) -> Comparison:
    """Base and adapter read in one loaded model (adapter off, adapter on), with a null from random adapters.

    The null: as many random low-rank updates as asked for, each layer's of the same rank and Frobenius norm as the
    trained one. A change that they make too says nothing about what was learned. `adapter`: its name, None for the
    active one. Raises LensError when there is no adapter, or when the embedding rows differ although nothing that
    feeds them is adapted.
    """
    loaded = model_with_tokenizer(loaded)
    if not isinstance(loaded.model, peft.PeftModel):
        raise LensError(
            f"{type(loaded.model).__name__} carries no adapter; load one with load_model or with_adapters"
        )
    if null_adapters < 1:
        raise LensError(f"null_adapters is {null_adapters}; expected 1 or more")
    name = adapter or loaded.model.active_adapter
    if name not in loaded.model.peft_config:
        raise LensError(f"no adapter {name!r}; the model carries {', '.join(loaded.model.peft_config)}")
    mixture = bool(routers(loaded.model))

    def read() -> tuple[LayerReading, RoutingReading | None]:
        reading = read_layers(loaded, prompt, positions=positions, top_k=top_k)
        return reading, read_routing(loaded, prompt) if mixture else None

    with use_adapter(loaded, None):
        base, base_routing = read()
    with use_adapter(loaded, name):
        ours, our_routing = read()
        _same_start(loaded.model, base, ours)
        null = []
        for draw in range(null_adapters):
            with _random_update(loaded.model, name, seed=(seed, draw)):
                null.append(read())
    return Comparison(
        base=base,
        adapter=ours,
        null_entropy=np.stack([one.entropy for one, _ in null]),
        null_kl_to_final=np.stack([one.kl_to_final for one, _ in null]),
        null_same_top=np.stack([one.top_ids[:, :, 0] == base.top_ids[:, :, 0] for one, _ in null]),
        base_routing=base_routing,
        adapter_routing=our_routing,
        routing_shift=routing_distance(base_routing, our_routing) if mixture else None,
        null_routing_shift=np.stack([routing_distance(base_routing, one) for _, one in null]) if mixture else None,
    )


def _same_start(model: Any, base: LayerReading, adapter: LayerReading) -> None:
    """Refuses two embedding rows that differ although no adapter is where they come from."""
    gap = float(np.abs(base.entropy[0] - adapter.entropy[0]).max())
    if gap > FLOOR and not readout_is_adapted(model):
        raise LensError(
            f"base and adapter differ by {gap:.2g} nats at the embedding row, but nothing adapted feeds it: one of "
            "the two readings is wrong"
        )


def routing_distance(base: RoutingReading, other: RoutingReading) -> np.ndarray:
    """Jensen-Shannon divergence (Lin 1991) of the routers, (M,) in nats, mean over positions."""
    return (jensenshannon(base.probabilities, other.probabilities, axis=-1) ** 2).mean(axis=1)


@contextmanager
def _random_update(model: Any, adapter: str, *, seed: tuple[int, int]) -> Iterator[None]:
    """The adapter's updates replaced by random ones of the same rank and norm; the trained ones come back."""
    factors = lora_factors(model, adapter)
    kept = [(a.detach().clone(), b.detach().clone()) for a, b, _ in factors]
    rng = np.random.default_rng(seed)
    try:
        with torch.no_grad():
            for a, b, experts in factors:
                norm = _update_norm(a, b, experts)
                for factor in (a, b):
                    factor.copy_(torch.from_numpy(rng.standard_normal(factor.shape, dtype=np.float32)))
                share = norm / _update_norm(a, b, experts)
                b.mul_(share.repeat(b.shape[1] // experts))  # columns of B: expert fastest
        yield
    finally:
        with torch.no_grad():
            for (a, b, _), (old_a, old_b) in zip(factors, kept, strict=True):
                a.copy_(old_a)
                b.copy_(old_b)


def _update_norm(a: Tensor, b: Tensor, experts: int) -> Tensor:
    """(experts,) Frobenius norms of B A, from the small Gram matrices."""
    left = b.float().view(len(b), -1, experts).permute(2, 1, 0)  # (experts, rank, out)
    right = a.float().view(experts, -1, a.shape[1])  # (experts, rank, in)
    return ((left @ left.mT) * (right @ right.mT)).sum((1, 2)).clamp_min(0).sqrt()
