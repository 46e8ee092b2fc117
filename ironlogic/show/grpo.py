"""Reinforcement learning drawn and read: rewards over the steps, pass at k on problems held out, completions."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.data.problems import thinks
from ironlogic.evidence.statistics import mean_interval, share_interval
from ironlogic.show.explorer import Explorer
from ironlogic.show.plots import _axes

import ipywidgets
import pandas as pd
from IPython.display import HTML, DisplayHandle
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.evidence.statistics import Interval
    from ironlogic.training.grpo import Samples

__all__ = ["completions_table", "live_rewards", "plot_pass", "plot_rewards", "sample_explorer"]

_CURVES = {"reward": "mean reward", "thinks": "share that thinks", "tokens": "tokens per completion"}
_CELL = "style='text-align:left;white-space:pre-wrap;vertical-align:top;line-height:1.4'"


# --- figures ------------------------------------------------------------------------------------------------
def plot_rewards(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, reward: str, window: int = 5) -> Figure:
    """Reward, share that thinks and length over the steps of GRPO; `runs` maps a name to `read_completions`.

    Points are means over `window` steps, bands 95 % intervals over the prompts in them: completions of one prompt
    are not independent. Completions that the reward passed over (None) are left out.
    """
    figure, panels = _axes(3)
    for i, (name, completions) in enumerate(runs.items()):
        scored = [line for line in completions if line[reward] is not None]
        rows = pd.DataFrame(scored)[["step", "prompt", "tokens"]]
        rows["reward"] = [line[reward] for line in scored]
        rows["thinks"] = [float(thinks(line["completion"])) for line in scored]
        if rows["reward"].nunique() == 1:
            name = f"{name} (always {rows['reward'][0]:g}: nothing to learn)"
        middles, intervals = _windows(rows, window)
        for axes, curve in zip(panels, _CURVES, strict=True):
            _draw_band(axes, middles, [interval[curve] for interval in intervals], color=f"C{i}", label=name)
    for axes, (curve, label) in zip(panels, _CURVES.items(), strict=True):
        axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, None if curve == "tokens" else 1.04))
        axes.locator_params(axis="x", integer=True)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _windows(rows: pd.DataFrame, window: int) -> "tuple[list[float], list[dict[str, Interval]]]":
    """The middle of every `window` steps, and there an interval over prompts for every curve."""
    middles, intervals = [], []
    first = rows["step"].min()
    for _, steps in rows.groupby((rows["step"] - first) // window):
        prompts = steps.groupby(["step", "prompt"], sort=False)[list(_CURVES)].mean()
        middles.append(float(steps["step"].unique().mean()))
        intervals.append({curve: mean_interval(prompts[curve].to_numpy()) for curve in _CURVES})
    return middles, intervals


def _draw_band(axes: Axes, x: Sequence[float], intervals: "Sequence[Interval]", *, color: str, label: str) -> None:
    axes.plot(x, [interval.mean for interval in intervals], "o-", ms=3, color=color, label=label)
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def plot_pass(arms: "Mapping[str, Samples]") -> Figure:
    """Chance that one of k sampled answers is right over k (left), and what share of answers thinks (right).

    Bands and whiskers are 95 % intervals over problems.
    """
    figure, (left, right) = _axes(2)
    for i, (name, samples) in enumerate(arms.items()):
        ks = range(1, samples.correct.shape[1] + 1)
        passed = [share_interval(samples.pass_at(k)) for k in ks]
        _draw_band(left, ks, passed, color=f"C{i}", label=name)
        share = share_interval(samples.thinks.mean(axis=1))
        error = [[share.mean - share.low], [share.high - share.mean]]
        right.barh(i, share.mean, xerr=error, color=f"C{i}", height=0.6)
    left.set(xlabel="k, answers sampled to a problem", ylabel="one of them is right", ylim=(0, 1.04))
    left.legend(frameon=False, fontsize=9, loc="lower right")
    right.set(
        yticks=range(len(arms)),
        yticklabels=list(arms),
        xlabel="share of sampled answers that think",
        xlim=(0, 1.04),
    )
    right.invert_yaxis()
    return figure


# --- completions to read ------------------------------------------------------------------------------------
def completions_table(
    completions: Sequence[Mapping[str, Any]], *, steps: Sequence[int], rewards: Sequence[str], rows: int = 4
) -> HTML:
    """The first `rows` completions of each of those steps of `read_completions`, with their rewards."""
    columns = ["step", "prompt", "completion", "tokens", *rewards]
    body = []
    for step in steps:
        lines = [line for line in completions if line["step"] == step]
        if not lines:
            known = f"{completions[0]['step']} to {completions[-1]['step']}" if completions else "none"
            raise ValueError(f"completions_table: no completions of step {step}; there are those of {known}")
        body += [[str(line[name]) for name in columns] for line in lines[:rows]]
    return HTML(_table(columns, body))


def sample_explorer(arms: "Mapping[str, Samples]") -> Explorer:
    """One problem, and what every arm answered each time it was asked it."""
    tasks = next(iter(arms.values())).tasks
    different = [name for name, samples in arms.items() if samples.tasks != tasks]
    if different:
        raise ValueError(f"sample_explorer: {', '.join(different)} answered other problems than {next(iter(arms))}")

    def show(problem: int) -> tuple[str, None]:
        task = tasks[problem]
        columns = {}
        for name, samples in arms.items():
            here, overall = samples.correct[problem].mean(), samples.correct.mean()
            columns[f"{name}: {here:.0%} here, {overall:.0%} over all"] = [
                f"{'✓' if right else '✗'} {' '.join(answer.text.split())}"  # a line each: thoughts have several
                for answer, right in zip(samples.answers[problem], samples.correct[problem], strict=True)
            ]
        title = f"<p>{escape(task.prompt)}<br>the answer is <b>{escape(task.answer)}</b></p>"
        return title + _table(list(columns), list(zip(*columns.values(), strict=False))), None

    options = [(f"{task.kind}: {task.prompt[:70]}", i) for i, task in enumerate(tasks)]
    wide = ipywidgets.Layout(width="95%")
    problem = ipywidgets.Dropdown(options=options, value=0, description="problem", layout=wide)
    return Explorer("samples", {"problem": problem}, show)


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
        reward, thoughts = (sum(line[name] for line in recent) / len(recent) for name in ("reward", "think_rate"))
        left = last["seconds"] / last["step"] * (last["steps"] - last["step"])
        handle.update(
            HTML(
                f"<p><b>{escape(arm)}</b> step {last['step']} of {last['steps']} · reward {reward:.2f} · "
                f"{thoughts:.0%} think · {last['seconds']:.0f} s, about {left:.0f} s to go</p>"
            )
        )

    return watch
