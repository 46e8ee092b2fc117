"""Arms beside their control as figures: curves over the scramble ratio, effects with intervals, recipes."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ironlogic.evidence.claims import Finding, Findings
from ironlogic.evidence.items import RATIOS, WORST, Items
from ironlogic.evidence.results import Arms, Columns
from ironlogic.evidence.statistics import mean_interval, share_interval
from ironlogic.show.explorer import Explorer, live_html, picture_html, progress, wide
from ironlogic.show.plots import COLORS, _axes, arm_color, draw_band, error_bars, plot_losses, png_bytes

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "VERDICT_COLORS",
    "finding_pictures",
    "live_arms",
    "plot_curves",
    "plot_findings",
    "plot_frontier",
    "plot_learning",
    "plot_recipes",
    "plot_robustness",
    "robustness_explorer",
]

VERDICT_COLORS = {
    "holds": "#2e7d32",
    "holds in part": "#9a6b00",
    "fails": "#b3261e",
    "can't be told here": "#5f6670",
    "no room to tell": "#5f6670",
    "one training: not judged": "#5f6670",
}
MEASURES = {  # what `plot_curves` draws over the ratio -> label of the axis
    "correct": "accuracy (exact match)",
    "of the ceiling": "accuracy, of what an ideal reader reaches",
    "loss": "loss of the answer (nats per token)",
    "think": "share of replies that think",
    "tokens": "tokens an answer",
    "loop": "share of replies that loop",
}
SORTS = {  # of items
    "free": "order-free: the bag of words fixes the answer",
    "bound": "order-bound: only the word order tells",
    "easy": "easy",
    "hard": "hard",
    "all": "all",
}


# --- over the scramble ratio --------------------------------------------------------------------------------
def plot_robustness(arms: Arms, items: Items) -> Figure:
    """Accuracy over the scramble ratio, order-free and order-bound items apart; see `plot_curves`."""
    figure, panels = _axes(2, height=3.9, sharey=True)
    for axes, sort in zip(panels, ("free", "bound"), strict=True):
        _draw_curves(axes, arms, "correct", items.among(sort), items.ratios)
        axes.set(title=SORTS[sort].replace(": ", " problems\n"), ylim=(0, 1.04))
    panels[1].set_ylabel("")
    panels[0].legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def plot_curves(
    arms: Arms,
    items: Items | None = None,
    *,
    measure: str = "correct",
    among: str = "all",
    ratios: Sequence[float] = RATIOS,
) -> Figure:
    """A measure (a key of MEASURES) over the scramble ratio; an arm trained once is dotted.

    Bands: 95 % over trainings and items. Verdicts on differences are over kinds of items (`judge_claims`).

    Accuracy has two controls: the ideal reader (dashed) and, at the ratio where it was measured, a cross for the
    arm's accuracy with words substituted instead of moved. Without `items` the columns are of conversations.
    """
    figure, (axes,) = _axes(width=7, height=3.9)
    _draw_curves(axes, arms, measure, slice(None) if items is None else items.among(among), ratios)
    axes.set_ylim(0, 1.05 if measure in ("correct", "of the ceiling", "think") else None)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_curves(axes: Axes, arms: Arms, measure: str, among: np.ndarray | slice, ratios: Sequence[float]) -> None:
    column = "correct" if measure == "of the ceiling" else measure
    interval = share_interval if measure in ("correct", "think", "loop") else mean_interval
    ideal: dict[float, float] = {}
    for i, (arm, trainings) in enumerate(arms.items()):
        tables = _tables(trainings, column, among, ratios)
        ceilings = _ceilings(trainings, among, ratios)
        ideal = ideal or ceilings
        if measure == "of the ceiling":
            tables = {ratio: table / ceilings[ratio] for ratio, table in tables.items() if ratio in ceilings}
        if not tables:
            continue
        color, style = arm_color(arm, i), "o-" if len(trainings) > 1 else "o:"
        draw_band(axes, list(tables), list(map(interval, tables.values())), color=color, label=arm, style=style)
        floors = [c["correct substituted"][among] for c in trainings.values() if "correct substituted" in c]
        if measure == "correct" and floors:
            axes.plot(WORST, np.mean(floors), "x", color=color, ms=7)
    if measure == "correct" and ideal:
        axes.plot(list(ideal), list(ideal.values()), "k--", lw=1.2, label="ideal reader")
    axes.set(xlabel="burden ratio of the test prompt", ylabel=MEASURES[measure], xticks=list(ratios))


def _tables(
    trainings: Mapping[int, Columns], column: str, among: np.ndarray | slice, ratios: Sequence[float]
) -> dict[float, np.ndarray]:
    """The column by ratio, (training, item), of the items where it was measured."""
    tables = {}
    for ratio in ratios:
        name = f"{column}@{ratio:g}"
        measured = [columns[name][among] for columns in trainings.values() if name in columns]
        if measured:
            table = np.stack(measured)
            tables[ratio] = table[:, np.isfinite(table).all(axis=0)]
    return {ratio: table for ratio, table in tables.items() if table.size}


def _ceilings(
    trainings: Mapping[int, Columns], among: np.ndarray | slice, ratios: Sequence[float]
) -> dict[float, float]:
    """What an ideal reader reaches, by ratio, where it is known of every item."""
    columns = next(iter(trainings.values()))
    known = {ratio: columns[f"ceiling@{ratio:g}"][among] for ratio in ratios if f"ceiling@{ratio:g}" in columns}
    return {ratio: float(values.mean()) for ratio, values in known.items() if np.isfinite(values).all()}


def plot_learning(arms: Arms, items: Items, sizes: Sequence[int], *, column: str, label: str) -> Figure:
    """A column over the number of rows trained on, FT beside SFT's learning curve, with 95 % intervals."""
    figure, (axes,) = _axes()
    kinds = items.kinds(items.among("all"))
    for arm in ("SFT", "FT"):
        drawn = {size: arms[f"{arm} {size} rows"] for size in sizes if arms.get(f"{arm} {size} rows")}
        tables = [np.stack([columns[column] for columns in trainings.values()]) for trainings in drawn.values()]
        intervals = [share_interval(table, kinds) for table in tables]
        means, errors = [interval.mean for interval in intervals], error_bars(*intervals)
        axes.errorbar(list(drawn), means, errors, fmt="o-", ms=4, lw=1, color=COLORS[arm], label=arm)
    axes.set(xscale="log", xlabel="rows trained on", ylabel="accuracy (exact match)", title=label, ylim=(0, 1.04))
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def plot_frontier(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Every learning rate of a sweep (`Study.sweep_points`): scrambled prompts over clean ones, SFT beside FT.

    Further right and further up is better; the ring is the rate that was chosen, the square the base model.
    """
    figure, (axes,) = _axes(width=6, height=3.9)
    table = pd.DataFrame(points)
    for _, base in table[table["arm"] == "base"].iterrows():
        axes.plot(base["clean"], base["scrambled"], "s", color=COLORS["base"], ms=7, label="base")
    for arm in ("SFT", "FT"):
        own = table[table["arm"] == arm].sort_values("rate")
        best = own.loc[own["score"].idxmax()]
        axes.plot(own["clean"], own["scrambled"], "o-", color=COLORS[arm], ms=5, lw=1, label=arm)
        axes.plot(best["clean"], best["scrambled"], "o", ms=13, mfc="none", mec=COLORS[arm])
        for rate, *place in own[["rate", "clean", "scrambled"]].to_numpy():
            axes.annotate(f"{rate:g}", place, xytext=(6, -10), textcoords="offset points", fontsize=8)
    measure = "accuracy" if (table["clean"] >= 0).all() else "minus the loss (nats a token)"
    axes.set(xlabel=f"{measure}, clean prompts", ylabel=f"{measure}, scrambled prompts")
    axes.set_title("Learning rates, on validation problems", fontsize=10)
    axes.margins(0.15)
    axes.legend(frameon=False)
    return figure


# --- effects ------------------------------------------------------------------------------------------------
def plot_findings(findings: Iterable[Finding]) -> Figure:
    """Every effect that is a difference or a share: its interval, its trainings, and from where the claim holds."""
    shown = [finding for finding in findings if finding.effect is not None and finding.claim.form != "worth"]
    figure, (axes,) = _axes(width=9, height=1.2 + 0.46 * len(shown))
    for row, finding in enumerate(shown):
        effect, color = finding.effect, VERDICT_COLORS[finding.verdict]
        axes.plot([effect.low, effect.high], [row, row], color=color, lw=2.4, solid_capstyle="butt")
        axes.plot(effect.mean, row, "o", color=color, ms=6)
        axes.plot(finding.each, [row] * len(finding.each), "|", color=color, ms=11)
        axes.plot([finding.claim.size] * 2, [row - 0.32, row + 0.32], color="black", lw=1)
        axes.annotate(finding.verdict, (1.01, row), xycoords=("axes fraction", "data"), color=color, va="center")
    axes.axvline(0, color="gray", lw=0.8)
    axes.set_yticks(range(len(shown)), [f"{f.claim.said}\n{f.claim.measure}" for f in shown], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("effect in the claimed direction\nticks: trainings · black mark: from here on the claim holds")
    return figure


def plot_recipes(recipes: Sequence[Finding]) -> Figure:
    """What a recipe buys on scrambled prompts, over what it costs on clean ones (`claims.compare_recipes`)."""
    figure, (axes,) = _axes(width=7.5, height=4.2)
    known = {finding.claim.key: finding for finding in recipes if finding.effect is not None}
    axes.axhline(0, color="gray", lw=0.8)
    axes.axvline(0, color="gray", lw=0.8)
    for i, arm in enumerate(dict.fromkeys(finding.claim.said for finding in recipes)):
        price, gain = known.get(f"{arm} price"), known.get(f"{arm} gain")
        if price is None or gain is None:
            continue
        axes.set_xlabel(f"{price.claim.measure}\nminus that of {price.claim.control}")
        axes.set_ylabel(f"{gain.claim.measure}\nminus that of {gain.claim.control}")
        x, y = price.effect, gain.effect
        label = arm if arm == "base" else f"{arm} ({gain.repeats})"
        look = {"fmt": "o", "ms": 6, "lw": 1, "color": arm_color(arm, i), "label": label}
        axes.errorbar(x.mean, y.mean, xerr=error_bars(x), yerr=error_bars(y), **look)
    figure.legend(frameon=False, fontsize=8, title="(trainings)", title_fontsize=8, loc="outside right upper")
    return figure


def finding_pictures(findings: Findings) -> dict[str, Figure]:
    """A figure by its claim's key for every finding with an effect: the robustness or learning curve, if any."""
    pictures, arms, items = {}, findings.arms, findings.items
    for finding in findings:
        claim = finding.claim
        if finding.effect is None:
            continue
        if claim.form == "worth":
            picture = plot_learning(arms, items, findings.sizes, column=claim.column, label=claim.measure)
        elif claim.key in ("robust", "robust-bound", "words-enough"):
            shown = {arm: arms[arm] for arm in ("base", claim.control, claim.ours, "FT mixed") if arms.get(arm)}
            picture = plot_curves(shown, items, among=claim.among if items.among(claim.among).any() else "all")
        else:
            picture = plot_findings([finding])
        pictures[claim.key] = picture
    return pictures


# --- widgets ------------------------------------------------------------------------------------------------
def robustness_explorer(arms: Arms, items: Items, *, shown: tuple[str, ...] = ("base", "SFT", "FT")) -> Explorer:
    """A measure over the scramble ratio for the chosen arms, with intervals, ideal reader and floor.

    Offers what was measured on these items only. `shown` arms are chosen at first.
    """
    whole = {arm: trainings for arm, trainings in arms.items() if not arm.endswith(" rows")}
    columns = [name for trainings in whole.values() for columns in trainings.values() for name in columns]
    measured = {name.partition("@")[0] for name in columns}
    if "ceiling" in measured:
        measured.add("of the ceiling")

    def show(arms: tuple[str, ...], sort: str, measure: str) -> tuple[str, Figure | None]:
        if not arms:
            return "<p>choose an arm</p>", None
        trainings = ", ".join(f"{arm} {len(whole[arm])}" for arm in arms)
        html = (
            f"<p>{items.among(sort).sum()} problems · trainings: {escape(trainings)} · bands: 95 % · "
            "cross: words substituted</p>"
        )
        return html, plot_curves({arm: whole[arm] for arm in arms}, items, measure=measure, among=sort)

    sorts = {label: sort for sort, label in SORTS.items() if items.among(sort).any()}
    measures = {label: measure for measure, label in MEASURES.items() if measure in measured}
    chosen = [arm for arm in shown if arm in whole] or list(whole)[:3]
    controls = {
        "arms": ipywidgets.SelectMultiple(
            options=list(whole), value=chosen, description="arms", rows=min(9, len(whole))
        ),
        "sort": ipywidgets.Dropdown(options=sorts, description="problems", layout=wide()),
        "measure": ipywidgets.Dropdown(options=measures, description="measure", layout=wide()),
    }
    return Explorer("robustness", controls, show)


def live_arms(*, every: float = 5.0) -> Callable[[str, list[dict[str, Any]]], None]:
    """A `watch` for `train_twins` and its like: a line for each training and all loss curves, while they train.

    `every`: seconds between two pictures.
    """
    update = live_html("<p>starting; the first steps come when the libraries are loaded</p>")
    metrics, drawn = {}, 0.0

    def watch(name: str, lines: list[dict[str, Any]]) -> None:
        nonlocal drawn
        metrics[name] = lines
        if time.monotonic() - drawn < every and lines[-1]["step"] < lines[-1]["steps"]:
            return
        drawn = time.monotonic()
        rows = []
        for arm, (*_, last) in metrics.items():
            figures = f"loss {last['loss']:.3f} · peak {last['peak_gib']:.1f} GiB"
            rows.append(f"<b>{escape(arm)}</b> {progress(last)} · {figures}")
        picture = picture_html(png_bytes(plot_losses(metrics)), "loss of every training")
        update(f"<p>{'<br>'.join(rows)}</p>{picture}")

    return watch
