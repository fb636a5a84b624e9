"""The runs of one contender in a stage, and which of its learning rates is the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mada_lab.run.curves import loss_points
from mada_lab.run.folder import RunFolder
from mada_lab.run.stored import StoredRun, load_run


@dataclass(frozen=True)
class ContenderRuns:
    """The runs of one contender.

    ``grid`` are the learning rates among which that of the runs was chosen in an earlier stage, if there was one.
    """

    label: str
    runs: Sequence[StoredRun]
    grid: Sequence[float] = ()

    def lrs(self) -> list[float]:
        """Return the learning rates of the runs."""
        return sorted({run.lr for run in self.runs})

    def at(self, lr: float | None) -> list[StoredRun]:
        """Runs at one learning rate, by start of the betas, where these vary, and seed."""
        return sorted((run for run in self.runs if run.lr == lr), key=lambda run: (run.betas or (), run.seed))

    def finals(self, lr: float | None) -> list[float]:
        """Final validation losses; those of diverged runs are missing."""
        return [run.result.val_loss for run in self.at(lr) if run.result.val_loss is not None]

    def diverged(self, lr: float | None) -> int:
        """Return how many runs at one learning rate diverged."""
        return len(self.at(lr)) - len(self.finals(lr))

    def mean_final(self, lr: float) -> float | None:
        """Mean final validation loss; None where any seed diverged: a mean over the lucky ones would flatter."""
        return None if self.diverged(lr) or not self.at(lr) else statistics.fmean(self.finals(lr))

    def best_lr(self) -> float | None:
        """Learning rate with the lowest mean final validation loss; None where each has a diverged run."""
        means = {lr: mean for lr in self.lrs() if (mean := self.mean_final(lr)) is not None}
        return min(means, key=means.__getitem__) if means else None

    def edge(self, lr: float | None) -> str | None:
        """Which edge of its grid a learning rate is, "lowest" or "highest"; None for one that lies inside."""
        grid = {*self.grid, *self.lrs()}
        if lr is None or len(grid) < 2:
            return None
        return {min(grid): "lowest", max(grid): "highest"}.get(lr)

    def betas(self) -> list[tuple[float, float]]:
        """Return where the betas of the runs start."""
        return sorted({run.betas for run in self.runs if run.betas is not None})

    def robust_lr(self) -> float:
        """Learning rate with the lowest median final validation loss, a diverged run counting as the worst."""
        return min(self.lrs(), key=lambda lr: statistics.median(final_losses(self.at(lr), "val_loss")))

    def shown_lr(self) -> float:
        """Where single runs are shown: the best learning rate, or that of the table of betas where these vary."""
        best = self.best_lr()
        return self.robust_lr() if best is None or len(self.betas()) > 1 else best

    def curves(self) -> dict[int, list[float]]:
        """Validation losses of all seeds by step, at the best learning rate."""
        curves: dict[int, list[float]] = {}
        for run in self.at(self.best_lr()):
            for step, loss in loss_points(run.metrics, "val_loss"):
                curves.setdefault(step, []).append(loss)
        return curves

    def band(self) -> tuple[list[int], list[float], list[float], list[float]]:
        """Steps, and mean, lowest and highest validation loss of all seeds at each, at the best learning rate."""
        curves = sorted(self.curves().items())
        means, lows, highs = ([pick(losses) for _, losses in curves] for pick in (statistics.fmean, min, max))
        return [step for step, _ in curves], means, lows, highs

    def steps_to(self, target: float) -> int | None:
        """First validated step at which the mean over seeds is at ``target`` or below."""
        reached = (step for step, values in sorted(self.curves().items()) if statistics.fmean(values) <= target)
        return next(reached, None)


def load_contender(label: str, folders: Iterable[RunFolder]) -> ContenderRuns:
    """Read the runs of these folders that are over."""
    return ContenderRuns(label, [run for folder in folders if (run := load_run(folder)) is not None])


def final_losses(runs: Sequence[StoredRun], name: str) -> list[float]:
    """Return final losses, infinite where a run diverged. ``name`` is that of a field of :class:`Result`."""
    return [or_infinite(getattr(run.result, name)) for run in runs]


def or_infinite(loss: float | None) -> float:
    """Return a final loss; that of a diverged run is infinite."""
    return math.inf if loss is None else loss
