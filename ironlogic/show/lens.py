"""Lens readings as figures and as a table. Computes nothing, knows no model; a token's text can break none of them.

In figures a blank is `·`, a line break `↵`, a tab `→`; what no installed font has is written as \\uXXXX, and `$` is
a dollar. In the table a token is its repr, so that a line stays a line; in HTML it is escaped and isolated from the
direction of its neighbours.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path

from ironlogic.lens.results import AttentionReading, Comparison, LayerReading, RoutingReading, layer_name
from ironlogic.show.plots import COLORS, _axes

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

__all__ = [
    "LensTable",
    "lens_table",
    "plot_attention",
    "plot_entropy",
    "plot_layers",
    "plot_ribbon",
    "plot_routing",
    "plot_words",
    "token_label",
]

HEAT = matplotlib.colormaps["viridis_r"]  # of entropy, 0 to ln V, in tables and figures
_CJK = ("notosanscjk", "sourcehansans", "droidsansfallback", "wqy-", "msyh", "simhei", "pingfang", "hiragino")
_SHOWN = {"\n": "↵", "\r": "⇠", "\t": "→", " ": "·"}
_WORDS_AT_MOST = 1500  # cells of a heat map that get their token written in
_DEPTH = "layers passed (0 = embedding)"
_BASE, _ADAPTER = COLORS["base"], COLORS["FT"]


# --- tokens -----------------------------------------------------------------------------------------------------
@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Families for all text (the second has Chinese, Japanese, Korean, where installed), and their characters."""
    manager = font_manager.fontManager
    listed = {entry.fname for entry in manager.ttflist}
    for file in sorted(font_manager.findSystemFonts()):
        if Path(file).name.lower().startswith(_CJK) and file not in listed:
            manager.addfont(file)  # matplotlib's list is older than the font
    found = sorted((e.fname, e.name) for e in manager.ttflist if Path(e.fname).name.lower().startswith(_CJK))
    families = ["DejaVu Sans", *[name for _, name in found][:1]]
    files = {entry.fname for entry in manager.ttflist if entry.name in families}
    return families, frozenset().union(*(font_manager.get_font(file).get_charmap() for file in files))


def token_label(token: str, *, width: int = 10) -> str:
    """A token as one visible line of at most `width` columns for a figure."""
    known = _fonts()[1]
    shown = (_SHOWN.get(c) or (c if c.isprintable() and ord(c) in known else _escaped(c)) for c in token)
    runs = [(c, len(list(run))) for c, run in groupby(shown)]
    pieces = [f"{c}×{n}" if n > 3 else c * n for c, n in runs]  # 32 line breaks read ↵×32
    label, used = "", 0
    for piece in pieces:
        used += text_columns(piece)
        if used > width and label:
            return label + "…"
        label += piece
    return label or "∅"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def text_columns(text: str) -> int:
    """Columns that a text takes in a monospaced line."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 or unicodedata.category(c) == "Cf" for c in text)


def ink_on(color: Sequence[float]) -> str:
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _finished(figure: Figure) -> Figure:
    for text in figure.findobj(Text):
        text.set_fontfamily(_fonts()[0])
        text.set_parse_math(False)
    return figure


# --- layers -----------------------------------------------------------------------------------------------------
def plot_layers(reading: LayerReading, *, title: str = "") -> Figure:
    """Heat map, layers x positions: colour is entropy on a fixed scale from 0 to ln V, text the top token.

    Above the red line the top token no longer changes. The text's own next token stands on top.
    """
    rows, columns = reading.entropy.shape
    figure, (axes,) = _axes(height=max(3.2, 0.3 * rows + 1.6))
    figure.set_figwidth(max(6.0, 0.8 * columns + 2.2))
    axes.grid(visible=False)
    picture = axes.imshow(
        reading.entropy, cmap=HEAT, vmin=0, vmax=reading.ln_vocabulary, aspect="auto", origin="lower"
    )
    if rows * columns <= _WORDS_AT_MOST:
        _write_words(axes, reading)
    for edge in np.arange(1, columns) - 0.5:
        axes.axvline(edge, color="white", lw=0.6)
    for edge in np.arange(1, rows) - 0.5:
        axes.axhline(edge, color="white", lw=0.6)
    edges = np.repeat(np.arange(columns + 1) - 0.5, 2)[1:-1]
    heights = np.repeat(reading.settle_layer - 0.5, 2)
    axes.plot(edges, heights, color="white", lw=4)
    axes.plot(edges, heights, color="#d62728", lw=2)
    axes.set_yticks(range(rows), [layer_name(layer) for layer in reading.layers], fontsize=8)
    axes.set_xticks(range(columns), [token_label(reading.tokens[p]) for p in reading.positions], fontsize=8)
    axes.tick_params(axis="x", rotation=0 if columns <= 16 else 60)
    axes.set(xlabel="input token", ylabel="layers passed", xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5))
    following = [reading.tokens[p + 1] if p + 1 < len(reading.tokens) else None for p in reading.positions]
    top = axes.secondary_xaxis("top")
    labels = ["?" if token is None else token_label(token) for token in following]
    top.set_xticks(range(columns), labels, fontsize=8, rotation=0 if columns <= 16 else 60)
    top.set_xlabel("next token in the text", fontsize=8)
    figure.colorbar(
        picture, ax=axes, pad=0.02, label=f"entropy (nats), uniform = ln V = {reading.ln_vocabulary:.2f}"
    )
    axes.set_title(title or "top token after each layer; above the red line it no longer changes", fontsize=10)
    return _finished(figure)


def _write_words(axes, reading: LayerReading) -> None:
    for layer, line in enumerate(reading.top_tokens):
        for column, tokens in enumerate(line):
            ink = ink_on(HEAT(reading.entropy[layer, column] / reading.ln_vocabulary))
            weight = "bold" if layer >= reading.settle_layer[column] else "normal"
            axes.text(
                column, layer, token_label(tokens[0], width=9), ha="center", va="center", fontsize=8, color=ink
            ).set_fontweight(weight)


def plot_entropy(
    what: LayerReading | Comparison | Mapping[str, LayerReading], *, position: int | None = None
) -> Figure:
    """Entropy over the layers against ln V, and beside it the distance to the final answer.

    A mapping draws its readings by name. A Comparison draws base and adapter, and between the two panels what the
    adapter changed, on the band of what the random adapters changed.
    """
    both = isinstance(what, Comparison)
    readings: Mapping[str, LayerReading] = {"": what} if isinstance(what, LayerReading) else what
    readings = {"base": what.base, "adapter": what.adapter} if both else readings
    first = next(iter(readings.values()))
    column = first.column(position)
    figure, panels = _axes(3 if both else 2, height=3.6)
    for i, (name, reading) in enumerate(readings.items()):
        here = reading.column(position)
        color = {"base": _BASE, "adapter": _ADAPTER}.get(name, COLORS.get(name, f"C{i}"))
        style = {"color": color, "ms": 4, "label": token_label(name, width=40)}
        mark = ("o-", "s--", "^:", "v-.")[i % 4]
        panels[0].plot(reading.layers, reading.entropy[:, here], mark, **style)
        panels[-1].plot(reading.layers, reading.kl_to_final[:, here], mark, **style)
    panels[0].axhline(first.ln_vocabulary, color="black", ls=":", lw=1)
    panels[0].text(
        0, first.ln_vocabulary, f"ln V = {first.ln_vocabulary:.2f}: no information", fontsize=8, va="bottom"
    )
    panels[0].set(ylabel="entropy (nats)", ylim=(0, first.ln_vocabulary * 1.1))
    panels[-1].set(ylabel="KL(final answer || layer), nats", ylim=(0, None))
    if both:
        _draw_change(panels[1], what, column)
    for axes in panels:
        axes.set_xlabel(_DEPTH)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(readings) > 1:
        panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"after {token_label(first.tokens[first.positions[column]], width=30)}", fontsize=10)
    return _finished(figure)


def _draw_change(axes, comparison: Comparison, column: int) -> None:
    """Adapter minus base on the band of the null."""
    layers, base = comparison.base.layers, comparison.base.entropy[:, column]
    low, high = (end[:, column] - base for end in comparison.null_band)
    label = f"{len(comparison.null_entropy)} random adapters of the same norm"
    axes.fill_between(layers, low, high, color="#7f9fd0", alpha=0.35, label=label)
    axes.plot(layers, comparison.entropy_change[:, column], "s--", ms=4, color=_ADAPTER, label="adapter")
    axes.axhline(0, color=_BASE, lw=1)
    axes.set_ylabel("change of entropy against base (nats)")
    axes.legend(frameon=False, fontsize=8)


def plot_ribbon(what: LayerReading | Comparison, *, position: int | None = None) -> Figure:
    """Probabilities of the leading tokens, stacked, over the layers; a token has one colour in all panels.

    White: tokens outside the top k of that layer and tokens that lead nowhere near the end.
    """
    readings = {"base": what.base, "adapter": what.adapter} if isinstance(what, Comparison) else {"": what}
    leading: dict[int, str] = {}
    for reading in readings.values():
        column = reading.column(position)
        for layer in (-1, *range(len(reading.layers) - 1, 0, -1)):
            count = reading.top_ids.shape[2] if layer == -1 else 1
            pairs = zip(reading.top_ids[layer, column], reading.top_tokens[layer][column], strict=True)
            leading |= {int(i): t for i, t in list(pairs)[:count] if int(i) not in leading}
    kept = dict(list(leading.items())[:10])
    figure, panels = _axes(len(readings), height=3.6, sharey=True)
    for axes, (name, reading) in zip(panels, readings.items(), strict=True):
        column = reading.column(position)
        ids, probs = reading.top_ids[:, column], reading.top_probs[:, column]
        heights = np.array([(probs * (ids == token)).sum(axis=1) for token in kept])
        axes.stackplot(reading.layers, heights, colors=[f"C{i}" for i in range(len(kept))], alpha=0.85)
        middles = heights.cumsum(axis=0) - heights / 2
        for i, text in enumerate(kept.values()):
            most, last = int(heights[i].argmax()), len(reading.layers) - 1
            if heights[i, last] > 0.03:
                label = f" {token_label(text)} {heights[i, last]:.0%}"
                axes.text(reading.layers[last], middles[i, last], label, color=f"C{i}", fontsize=8, va="center")
            elif heights[i, most] > 0.1:  # it led on the way
                place = reading.layers[most], middles[i, most]
                axes.text(*place, token_label(text), color="white", fontsize=8, ha="center", va="center")
        axes.set(xlabel=_DEPTH, title=name, ylim=(0, 1), xlim=(0, reading.layers[-1] * 1.25))
    panels[0].set_ylabel("probability of the next token")
    return _finished(figure)


def plot_words(comparison: Comparison, *, position: int | None = None) -> Figure:
    """The leading words of base and adapter, side by side; black: in both at that layer, grey: only here."""
    column = comparison.base.column(position)
    layers = comparison.base.layers
    figure, (axes,) = _axes(height=0.27 * len(layers) + 0.9)
    figure.set_figwidth(11)
    axes.axis("off")
    axes.set(xlim=(0, 12.6), ylim=(-0.6, len(layers) + 0.6))
    sides = (("base", comparison.base, comparison.adapter), ("adapter", comparison.adapter, comparison.base))
    for start, (name, mine, other) in zip((0.9, 7.1), sides, strict=True):
        axes.text(start, len(layers), f"{name}: top words, entropy (nats)", fontsize=9)
        for layer in layers:
            shared = set(other.top_ids[layer, column].tolist())
            words = zip(mine.top_ids[layer, column].tolist(), mine.top_tokens[layer][column], strict=True)
            for i, (token, text) in enumerate(list(words)[:5]):
                color = "black" if token in shared else "#9a9a9a"
                axes.text(start + i, layer, token_label(text, width=8), fontsize=8, color=color, va="center")
            color = HEAT(mine.entropy[layer, column] / mine.ln_vocabulary)
            chip = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
            value = f"{mine.entropy[layer, column]:.2f}"
            axes.text(start + 5.1, layer, value, fontsize=8, color=ink_on(color), bbox=chip, va="center")
    for layer in layers:
        axes.text(0, layer, layer_name(layer), fontsize=8, color="#666666", va="center")
    return _finished(figure)


# --- the table --------------------------------------------------------------------------------------------------
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


# --- attention and routing --------------------------------------------------------------------------------------
def plot_attention(reading: AttentionReading, *, layer: int = -1, position: int | None = None) -> Figure:
    """Where one position looks: every layer (left), one layer (right), mean over heads. Grey: first token."""
    wanted = reading.positions[-1] if position is None else position % len(reading.tokens)
    if wanted not in reading.positions:
        raise ValueError(f"position {position} was not read; read are {reading.positions}")
    mean = reading.weights[:, :, reading.positions.index(wanted)].mean(axis=1)[:, : wanted + 1]
    row = layer if layer < 0 else reading.layers.index(layer)
    tokens = [f"{i} {token_label(t, width=12)}" for i, t in enumerate(reading.tokens[: wanted + 1])]
    figure, (left, right) = _axes(2, height=max(3.2, 0.2 * len(tokens) + 1))
    for axes in (left, right):
        axes.grid(visible=False)
    picture = left.imshow(mean.T, cmap="Blues", vmin=0, aspect="auto")
    left.set_xticks(range(0, len(reading.layers), max(1, len(reading.layers) // 8)))
    left.set_xticklabels([reading.layers[int(i)] for i in left.get_xticks()])
    left.set(xlabel="layer", title="attention in every layer")
    figure.colorbar(picture, ax=left, pad=0.02)
    colors = ["#9e9e9e", *["#1f77b4"] * (len(tokens) - 1)]
    right.barh(range(len(tokens)), mean[row], color=colors)
    right.axvline(1 / len(tokens), color="black", ls=":", lw=1, label=f"uniform, 1/{len(tokens)}")
    right.legend(frameon=False, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="weight", title=f"layer {reading.layers[row]}")
    for axes in (left, right):
        axes.set_yticks(range(len(tokens)), tokens, fontsize=8 if len(tokens) <= 40 else 5)
    return _finished(figure)


def plot_routing(what: RoutingReading | Comparison) -> Figure:
    """Mean router probability of every expert in every layer; of a Comparison also what the adapter changed.

    The shift of routing means something only where it leaves the band of the random adapters.
    """
    if isinstance(what, Comparison) and (what.base_routing is None or what.adapter_routing is None):
        raise ValueError("plot_routing: this comparison is of a model without experts")
    reading = what.base_routing if isinstance(what, Comparison) else what
    figure, panels = _axes(3 if isinstance(what, Comparison) else 1, height=3.4)
    _expert_map(figure, panels[0], reading, reading.probabilities.mean(axis=1), "Blues", "mean router probability")
    if isinstance(what, Comparison):
        change = (what.adapter_routing.probabilities - reading.probabilities).mean(axis=1)
        _expert_map(figure, panels[1], reading, change, "RdBu_r", "adapter minus base")
        null, axes = what.null_routing_shift, panels[2]
        axes.fill_between(reading.layers, null.min(axis=0), null.max(axis=0), color="#7f9fd0", alpha=0.35)
        axes.plot(reading.layers, null.mean(axis=0), color="#7f9fd0", label="random adapters of the same norm")
        axes.plot(reading.layers, what.routing_shift, "o-", ms=4, color=_ADAPTER, label="adapter")
        axes.set(
            xlabel="layer", ylabel="Jensen-Shannon divergence (nats)", title="shift of routing", ylim=(0, None)
        )
        axes.set_xticks(reading.layers)
        axes.legend(frameon=False, fontsize=8)
    return _finished(figure)


def _expert_map(figure, axes, reading: RoutingReading, values: np.ndarray, colors: str, title: str) -> None:
    limit = np.abs(values).max() or 1.0
    low = 0 if colors == "Blues" else -limit
    picture = axes.imshow(values, cmap=colors, vmin=low, vmax=limit, aspect="auto", origin="lower")
    axes.grid(visible=False)
    axes.set_yticks(range(len(reading.layers)), reading.layers)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=axes, pad=0.02)
