"""Findings as one page of HTML that needs nothing beside it: pictures inside, every text escaped, no script."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from ironlogic import __version__
from ironlogic.evidence.claims import Finding, Findings
from ironlogic.evidence.statistics import Interval
from ironlogic.show.evidence import VERDICT_COLORS, finding_pictures, plot_frontier, plot_recipes
from ironlogic.show.explorer import picture_html
from ironlogic.show.plots import png_bytes
from ironlogic.training.runs import replacing

import jinja2
import pandas as pd
import torch
import transformers
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["findings_html", "measures_html", "write_report"]


def findings_html(findings: Findings) -> str:
    """The table of claims; each row opens to its rule and its picture."""
    return _render("findings", findings=findings)


def measures_html(table: pd.DataFrame) -> str:
    """Every measure of every arm (`evidence.measures.describe`), with its standard deviation over trainings."""
    return _render("measures", measures=table)


def write_report(
    path: str | Path,
    findings: Findings,
    *,
    title: str,
    lines: Sequence[str] = (),
    recipes: Sequence[Finding] = (),
    sweep: Sequence[Mapping[str, Any]] = (),
    measures: pd.DataFrame,
) -> Path:
    """Writes the page, and beside it as JSON what it says, with day, machine and versions; returns its path.

    `lines` say what was done with what, `recipes` come from `compare_recipes`, `sweep` from `Study.sweep_points`,
    `measures` from `describe`.
    """
    sections = []
    if sweep:
        sections.append(("The learning rates that were tried", plot_frontier(sweep)))
    if any(finding.effect for finding in recipes):
        sections.append(("What each recipe buys, and what it costs", plot_recipes(recipes)))
    lines = [*lines, _made()]
    page = _render("page", title=title, lines=lines, findings=findings, sections=sections, measures=measures)
    told = {
        "title": title,
        "lines": lines,
        "findings": [_plain(finding) for finding in findings],
        "recipes": [_plain(finding) for finding in recipes],
        "sweep": list(sweep),
        "measures": {arm: json.loads(measures[arm, "mean"].to_json()) for arm in measures.columns.levels[0]},
    }
    path = Path(path)
    for file, text in ((path, page), (path.with_suffix(".json"), json.dumps(told, indent=1, ensure_ascii=False))):
        with replacing(file) as part:
            part.write_text(text, encoding="utf-8")
    return path


def _made() -> str:
    """When, where and with what."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    return (
        f"Made on {date.today()} with ironlogic {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__} on {platform.machine()}, {os.cpu_count()} cores, {card}."
    )


def _plain(finding: Finding) -> dict[str, Any]:
    return {name: _finite(value) for name, value in asdict(finding).items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _render(part: str, *, findings: Findings | None = None, **values: Any) -> str:
    """`report.html`: the whole page, or that part of it."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    filters = {"level": _level, "effect": _effect, "details": _details, "spread": _spread}
    environment.filters |= filters | {"picture": _picture}
    pictures = finding_pictures(findings) if findings else {}
    values |= {"findings": findings, "pictures": pictures, "colors": VERDICT_COLORS}
    return environment.get_template("report.html").render(part=part, **values)


# --- what the template calls ----------------------------------------------------------------------------------
def _picture(figure: Figure, alt: str) -> Markup:
    return Markup(picture_html(png_bytes(figure), alt))


def _level(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{interval.mean:.2g}" if abs(interval.mean) >= 10 else f"{interval.mean:.3f}"


def _effect(value: float, form: str) -> str:
    return {"saved": f"{value:+.1%}", "worth": f"{value:.2g} x"}.get(form, f"{value:+.3f}")


def _spread(mean: float, deviation: float) -> str:
    """Two figures that matter of the deviation, at most three decimals, and the mean to the same place."""
    if math.isnan(mean):
        return "–"
    if not deviation > 0:
        return f"{mean:.3g}"
    digits = min(max(0, 1 - math.floor(math.log10(deviation))), 3)
    return Markup("{} <small>±{}</small>").format(f"{mean:.{digits}f}", f"{deviation:.{digits}f}")


def _details(finding: Finding) -> list[str]:
    claim = finding.claim
    rules = {
        "worth": f"holds from {claim.size:g} x on, in part above 1 x",
        "saved": f"holds from {claim.size:.0%} saved on, in part above 3 %",
        "no harm": f"holds if a loss of {-claim.size:g} is ruled out",
        "gain": f"holds from {claim.size:+g} on, in part above 0",
    }
    details = [f"rule: {rules[claim.form]}"]
    if claim.source:
        details.append(f"said in seed {claim.source}")
    if finding.effect is not None and math.isfinite(finding.detectable):
        details.append(f"smallest effect such data show in 4 of 5 repetitions: {finding.detectable:.3f}")
    if finding.kinds:
        details.append(f"interval over trainings and {finding.kinds} kinds of items")
    if finding.p is not None:
        nothing = f"a loss of {-claim.size:g}" if claim.form == "no harm" else "no effect"
        details.append(f"p = {finding.p:.2g} of {nothing}, after Holm over all claims")
    if finding.effect is not None and finding.note:
        details.append(finding.note)
    return details
