"""Controls for the notebooks: layout and callbacks only; what they show comes from the other modules."""

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.burden import PROTECTED, apply_burden, measure_disorder, moved_units
from ironlogic.data.problems import Task, bayes_ceiling, check_answer
from ironlogic.memory import plan_memory
from ironlogic.presets import PRESETS
from ironlogic.show.chat import chat_box
from ironlogic.show.explorer import Explorer, picture_html, ratio_slider, text_html
from ironlogic.show.plots import png_bytes
from ironlogic.show.grpo import completions_table, live_rewards, sample_explorer
from ironlogic.show.lens import lens_table, plot_entropy, plot_layers
from ironlogic.show.picture_widget import picture_explorer
from ironlogic.show.plots import plot_disorder, plot_losses, plot_memory
from ironlogic.units import count_units

import ipywidgets
from IPython.display import HTML, DisplayHandle
from matplotlib.figure import Figure

if TYPE_CHECKING:  # the explorers that need a model import it when they are called: ten seconds for the others
    from ironlogic.models import LoadedModel

__all__ = [
    "Explorer",
    "answer_explorer",
    "answer_table",
    "burden_explorer",
    "chat_box",
    "completions_table",
    "lens_explorer",
    "live_losses",
    "live_rewards",
    "memory_explorer",
    "picture_explorer",
    "sample_explorer",
]

_PLURAL = {
    "word": "words",
    "char": "characters",
    "sentence": "sentences",
    "token": "tokens",
    "seed": "words between blanks",
}


def burden_explorer(
    text: str, *, ratio: float = 0.7, unit: str = "word", seed: int = 3407, tokenizer: Any = None
) -> Explorer:
    """What a burden does to a text: ratio, unit, protected spans and draw; moved words coloured, disorder reached.

    The unit `token` is offered when a tokenizer is given.
    """
    units = ["word", "char", "sentence", "seed", *(["token"] if tokenizer else [])]

    def show(text: str, ratio: float, unit: str, protect: bool, draw: int) -> tuple[str, Figure]:
        options = {"unit": unit, "protect": PROTECTED if protect else (), "seed": seed, "key": (draw, 0, 0)}
        counting = unit if unit != "token" else "word"

        def burdened(at: float) -> str:
            return apply_burden(text, ratio=at, tokenizer=tokenizer, **options)

        after = burdened(ratio)
        reached = measure_disorder(text, after, unit=counting)
        every = count_units(text, unit=unit, tokenizer=tokenizer)
        spans = () if unit == "seed" else options["protect"]  # the published function protects nothing
        free = count_units(text, unit=unit, protect=spans, tokenizer=tokenizer)
        kept = f" ({every - free} more are protected)" if free < every else ""
        html = (
            f"<p><b>asked for {ratio:.0%}</b> of {free} {_PLURAL[unit]}{kept} · "
            f"displaced <b>{reached.displaced:.0%}</b> · "
            f"Kendall tau distance {reached.kendall_tau:.2f} (random order: 0.50) · "
            f"neighbours kept {reached.bigrams_kept:.0%}</p>"
            f"<p>what the model is asked instead (moved units coloured):</p>"
            f"{text_html(after, moved=moved_units(text, after, unit=counting))}"
        )
        grid = [i / 10 for i in range(11)]
        points = [(at, measure_disorder(text, burdened(at), unit=counting)) for at in grid]
        return html, plot_disorder(points, movable=free, units=max(every, 2), marked=ratio)

    return Explorer(
        "burden",
        {
            "text": ipywidgets.Textarea(
                value=text, description="text", layout=ipywidgets.Layout(width="95%", height="110px")
            ),
            "ratio": ratio_slider("burden", ratio),
            "unit": ipywidgets.Dropdown(options=units, value=unit, description="unit"),
            "protect": ipywidgets.Checkbox(
                value=True, description="protect code, URLs, LaTeX and tags", layout=ipywidgets.Layout(width="95%")
            ),
            "draw": ipywidgets.IntSlider(value=0, min=0, max=9, description="draw", continuous_update=False),
        },
        show,
    )


def answer_explorer(
    loaded: "LoadedModel", arms: Sequence[str], tasks: Sequence[Task], *, ratio: float = 0.7, seed: int = 0
) -> Explorer:
    """One problem, scrambled by slider, answered by the base model and by every adapter it carries."""
    from ironlogic.evidence.items import scramble

    def show(problem: int, ratio: float) -> tuple[str, None]:
        task = tasks[problem]
        prompt = scramble(task.prompt, ratio, seed=seed, item=problem)
        head = (
            f"<p>{escape(task.kind)} · order-{task.order} · the answer is <b>{escape(task.answer)}</b> · an ideal "
            f"reader of this prompt is right with probability {bayes_ceiling(task, prompt, ratio):.2f}</p>"
        )
        return head + answer_table(loaded, arms, [(task, prompt)]).data, None

    options = [(f"{task.kind}: {task.prompt[:60]}", i) for i, task in enumerate(tasks)]
    wide = ipywidgets.Layout(width="95%")
    return Explorer(
        "answers",
        {
            "problem": ipywidgets.Dropdown(options=options, value=0, description="problem", layout=wide),
            "ratio": ratio_slider("burden", ratio),
        },
        show,
    )


def answer_table(loaded: "LoadedModel", arms: Sequence[str], asked: Sequence[tuple[Task, str]]) -> HTML:
    """A row per (problem, prompt as asked), a column per arm: the reply, with a mark for right or wrong."""
    from ironlogic.generate import generate
    from ironlogic.models import use_adapter

    prompts = [prompt for _, prompt in asked]
    replies = {}
    for arm in ["base", *arms]:
        with use_adapter(loaded, None if arm == "base" else arm) as model:
            replies[arm] = generate(model, prompts, max_new_tokens=72)
    left = "style='text-align:left;white-space:pre-wrap;vertical-align:top;line-height:1.4'"
    head = "".join(f"<th {left}>{escape(name)}</th>" for name in ("asked", "answer", *replies))
    rows = []
    for i, (task, prompt) in enumerate(asked):
        cells = [f'<span dir="auto">{escape(prompt)}</span>', escape(task.answer)]
        for arm in replies:
            text = replies[arm][i].text
            cells.append(f"{'✓' if check_answer(task, text) else '✗'} {escape(text)}")
        rows.append("".join(f"<td {left}>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return HTML(f"<table><tr>{head}</tr>{body}</table>")


def live_losses(arm: str) -> Callable[[list[dict[str, Any]]], None]:
    """A `watch` for train_sft: one line and a loss curve that grow while it trains."""
    handle = DisplayHandle()
    handle.display(HTML(f"<p>{escape(arm)}: starting</p>"))

    def watch(lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        left = last["seconds"] / last["step"] * (last["steps"] - last["step"])
        line = (
            f"<p><b>{escape(arm)}</b> step {last['step']} of {last['steps']} · loss {last['loss']:.3f} · "
            f"{last['seconds']:.0f} s, about {left:.0f} s to go · peak {last['peak_gib']:.1f} GiB</p>"
        )
        handle.update(HTML(line + picture_html(png_bytes(plot_losses({arm: lines})), f"loss of {arm}")))

    return watch


def memory_explorer(preset: str, *, card_gib: float = 24) -> Explorer:
    """What one training step of a system needs, against the memory of a card."""

    def show(preset: str, card_gib: float, length: int) -> tuple[str, Figure]:
        plan = plan_memory(preset, card_gib=card_gib, length=length)
        return f"<pre>{escape(plan.table())}</pre>", plot_memory({preset: plan})

    cards = [name for name, p in PRESETS.items() if p.card_gib]
    return Explorer(
        "memory",
        {
            "preset": ipywidgets.Dropdown(options=cards, value=preset, description="system"),
            "card_gib": ipywidgets.FloatSlider(
                value=card_gib,
                min=8,
                max=96,
                step=1,
                description="card, GiB",
                readout_format=".0f",
                continuous_update=False,
            ),
            "length": ipywidgets.SelectionSlider(
                options=[512, 1024, 2048, 4096, 8192], value=4096, description="tokens", continuous_update=False
            ),
        },
        show,
    )


def lens_explorer(loaded: "LoadedModel", prompt: str, *, top_k: int = 5) -> Explorer:
    """What each layer says: prompt (text as it stands), position, layer, and base, adapter or both.

    `adapter` and `both` are offered when the model carries an adapter. A prompt is read once per model, however
    often position and layer are moved.
    """
    from ironlogic.lens.parts import decoder_layers
    from ironlogic.lens.read import read_layers
    from ironlogic.models import use_adapter

    adapter = _active_adapter(loaded)
    last = len(decoder_layers(loaded.model))
    kept: dict[tuple[str, str], Any] = {}

    def read(text: str, name: str) -> Any:
        if (text, name) not in kept:
            if len(kept) > 8:
                kept.clear()
            if adapter is None:
                kept[text, name] = read_layers(loaded, text, positions=None, top_k=top_k)
            else:
                with use_adapter(loaded, None if name == "base" else adapter) as model:
                    kept[text, name] = read_layers(model, text, positions=None, top_k=top_k)
        return kept[text, name]

    def show(text: str, position: int, layer: int, model: str) -> tuple[str, Figure]:
        readings = {name: read(text, name) for name in (("base", "adapter") if model == "both" else (model,))}
        first = next(iter(readings.values()))
        controls["position"].max = len(first.tokens) - 1
        here = min(position, len(first.tokens) - 1)
        pieces = [(token, i == here) for i, token in enumerate(first.tokens)]
        html = "<p>the next token after the marked one, as every layer would say it:</p>" + text_html(
            "", moved=pieces
        )
        for name, reading in readings.items():
            html += f"<p><b>{escape(name)}</b>, layer {layer}: {_said(reading, layer, here)}</p>"
        tables = "".join(f"<td>{lens_table(reading, position=here).html}</td>" for reading in readings.values())
        html += f"<details><summary>all layers</summary><table><tr>{tables}</tr></table></details>"
        if len(readings) == 1 and len(first.tokens) <= 24:
            return html, plot_layers(first)
        return html, plot_entropy(readings, position=here)

    wide = ipywidgets.Layout(width="95%", height="80px")
    count = len(read(prompt, "base").tokens)
    controls: dict[str, Any] = {
        "text": ipywidgets.Textarea(value=prompt, description="prompt", layout=wide, continuous_update=False),
        "position": ipywidgets.IntSlider(
            value=count - 1, min=0, max=count - 1, description="position", continuous_update=False
        ),
        "layer": ipywidgets.IntSlider(value=last, min=0, max=last, description="layer", continuous_update=False),
        "model": ipywidgets.Dropdown(
            options=["base"] if adapter is None else ["base", "adapter", "both"],
            value="base" if adapter is None else "both",
            description="model",
        ),
    }
    return Explorer("lens", controls, show)


def _active_adapter(loaded: "LoadedModel") -> str | None:
    import peft

    return loaded.model.active_adapter if isinstance(loaded.model, peft.PeftModel) else None


def _said(reading: Any, layer: int, position: int) -> str:
    """One line: the leading tokens of a layer with their probabilities, entropy and distance to the answer."""
    column = reading.column(position)
    pairs = zip(reading.top_tokens[layer][column], reading.top_probs[layer, column], strict=True)
    words = " · ".join(f"<bdi><code>{escape(repr(token))}</code></bdi> {share:.1%}" for token, share in pairs)
    return (
        f"{words} · entropy {reading.entropy[layer, column]:.2f} of {reading.ln_vocabulary:.2f} nats · "
        f"{reading.active[layer, column]} tokens above 1 % · "
        f"KL to the answer {reading.kl_to_final[layer, column]:.2f}"
    )
