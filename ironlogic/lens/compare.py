"""Two readings beside each other: how far their distributions are apart."""

import numpy as np
from scipy import special

__all__ = ["entropy", "js_divergence"]


def entropy(probabilities) -> np.ndarray:
    """Entropy in nats over the last axis, which sums to 1.

    >>> print(f"{entropy([0.5, 0.5]):.4f}")  # ln 2
    0.6931
    """
    p = np.asarray(probabilities, dtype=float)
    if p.size == 0 or (p < 0).any() or not np.allclose(p.sum(axis=-1), 1, atol=1e-3):
        raise ValueError("entropy: expected probabilities that sum to 1 over the last axis")
    return special.entr(p).sum(axis=-1)


def js_divergence(ours, theirs) -> np.ndarray:
    """Jensen-Shannon divergence in nats over the last axis: 0 if equal, ln 2 if nothing is shared (Lin 1991).

    >>> print(f"{js_divergence([1, 0], [0, 1]):.4f}")  # ln 2
    0.6931
    """
    p, q = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if p.shape != q.shape:
        raise ValueError(f"js_divergence: shapes {p.shape} and {q.shape} differ")
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)
