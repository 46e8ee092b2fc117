"""Findings and curves of a study as figures. Computes nothing but intervals, knows no model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ironlogic.evidence.items import RATIOS, Items
from ironlogic.evidence.statistics import bootstrap_interval
from ironlogic.show.plots import COLORS, _axes

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.evidence.claims import Arms, Finding

__all__ = [
    "VERDICT_COLORS",
    "finding_pictures",
    "plot_curves",
    "plot_finding",
    "plot_findings",
    "plot_learning",
    "plot_recipes",
]

VERDICT_COLORS = {
    "holds": "#2e7d32",
    "holds in part": "#9a6b00",
    "fails": "#b3261e",
    "can't be told here": "#5f6670",
}
MEASURES = {  # what `plot_curves` draws over the ratio -> label of the axis
    "correct": "accuracy (exact match)",
    "of the ceiling": "accuracy, of what an ideal reader reaches",
    "think": "share of replies that think",
    "tokens": "tokens an answer",
    "loop": "share of replies that loop",
}
_COLORS = COLORS | {  # as in every other figure, and the arms that only a study has
    "FT 0.3": "#ff7f0e",
    "deletion": "#8c564b",
    "NEFTune": "#17becf",
    "SFT then SFT": "#0b3c6f",
    "FT then SFT": "#7f1d1d",
    "yours": COLORS["FT"],
    "control": COLORS["SFT"],
}
_WORDS = {"difference": "ours minus control", "saved": "share saved, 1 - ours / control"}


def _color(arm: str, position: int) -> str:
    return _COLORS.get(arm, f"C{position}")


def _label(finding: "Finding") -> str:
    claim = finding.claim
    return f"{claim.said}\n{claim.measure}"


def plot_findings(findings: "Sequence[Finding]") -> Figure:
    """Every effect that is a difference or a share, with its interval, and the mark from which the claim holds."""
    shown = [f for f in findings if f.effect is not None and f.claim.form != "worth"]
    figure, (axes,) = _axes(height=1.2 + 0.46 * len(shown))
    figure.set_figwidth(9)
    for row, finding in enumerate(shown):
        effect, color = finding.effect, VERDICT_COLORS[finding.verdict]
        axes.plot([effect.low, effect.high], [row, row], color=color, lw=2.4, solid_capstyle="butt")
        axes.plot(effect.mean, row, "o", color=color, ms=6)
        axes.plot([finding.claim.size] * 2, [row - 0.32, row + 0.32], color="black", lw=1)
        axes.annotate(finding.verdict, (1.01, row), xycoords=("axes fraction", "data"), color=color, va="center")
    axes.axvline(0, color="gray", lw=0.8)
    axes.set_yticks(range(len(shown)), [_label(f) for f in shown], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("effect in the claimed direction · black mark: from here on the claim holds")
    return figure


def plot_finding(finding: "Finding") -> Figure:
    """One effect: every training a dot, the interval a bar, the zone in which the claim holds shaded."""
    figure, (axes,) = _axes(height=1.7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    effect, color, size = finding.effect, VERDICT_COLORS[finding.verdict], finding.claim.size
    spread = [effect.low, effect.high, *finding.each, size, 0.0]
    room = 0.12 * (max(spread) - min(spread) or 1.0)
    axes.set_xlim(min(spread) - room, max(spread) + room)
    axes.axvspan(size, max(spread) + room, color=VERDICT_COLORS["holds"], alpha=0.10, lw=0)
    axes.axvline(0, color="gray", lw=0.8)
    axes.plot([effect.low, effect.high], [0, 0], color=color, lw=5, alpha=0.5, solid_capstyle="butt")
    axes.plot(effect.mean, 0, "o", color=color, ms=8)
    axes.plot(finding.each, np.full(len(finding.each), 0.5), "|", color="black", ms=12)
    axes.set(ylim=(-0.6, 1), xlabel=f"{_WORDS[finding.claim.form]} · shaded: the claim holds")
    axes.set_title(f"{finding.claim.ours} against {finding.claim.control}: {finding.claim.measure}", fontsize=9)
    return figure


def plot_curves(
    arms: "Arms", items: Items, *, measure: str = "correct", among: str = "all", ratios: Sequence[float] = RATIOS
) -> Figure:
    """A measure (a key of MEASURES) over the scramble ratio, with 95 % intervals; an arm trained once is dotted.

    Accuracy has two controls: the ideal reader (dashed) and, at the ratio where it was measured, a cross for the
    arm's accuracy with words substituted instead of moved.
    """
    figure, (axes,) = _axes(height=3.9)
    figure.set_figwidth(7)
    mine, needed = items.among(among), "correct" if measure == "of the ceiling" else measure
    for i, (arm, repeats) in enumerate(arms.items()):
        tables = {
            r: [c[f"{needed}@{r:g}"][mine] for c in repeats.values() if f"{needed}@{r:g}" in c] for r in ratios
        }
        known = [ratio for ratio in ratios if tables[ratio] and mine.any()]
        if not known:
            continue
        ceiling = {
            r: next(iter(repeats.values())).get(f"ceiling@{r:g}", np.full(len(mine), np.nan))[mine] for r in known
        }
        scale = {r: ceiling[r].mean() if measure == "of the ceiling" else 1.0 for r in known}
        found = [bootstrap_interval(np.stack(tables[r]) / scale[r]) for r in known if np.isfinite(scale[r])]
        known = [r for r in known if np.isfinite(scale[r])]
        color = _color(arm, i)
        axes.plot(known, [f.mean for f in found], "o-" if len(repeats) > 1 else "o:", ms=4, color=color, label=arm)
        axes.fill_between(known, [f.low for f in found], [f.high for f in found], color=color, alpha=0.13, lw=0)
        if measure == "correct":
            floor = [c["correct substituted"][mine].mean() for c in repeats.values() if "correct substituted" in c]
            axes.plot([0.7] * len(floor[:1]), [np.mean(floor)] * len(floor[:1]), "x", color=color, ms=7)
            if i == 0 and np.isfinite(list(ceiling.values())).all():
                axes.plot(known, [ceiling[r].mean() for r in known], "k--", lw=1.2, label="ideal reader")
    axes.set(xlabel="burden ratio of the test prompt", ylabel=MEASURES[measure], xticks=list(ratios))
    axes.set_ylim(0, None if measure == "tokens" else 1.05 if measure != "loop" else None)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_learning(arms: "Arms", sizes: Sequence[int], *, column: str, label: str) -> Figure:
    """Loss of the reference replies over the number of rows trained on, FT beside SFT."""
    figure, (axes,) = _axes()
    for i, arm in enumerate(("SFT", "FT")):
        points = []
        for size in sizes:
            repeats = arms.get(arm if size == sizes[-1] else f"{arm} {size} rows", {}).values()
            if repeats:
                points.append((size, bootstrap_interval(np.stack([columns[column] for columns in repeats]))))
        color = _color(arm, i)
        axes.plot([s for s, _ in points], [f.mean for _, f in points], "o-", ms=4, color=color, label=arm)
        low, high = [f.low for _, f in points], [f.high for _, f in points]
        axes.fill_between([s for s, _ in points], low, high, color=color, alpha=0.15, lw=0)
    axes.set(xscale="log", xlabel="rows trained on", ylabel="loss (nats per token)", title=label, ylim=(0, None))
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def plot_recipes(recipes: "Sequence[Finding]") -> Figure:
    """What a recipe buys on scrambled prompts, over what it costs on clean ones (`claims.compare_recipes`)."""
    figure, (axes,) = _axes(height=4.2)
    figure.set_figwidth(7.5)
    known = {f.claim.key: f for f in recipes if f.effect is not None}
    arms = list(dict.fromkeys(f.claim.said for f in recipes))
    axes.axhline(0, color="gray", lw=0.8)
    axes.axvline(0, color="gray", lw=0.8)
    for i, arm in enumerate(arms):
        price, gain = known.get(f"{arm} price"), known.get(f"{arm} gain")
        if price is None or gain is None:
            continue
        axes.set_xlabel(f"{price.claim.measure}\nminus that of {price.claim.control}")
        axes.set_ylabel(f"{gain.claim.measure}\nminus that of {gain.claim.control}")
        x, y, color = price.effect, gain.effect, _color(arm, i)
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=[[x.mean - x.low], [x.high - x.mean]],
            yerr=[[y.mean - y.low], [y.high - y.mean]],
            fmt="o",
            color=color,
            ms=6,
            lw=1,
            label=arm if arm == "base" else f"{arm} ({gain.repeats})",
        )
    figure.legend(frameon=False, fontsize=8, title="(trainings)", title_fontsize=8, loc="outside right upper")
    return figure


def finding_pictures(
    findings: "Sequence[Finding]", arms: "Arms", items: Items, *, sizes: Sequence[int] = ()
) -> dict[str, Figure]:
    """A figure by its claim's key for every finding with an effect: the robustness or learning curve, if any."""
    pictures = {}
    for finding in findings:
        claim = finding.claim
        if finding.effect is None:
            continue
        if claim.form == "worth":
            picture = plot_learning(arms, sizes, column=claim.column, label=claim.measure)
        elif claim.key in ("robust", "robust-bound", "words-enough"):
            some = {arm: arms[arm] for arm in ("base", claim.control, claim.ours, "FT mixed") if arms.get(arm)}
            picture = plot_curves(some, items, among=claim.among if items.among(claim.among).any() else "all")
        else:
            picture = plot_finding(finding)
        pictures[claim.key] = picture
    return pictures
