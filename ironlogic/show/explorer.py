"""What every widget is made of: controls above, text and picture below; HTML of texts, tables, pictures and errors.

Everything a callback shows goes into HTML widgets, whose text and picture (a data URI) are plain traits: a
browser, a headless run and a test see the same, and ipywidgets 7.7 (Colab) and 8 both can do it. `Output`
widgets and `interact` are not used: they hang headless runs now and then (jupyter/nbclient#312).
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ironlogic.show.plots import png_bytes

import ipywidgets
import pandas as pd
from IPython.display import HTML, DisplayHandle
from matplotlib.figure import Figure

__all__ = [
    "Explorer",
    "error_html",
    "live_html",
    "picture_html",
    "progress",
    "ratio_slider",
    "table_html",
    "text_html",
    "uploaded",
    "wide",
]

_MOVED = "background:#ffe08a;border-radius:3px;color:#111"
_TEXT = (
    "white-space:pre-wrap;font-family:monospace;line-height:1.4;border:1px solid #8888;border-radius:6px;"
    "padding:8px;max-height:16em;overflow:auto"
)
_CELL = (
    "padding:3px 10px;text-align:left;vertical-align:top;line-height:1.4;white-space:pre-wrap;"
    "unicode-bidi:plaintext"
)


class Explorer:
    """Controls above, text and picture below.

    `show(**values)` takes the value of every control by its name and returns HTML and a figure (or None). Each
    control carries the CSS class `il-<name>-<control>`, text and picture `il-<name>-text` and `-plot`.
    """

    def __init__(
        self,
        name: str,
        controls: Mapping[str, ipywidgets.Widget],
        show: Callable[..., tuple[str, Figure | None]],
    ) -> None:
        self.controls, self._show = dict(controls), show
        self.text, self.plot, self.png = ipywidgets.HTML(), ipywidgets.HTML(), b""
        for key, widget in [*self.controls.items(), ("text", self.text), ("plot", self.plot)]:
            widget.add_class(f"il-{name}-{key}")
        for control in self.controls.values():
            control.observe(self._update, names="value")
        self.view = ipywidgets.VBox([*self.controls.values(), self.text, self.plot])
        self._update()

    @property
    def values(self) -> dict[str, Any]:
        return {key: control.value for key, control in self.controls.items()}

    def _update(self, _: Any = None) -> None:
        try:
            html, figure = self._show(**self.values)
        except Exception as error:  # a callback's traceback is invisible in most front ends: show it here
            html, figure = error_html(error), None
        self.text.value = html
        self.png = png_bytes(figure) if figure else b""
        alt = ", ".join(f"{key} {value}" for key, value in self.values.items() if key != "text")
        self.plot.value = picture_html(self.png, alt) if figure else ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The widget where a kernel lives; text or picture for pages without one (GitHub, nbconvert)."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.view.model_id}
        values = ", ".join(f"{key}={value!r}" for key, value in self.values.items())
        bundle = {"text/plain": f"Explorer({values})", "application/vnd.jupyter.widget-view+json": view}
        if self.png:
            return bundle | {"image/png": base64.b64encode(self.png).decode()}
        return bundle | {"text/html": self.text.value}


# --- controls -------------------------------------------------------------------------------------------------
def wide(height: str | None = None) -> ipywidgets.Layout:
    """For a control that holds text."""
    return ipywidgets.Layout(width="95%", height=height)


def ratio_slider(label: str, value: float) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        value=value, min=0, max=1, step=0.05, description=label, readout_format=".2f", continuous_update=False
    )


def uploaded(value: Any) -> bytes | None:
    """The bytes of a FileUpload, None when it is empty: ipywidgets 7 holds a dict of files by name, 8 a tuple."""
    files = list(value.values()) if isinstance(value, dict) else list(value)
    return bytes(files[-1]["content"]) if files else None


# --- HTML -----------------------------------------------------------------------------------------------------
def text_html(text: str, *, moved: Sequence[tuple[str, bool]] | None = None) -> str:
    """Text as it stands, line breaks and all; or its pieces, those that moved coloured."""
    pieces = moved if moved is not None else [(text, False)]
    body = "".join(f'<span style="{_MOVED}">{escape(p)}</span>' if m else escape(p) for p, m in pieces)
    return f'<div dir="auto" style="{_TEXT}">{body}</div>'


def table_html(table: pd.DataFrame) -> str:
    """A table without its index; every text escaped, with its line breaks and in its own direction."""
    style = table.style.hide(axis="index").set_table_styles([{"selector": "th, td", "props": _CELL}])
    return style.format(escape="html", precision=2, na_rep="–").format_index(escape="html", axis=1).to_html()


def picture_html(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt, quote=True)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def error_html(error: BaseException) -> str:
    return f"<pre style='color:#b00020'>{escape(f'{type(error).__name__}: {error}')}</pre>"


# --- while something trains -----------------------------------------------------------------------------------
def live_html(first: str) -> Callable[[str], None]:
    """Shows HTML under the cell; call what comes back to show other HTML in its place."""
    handle = DisplayHandle()
    handle.display(HTML(first))
    return lambda html: handle.update(HTML(html))


def progress(line: Mapping[str, Any]) -> str:
    """How far a training is: `line` is the last of its metrics, with step, steps and seconds."""
    steps_left = line["steps"] - line["step"]
    time = f"{line['seconds']:.0f} s"
    if steps_left:
        time += f", about {line['seconds'] / line['step'] * steps_left:.0f} s to go"
    return f"step {line['step']} of {line['steps']} · {time}"
