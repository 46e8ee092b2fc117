"""What a spliced model sees, as figures: pictures with answers, checks that turn red, arms beside controls."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ironlogic.evidence.statistics import bootstrap_interval
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
    truths: Sequence[str],
    *,
    columns: int = 6,
) -> Figure:
    """A grid of pictures (PIL images or arrays), each with question, answer and, where it is wrong, the truth."""
    rows = -(-len(pictures) // columns)
    figure = _Picture(figsize=(1.6 * columns, 2.1 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for spot in axes.flat:
        spot.axis("off")
    for spot, picture, question, answer, truth in zip(
        axes.flat, pictures, questions, answers, truths, strict=False
    ):
        right = answer == truth
        spot.imshow(np.asarray(picture), interpolation="nearest")
        said = answer if right else f"{answer}\n(truth: {truth})"
        color = _RIGHT if right else _WRONG
        spot.set_title(f"{question}\n{said}", fontsize=7, color=color, parse_math=False)
    return figure


def plot_checks(reports: "Mapping[str, SpliceReport]") -> Figure:
    """Which check sees which fault: a row for each splice, a column for each check; red is broken, grey not run."""
    names = list(dict.fromkeys(row.name for report in reports.values() for row in report.rows))
    table = np.full((len(reports), len(names)), 0.5)
    for i, report in enumerate(reports.values()):
        for row in report.rows:
            table[i, names.index(row.name)] = float(row.passed)
    figure = _Picture(figsize=(1.6 + 0.42 * len(names), 1.6 + 0.3 * len(reports)), layout="constrained", dpi=110)
    spot = figure.subplots()
    colors = np.array([[0.81, 0.13, 0.18], [0.85, 0.85, 0.85], [0.68, 0.86, 0.71]])  # broken, not run, in order
    spot.imshow(colors[(table * 2).astype(int)], aspect="auto")
    spot.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    spot.set_yticks(range(len(reports)), list(reports), fontsize=8)
    spot.set_xticks(np.arange(len(names)) - 0.5, minor=True)
    spot.set_yticks(np.arange(len(reports)) - 0.5, minor=True)
    spot.grid(which="minor", color="white", lw=1.5)
    spot.tick_params(which="both", length=0)
    spot.spines[:].set_visible(False)
    return figure


def plot_controls(arms: Mapping[str, Any], *, ours: int = 1) -> Figure:
    """Accuracy of each arm, (item,) or (training, item), with its 95 % interval; the first `ours` stand out."""
    figure = _Picture(figsize=(7.5, 0.8 + 0.34 * len(arms)), layout="constrained", dpi=110)
    spot = figure.subplots()
    for place, correct in enumerate(arms.values()):
        found = bootstrap_interval(correct)
        color = _RIGHT if place < ours else "#8a8f98"
        spot.barh(place, found.mean, color=color, height=0.62)
        spot.plot([found.low, found.high], [place, place], color="black", lw=1.5)
        spot.text(max(found.mean, found.high) + 0.015, place, f"{found.mean:.2f}", va="center", fontsize=9)
    spot.set_yticks(range(len(arms)), list(arms), fontsize=9)
    spot.set(xlim=(0, 1.08), xlabel="share of held-out questions answered rightly (95 % interval)")
    spot.invert_yaxis()
    spot.spines[["top", "right"]].set_visible(False)
    return figure
