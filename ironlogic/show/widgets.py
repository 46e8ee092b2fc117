"""Controls for the notebooks: layout and callbacks only; what they show comes from the other modules."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.burden import PROTECTED, apply_burden, measure_disorder, moved_units
from ironlogic.data.problems import Task, bayes_ceiling, check_answer
from ironlogic.memory import plan_memory
from ironlogic.presets import PRESETS
from ironlogic.show.evidence import live_arms
from ironlogic.show.explorer import Explorer, ratio_slider, table_html, text_html, wide
from ironlogic.show.lens import lens_table, plot_entropy, plot_layers
from ironlogic.show.plots import plot_disorder, plot_memory
from ironlogic.units import count_units

import ipywidgets
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

if TYPE_CHECKING:  # the explorers that need a model import it when they are called: ten seconds for the others
    from ironlogic.lens.results import LayerReading
    from ironlogic.models import LoadedModel

__all__ = [
    "answer_explorer",
    "answer_table",
    "burden_explorer",
    "lens_explorer",
    "live_losses",
    "memory_explorer",
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

    def show(text: str, ratio: float, unit: str, protect: bool, draw: int) -> tuple[str, Figure]:
        protected = PROTECTED if protect else ()
        counting = "word" if unit == "token" else unit

        def burdened(ratio: float) -> str:
            options = {"unit": unit, "protect": protected, "seed": seed, "key": (draw, 0, 0)}
            return apply_burden(text, ratio=ratio, tokenizer=tokenizer, **options)

        after = burdened(ratio)
        reached = measure_disorder(text, after, unit=counting)
        units = count_units(text, unit=unit, tokenizer=tokenizer)
        spans = () if unit == "seed" else protected  # the published function protects nothing
        movable = count_units(text, unit=unit, protect=spans, tokenizer=tokenizer)
        kept = f" ({units - movable} more are protected)" if movable < units else ""
        html = (
            f"<p><b>asked for {ratio:.0%}</b> of {movable} {_PLURAL[unit]}{kept} · "
            f"displaced <b>{reached.displaced:.0%}</b> · "
            f"Kendall tau distance {reached.kendall_tau:.2f} (random order: 0.50) · "
            f"neighbours kept {reached.bigrams_kept:.0%}</p>"
            f"<p>what the model is asked instead (moved units coloured):</p>"
            f"{text_html(after, moved=moved_units(text, after, unit=counting))}"
        )
        grid = [i / 10 for i in range(11)]
        points = [(at, measure_disorder(text, burdened(at), unit=counting)) for at in grid]
        return html, plot_disorder(points, movable=movable, units=max(units, 2), marked=ratio)

    units = ["word", "char", "sentence", "seed", *(["token"] if tokenizer else [])]
    controls = {
        "text": ipywidgets.Textarea(text, description="text", layout=wide("110px")),
        "ratio": ratio_slider("burden", ratio),
        "unit": ipywidgets.Dropdown(options=units, value=unit, description="unit"),
        "protect": ipywidgets.Checkbox(True, description="protect code, URLs, LaTeX, tags, tables", layout=wide()),
        "draw": ipywidgets.IntSlider(0, 0, 9, description="draw", continuous_update=False),
    }
    return Explorer("burden", controls, show)


def answer_explorer(
    loaded: "LoadedModel", arms: Sequence[str], tasks: Sequence[Task], *, ratio: float = 0.7, seed: int = 0
) -> Explorer:
    """One problem, scrambled by slider, answered by the base model and by every adapter it carries."""
    from ironlogic.evidence.items import scramble

    def show(problem: int, ratio: float) -> tuple[str, None]:
        task = tasks[problem]
        prompt = scramble(task.prompt, ratio, seed=seed, item=problem)
        ceiling = bayes_ceiling(task, prompt, ratio)
        told = [task.kind, f"order-{task.order}", f"the answer is {task.answer}"]
        if not math.isnan(ceiling):
            told.append(f"an ideal reader of this prompt is right with probability {ceiling:.2f}")
        head = f"<p>{escape(' · '.join(told))}</p>"
        return head + answer_table(loaded, arms, [(task, prompt)]).data, None

    options = [(f"{task.kind}: {task.prompt[:60]}", i) for i, task in enumerate(tasks)]
    problem = ipywidgets.Dropdown(options=options, value=0, description="problem", layout=wide())
    return Explorer("answers", {"problem": problem, "ratio": ratio_slider("burden", ratio)}, show)


def answer_table(loaded: "LoadedModel", arms: Sequence[str], asked: Sequence[tuple[Task, str]]) -> HTML:
    """A row per (problem, prompt as asked), a column per arm: the reply, with a mark for right or wrong."""
    from ironlogic.generate import generate
    from ironlogic.models import use_adapter

    tasks, prompts = [task for task, _ in asked], [prompt for _, prompt in asked]
    table = pd.DataFrame({"asked": prompts, "answer": [task.answer for task in tasks]})
    for arm in ["base", *arms]:
        with use_adapter(loaded, None if arm == "base" else arm) as model:
            said = generate(model, [task.ask(prompt) for task, prompt in asked], max_new_tokens=72)
            replies = [reply.text for reply in said]
        marks = ["✓" if check_answer(task, reply) else "✗" for task, reply in zip(tasks, replies, strict=True)]
        table[arm] = [f"{mark} {reply}" for mark, reply in zip(marks, replies, strict=True)]
    return HTML(table_html(table))


def live_losses(arm: str) -> Callable[[list[dict[str, Any]]], None]:
    """A `watch` for train_sft: one line and a loss curve that grow while it trains."""
    return partial(live_arms(every=0), arm)


def memory_explorer(preset: str, *, card_gib: float = 24) -> Explorer:
    """What one training step of a system needs, against the memory of a card."""

    def show(preset: str, card_gib: float, length: int) -> tuple[str, Figure]:
        plan = plan_memory(preset, card_gib=card_gib, length=length)
        return f"<pre style='word-break:normal'>{escape(plan.table())}</pre>", plot_memory({preset: plan})

    systems = [name for name, preset in PRESETS.items() if preset.card_gib]
    lengths = [512, 1024, 2048, 4096, 8192]
    at_rest = {"continuous_update": False}
    controls = {
        "preset": ipywidgets.Dropdown(options=systems, value=preset, description="system"),
        "card_gib": ipywidgets.FloatSlider(
            card_gib, min=8, max=96, step=1, description="card, GiB", readout_format=".0f", **at_rest
        ),
        "length": ipywidgets.SelectionSlider(options=lengths, value=4096, description="tokens", **at_rest),
    }
    return Explorer("memory", controls, show)


def lens_explorer(loaded: "LoadedModel", prompt: str, *, top_k: int = 5) -> Explorer:
    """What each layer says: prompt (text as it stands), position, layer, and base, adapter or both.

    `adapter` and `both` are offered when the model carries an adapter. A prompt is read once per model, however
    often position and layer are moved.
    """
    from ironlogic.lens.parts import decoder_layers
    from ironlogic.lens.read import read_layers
    from ironlogic.models import use_adapter

    import peft

    adapter = loaded.model.active_adapter if isinstance(loaded.model, peft.PeftModel) else None

    @lru_cache(maxsize=8)
    def read(text: str, name: str) -> "LayerReading":
        with use_adapter(loaded, adapter if name == "adapter" else None) as model:
            return read_layers(model, text, positions=None, top_k=top_k)

    def show(text: str, position: int, layer: int, model: str) -> tuple[str, Figure]:
        readings = {name: read(text, name) for name in (("base", "adapter") if model == "both" else (model,))}
        first = next(iter(readings.values()))
        controls["position"].max = len(first.tokens) - 1
        here = min(position, len(first.tokens) - 1)
        tokens = [(token, i == here) for i, token in enumerate(first.tokens)]
        html = (
            f"<p>the next token after the marked one, as every layer would say it:</p>{text_html('', moved=tokens)}"
        )
        for name, reading in readings.items():
            html += f"<p><b>{escape(name)}</b>, layer {layer}: {_layer_line(reading, layer, here)}</p>"
        tables = "".join(f"<td>{lens_table(reading, position=here).html}</td>" for reading in readings.values())
        html += f"<details><summary>all layers</summary><table><tr>{tables}</tr></table></details>"
        if len(readings) == 1 and len(first.tokens) <= 24:
            return html, plot_layers(first)
        return html, plot_entropy(readings, position=here)

    models = ["base", "adapter", "both"] if adapter else ["base"]
    end, top = len(read(prompt, "base").tokens) - 1, len(decoder_layers(loaded.model))
    at_rest = {"continuous_update": False}
    controls: dict[str, Any] = {
        "text": ipywidgets.Textarea(prompt, description="prompt", layout=wide("80px"), **at_rest),
        "position": ipywidgets.IntSlider(end, 0, end, description="position", **at_rest),
        "layer": ipywidgets.IntSlider(top, 0, top, description="layer", **at_rest),
        "model": ipywidgets.Dropdown(options=models, value=models[-1], description="model"),
    }
    return Explorer("lens", controls, show)


def _layer_line(reading: "LayerReading", layer: int, position: int) -> str:
    """The leading tokens of a layer with their probabilities, entropy and distance to the answer."""
    column = reading.column(position)
    pairs = zip(reading.top_tokens[layer][column], reading.top_probs[layer, column], strict=True)
    words = " · ".join(f"<bdi><code>{escape(repr(token))}</code></bdi> {share:.1%}" for token, share in pairs)
    return (
        f"{words} · entropy {reading.entropy[layer, column]:.2f} of {reading.ln_vocabulary:.2f} nats · "
        f"{reading.active[layer, column]} tokens above 1 % · "
        f"KL to the answer {reading.kl_to_final[layer, column]:.2f}"
    )
