"""What a lens saw, as frozen results that know their shapes and units and write themselves as CSV and JSON.

Holds numbers and token texts only: no model, no torch. `read` makes readings, `show.lens` draws them.
Layers are numbered by how many the token has passed: 0 is the embedding, L is after the last layer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas

__all__ = ["ACTIVE", "AttentionReading", "Comparison", "LayerReading", "RoutingReading", "layer_name"]

ACTIVE = 0.01  # a token with more than this probability counts as active (seed 002's rule)


def layer_name(layer: int) -> str:
    """`embed` for row 0, the number of layers passed otherwise."""
    return "embed" if layer == 0 else str(layer)


@dataclass(frozen=True, eq=False)
class LayerReading:
    """The next-token distribution that each layer's state would give, at P positions of one prompt of T tokens."""

    entropy: np.ndarray  # (L+1, P) nats, between 0 and ln V
    top_ids: np.ndarray  # (L+1, P, k) most probable first
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]  # (L+1, P, k) their texts
    top_probs: np.ndarray  # (L+1, P, k)
    active: np.ndarray  # (L+1, P) tokens with a probability above 1 %
    kl_to_final: np.ndarray  # (L+1, P) nats, KL(last layer || this layer); 0 in the last row
    settle_layer: np.ndarray  # (P,) first layer from which the top token stays the same
    layers: tuple[int, ...]  # 0 .. L
    positions: tuple[int, ...]  # P of 0 .. T-1; the distribution is that of the token after it
    ids: tuple[int, ...]  # T tokens of the prompt
    tokens: tuple[str, ...]  # their texts
    vocabulary: int  # V
    checks: Mapping[str, float] = field(default_factory=dict)  # gaps that check_reading measured, and
    allowed: Mapping[str, float] = field(default_factory=dict)  # what they may be in the type that was read

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.positions))
        for name in ("entropy", "active", "kl_to_final"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"LayerReading: {name} has shape {getattr(self, name).shape}, not {shape}")
        if self.top_ids.shape != self.top_probs.shape or self.top_ids.shape[:2] != shape:
            raise ValueError(f"LayerReading: top tokens have shape {self.top_ids.shape}, not {shape} and k")

    @property
    def ln_vocabulary(self) -> float:
        """Entropy of no information at all, in nats."""
        return math.log(self.vocabulary)

    @property
    def proved(self) -> bool:
        """Whether the reading was checked, with gaps no wider than its type's rounding explains."""
        return bool(self.checks) and all(gap <= self.allowed[name] for name, gap in self.checks.items())

    def column(self, position: int | None = None) -> int:
        """Where `position` (negative: from the end; None: the last one read) is among the positions read."""
        if position is None:
            return len(self.positions) - 1
        wanted = position + len(self.ids) if position < 0 else position
        if wanted not in self.positions:
            raise ValueError(f"position {position} was not read; read are {self.positions}")
        return self.positions.index(wanted)

    def pick(self, columns: Sequence[int]) -> "LayerReading":
        """The same reading at some of its positions only."""
        rows = list(columns)
        cut = {
            name: getattr(self, name)[:, rows]
            for name in ("entropy", "top_ids", "top_probs", "active", "kl_to_final")
        }
        return replace(
            self,
            **cut,
            top_tokens=tuple(tuple(line[j] for j in rows) for line in self.top_tokens),
            settle_layer=self.settle_layer[rows],
            positions=tuple(self.positions[j] for j in rows),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a layer and position; token texts as repr, so that a line stays a line."""
        found = []
        for layer in self.layers:
            for j, position in enumerate(self.positions):
                row = {
                    "layer": layer,
                    "position": position,
                    "token": repr(self.tokens[position]),
                    "entropy_nats": float(self.entropy[layer, j]),
                    "active": int(self.active[layer, j]),
                    "kl_to_final_nats": float(self.kl_to_final[layer, j]),
                }
                for rank, token in enumerate(self.top_tokens[layer][j], start=1):
                    row[f"top_{rank}"] = repr(token)
                    row[f"id_{rank}"] = int(self.top_ids[layer, j, rank - 1])
                    row[f"p_{rank}"] = float(self.top_probs[layer, j, rank - 1])
                found.append(row)
        return found

    def to_csv(self) -> str:
        """`rows` as comma-separated values with a header."""
        return pandas.DataFrame(self.rows()).to_csv(index=False, lineterminator="\n")

    def to_json(self) -> str:
        """Everything, token texts as they are."""
        units = {"entropy": "entropy_nats", "kl_to_final": "kl_to_final_nats"}
        values = {units.get(one.name, one.name): getattr(self, one.name) for one in fields(self)}
        values["ln_vocabulary_nats"] = self.ln_vocabulary
        plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}
        return json.dumps(plain, ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class AttentionReading:
    """Where P query positions look, in every layer and head."""

    weights: np.ndarray  # (L, H, P, T) rows sum to 1
    layers: tuple[int, ...]  # 1 .. L: the layer that attends
    positions: tuple[int, ...]  # P queries
    tokens: tuple[str, ...]  # T keys
    checks: Mapping[str, float] = field(default_factory=dict)

    @property
    def first_token(self) -> np.ndarray:
        """(L, P) weight on position 0, mean over heads: large in most models whatever the token is (a sink)."""
        return self.weights[..., 0].mean(axis=1)


@dataclass(frozen=True, eq=False)
class RoutingReading:
    """Which experts a mixture-of-experts model asks, at P positions, in its M layers that have experts."""

    probabilities: np.ndarray  # (M, P, E) the router's softmax over all experts
    chosen: np.ndarray  # (M, P, k) the experts used, most probable first
    layers: tuple[int, ...]  # M of 1 .. L: layers without experts are left out, not shifted
    positions: tuple[int, ...]
    tokens: tuple[str, ...]  # T tokens of the prompt

    @property
    def usage(self) -> np.ndarray:
        """(M, E) share of the choices that fell on each expert; rows sum to 1."""
        experts = self.probabilities.shape[-1]
        counts = (self.chosen[..., None] == np.arange(experts)).sum(axis=(1, 2))
        return counts / counts.sum(axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Base and adapter read in one loaded model, with N random adapters of the same norm as the null."""

    base: LayerReading
    adapter: LayerReading
    null_entropy: np.ndarray  # (N, L+1, P) nats
    null_kl_to_final: np.ndarray  # (N, L+1, P) nats
    null_same_top: np.ndarray  # (N, L+1, P) whether the top token is the base's
    base_routing: RoutingReading | None = None  # of a mixture of experts
    adapter_routing: RoutingReading | None = None
    routing_shift: np.ndarray | None = None  # (M,) Jensen-Shannon divergence in nats, mean over positions
    null_routing_shift: np.ndarray | None = None  # (N, M)

    @property
    def entropy_change(self) -> np.ndarray:
        """(L+1, P) adapter minus base, nats."""
        return self.adapter.entropy - self.base.entropy

    @property
    def null_band(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest entropy (L+1, P) that the random adapters gave."""
        return self.null_entropy.min(axis=0), self.null_entropy.max(axis=0)

    @property
    def outside(self) -> np.ndarray:
        """(L+1, P) whether the adapter's entropy leaves the band; by chance alone in 2 of N + 1 places."""
        low, high = self.null_band
        return (self.adapter.entropy < low - 1e-6) | (self.adapter.entropy > high + 1e-6)
