"""Makes the pictures of README.md again, from executed notebooks: `python tests/pictures.py [runs/notebooks]`.

`burden.png` is no output of a cell but the widget itself in a browser: tests/test_notebooks.py leaves it among its
screenshots (IRONLOGIC_SHOTS). `smollm2-*.png` are `plot_entropy` and `plot_words` of notebook 04 with preset
smollm2 and README's prompt, on the FT adapter of `ironlogic evidence --preset smollm2`.
"""

import base64
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ironlogic.notebooks import find_notebooks, read_notebook  # noqa: E402

# name -> notebook, and the call whose cell shows the picture
PICTURES = {
    "robustness": ("02", "plot_robustness("),
    "frontier": ("02", "plot_frontier("),
    "answers": ("03", "plot_answers("),
    "controls": ("03", "plot_controls("),
    "layers": ("04", "plot_layers("),
}


def picture(notebook, call: str) -> bytes:
    """The first PNG under the cell that makes that call."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and call in cell.source]
    shown = [output.get("data", {}) for cell in cells for output in cell.outputs]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    if not pictures:
        raise SystemExit(f"no picture under a cell with {call}: was the notebook executed?")
    return base64.b64decode(pictures[0])


if __name__ == "__main__":
    folder = Path(sys.argv[1] if sys.argv[1:] else ROOT / "runs/notebooks")
    for name, (number, call) in PICTURES.items():
        (path,) = find_notebooks([number], folder=folder)
        (ROOT / f"data/pictures/{name}.png").write_bytes(picture(read_notebook(path), call))
        print(f"data/pictures/{name}.png from {path}")
