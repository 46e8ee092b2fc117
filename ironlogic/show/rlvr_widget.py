"""Completions to read: those of a training step with their rewards, and the sampled answers of several arms."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.show.explorer import Explorer

import ipywidgets
from IPython.display import HTML, DisplayHandle

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.training.grpo import Samples

__all__ = ["completions_table", "live_rewards", "sample_explorer"]

_CELL = "style='text-align:left;white-space:pre-wrap;vertical-align:top;line-height:1.4'"


def completions_table(
    completions: Sequence[Mapping[str, Any]], *, steps: Sequence[int], rewards: Sequence[str], rows: int = 4
) -> HTML:
    """The first `rows` completions of each of those steps of `read_completions`, with their rewards."""
    head = ["step", "prompt", "completion", "tokens", *rewards]
    body = []
    for step in steps:
        mine = [line for line in completions if line["step"] == step]
        if not mine:
            known = f"{completions[0]['step']} to {completions[-1]['step']}" if completions else "none"
            raise ValueError(f"completions_table: no completions of step {step}; there are those of {known}")
        body += [[str(line[name]) for name in head] for line in mine[:rows]]
    return HTML(_table(head, body))


def sample_explorer(arms: "Mapping[str, Samples]") -> Explorer:
    """One problem, and what every arm answered each time it was asked it."""
    tasks = next(iter(arms.values())).tasks
    different = [name for name, samples in arms.items() if samples.tasks != tasks]
    if different:
        raise ValueError(f"sample_explorer: {', '.join(different)} answered other problems than {next(iter(arms))}")

    def show(problem: int) -> tuple[str, None]:
        task = tasks[problem]
        columns = [
            [
                f"{'✓' if right else '✗'} {' '.join(answer.text.split())}"  # a line each: thoughts have several
                for answer, right in zip(samples.answers[problem], samples.correct[problem], strict=True)
            ]
            for samples in arms.values()
        ]
        shares = [(samples.correct[problem].mean(), samples.correct.mean()) for samples in arms.values()]
        overall = [
            f"{name}: {here:.0%} here, {all_:.0%} over all" for name, (here, all_) in zip(arms, shares, strict=True)
        ]
        title = f"<p>{escape(task.prompt)}<br>the answer is <b>{escape(task.answer)}</b></p>"
        return title + _table(overall, list(zip(*columns, strict=False))), None

    options = [(f"{task.kind}: {task.prompt[:70]}", i) for i, task in enumerate(tasks)]
    wide = ipywidgets.Layout(width="95%")
    return Explorer(
        "samples",
        {"problem": ipywidgets.Dropdown(options=options, value=0, description="problem", layout=wide)},
        show,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td {_CELL}><span dir="auto">{escape(cell)}</span></td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def live_rewards(arm: str) -> Callable[[list[dict[str, Any]]], None]:
    """A `watch` for train_grpo: one line that follows the steps."""
    handle = DisplayHandle()
    handle.display(HTML(f"<p>{escape(arm)}: starting</p>"))

    def watch(lines: list[dict[str, Any]]) -> None:
        last, recent = lines[-1], lines[-5:]
        reward, thinks = (sum(line[name] for line in recent) / len(recent) for name in ("reward", "think_rate"))
        left = last["seconds"] / last["step"] * (last["steps"] - last["step"])
        handle.update(
            HTML(
                f"<p><b>{escape(arm)}</b> step {last['step']} of {last['steps']} · reward {reward:.2f} · "
                f"{thinks:.0%} think · {last['seconds']:.0f} s, about {left:.0f} s to go</p>"
            )
        )

    return watch
