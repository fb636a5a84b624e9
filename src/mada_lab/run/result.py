"""How a run ended, from its metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from mada_lab.run.folder import Metrics


@dataclass(frozen=True)
class Result:
    """How a run ended: ``status`` is "finished", "diverged" or "interrupted". Losses of a diverged run are None.

    ``train_loss`` is the mean over the last twentieth of the steps; times, in seconds, are typical ones of a step.
    ``val`` holds what else the task measures in its last validation, by name.
    """

    status: str
    step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    step_seconds: float | None
    optimizer_seconds: float | None
    coefficients: dict[str, float]
    skipped_hypergradients: int
    val: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0


def summarize(metrics: Metrics, status: str, coefficients: dict[str, float], skipped: int) -> Result:
    """Return the result of a run from its metrics."""
    steps = [line for line in metrics if "loss" in line]
    losses = [line["loss"] for line in steps if line["loss"] is not None]
    validations = [line for line in metrics if line.get("val_loss") is not None]
    validation = [line["val_loss"] for line in validations]
    usable = status != "diverged"
    tail = losses[-max(1, len(losses) // 20) :]
    return Result(
        status=status,
        step=steps[-1]["step"] if steps else 0,
        train_loss=statistics.fmean(tail) if usable and tail else None,
        val_loss=validation[-1] if usable and validation else None,
        best_val_loss=min(validation) if usable and validation else None,
        step_seconds=_typical([line["step_seconds"] for line in steps]),
        optimizer_seconds=_typical([line["optimizer_seconds"] for line in steps]),
        coefficients=coefficients,
        skipped_hypergradients=skipped,
        val={
            name.removeprefix("val_"): value
            for name, value in (validations[-1] if usable and validations else {}).items()
            if name.startswith("val_") and name != "val_loss" and value is not None
        },
        skipped_steps=sum(line.get("skipped", False) for line in steps),
    )


def _typical(seconds: Sequence[float]) -> float | None:
    """Median over twentieths of a run, each of ten steps or more, of the mean time of a step in them.

    The median over steps would pass over what happens in each tenth of them alone, the mean be that of a few long ones.

    >>> _typical([1.0] * 200 + [99.0]), _typical(([1.0] * 9 + [11.0]) * 4), _typical([2.0]), _typical([])
    (1.0, 2.0, 2.0, None)
    """
    size = max(10, len(seconds) // 20)
    parts = [seconds[begin : begin + size] for begin in range(0, len(seconds), size)]
    return statistics.median(map(statistics.fmean, parts)) if parts else None
