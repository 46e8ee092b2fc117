"""Results as matplotlib figures. Computes nothing but intervals, knows no model; returns a new Figure each time."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ironlogic.burden import Disorder, expected_disorder

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.export.artefacts import Comparison
    from ironlogic.memory import MemoryPlan

__all__ = [
    "COLORS",
    "plot_disorder",
    "plot_exports",
    "plot_losses",
    "plot_memory",
    "plot_reached",
]

COLORS = {  # an arm has one colour in every figure
    "base": "#8a8f98",
    "SFT": "#1f77b4",
    "FT": "#d62728",
    "FT as the seed": "#e377c2",
    "FT mixed": "#2ca02c",
    "FT 0.3": "#ff7f0e",
    "deletion": "#8c564b",
    "NEFTune": "#17becf",
    "SFT then SFT": "#0b3c6f",
    "FT then SFT": "#7f1d1d",
    "yours": "#d62728",
    "control": "#1f77b4",
}


_MARKS = {"transformers": "o", "llama.cpp": "^"}
_FLOOR = 1e-9  # nats: what equal distributions are drawn at


def _color(arm: str, position: int) -> str:
    return COLORS.get(arm, f"C{position}")


class _Picture(Figure):
    """A figure that a notebook shows as a picture without pyplot having been imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def _axes(columns: int = 1, *, height: float = 3.4, sharey: bool = False):
    """A figure (no pyplot: nothing global, nothing to close) and its row of axes."""
    figure = _Picture(figsize=(4.6 * columns + 0.8, height), layout="constrained", dpi=110)
    row = figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, row


def plot_losses(runs: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Training loss over steps; `runs` maps an arm's name to its metrics (`Run.metrics`)."""
    figure, (axes,) = _axes()
    for i, (arm, lines) in enumerate(runs.items()):
        axes.plot(
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            color=_color(arm, i),
            label=arm,
        )
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
    names = {
        "displaced": "displaced",
        "kendall_tau": "Kendall tau distance",
        "bigrams_kept": "neighbours kept",
    }
    for i, (name, label) in enumerate(names.items()):
        axes.plot(ratios, [getattr(e, name) for e in expected], color=f"C{i}", lw=1.2, label=label)
        axes.plot([r for r, _ in points], [getattr(d, name) for _, d in points], "o", ms=4, color=f"C{i}")
    axes.plot([0, 1], [0, 1], ":", color="gray", lw=1, label="nominal")
    if marked is not None:
        axes.axvline(marked, color="black", lw=0.8)
    axes.set(xlabel="burden ratio asked for", ylabel="share of units", ylim=(-0.02, 1.02))
    axes.set_title("dots: this draw · lines: expected", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_memory(plans: "Mapping[str, MemoryPlan]") -> Figure:
    """One stacked bar of gibibytes a plan, against its card."""
    figure, (axes,) = _axes(height=1.4 + 0.5 * len(plans))
    figure.set_figwidth(8)
    names = list(dict.fromkeys(name for plan in plans.values() for name in plan.parts))
    for row, plan in enumerate(plans.values()):
        left = 0.0
        for i, name in enumerate(names):
            size = plan.parts.get(name, 0.0)
            axes.barh(row, size, left=left, color=f"C{i}", label=name if row == 0 else None, height=0.6)
            left += size
        if plan.card_gib:
            axes.plot([plan.card_gib] * 2, [row - 0.4, row + 0.4], color="black", lw=2)
    axes.set(yticks=range(len(plans)), yticklabels=list(plans), xlabel="GiB (black line: the card)")
    axes.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, ncol=4, loc="outside lower center")
    return figure


def plot_reached(units: Sequence[int], displaced: Sequence[float], *, ratio: float) -> Figure:
    """Share of units displaced over the number of units of each row, against the ratio asked for."""
    figure, (axes,) = _axes(height=2.8)
    axes.plot(units, displaced, ".", alpha=0.35, color=COLORS["FT"], label="rows")
    counts = np.arange(1, max(units, default=1) + 1)
    expected = [expected_disorder(int(n), ratio).displaced for n in counts]
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
