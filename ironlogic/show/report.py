"""Findings as one page of HTML that needs nothing beside it: pictures inside, every text escaped, no script."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ironlogic.evidence.items import Items
from ironlogic.show.evidence import VERDICT_COLORS, finding_pictures, plot_recipes

from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.evidence.claims import Arms, Finding
    from ironlogic.evidence.statistics import Interval

__all__ = ["findings_html", "measures_html", "write_report"]

_GRID = " ".join(f"minmax(0, {share}fr)" for share in (2.2, 2.1, 1.1, 1.1, 1.7, 0.7)) + " 150px"
_STYLE = f"""
.il-evidence {{ font: 14px/1.4 system-ui, sans-serif; color: #1b1c1e; background: #fff; max-width: 1180px }}
.il-evidence {{ container-type: inline-size }}
.il-evidence .row {{ display: grid; grid-template-columns: {_GRID}; gap: 10px; padding: 7px 4px }}
.il-evidence .row {{ align-items: center }}
.il-evidence .head {{ font-weight: 600; border-bottom: 2px solid #1b1c1e }}
.il-evidence details {{ border-bottom: 1px solid #d9dce0 }}
.il-evidence summary {{ cursor: pointer; list-style: none }}
.il-evidence summary::-webkit-details-marker {{ display: none }}
.il-evidence summary:hover, .il-evidence summary:focus {{ background: #f2f4f7 }}
.il-evidence summary > span:first-child {{ padding-left: 18px; position: relative }}
.il-evidence summary > span:first-child::before {{ content: "\\25b8"; position: absolute; left: 2px }}
.il-evidence details[open] > summary > span:first-child::before {{ content: "\\25be" }}
.il-evidence .chip {{ color: #fff; border-radius: 4px; padding: 2px 7px; white-space: nowrap; font-size: 13px }}
.il-evidence small {{ color: #4a4f57 }}
.il-evidence img {{ max-width: 100% }}
.il-evidence .more {{ padding: 4px 4px 14px 22px }}
.il-evidence .num {{ font-variant-numeric: tabular-nums }}
.il-evidence table {{ border-collapse: collapse; color: inherit; background: #fff }}
.il-evidence th, .il-evidence td {{ padding: 3px 6px; text-align: right; border-bottom: 1px solid #d9dce0 }}
.il-evidence th:first-child, .il-evidence td:first-child {{ text-align: left; position: sticky; left: 0 }}
.il-evidence th:first-child, .il-evidence td:first-child {{ background: #fff; min-width: 110px }}
.il-evidence td {{ white-space: nowrap }}
.il-evidence td small {{ font-size: 11px }}
.il-evidence td:first-child {{ white-space: normal }}
@container (max-width: 720px) {{
  .il-evidence .head {{ display: none }}
  .il-evidence .row {{ grid-template-columns: 4fr 4fr 5fr; gap: 2px 10px; align-items: start; padding: 10px 2px }}
  .il-evidence .row > span:nth-child(1) {{ grid-column: 1 / -1; font-weight: 600 }}
  .il-evidence .row > span:nth-child(2) {{ grid-column: 1 / -1; padding-left: 18px }}
  .il-evidence .row > span:nth-child(3), .il-evidence .row > span:nth-child(6) {{ padding-left: 18px }}
  .il-evidence .row > span:nth-child(7) {{ grid-column: 2 / -1 }}
  .il-evidence .more {{ padding: 4px 2px 14px }}
}}
"""


def _picture(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def _number(value: float, form: str) -> str:
    return f"{value:+.1%}" if form == "saved" else f"{value:.2g} x" if form == "worth" else f"{value:+.3f}"


def _effect(finding: "Finding") -> str:
    if finding.effect is None:
        return f"<small>{escape(finding.note)}</small>"
    effect, form = finding.effect, finding.claim.form
    low, high = (_number(value, form) for value in (effect.low, effect.high))
    least = "≥ " if finding.at_least else ""
    return f"<b>{least}{_number(effect.mean, form)}</b> <small>[{low}, {high}]</small>"


def _plain(interval: "Interval | None", arm: str) -> str:
    value = (
        "–" if interval is None else f"{interval.mean:.2g}" if abs(interval.mean) >= 10 else f"{interval.mean:.3f}"
    )
    return f"{value}<br><small>{escape(arm)}</small>"


def _details(finding: "Finding") -> str:
    claim = finding.claim
    rule = {
        "worth": f"holds from {claim.size:g} x on, in part above 1 x",
        "saved": f"holds from {claim.size:.0%} saved on, in part above 3 %",
        "difference": f"holds if a loss of {-claim.size:g} is ruled out (90 % interval)"
        if claim.harmless
        else f"holds from {claim.size:+g} on, in part above 0",
    }[claim.form]
    said = [f"rule: {rule}", f"said in seed {claim.source}" if claim.source else ""]
    if finding.effect is not None and finding.detectable == finding.detectable:
        said.append(f"smallest effect such data show in 4 of 5 repetitions: {finding.detectable:.3f}")
    if finding.same:
        said.append("shown to be the same within 0.03 (two one-sided tests)")
    if finding.p is not None:
        said.append(f"McNemar over items, first training, Holm: p = {finding.p:.2g}")
    return " · ".join(escape(text) for text in [*said, finding.note if finding.effect else ""] if text)


def findings_html(findings: "Sequence[Finding]", pictures: Mapping[str, Figure]) -> str:
    """The table of claims; each row opens to its rule and its picture (by the claim's key)."""
    heads = ("what was said", "what was measured", "measured", "control", "effect", "n", "verdict")
    rows = [f'<div class="row head">{"".join(f"<span>{escape(head)}</span>" for head in heads)}</div>']
    for finding in findings:
        claim, color = finding.claim, VERDICT_COLORS[finding.verdict]
        n = f"{finding.repeats} x {finding.items}" if finding.items else "–"
        cells = (
            escape(claim.said),
            escape(claim.measure),
            _plain(finding.ours, claim.ours),
            _plain(finding.control, claim.control),
            _effect(finding),
            n,
            f'<span class="chip" style="background:{color}">{escape(finding.verdict)}</span>',
        )
        line = "".join(f'<span class="num">{cell}</span>' for cell in cells)
        picture = _picture(pictures[claim.key], claim.measure) if claim.key in pictures else ""
        rows.append(
            f'<details><summary class="row">{line}</summary><div class="more"><p>{_details(finding)}</p>{picture}'
            "</div></details>"
        )
    foot = (
        "n: trainings an arm x items. Effects are in the claimed direction. Intervals are 95 % each (90 % where "
        "no harm is claimed), not corrected for their number. Of the admitted side effects, fails means: not seen "
        "here. A row opens by click to its rule and picture. Bands of a curve are of each arm alone; all arms read "
        "the same items, so their difference is surer than the bands look."
    )
    body = f"{''.join(rows)}<p><small>{foot}</small></p>"
    return f'<style>{_STYLE}</style><div class="il-evidence">{body}</div>'


def measures_html(arms: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Every measure of every arm: arm -> measure -> mean and standard deviation over trainings (`describe`)."""
    fullest = sorted(arms.values(), key=len, reverse=True)  # its order is the table's
    names = list(dict.fromkeys(name for told in fullest for name in told))
    head = "".join(f"<th>{escape(arm)}</th>" for arm in arms)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{_spread(*told[name]) if name in told else '–'}</td>" for told in arms.values())
        + "</tr>"
        for name in names
    )
    table = f"<table><tr><th></th>{head}</tr>{body}</table>"
    return f'<style>{_STYLE}</style><div class="il-evidence" style="overflow-x:auto">{table}</div>'


def _spread(mean: float, deviation: float) -> str:
    """Two figures that matter of the deviation, at most three decimals, and the mean to the same place."""
    if not deviation > 0:
        return f"{mean:.3g}"
    digits = min(max(0, 1 - math.floor(math.log10(deviation))), 3)
    return f"{mean:.{digits}f} <small>±{deviation:.{digits}f}</small>"


def write_report(
    path: Path,
    *,
    title: str,
    lines: Sequence[str],
    findings: "Sequence[Finding]",
    recipes: "Sequence[Finding]",
    arms: "Arms",
    items: Items,
    measures: Mapping[str, Mapping[str, tuple[float, float]]],
    sizes: Sequence[int] = (),
) -> Path:
    """Writes the page, and the findings beside it as JSON; returns its path. `lines` say what was done with what.

    `measures` comes from `behaviour.describe`, `sizes` are the rows of the learning curves.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in lines), "<h2>The claims</h2>"]
    parts.append(findings_html(findings, finding_pictures(findings, arms, items, sizes=sizes)))
    if any(finding.effect for finding in recipes):
        heading = "What each recipe buys, and what it costs"
        parts.append(f"<h2>{heading}</h2>{_picture(plot_recipes(recipes), heading)}")
    parts += ["<h2>Every measure: mean ± standard deviation over trainings</h2>", measures_html(measures)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title></head>"
        '<body style="max-width:1180px;margin:24px auto;padding:0 16px" class="il-evidence">'
        f"{''.join(parts)}</body></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [{name: _plain_json(value) for name, value in asdict(finding).items()} for finding in findings]
    for file, text in ((path, page), (path.with_suffix(".json"), json.dumps(told, indent=1, ensure_ascii=False))):
        beside = file.with_suffix(".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    return path


def _plain_json(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
