"""Findings as one page of HTML that needs nothing beside it: pictures inside, every text escaped, no script."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ironlogic.show.evidence import VERDICT_COLORS, finding_pictures, plot_recipes
from ironlogic.show.explorer import picture_html, png_bytes

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.evidence.claims import Finding, Findings
    from ironlogic.evidence.statistics import Interval

    import pandas as pd

__all__ = ["findings_html", "measures_html", "write_report"]

_GRID = " ".join(f"minmax(0, {share}fr)" for share in (2.2, 2.1, 1.1, 1.1, 1.7, 0.7)) + " 150px"
_STYLE = """<style>
.il-evidence { font: 14px/1.4 system-ui, sans-serif; color: #1b1c1e; background: #fff; max-width: 1180px }
.il-evidence { container-type: inline-size }
.il-evidence .row { display: grid; grid-template-columns: GRID; gap: 10px; padding: 7px 4px; align-items: center }
.il-evidence .head { font-weight: 600; border-bottom: 2px solid #1b1c1e }
.il-evidence details { border-bottom: 1px solid #d9dce0 }
.il-evidence summary { cursor: pointer; list-style: none }
.il-evidence summary::-webkit-details-marker { display: none }
.il-evidence summary:hover, .il-evidence summary:focus { background: #f2f4f7 }
.il-evidence summary > span:first-child { padding-left: 18px; position: relative }
.il-evidence summary > span:first-child::before { content: "\\25b8"; position: absolute; left: 2px }
.il-evidence details[open] > summary > span:first-child::before { content: "\\25be" }
.il-evidence .chip { color: #fff; border-radius: 4px; padding: 2px 7px; white-space: nowrap; font-size: 13px }
.il-evidence small { color: #4a4f57 }
.il-evidence img { max-width: 100% }
.il-evidence .more { padding: 4px 4px 14px 22px }
.il-evidence .num { font-variant-numeric: tabular-nums }
.il-evidence table { border-collapse: collapse; color: inherit; background: #fff }
.il-evidence th, .il-evidence td { padding: 3px 6px; text-align: right; border-bottom: 1px solid #d9dce0 }
.il-evidence th:first-child, .il-evidence td:first-child { text-align: left; position: sticky; left: 0 }
.il-evidence th:first-child, .il-evidence td:first-child { background: #fff; min-width: 110px }
.il-evidence td { white-space: nowrap }
.il-evidence td small { font-size: 11px }
.il-evidence td:first-child { white-space: normal }
@container (max-width: 720px) {
  .il-evidence .head { display: none }
  .il-evidence .row { grid-template-columns: 4fr 4fr 5fr; gap: 2px 10px; align-items: start; padding: 10px 2px }
  .il-evidence .row > span:nth-child(1) { grid-column: 1 / -1; font-weight: 600 }
  .il-evidence .row > span:nth-child(2) { grid-column: 1 / -1; padding-left: 18px }
  .il-evidence .row > span:nth-child(3), .il-evidence .row > span:nth-child(6) { padding-left: 18px }
  .il-evidence .row > span:nth-child(7) { grid-column: 2 / -1 }
  .il-evidence .more { padding: 4px 2px 14px }
}
</style>""".replace("GRID", _GRID)

_FINDINGS = """{{ style }}<div class="il-evidence">
<div class="row head">
{%- for head in ("what was said", "what was measured", "measured", "control", "effect", "n", "verdict") -%}
<span>{{ head }}</span>
{%- endfor -%}
</div>
{% for finding in findings %}{% set claim = finding.claim -%}
<details><summary class="row">
<span class="num">{{ claim.said }}</span>
<span class="num">{{ claim.measure }}</span>
<span class="num">{{ finding.ours | level }}<br><small>{{ claim.ours }}</small></span>
<span class="num">{{ finding.control | level }}<br><small>{{ claim.control }}</small></span>
<span class="num">
{%- if finding.effect -%}
<b>{{ "≥ " if finding.at_least }}{{ finding.effect.mean | effect(claim.form) }}</b>
<small>[{{ finding.effect.low | effect(claim.form) }}, {{ finding.effect.high | effect(claim.form) }}]</small>
{%- else -%}
<small>{{ finding.note }}</small>
{%- endif -%}
</span>
<span class="num">{{ "%s x %s" % (finding.repeats, finding.items) if finding.items else "–" }}</span>
<span class="num">
<span class="chip" style="background:{{ colors[finding.verdict] }}">{{ finding.verdict }}</span>
</span>
</summary><div class="more"><p>{{ finding | details | join(" · ") }}</p>{{ pictures[claim.key] }}</div></details>
{% endfor -%}
<p><small>n: trainings an arm x items. Effects are in the claimed direction. Intervals are 95 % each (90 % where
no harm is claimed), not corrected for their number. Of the admitted side effects, fails means: not seen here. A row
opens by click to its rule and picture. Bands of a curve are of each arm alone; all arms read the same items, so
their difference is surer than the bands look.</small></p></div>"""

_MEASURES = """{{ style }}<div class="il-evidence" style="overflow-x:auto"><table>
<tr><th></th>{% for arm in arms %}<th>{{ arm }}</th>{% endfor %}</tr>
{% for name, row in table.iterrows() -%}
<tr><td>{{ name }}</td>
{%- for arm in arms %}<td>{{ row[arm]["mean"] | spread(row[arm]["sd"]) }}</td>{% endfor -%}
</tr>
{% endfor -%}
</table></div>"""

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title></head>
<body style="max-width:1180px;margin:24px auto;padding:0 16px" class="il-evidence">
<h1>{{ title }}</h1>{% for line in lines %}<p>{{ line }}</p>{% endfor %}
<h2>The claims</h2>{{ findings }}
{% if recipes %}<h2>What each recipe buys, and what it costs</h2>{{ recipes }}{% endif %}
<h2>Every measure: mean ± standard deviation over trainings</h2>{{ measures }}
</body></html>"""


def findings_html(findings: "Findings") -> str:
    """The table of claims; each row opens to its rule and its picture."""
    figures = finding_pictures(findings)
    pictures = {key: _picture(figure, findings[key].claim.measure) for key, figure in figures.items()}
    return _render(_FINDINGS, findings=findings, pictures=pictures, colors=VERDICT_COLORS)


def measures_html(table: "pd.DataFrame") -> str:
    """Every measure of every arm (`evidence.measures.describe`), with its standard deviation over trainings."""
    return _render(_MEASURES, table=table, arms=list(dict.fromkeys(arm for arm, _ in table.columns)))


def write_report(
    path: str | Path,
    findings: "Findings",
    *,
    title: str,
    lines: Sequence[str] = (),
    recipes: "Sequence[Finding]" = (),
    measures: "pd.DataFrame",
) -> Path:
    """Writes the page, and the findings beside it as JSON; returns its path.

    `lines` say what was done with what, `recipes` come from `compare_recipes`, `measures` from `describe`.
    """
    path = Path(path)
    shown = any(finding.effect for finding in recipes)
    page = _render(
        _PAGE,
        title=title,
        lines=lines,
        findings=Markup(findings_html(findings)),
        recipes=_picture(plot_recipes(recipes), "what each recipe buys, and what it costs") if shown else "",
        measures=Markup(measures_html(measures)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{name: _finite(value) for name, value in asdict(finding).items()} for finding in findings]
    content = json.dumps(plain, indent=1, ensure_ascii=False)
    for file, text in ((path, page), (path.with_suffix(".json"), content)):
        beside = file.with_suffix(".part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    return path


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture(figure: Figure, alt: str) -> Markup:
    return Markup(picture_html(png_bytes(figure), alt))


def _render(template: str, **values) -> str:
    environment = jinja2.Environment(autoescape=True)
    environment.filters |= {"level": _level, "effect": _effect, "details": _details, "spread": _spread}
    return environment.from_string(template).render(style=Markup(_STYLE), **values)


# --- numbers and words ----------------------------------------------------------------------------------------
def _level(interval: "Interval | None") -> str:
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


def _details(finding: "Finding") -> list[str]:
    claim = finding.claim
    rule = {
        "worth": f"holds from {claim.size:g} x on, in part above 1 x",
        "saved": f"holds from {claim.size:.0%} saved on, in part above 3 %",
        "no harm": f"holds if a loss of {-claim.size:g} is ruled out (90 % interval)",
        "gain": f"holds from {claim.size:+g} on, in part above 0",
    }[claim.form]
    details = [f"rule: {rule}"]
    if claim.source:
        details.append(f"said in seed {claim.source}")
    if finding.effect is not None and math.isfinite(finding.detectable):
        details.append(f"smallest effect such data show in 4 of 5 repetitions: {finding.detectable:.3f}")
    if finding.same:
        details.append("shown to be the same within 0.03 (two one-sided tests)")
    if finding.p is not None:
        details.append(f"McNemar over items, first training, Holm: p = {finding.p:.2g}")
    if finding.effect is not None and finding.note:
        details.append(finding.note)
    return details
