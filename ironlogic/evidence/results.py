"""What was measured on the trainings of one arm, item by item, and the difference of two arms."""

from collections.abc import Mapping

from ironlogic.evidence.items import WORST
from ironlogic.evidence.statistics import Interval, mean_interval

import numpy as np

__all__ = ["Arms", "Columns", "Measurement", "of_seed", "paired_seeds"]

Columns = dict[str, np.ndarray]  # one model: measure, with @ratio where it has one -> (item,)
Arms = Mapping[str, Mapping[int, Columns]]  # arm -> training seed -> columns; an untrained model has the one seed 0

_HEADLINES = {
    "correct@0": "accuracy, clean",
    f"correct@{WORST}": f"accuracy at {WORST}",
    "loss@0": "loss of the answer, clean (nats a token)",
    f"loss@{WORST}": f"loss of the answer at {WORST} (nats a token)",
}


class Measurement(dict[int, Columns]):
    """The columns of one arm by training seed (0: a model that was not trained). Prints means with intervals.

    `ft - sft` is a measurement too: the differences, paired by training seed and item.
    """

    is_difference = False

    def __sub__(self, control: "Measurement") -> "Measurement":
        difference = Measurement()
        difference.is_difference = True
        for seed in paired_seeds(self, control):
            ours, theirs = of_seed(self, seed), of_seed(control, seed)
            difference[seed] = {name: ours[name] - theirs[name] for name in ours if name in theirs}
        if not difference:
            raise ValueError(f"no training seed is in both arms: {sorted(self)} and {sorted(control)}")
        return difference

    def table(self, column: str, among: np.ndarray | None = None) -> np.ndarray:
        """A column of every training, (training, item); of the items `among` (booleans), else of those known."""
        table = np.stack([columns[column] for columns in self.values()])
        return table[:, np.isfinite(table).all(axis=0) if among is None else among]

    def interval(
        self, column: str, among: np.ndarray | None = None, *, kinds: np.ndarray | None = None
    ) -> Interval:
        """Mean and 95 % interval over trainings and items, or their `kinds` (one training: over items alone)."""
        return mean_interval(self.table(column, among), kinds)

    def __str__(self) -> str:
        lines = []
        for column, label in _HEADLINES.items():
            if all(column in columns for columns in self.values()) and self.table(column).size:
                interval = self.interval(column)
                lines.append(f"{label}: {f'{interval:+}' if self.is_difference else interval}")
        items = len(next(iter(next(iter(self.values())).values())))
        alone = "; the interval is over items alone" if len(self) == 1 else ""
        return "\n".join([*lines, f"({len(self)} training{'s' * (len(self) > 1)} x {items} items{alone})"])


def paired_seeds(ours: Mapping[int, Columns], control: Mapping[int, Columns]) -> list[int]:
    """Training seeds of both; an untrained model (seed 0) stands beside every training."""
    if set(control) == {0}:
        return sorted(ours)
    if set(ours) == {0}:
        return sorted(control)
    return sorted(set(ours) & set(control))


def of_seed(arm: Mapping[int, Columns], seed: int) -> Columns:
    return arm[seed] if seed in arm else arm[0]
