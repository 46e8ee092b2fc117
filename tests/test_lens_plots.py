"""Figures and tables of readings: they hold what was read, and no token breaks them."""

import re
import warnings
from html.parser import HTMLParser

from ironlogic.lens.results import AttentionReading, Comparison, LayerReading, RoutingReading
from ironlogic.show.lens import (
    lens_table,
    plot_attention,
    plot_entropy,
    plot_layers,
    plot_ribbon,
    plot_routing,
    plot_words,
    text_columns,
    token_label,
)

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

NASTY = (
    "了一些",
    "مصطفى",
    "\n\n",
    "\r",
    "$a$",
    "_me",
    "<b>&",
    "\u202e",
    "\x00",
    "\ufffd",
    " the",
    "",
    "한국어",
    "🦊",
)
LAYERS, TOP = 4, 5


def reading(seed: int = 0, tokens: tuple[str, ...] = NASTY) -> LayerReading:
    rng = np.random.default_rng(seed)
    count = len(tokens)
    probs = np.sort(rng.dirichlet(np.ones(20), size=(LAYERS + 1, count))[..., :TOP])[..., ::-1]
    ids = np.stack([[rng.permutation(count)[:TOP] for _ in range(count)] for _ in range(LAYERS + 1)])
    kl = rng.uniform(0, 9, (LAYERS + 1, count))
    kl[-1] = 0
    return LayerReading(
        entropy=rng.uniform(0, 6, (LAYERS + 1, count)),
        top_ids=ids,
        top_tokens=tuple(tuple(tuple(tokens[i] for i in one) for one in line) for line in ids),
        top_probs=probs,
        active=rng.integers(0, 50, (LAYERS + 1, count)),
        kl_to_final=kl,
        settle_layer=rng.integers(0, LAYERS + 1, count),
        layers=tuple(range(LAYERS + 1)),
        positions=tuple(range(count)),
        ids=tuple(range(count)),
        tokens=tokens,
        vocabulary=1000,
    )


def routing(seed: int = 0) -> RoutingReading:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(4), size=(3, len(NASTY)))
    chosen = np.argsort(-probabilities)[..., :2]
    return RoutingReading(probabilities, chosen, (1, 3, 4), tuple(range(len(NASTY))), NASTY)


def comparison() -> Comparison:
    null = np.stack([reading(seed).entropy for seed in (5, 6, 7)])
    return Comparison(
        base=reading(0),
        adapter=reading(1),
        null_entropy=null,
        null_kl_to_final=null,
        null_same_top=null > 1,
        base_routing=routing(0),
        adapter_routing=routing(1),
        routing_shift=np.array([0.1, 0.2, 0.3]),
        null_routing_shift=np.full((3, 3), 0.2),
    )


def attention() -> AttentionReading:
    weights = np.random.default_rng(0).dirichlet(np.ones(len(NASTY)), size=(LAYERS, 2, 1))
    return AttentionReading(weights, tuple(range(1, LAYERS + 1)), (len(NASTY) - 1,), NASTY)


FIGURES = {
    "layers": lambda: plot_layers(reading()),
    "entropy": lambda: plot_entropy(reading()),
    "entropy by name": lambda: plot_entropy({"_a": reading(0), "$b$": reading(1)}, position=3),
    "entropy compared": lambda: plot_entropy(comparison(), position=0),
    "ribbon": lambda: plot_ribbon(reading(), position=2),
    "ribbon compared": lambda: plot_ribbon(comparison()),
    "words": lambda: plot_words(comparison()),
    "routing": lambda: plot_routing(routing()),
    "routing compared": lambda: plot_routing(comparison()),
    "attention": lambda: plot_attention(attention()),
}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_every_token_without_a_missing_glyph(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name]()
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not any("\n\n" in text or "\x00" in text for text in texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())


def test_heat_map_shows_the_reading():
    shown = reading()
    figure = plot_layers(shown)
    axes = figure.axes[0]
    assert (axes.images[0].get_array() == shown.entropy).all()
    assert axes.images[0].get_clim() == (0, shown.ln_vocabulary)
    cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert len(cells) == (LAYERS + 1) * len(NASTY)
    for layer in range(LAYERS + 1):
        for column in range(len(NASTY)):
            assert cells[column, layer] == token_label(shown.top_tokens[layer][column][0], width=9)
    settled = axes.lines[-1].get_ydata()
    assert (settled[::2] == shown.settle_layer - 0.5).all()


def test_curves_show_the_reading_and_its_null():
    made = comparison()
    figure = plot_entropy(made, position=2)
    base, adapter = figure.axes[0].lines[:2]
    assert (base.get_ydata() == made.base.entropy[:, 2]).all()
    assert (adapter.get_ydata() == made.adapter.entropy[:, 2]).all()
    assert set(figure.axes[0].lines[2].get_ydata()) == {made.base.ln_vocabulary}
    assert (figure.axes[1].lines[0].get_ydata() == made.entropy_change[:, 2]).all()
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    change = made.null_entropy[:, :, 2] - made.base.entropy[:, 2]
    assert (band.min(), band.max()) == pytest.approx((change.min(), change.max()))
    assert (figure.axes[2].lines[1].get_ydata() == made.adapter.kl_to_final[:, 2]).all()


def test_words_shared_are_black_and_others_grey():
    made = comparison()
    figure = plot_words(made, position=1)
    black = [t for t in figure.axes[0].texts if t.get_color() == "black" and t.get_position()[0] == 0.9]
    first = [made.base.top_ids[layer, 1, 0] in made.adapter.top_ids[layer, 1] for layer in range(LAYERS + 1)]
    assert len(black) == sum(first) + 1  # with the title


def test_attention_leaves_the_future_out_and_refuses_what_was_not_read():
    shown = attention()
    figure = plot_attention(shown, layer=2)
    bars = [patch.get_width() for patch in figure.axes[1].patches]
    assert bars == pytest.approx(shown.weights[1, :, 0].mean(axis=0))
    with pytest.raises(ValueError, match="position 3 was not read"):
        plot_attention(shown, position=3)


def test_routing_needs_experts():
    made = comparison()
    object.__setattr__(made, "base_routing", None)
    with pytest.raises(ValueError, match="without experts"):
        plot_routing(made)


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "·the"),
        ("\n" * 32, "↵×32"),
        ("a\tb\r", "a→b⇠"),
        ("\x00", "\\x00"),
        ("\u202e", "\\u202e"),
        ("", "∅"),
        ("abcdefghijkl", "abcdefghij…"),
        ("$x$", "$x$"),
        ("\U000f0000", "\\U000f0000"),
    ],
)
def test_token_labels(token, label):
    assert token_label(token, width=10) == label


def test_characters_without_a_font_are_escaped(monkeypatch):
    from ironlogic.show import lens as lens_plots

    monkeypatch.setattr(lens_plots, "_fonts", lambda: (["DejaVu Sans"], frozenset(range(128))))
    assert token_label("了", width=10) == "\\u4e86"


# --- the table --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("position", range(len(NASTY)))
def test_text_table_keeps_its_columns(position):
    shown = reading()
    lines = str(lens_table(shown, position=position)).split("\n")
    rows = lines[3 : 4 + LAYERS]
    assert len(lines) == 3 + LAYERS + 1 + 2 + TOP  # one line a row, whatever the tokens hold
    assert lines[1].startswith("layer | top token")
    for layer, row in enumerate(rows):
        cells = row.split(" | ")
        assert cells[0].strip() == ("embed" if layer == 0 else str(layer))
        assert cells[1].strip().strip("\u2068\u2069") == repr(shown.top_tokens[layer][position][0])
        assert cells[2].strip() == f"{shown.top_probs[layer, position, 0]:.1%}"
        assert cells[3].strip() == str(shown.active[layer, position])
        assert cells[4].strip() == f"{shown.entropy[layer, position]:.4f}"
    starts = {text_columns(row.split(" | ")[0] + " | " + row.split(" | ")[1]) for row in rows}
    assert len(starts) == 1
    assert all(row.isprintable() or "\u2068" in row for row in lines)


def test_html_table_is_well_formed_and_escaped():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            self.seen.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    for position in range(len(NASTY)):
        html = lens_table(reading(), position=position)._repr_html_()
        tags = Tags()
        tags.feed(html)
        assert tags.open == []
        assert set(tags.seen) == {"table", "caption", "tr", "th", "td", "bdi", "p", "ol", "li"}
        assert tags.seen.count("td") == 6 * (LAYERS + 1)
        assert not re.search("[\u202e\x00\n]", html)


def test_table_of_the_last_position_read_by_default():
    shown = reading().pick([4, 2])
    assert "position 2" in str(lens_table(shown))
    assert "position 4" in str(lens_table(shown, position=4))
    with pytest.raises(ValueError, match="position 3 was not read"):
        lens_table(shown, position=3)


def test_readings_refuse_wrong_shapes():
    shown = reading()
    values = {name: getattr(shown, name) for name in shown.__dataclass_fields__}
    with pytest.raises(ValueError, match="entropy has shape"):
        LayerReading(**values | {"entropy": shown.entropy[:-1]})
    with pytest.raises(ValueError, match="top tokens have shape"):
        LayerReading(**values | {"top_probs": shown.top_probs[..., :2]})
