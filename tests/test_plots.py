"""Figures: they draw what they are given, and a notebook shows them without pyplot."""

import subprocess
import sys
from types import SimpleNamespace

from ironlogic.burden import apply_burden, measure_disorder
from ironlogic.memory import plan_memory
from ironlogic.show.plots import plot_disorder, plot_exports, plot_losses, plot_memory, plot_reached

import numpy as np
import pytest


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_ydata())


def test_losses():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    figure = plot_losses({"FT": lines})
    assert curve(figure.axes[0], "FT") == [2.0, 1.0]
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"


def test_disorder_and_reached():
    text = " ".join(map(str, range(50)))
    points = [(r, measure_disorder(text, apply_burden(text, ratio=r))) for r in (0.0, 0.5, 1.0)]
    figure = plot_disorder(points, movable=50, units=50, marked=0.5)
    assert np.allclose(curve(figure.axes[0], "nominal"), [0, 1])
    figure = plot_reached([5, 50], [0.6, 0.68], ratio=0.7)
    assert curve(figure.axes[0], "rows") == [0.6, 0.68]


def test_memory_bars_add_up():
    plans = {name: plan_memory(name, card_gib=24) for name in ("24gb", "qwen3-smvl")}
    figure = plot_memory(plans)
    total = sum(plan.peak_gib for plan in plans.values())
    assert np.isclose(sum(bar.get_width() for bar in figure.axes[0].patches), total)
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {part for plan in plans.values() for part in plan.parts}


@pytest.mark.slow
def test_drawing_needs_no_torch():
    code = "import sys; from ironlogic.show import grpo, plots, widgets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_exports_are_drawn_by_size_and_divergence():
    def point(kind, reader, mebibytes, mean_kl, tolerance):
        return SimpleNamespace(
            kind=kind, reader=reader, bytes=mebibytes * 2**20, mean_kl=mean_kl, tolerance=tolerance
        )

    rows = [
        point("f32", "transformers", 4, 0.0, 1e-6),
        point("q8_0", "transformers", 1, 3e-4, 1e-2),
        point("q8_0", "llama.cpp", 1, 5e-4, 1e-2),
    ]
    (axes,) = plot_exports(rows).axes
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert drawn["read by transformers"] == [[4.0, 1e-9], [1.0, 3e-4]], "equal is drawn at the floor"
    assert drawn["read by llama.cpp"] == [[1.0, 5e-4]]
    assert drawn["allowed"] == [[4.0, 1e-6], [1.0, 1e-2], [1.0, 1e-2]]
    assert [text.get_text() for text in axes.texts] == ["f32", "q8_0"]
