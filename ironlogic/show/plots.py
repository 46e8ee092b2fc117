"""Figures of training, disorder, memory and exports, and what the figures of every room share.

Every call makes a new figure, without pyplot: nothing global, nothing to close.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ironlogic.burden import Disorder, expected_disorder
from ironlogic.evidence.statistics import Interval

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.export.write import Comparison
    from ironlogic.memory import MemoryPlan

__all__ = [
    "COLORS",
    "arm_color",
    "draw_band",
    "error_bars",
    "plot_disorder",
    "plot_exports",
    "plot_losses",
    "plot_memory",
    "plot_reached",
    "png_bytes",
]

COLORS = {  # an arm has one colour in every figure
    "base": "#8a8f98",
    "SFT": "#1f77b4",
    "FT": "#d62728",
    "FT as the seed": "#e377c2",
    "FT mixed": "#2ca02c",
    "shuffled answers": "#ff7f0e",
    "deletion": "#8c564b",
    "NEFTune": "#17becf",
    "SFT then SFT": "#0b3c6f",
    "FT then SFT": "#7f1d1d",
    "yours": "#d62728",
    "control": "#1f77b4",
}
_MARKS = {"transformers": "o", "llama.cpp": "^"}
_FLOOR = 1e-9  # nats: what equal distributions are drawn at


# --- what figures share ---------------------------------------------------------------------------------------
def png_bytes(picture: Figure | Image.Image) -> bytes:
    write = picture.savefig if isinstance(picture, Figure) else picture.save
    buffer = io.BytesIO()
    write(buffer, format="png")
    return buffer.getvalue()


class _Picture(Figure):
    """A figure that a notebook shows without pyplot having been imported."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def _axes(columns: int = 1, *, width: float | None = None, height: float = 3.4, sharey: bool = False):
    """A figure and its row of axes; `width` of the whole (inches), by default 4.6 a column."""
    size = (width or 4.6 * columns + 0.8, height)
    figure = _Picture(figsize=size, layout="constrained", dpi=110)
    row = figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, row


def arm_color(arm: str, position: int) -> str:
    return COLORS.get(arm, f"C{position}")


def draw_band(
    axes: Axes, x: Sequence[float], intervals: Sequence[Interval], *, color: str, label: str, style: str = "o-"
) -> None:
    """A line through the means, on the band of the intervals."""
    axes.plot(x, [interval.mean for interval in intervals], style, ms=4, color=color, label=label)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.fill_between(x, low, high, color=color, alpha=0.14, lw=0)


def error_bars(*intervals: Interval) -> np.ndarray:
    """How far each interval reaches below and above its mean, (2, interval), as matplotlib's `yerr` wants it."""
    return np.array([(i.mean - i.low, i.high - i.mean) for i in intervals]).T


# --- the figures ----------------------------------------------------------------------------------------------
def plot_losses(runs: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Training loss over steps; `runs` maps an arm's name to its metrics (`Run.metrics`)."""
    figure, (axes,) = _axes()
    for i, (arm, lines) in enumerate(runs.items()):
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, color=arm_color(arm, i), label=arm)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def plot_disorder(
    points: Sequence[tuple[float, Disorder]], *, movable: int, units: int, marked: float | None = None
) -> Figure:
    """Disorder reached over the ratio asked for: dots measured, lines expected where `movable` of `units` may move.

    Units that stay pull every share towards "in order": exact for what is displaced, close for the pairs.
    """
    figure, (axes,) = _axes(height=3.0)
    ratios = np.linspace(0, 1, 41)
    expected = [expected_disorder(units, float(ratio) * movable / units) for ratio in ratios]
    labels = {"displaced": "displaced", "kendall_tau": "Kendall tau distance", "bigrams_kept": "neighbours kept"}
    for i, (name, label) in enumerate(labels.items()):
        axes.plot(ratios, [getattr(disorder, name) for disorder in expected], color=f"C{i}", lw=1.2, label=label)
        for ratio, disorder in points:
            axes.plot(ratio, getattr(disorder, name), "o", ms=4, color=f"C{i}")
    axes.plot([0, 1], [0, 1], ":", color="gray", lw=1, label="nominal")
    if marked is not None:
        axes.axvline(marked, color="black", lw=0.8)
    axes.set(xlabel="burden ratio asked for", ylabel="share of units", ylim=(-0.02, 1.02))
    axes.set_title("dots: this draw · lines: expected", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_memory(plans: "Mapping[str, MemoryPlan]") -> Figure:
    """One stacked bar of gibibytes a plan, against its card."""
    figure, (axes,) = _axes(width=8, height=1.4 + 0.5 * len(plans))
    rows, left = np.arange(len(plans)), np.zeros(len(plans))
    for part in dict.fromkeys(part for plan in plans.values() for part in plan.parts):
        sizes = np.array([plan.parts.get(part, 0.0) for plan in plans.values()])
        axes.barh(rows, sizes, left=left, label=part, height=0.6)
        left += sizes
    for row, plan in enumerate(plans.values()):
        if plan.card_gib:
            axes.plot([plan.card_gib] * 2, [row - 0.4, row + 0.4], color="black", lw=2)
    axes.set_yticks(rows, list(plans))
    axes.set_xlabel("GiB (black line: the card)")
    axes.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, ncol=4, loc="outside lower center")
    return figure


def plot_reached(units: Sequence[int], displaced: Sequence[float], *, ratio: float) -> Figure:
    """Share of units displaced over the number of units of each row, against the ratio asked for."""
    figure, (axes,) = _axes(height=2.8)
    axes.plot(units, displaced, ".", alpha=0.35, color=COLORS["FT"], label="rows")
    counts = np.arange(1, max(units, default=1) + 1)
    expected = [expected_disorder(int(count), ratio).displaced for count in counts]
    axes.plot(counts, expected, color="black", lw=1, label="expected")
    axes.axhline(ratio, color="gray", ls=":", lw=1, label="asked for")
    axes.set(xlabel="units (words) in the user's turns", ylabel="share displaced", ylim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_exports(comparisons: "Sequence[Comparison]") -> Figure:
    """Size against the mean divergence of the next-token distributions, a point per artefact and reader.

    The red bar above a point is what an artefact of its kind may have.
    """
    figure, (axes,) = _axes()
    sizes = np.array([comparison.bytes / 2**20 for comparison in comparisons])
    divergences = np.maximum([comparison.mean_kl for comparison in comparisons], _FLOOR)
    allowed = [comparison.tolerance for comparison in comparisons]
    readers = np.array([comparison.reader for comparison in comparisons])
    for reader in dict.fromkeys(readers):
        own = readers == reader
        axes.scatter(
            sizes[own], divergences[own], marker=_MARKS.get(reader, "s"), label=f"read by {reader}", zorder=3
        )
    axes.scatter(sizes, allowed, marker="_", s=300, color="tab:red", label="allowed")
    places = {c.kind: place for c, *place in zip(comparisons, sizes, allowed, strict=True)}  # a label a kind
    for kind, place in places.items():
        axes.annotate(kind, place, xytext=(0, 5), textcoords="offset points", ha="center")
    axes.set(yscale="log", xlabel="size, MiB", ylabel="mean KL from its source, nats", ylim=(_FLOOR / 2, 1))
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure
