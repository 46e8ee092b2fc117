"""Reinforcement learning drawn and read: rewards over the steps, pass at k on problems held out, completions."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.data.problems import thinks
from ironlogic.evidence.statistics import mean_interval, share_interval
from ironlogic.show.explorer import Explorer, live_html, progress, table_html, wide
from ironlogic.show.plots import _axes, draw_band, error_bars

import ipywidgets
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.training.grpo import Samples

__all__ = ["completions_table", "live_rewards", "plot_pass", "plot_rewards", "sample_explorer"]

_CURVES = {"reward": "mean reward", "thinks": "share that thinks", "tokens": "tokens per completion"}


# --- figures ------------------------------------------------------------------------------------------------
def plot_rewards(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, reward: str, window: int = 5) -> Figure:
    """Reward, share that thinks and length over the steps of GRPO; `runs` maps a name to `read_completions`.

    Points are means over `window` steps, bands 95 % intervals over the prompts in them: completions of one prompt
    are not independent. Completions that the reward passed over (None) are left out.
    """
    figure, panels = _axes(3)
    for i, (name, completions) in enumerate(runs.items()):
        rows = pd.DataFrame([line | {"reward": line[reward]} for line in completions if line[reward] is not None])
        rows["thinks"] = rows["completion"].map(thinks).astype(float)
        rows["window"] = (rows["step"] - rows["step"].min()) // window
        if rows["reward"].nunique() == 1:
            name = f"{name} (always {rows['reward'][0]:g}: nothing to learn)"
        middles = rows.drop_duplicates("step").groupby("window")["step"].mean()
        prompts = rows.groupby(["window", "step", "prompt"], sort=False)[list(_CURVES)].mean()
        for axes, curve in zip(panels, _CURVES, strict=True):
            intervals = [mean_interval(values) for _, values in prompts.groupby("window")[curve]]
            draw_band(axes, middles, intervals, color=f"C{i}", label=name)
    for axes, (curve, label) in zip(panels, _CURVES.items(), strict=True):
        axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, None if curve == "tokens" else 1.04))
        axes.locator_params(axis="x", integer=True)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def plot_pass(arms: "Mapping[str, Sequence[Samples]]") -> Figure:
    """Chance that one of k sampled answers is right over k (left), and what share of answers thinks (right).

    An arm is one training or several; bands and whiskers are 95 % intervals over problems and trainings.
    """
    figure, (left, right) = _axes(2)
    for i, (name, trainings) in enumerate(arms.items()):
        ks = range(1, trainings[0].correct.shape[1] + 1)
        passed = [share_interval([samples.pass_at(k) for samples in trainings]) for k in ks]
        draw_band(left, ks, passed, color=f"C{i}", label=name)
        share = share_interval([samples.thinks.mean(axis=1) for samples in trainings])
        right.barh(i, share.mean, xerr=error_bars(share), color=f"C{i}", height=0.6)
    left.set(xlabel="k, answers sampled to a problem", ylabel="one of them is right", ylim=(0, 1.04))
    left.legend(frameon=False, fontsize=9, loc="lower right")
    right.set_yticks(range(len(arms)), list(arms))
    right.set(xlabel="share of sampled answers that think", xlim=(0, 1.04))
    right.invert_yaxis()
    return figure


# --- completions to read ------------------------------------------------------------------------------------
def completions_table(
    completions: Sequence[Mapping[str, Any]], *, steps: Sequence[int], rewards: Sequence[str], rows: int = 4
) -> HTML:
    """The first `rows` completions of each of those steps of `read_completions`, with their rewards."""
    shown = []
    for step in steps:
        lines = [line for line in completions if line["step"] == step]
        if not lines:
            known = f"{completions[0]['step']} to {completions[-1]['step']}" if completions else "none"
            raise ValueError(f"completions_table: no completions of step {step}; there are those of {known}")
        shown += lines[:rows]
    columns = ["step", "prompt", "completion", "tokens", *rewards]
    return HTML(table_html(pd.DataFrame(shown, columns=columns)))


def sample_explorer(arms: "Mapping[str, Samples]") -> Explorer:
    """One problem, and what every arm answered each time it was asked it."""
    first, *others = arms
    tasks = arms[first].tasks
    different = [name for name in others if arms[name].tasks != tasks]
    if different:
        raise ValueError(f"sample_explorer: {', '.join(different)} answered other problems than {first}")

    def show(problem: int) -> tuple[str, None]:
        task, columns = tasks[problem], {}
        for name, samples in arms.items():
            correct = samples.correct[problem]
            head = f"{name}: {correct.mean():.0%} here, {samples.correct.mean():.0%} over all"
            columns[head] = [
                f"{'✓' if right else '✗'} {' '.join(answer.text.split())}"  # a line each: thoughts have several
                for answer, right in zip(samples.answers[problem], correct, strict=True)
            ]
        title = f"<p>{escape(task.prompt)}<br>the answer is <b>{escape(task.answer)}</b></p>"
        return title + table_html(pd.DataFrame({head: pd.Series(cells) for head, cells in columns.items()})), None

    options = [(f"{task.kind}: {task.prompt[:70]}", i) for i, task in enumerate(tasks)]
    problem = ipywidgets.Dropdown(options=options, value=0, description="problem", layout=wide())
    return Explorer("samples", {"problem": problem}, show)


def live_rewards() -> Callable[[str, list[dict[str, Any]]], None]:
    """A `watch` for `run_parallel`: a line for each training that follows its steps."""
    update, lines_of = live_html("<p>starting; the first steps come when the libraries are loaded</p>"), {}

    def watch(name: str, lines: list[dict[str, Any]]) -> None:
        recent = pd.DataFrame(lines[-5:])
        figures = f"loss {lines[-1].get('loss', math.nan):.3f}"
        if "reward" in recent:
            figures = f"reward {recent['reward'].mean():.2f} · {recent['think_rate'].mean():.0%} think"
        lines_of[name] = f"<b>{escape(name)}</b> {progress(lines[-1])} · {figures}"
        update(f"<p>{'<br>'.join(lines_of.values())}</p>")

    return watch
