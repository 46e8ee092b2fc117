"""The page and its pictures: self-contained, escaped, complete."""

import json
import math
import re
from dataclasses import replace

from ironlogic.evidence.claims import CLAIMS, compare_recipes, judge_claims
from ironlogic.evidence.items import RATIOS, items_of_chats, made_items
from ironlogic.session import ROOT
from ironlogic.show.evidence import (
    MEASURES,
    finding_pictures,
    plot_curves,
    plot_findings,
    plot_learning,
    plot_robustness,
    robustness_explorer,
)
from ironlogic.show.plots import COLORS
from ironlogic.show.report import findings_html, measures_html, write_report

import numpy as np
import pandas as pd
import pytest

ITEMS = made_items(80, seed=1)
SIZES = (100, 248, 2480)


def study(*, nasty: str = "FT mixed") -> dict:
    rng, arms = np.random.default_rng(0), {}
    for name in ("base", "SFT", "FT", nasty, *(f"SFT {size} rows" for size in SIZES), "FT 248 rows"):
        arms[name] = {}
        for seed in range(1 if name == "base" else 3):
            columns = {
                f"{m}@{r:g}": (rng.random(80) < 0.6).astype(float)
                for m in ("correct", "think", "loop", "loss")
                for r in RATIOS
            }
            columns |= {f"tokens@{r:g}": rng.integers(3, 40, 80).astype(float) for r in RATIOS}
            columns |= {f"ceiling@{r:g}": np.ones(80) for r in RATIOS}
            columns |= {
                name: rng.random(80) for name in ("sure", "silent layers", "late entropy", "attention shift")
            }
            columns |= {"correct substituted": np.zeros(80), "mode@0": np.ones(80), "bleed excess": np.zeros(80)}
            arms[name][seed] = columns
    return arms


@pytest.mark.slow
def test_page_needs_nothing_beside_it_and_escapes_everything(tmp_path):
    evil = "<script>alert(1)</script>"
    arms = study(nasty=evil)
    claims = [replace(CLAIMS[0], said=evil, measure=evil), *CLAIMS[1:]]
    findings = judge_claims(arms, ITEMS, claims=claims, sizes=SIZES)
    figures = pd.DataFrame({(evil, "mean"): {evil: 1.0}, (evil, "sd"): {evil: 0.1}})
    page = write_report(
        tmp_path / "deep/report.html",
        findings,
        title=evil,
        lines=[evil],
        recipes=compare_recipes(arms, ITEMS),
        sweep=[{"arm": arm, "rate": 0.1, "clean": 0.5, "scrambled": 0.4, "score": 0.45} for arm in ("SFT", "FT")],
        measures=figures,
    ).read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert not re.findall(r"(?:src|href)=\"(?!data:image/png)", page)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert page.count("<details>") == len(findings) == len(claims) - 1  # no experts here
    assert page.count("data:image/png") == sum(finding.effect is not None for finding in findings) + 2
    for finding in findings:
        assert finding.claim.key in {claim.key for claim in claims}
        assert finding.verdict.replace("'", "&#39;") in page
    assert {file.name for file in (tmp_path / "deep").iterdir()} == {"report.html", "report.json"}
    told = json.loads((tmp_path / "deep/report.json").read_text(encoding="utf-8"))
    assert [one["verdict"] for one in told["findings"]] == [finding.verdict for finding in findings]
    assert told["findings"][0]["claim"]["said"] == evil
    assert told["measures"] == {evil: {evil: 1.0}}
    assert re.match(r"Made on \d{4}-\d\d-\d\d with ironlogic \S+, torch", told["lines"][-1])


def test_spread_stands_beside_the_mean_of_several_trainings():
    table = pd.DataFrame(
        {
            ("a", "mean"): {"m": 0.61803, "other": math.nan},
            ("a", "sd"): {"m": 0.0213, "other": math.nan},
            ("b", "mean"): {"m": 0.5, "other": 12.0},
            ("b", "sd"): {"m": math.nan, "other": 0.0},
        }
    )
    html = measures_html(table)
    assert "<td>m</td><td>0.618 <small>±0.021</small></td><td>0.5</td>" in html
    assert "<td>other</td><td>–</td><td>12</td>" in html


@pytest.mark.slow
def test_row_says_rule_n_and_reason():
    html = findings_html(judge_claims(study(), ITEMS))
    assert "holds from +0.03 on" in html
    assert "a loss of 0.03 is ruled out" in html
    assert "there is no run of FT then SFT" in html
    assert "3 x 40" in html  # trainings x order-free items
    assert "interval over trainings and 10 kinds of items" in html
    assert "would have shown" in html  # beside what can't be told
    assert "There is no control" in findings_html(judge_claims({"FT": study()["FT"]}, ITEMS))


@pytest.mark.parametrize("measure", MEASURES)
def test_curves_are_the_means_of_the_columns(measure):
    arms = {arm: repeats for arm, repeats in study().items() if arm in ("base", "FT")}
    (axes,) = plot_curves(arms, ITEMS, measure=measure, among="free").axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines if len(line.get_ydata()) == len(RATIOS)}
    column = "correct" if measure == "of the ceiling" else measure
    free = ITEMS.among("free")
    for arm, repeats in arms.items():
        expected = [np.mean([columns[f"{column}@{r:g}"][free] for columns in repeats.values()]) for r in RATIOS]
        assert drawn[arm] == pytest.approx(expected)


@pytest.mark.slow
def test_figures_show_what_is_known_and_survive_what_is_not():
    arms = study()
    findings = judge_claims(arms, ITEMS, sizes=SIZES)
    shown = [f for f in findings if f.effect is not None and f.claim.form != "worth"]
    (axes,) = plot_findings(findings).axes
    assert len(axes.get_yticks()) == len(shown)
    assert (
        len(plot_learning(arms, ITEMS, SIZES, column="correct@0", label="x").axes[0].get_legend().get_texts()) == 2
    )
    assert finding_pictures(judge_claims({}, ITEMS)) == {}
    assert set(finding_pictures(findings)) == {f.claim.key for f in findings if f.effect}
    panels = plot_robustness({arm: arms[arm] for arm in ("SFT", "FT")}, ITEMS).axes
    for axes, order in zip(panels, ("free", "bound"), strict=True):
        drawn = {line.get_label(): line for line in axes.lines}
        clean = np.mean([columns["correct@0"][ITEMS.among(order)] for columns in arms["SFT"].values()])
        assert drawn["SFT"].get_ydata()[0] == pytest.approx(clean)
        assert drawn["SFT"].get_color() == COLORS["SFT"]
        assert drawn["ideal reader"].get_ydata().tolist() == [1.0] * len(RATIOS)


@pytest.mark.slow
def test_explorer_offers_what_was_measured():
    arms = study()
    explorer = robustness_explorer(arms, ITEMS)
    assert explorer.controls["arms"].value == ("base", "SFT", "FT")
    assert "FT 248 rows" not in explorer.controls["arms"].options
    assert "40 problems" in explorer.text.value
    before = explorer.png
    explorer.controls["measure"].value = "think"
    explorer.controls["sort"].value = "bound"
    assert "40 problems" in explorer.text.value
    assert explorer.png not in (b"", before)
    explorer.controls["arms"].value = ()
    assert explorer.text.value == "<p>choose an arm</p>"
    plain = {"base": {0: {f"tokens@{r:g}": np.ones(3) for r in RATIOS}}}
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]] * 3
    unchecked = robustness_explorer(plain, items_of_chats(chats))
    assert list(unchecked.controls["measure"].options.values()) == ["tokens"]
    assert list(unchecked.controls["sort"].options.values()) == ["all"]


@pytest.mark.parametrize(("column", "study"), [(3, "nano"), (4, "smollm2")])
def test_the_readme_says_what_the_kept_results_say(column, study):
    """The cells of README's table of claims are those of the studies that lie in data/."""
    told = json.loads((ROOT / f"data/evidence/{study}.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| said | measured | nano | SmolLM2-135M |") :].split("\n\n")[0]
    cells = [row.split("|")[column] for row in table.splitlines()[2:]]
    findings = [finding for finding in told["findings"] if finding["claim"]["key"] != "routing"]  # without experts
    assert len(cells) == len(findings)
    for cell, finding in zip(cells, findings, strict=True):
        effect, form = finding["effect"], finding["claim"]["form"]
        figures = [float(figure) for figure in re.findall(r"[-+]?\d*\.\d+", cell)]
        if effect is None:
            assert not figures, cell
        elif form == "worth":
            assert f"at most {effect['high']:.0f} x" in cell, cell
        else:
            scale = 100 if form == "saved" else 1
            expected = [scale * effect[end] for end in ("mean", "low", "high")]
            assert np.allclose(figures[:3], expected, atol=0.05 if form == "saved" else 0.0005), cell
        words = {"can't be told here": "can't be told", "no room to tell": "no room"}
        assert effect is None or words.get(finding["verdict"], finding["verdict"]) in cell
