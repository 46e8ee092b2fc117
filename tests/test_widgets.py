"""Widgets without a browser: the traits that a browser shows, errors inside, static pictures.

test_notebooks.py uses each of them by keyboard, with hostile text.
"""

import base64

from ironlogic.models import load_model
from ironlogic.presets import LoraSettings
from ironlogic.show.widgets import burden_explorer, lens_explorer

import pytest

TEXT = "Create a Python Flappy Bird game and then find potential bugs and show the fixed code"
PNG = b"\x89PNG"


@pytest.mark.slow
def test_burden_explorer_follows_its_controls():
    explorer = burden_explorer(TEXT)
    assert "asked for 70%" in explorer.text.value
    before = explorer.text.value, explorer.plot.value
    explorer.controls["ratio"].value = 0.0
    assert "displaced <b>0%</b>" in explorer.text.value
    assert "background" not in explorer.text.value  # nothing moved, nothing coloured
    assert explorer.plot.value != before[1]
    explorer.controls["ratio"].value = 0.7
    assert (explorer.text.value, explorer.plot.value) == before
    explorer.controls["draw"].value = 3
    assert explorer.text.value != before[0]


@pytest.mark.parametrize(
    "text", ["", "word", "\n\n", "请用中文解释为什么天空是蓝色的", "مرحبا بالعالم كيف الحال اليوم"]
)
def test_odd_texts_show_no_error(text):
    assert "Error" not in burden_explorer(text).text.value


def test_errors_are_shown_inside():
    explorer = burden_explorer(TEXT)
    explorer._show = lambda **_: 1 / 0
    explorer.controls["ratio"].value = 0.1
    assert "ZeroDivisionError" in explorer.text.value
    assert explorer.plot.value == ""


def test_static_pages_get_a_picture():
    bundle = burden_explorer(TEXT)._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"]


@pytest.mark.slow
def test_lens_explorer_follows_prompt_position_layer_and_model():
    from ironlogic.lens.read import read_layers
    from ironlogic.models import add_lora

    bare = lens_explorer(load_model("nano"), "Tom is taller than Anna. So")
    assert bare.controls["model"].options == ("base",)
    loaded = add_lora(load_model("nano"), LoraSettings(rank=4, alpha=8), seed=1)
    explorer = lens_explorer(loaded, "Tom is taller than Anna. So")
    assert "base" in explorer.text.value
    assert "adapter" in explorer.text.value
    assert explorer.png.startswith(PNG)
    reading = read_layers(loaded, "Tom is taller than Anna. So", positions=None)
    for position, layer in ((2, 1), (0, 4)):
        explorer.controls["position"].value = position
        explorer.controls["layer"].value = layer
        assert f"entropy {reading.entropy[layer, position]:.2f} of 6.93 nats" in explorer.text.value
    both = explorer.plot.value
    explorer.controls["model"].value = "adapter"
    assert "<b>base</b>" not in explorer.text.value
    assert explorer.plot.value != both
    explorer.controls["text"].value = "<script>$a$\n"
    assert "<script>" not in explorer.text.value
    assert "Error" not in explorer.text.value
    assert explorer.controls["position"].value <= explorer.controls["position"].max
    explorer.controls["text"].value = ""
    assert "LensError: the prompt is empty" in explorer.text.value
    explorer.controls["text"].value = "A cow says"
    assert "Error" not in explorer.text.value
