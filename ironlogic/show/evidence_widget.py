"""The robustness curve to look into: arms, sort of problems and measure by choice."""

from typing import TYPE_CHECKING

from ironlogic.evidence.items import Items
from ironlogic.show.evidence import MEASURES, plot_curves
from ironlogic.show.explorer import Explorer

import ipywidgets
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.evidence.claims import Arms

__all__ = ["robustness_explorer"]

_SORTS = {
    "order-free: the bag of words fixes the answer": "free",
    "order-bound: only the word order tells": "bound",
    "easy": "easy",
    "hard": "hard",
    "all": "all",
}


def robustness_explorer(arms: "Arms", items: Items, *, shown: tuple[str, ...] = ("base", "SFT", "FT")) -> Explorer:
    """A measure over the scramble ratio for the chosen arms, with intervals, ideal reader and floor.

    Offers what was measured on these items only. `shown` arms are chosen at first.
    """
    whole = {arm: repeats for arm, repeats in arms.items() if not arm.endswith(" rows")}
    columns = {name.partition("@")[0] for repeats in whole.values() for some in repeats.values() for name in some}
    measures = {
        label: m for m, label in MEASURES.items() if m in columns or ("ceiling" in m and "correct" in columns)
    }
    sorts = {label: sort for label, sort in _SORTS.items() if items.among(sort).any()}

    def show(arms: tuple[str, ...], sort: str, measure: str) -> tuple[str, Figure | None]:
        if not arms:
            return "<p>choose an arm</p>", None
        chosen = {arm: whole[arm] for arm in arms}
        n = ", ".join(f"{arm} {len(repeats)}" for arm, repeats in chosen.items())
        html = (
            f"<p>{items.among(sort).sum()} problems · trainings: {n} · bands: 95 % · cross: words substituted</p>"
        )
        return html, plot_curves(chosen, items, measure=measure, among=sort)

    return Explorer(
        "robustness",
        {
            "arms": ipywidgets.SelectMultiple(
                options=list(whole),
                value=[arm for arm in shown if arm in whole] or list(whole)[:3],
                description="arms",
                rows=min(9, len(whole)),
            ),
            "sort": ipywidgets.Dropdown(options=sorts, description="problems"),
            "measure": ipywidgets.Dropdown(options=measures, description="measure"),
        },
        show,
    )
