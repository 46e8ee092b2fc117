"""What a spliced model sees, as figures: pictures with answers, checks that turn red, arms beside controls."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ironlogic.data.pictures import read_picture
from ironlogic.evidence.statistics import share_interval
from ironlogic.show.lens import _escaped, _fonts
from ironlogic.show.plots import _Picture

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.vision.check import SpliceReport

__all__ = ["plot_answers", "plot_checks", "plot_controls"]

_RIGHT, _WRONG = "#1a7f37", "#cf222e"


def plot_answers(
    pictures: Sequence[Any],
    questions: Sequence[str],
    answers: Sequence[str],
    truths: Sequence[str] | None = None,
    *,
    columns: int = 6,
) -> Figure:
    """A grid of pictures, each with question, answer and, where it is wrong, the truth.

    A picture is whatever `read_picture` reads. Without `truths` nothing is judged, and all is black.
    """
    rows = -(-len(pictures) // columns)
    figure = _Picture(figsize=(1.6 * columns, 2.1 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    shown = zip(axes.flat, pictures, questions, answers, answers if truths is None else truths, strict=False)
    for panel, picture, question, answer, truth in shown:
        panel.imshow(np.asarray(read_picture(picture)), interpolation="nearest")
        right = answer == truth
        said = [question, answer] if right else [question, answer, f"(truth: {truth})"]
        color = "black" if truths is None else _RIGHT if right else _WRONG
        panel.set_title(_caption(said), fontsize=7, fontfamily=_fonts()[0], color=color, parse_math=False)
    return figure


def _caption(texts: Sequence[str]) -> str:
    """Each in at most four lines as wide as a picture; what no font has is written as \\uXXXX."""
    known, lines = _fonts()[1], []
    for text in texts:
        line = " ".join(text.split())
        line = "".join(c if c.isprintable() and ord(c) in known else _escaped(c) for c in line)
        lines += textwrap.wrap(line, 30, max_lines=4, placeholder=" …")
    return "\n".join(lines)


def plot_checks(reports: "Mapping[str, SpliceReport]") -> Figure:
    """Which check sees which fault: a row for each splice, a column for each check; red is broken, grey not run."""
    names = list(dict.fromkeys(row.name for report in reports.values() for row in report.rows))
    table = np.full((len(reports), len(names)), 0.5)
    for i, report in enumerate(reports.values()):
        for row in report.rows:
            table[i, names.index(row.name)] = float(row.passed)
    figure = _Picture(figsize=(1.6 + 0.42 * len(names), 1.6 + 0.3 * len(reports)), layout="constrained", dpi=110)
    axes = figure.subplots()
    colors = np.array([[0.81, 0.13, 0.18], [0.85, 0.85, 0.85], [0.68, 0.86, 0.71]])  # broken, not run, in order
    axes.imshow(colors[(table * 2).astype(int)], aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(reports)), list(reports), fontsize=8)
    axes.set_xticks(np.arange(len(names)) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(reports)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return figure


def plot_controls(arms: Mapping[str, Any], *, ours: int = 1) -> Figure:
    """Accuracy of each arm, (item,) or (training, item), with its 95 % interval; the first `ours` stand out."""
    figure = _Picture(figsize=(7.5, 0.8 + 0.34 * len(arms)), layout="constrained", dpi=110)
    axes = figure.subplots()
    for row, correct in enumerate(arms.values()):
        interval = share_interval(correct)
        color = _RIGHT if row < ours else "#8a8f98"
        axes.barh(row, interval.mean, color=color, height=0.62)
        axes.plot([interval.low, interval.high], [row, row], color="black", lw=1.5)
        label = f"{interval.mean:.2f}"
        axes.text(max(interval.mean, interval.high) + 0.015, row, label, va="center", fontsize=9)
    axes.set_yticks(range(len(arms)), list(arms), fontsize=9)
    axes.set(xlim=(0, 1.08), xlabel="share of held-out questions answered rightly (95 % interval)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure
