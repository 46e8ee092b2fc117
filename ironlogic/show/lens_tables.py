"""Seed 002's table of a reading, as text and HTML that no token can break.

A token is its repr, so that a line stays a line; in HTML it is escaped and isolated from the direction of its
neighbours, and in text so too where it is written from right to left. Knows no model and draws no figure.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ironlogic.lens.results import LayerReading, layer_name

import matplotlib

__all__ = ["HEAT", "LensTable", "ink_on", "lens_table", "text_columns"]

HEAT = matplotlib.colormaps["viridis_r"]  # of entropy, 0 to ln V, in tables and figures


def text_columns(text: str) -> int:
    """Columns that a text takes in a monospaced line."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 or unicodedata.category(c) == "Cf" for c in text)


def ink_on(color: Sequence[float]) -> str:
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


@dataclass(frozen=True)
class LensTable:
    """A table as text (`str`, print) and as HTML (notebooks)."""

    text: str
    html: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def lens_table(reading: LayerReading, *, position: int | None = None) -> LensTable:
    """Seed 002's table: per layer top token, its probability, active tokens, entropy, next four; final top k."""
    column = reading.column(position)
    head = ("layer", "top token", "probability", "active > 1 %", "entropy", "top 2-5")
    rows = []
    for layer in reading.layers:
        first, *others = reading.top_tokens[layer][column]
        share, nats = reading.top_probs[layer, column, 0], reading.entropy[layer, column]
        cells = (layer_name(layer), first, f"{share:.1%}", str(reading.active[layer, column]), f"{nats:.4f}")
        rows.append((*cells, others[:4]))
    final = list(zip(reading.top_tokens[-1][column], reading.top_probs[-1, column], strict=True))
    after = f"after {reading.tokens[reading.positions[column]]!r} (position {reading.positions[column]})"
    return LensTable(_as_text(head, rows, final, after), _as_html(reading, column, head, rows, final, after))


def _as_text(head, rows, final, after: str) -> str:
    lines = [head, *((r[0], _isolated(r[1]), *r[2:5], ", ".join(map(_isolated, r[5]))) for r in rows)]
    widths = [max(text_columns(line[i]) for line in lines) for i in range(len(head))]
    padded = [
        " | ".join(cell + " " * (w - text_columns(cell)) for cell, w in zip(line, widths, strict=True))
        for line in lines
    ]
    ending = [f"{i:>4}. {share:7.2%}  {_isolated(token)}" for i, (token, share) in enumerate(final, start=1)]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join(
        [after, padded[0].rstrip(), rule, *(p.rstrip() for p in padded[1:]), "", "next token", *ending]
    )


def _isolated(token: str) -> str:
    """The repr; from right to left, within its own cell."""
    turned = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in token)
    return f"\u2068{token!r}\u2069" if turned else repr(token)


def _as_html(reading: LayerReading, column: int, head, rows, final, after: str) -> str:
    left = "style='text-align:left;white-space:pre;font-family:monospace'"

    def cell(text: str) -> str:
        return f"<td {left}>{text}</td>"

    def token(text: str) -> str:
        return f"<bdi>{escape(repr(text))}</bdi>"

    body = []
    for layer, (name, first, share, active, nats, others) in enumerate(rows):
        color = HEAT(reading.entropy[layer, column] / reading.ln_vocabulary)
        red, green, blue = (round(255 * part) for part in color[:3])
        chip = f"<td style='background:rgb({red},{green},{blue});color:{ink_on(color)}'>{nats}</td>"
        texts = cell(name), cell(token(first)), cell(share), cell(active), chip, cell(", ".join(map(token, others)))
        body.append(f"<tr>{''.join(texts)}</tr>")
    titles = "".join(f"<th {left}>{escape(title)}</th>" for title in head)
    ending = "".join(f"<li>{token(text)} {share:.2%}</li>" for text, share in final)
    caption = f"<caption>{escape(after)}; entropy in nats, ln V = {reading.ln_vocabulary:.2f}</caption>"
    return f"<table>{caption}<tr>{titles}</tr>{''.join(body)}</table><p>next token</p><ol>{ending}</ol>"
