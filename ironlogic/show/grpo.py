"""Figures of reinforcement learning: what was rewarded over the steps, and what it brought on problems held out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ironlogic.data.problems import thinks
from ironlogic.evidence.statistics import Interval, bootstrap_interval
from ironlogic.show.plots import _axes

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:  # nothing here needs torch
    from ironlogic.training.grpo import Samples

__all__ = ["plot_pass", "plot_rewards"]

_CURVES = {"reward": "mean reward", "thinks": "share that thinks", "tokens": "tokens per completion"}


def plot_rewards(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, reward: str, window: int = 5) -> Figure:
    """Reward, share that thinks and length over the steps of GRPO; `runs` maps a name to `read_completions`.

    Points are means over `window` steps, bands 95 % intervals over the prompts in them: completions of one prompt
    are not independent. Completions that the reward passed over (None) are left out.
    """
    figure, panels = _axes(3)
    for i, (name, completions) in enumerate(runs.items()):
        scored = [line for line in completions if line[reward] is not None]
        values = [[line[reward], thinks(line["completion"]), line["tokens"]] for line in scored]
        middles, found = _windows(scored, np.array(values, float), window)
        for k, axes in enumerate(panels):
            axes.plot(middles, [f[k].mean for f in found], "o-", ms=3, color=f"C{i}", label=name)
            low, high = [f[k].low for f in found], [f[k].high for f in found]
            axes.fill_between(middles, low, high, color=f"C{i}", alpha=0.15, lw=0)
    for axes, (curve, label) in zip(panels, _CURVES.items(), strict=True):
        axes.set(xlabel="optimizer step", ylabel=label, ylim=(0, None if curve == "tokens" else 1.04))
        axes.locator_params(axis="x", integer=True)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _windows(
    completions: Sequence[Mapping[str, Any]], values: np.ndarray, window: int
) -> tuple[list[float], list[list[Interval]]]:
    """Middle of every `window` steps, and an interval for each column of `values` (completion, column) there."""
    steps, middles, found = np.array([line["step"] for line in completions]), [], []
    for begin in range(int(steps.min()), int(steps.max()) + 1, window):
        mine = np.flatnonzero((steps >= begin) & (steps < begin + window))
        groups: dict[tuple[int, str], list[int]] = {}
        for i in mine:
            groups.setdefault((completions[i]["step"], completions[i]["prompt"]), []).append(i)
        per_prompt = np.array([values[group].mean(axis=0) for group in groups.values()])
        middles.append(float(np.mean(np.unique(steps[mine]))))
        found.append([bootstrap_interval(column) for column in per_prompt.T])
    return middles, found


def plot_pass(arms: "Mapping[str, Samples]") -> Figure:
    """Chance that one of k sampled answers is right over k (left), and what share of answers thinks (right).

    Bands and whiskers are 95 % intervals over problems.
    """
    figure, (left, right) = _axes(2)
    for i, (name, samples) in enumerate(arms.items()):
        ks = range(1, samples.correct.shape[1] + 1)
        found = [bootstrap_interval(samples.pass_at(k)) for k in ks]
        left.plot(ks, [f.mean for f in found], "o-", ms=4, color=f"C{i}", label=name)
        left.fill_between(ks, [f.low for f in found], [f.high for f in found], color=f"C{i}", alpha=0.15, lw=0)
        share = bootstrap_interval(samples.thinks.mean(axis=1))
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
