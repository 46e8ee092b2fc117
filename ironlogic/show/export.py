"""The figure of exports: how large each artefact is, and how far it is from the model it was made from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ironlogic.show.plots import _axes

from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.artefacts import Comparison

__all__ = ["plot_exports"]

_MARKS = {"transformers": "o", "llama.cpp": "^"}
_FLOOR = 1e-9  # nats: what equal distributions are drawn at


def plot_exports(comparisons: "Sequence[Comparison]") -> Figure:
    """Size against the mean divergence of the next-token distributions, a point per artefact and reader.

    The red bar above a point is what an artefact of its kind may have.
    """
    figure, (axes,) = _axes()
    for reader in dict.fromkeys(c.reader for c in comparisons):
        mine = [c for c in comparisons if c.reader == reader]
        x, y = [c.bytes / 2**20 for c in mine], [max(c.mean_kl, _FLOOR) for c in mine]
        axes.scatter(x, y, marker=_MARKS.get(reader, "s"), label=f"read by {reader}", zorder=3)
    x, y = [c.bytes / 2**20 for c in comparisons], [c.tolerance for c in comparisons]
    axes.scatter(x, y, marker="_", s=300, color="tab:red", label="allowed")
    for kind, c in {c.kind: c for c in comparisons}.items():
        axes.annotate(kind, (c.bytes / 2**20, c.tolerance), xytext=(0, 5), textcoords="offset points", ha="center")
    axes.set(yscale="log", xlabel="size, MiB", ylabel="mean KL from its source, nats", ylim=(_FLOOR / 2, 1))
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure
