"""The base of every widget: controls above, text and picture below.

Everything a callback shows goes into HTML widgets, whose text and picture (a data URI) are plain traits: a
browser, a headless run and a test see the same, and ipywidgets 7.7 (Colab) and 8 both can do it. `Output`
widgets and `interact` are not used: they hang headless runs now and then (jupyter/nbclient#312).
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

__all__ = ["Explorer", "picture_html", "png_bytes", "ratio_slider", "text_html", "uploaded"]

_MOVED = "background:#ffe08a;border-radius:3px;color:#111"


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def picture_html(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt, quote=True)}" style="max-width:100%" src="data:image/png;base64,{data}">'


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
        self.text, self.plot = ipywidgets.HTML(), ipywidgets.HTML()
        for key, control in self.controls.items():
            control.add_class(f"il-{name}-{key}")
            control.observe(self._update, names="value")
        self.text.add_class(f"il-{name}-text")
        self.plot.add_class(f"il-{name}-plot")
        self.view = ipywidgets.VBox([*self.controls.values(), self.text, self.plot])
        self.png = b""
        self._update()

    @property
    def values(self) -> dict[str, Any]:
        return {key: control.value for key, control in self.controls.items()}

    def _update(self, _: Any = None) -> None:
        try:
            html, figure = self._show(**self.values)
        except Exception as error:  # a callback's traceback is invisible in most front ends: show it here
            html, figure = f"<pre style='color:#b00020'>{escape(f'{type(error).__name__}: {error}')}</pre>", None
        self.text.value = html
        self.png = png_bytes(figure) if figure else b""
        alt = ", ".join(f"{key} {value}" for key, value in self.values.items() if key != "text")
        self.plot.value = picture_html(self.png, alt) if figure else ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The widget where a kernel lives; text and picture for pages without one (GitHub, nbconvert)."""
        bundle: dict[str, Any] = {
            "text/plain": f"Explorer({', '.join(f'{k}={v!r}' for k, v in self.values.items())})",
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.view.model_id,
            },
        }
        if self.png:
            bundle["image/png"] = base64.b64encode(self.png).decode()
        else:
            bundle["text/html"] = self.text.value
        return bundle


def ratio_slider(label: str, value: float) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        value=value, min=0, max=1, step=0.05, description=label, readout_format=".2f", continuous_update=False
    )


def text_html(text: str, *, moved: Sequence[tuple[str, bool]] | None = None) -> str:
    """Text as it stands, line breaks and all; moved pieces coloured."""
    pieces = moved if moved is not None else [(text, False)]
    body = "".join(f'<span style="{_MOVED}">{escape(p)}</span>' if m else escape(p) for p, m in pieces)
    style = (
        "white-space:pre-wrap;font-family:monospace;line-height:1.4;border:1px solid #8888;border-radius:6px;"
        "padding:8px;max-height:16em;overflow:auto"
    )
    return f'<div dir="auto" style="{style}">{body}</div>'


def uploaded(value: Any) -> bytes | None:
    """The bytes of a FileUpload, None when it is empty: ipywidgets 7 holds a dict of files by name, 8 a tuple."""
    files = list(value.values()) if isinstance(value, dict) else list(value)
    return bytes(files[-1]["content"]) if files else None
