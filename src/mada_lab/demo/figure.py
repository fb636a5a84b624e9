"""The figure of the demo, drawn from stored metrics alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mada_lab.demo.tuned import Tuned
from mada_lab.figures import save_figure, smoothed
from mada_lab.run.coefficients import scales_of
from mada_lab.run.curves import coefficient_points, loss_points
from mada_lab.run.folder import Metrics
from mada_optim.history.drawing import (
    DASHES,
    PALETTE,
    EndLabel,
    Points,
    axis_limits,
    draw_paths,
    label_ends,
    label_in_full,
    moves,
    style,
)
from mada_optim.history.notation import is_logarithmic


def draw_demo(runs: Mapping[str, Metrics], guess: float, tuned: Tuned | None, path: Path, title: str) -> None:
    """Draw ``path``.png and .svg: the losses of two runs, the rates that they used, and the coefficients that moved.

    Args:
        runs: metrics of each, by what people call the optimizer.
        guess: the learning rate of those that do not find their own.
        tuned: what the first reaches at its best learning rate; None: that is not known.
        path: of the files, without suffix.
        title: of the losses.
    """
    paths = {name: coefficient_points(metrics) for name, metrics in runs.items()}
    moved = {
        f"{name}/{key}": points
        for name, values in paths.items()
        for key, points in values.items()
        if not is_logarithmic(key) and moves(points)
    }
    with style():
        heights = [3.4, 2.0, *([2.2] if moved else [])]
        figure = Figure(figsize=(8, 0.8 + sum(heights)), layout="constrained")
        top, middle, *below = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
        losses, rates = [], []
        for index, (name, metrics) in enumerate(runs.items()):
            colour = PALETTE[1 - index]
            losses += _draw_run_of_demo(top, name, metrics, colour)
            rates += _draw_rates_of_demo(middle, name, paths[name], guess, colour, _last_step(metrics))
        if tuned is not None:
            for axes, value, labels in ((top, tuned.loss, losses), (middle, tuned.lr, rates)):
                axes.axhline(value, color="#777777", ls="dotted", lw=1.4)
                labels.append(EndLabel(value, f"AdamW, tuned  {value:.4g}", "#777777", "dotted"))
        low, high = min(label.value for label in losses), _late_maximum(runs.values())
        margin = 0.06 * (high - low) or 0.05
        top.set(title=title, ylabel="loss (nats)", ylim=(low - margin, high + margin))
        label_ends(top, losses)
        kinds: Any = ({"marker": "o", "ms": 4}, "validation"), ({"alpha": 0.5, "lw": 1.2}, "training, smoothed")
        top.legend(
            [Line2D([], [], color="#555555", **look) for look, _ in kinds], [name for _, name in kinds], frameon=False
        )
        shown = [value for line in middle.lines for value in line.get_ydata()]
        middle.set(title="The learning rate at the peak of its schedule", ylabel="learning rate", yscale="log")
        middle.set_ylim(axis_limits(shown, "lr"))
        label_in_full(middle.yaxis, (1, 3))
        label_ends(middle, rates)
        for axes in below:
            draw_paths(axes, moved)
            axes.set_title("The coefficients that moved")
        figure.axes[-1].set_xlabel("step")
        save_figure(figure, path)


def _draw_run_of_demo(axes: Axes, name: str, metrics: Metrics, colour: str) -> list[EndLabel]:
    """Draw validation losses, and training losses faintly. Returns the label of the end, if there is one."""
    training = loss_points(metrics, "loss")
    validation = loss_points(metrics, "val_loss")
    if training:
        steps, values = zip(*training, strict=True)
        axes.plot(steps, smoothed(values, len(values) // 80), color=colour, alpha=0.35, lw=1.2)
    if not validation:
        return []
    steps, values = zip(*validation, strict=True)
    axes.plot(steps, values, color=colour, marker="o", ms=4)
    return [EndLabel(values[-1], f"{name}  {values[-1]:.3f}", colour)]


def _draw_rates_of_demo(
    axes: Axes, name: str, paths: Mapping[str, Points], guess: float, colour: str, last: int
) -> list[EndLabel]:
    """Draw the rates that were found, or the guess where none is looked for."""
    rates = scales_of(paths)
    if not rates:
        axes.plot([0, last], [guess, guess], color=colour)
        return [EndLabel(guess, f"{name}, the guess  {guess:g}", colour)]
    labels = []
    for (kind, points), dashes in zip(rates.items(), itertools.cycle(DASHES)):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, ls=dashes)
        labels.append(EndLabel(values[-1], f"{name}, {kind}  {values[-1]:.2g}", colour, dashes))
    return labels


def _last_step(metrics: Metrics) -> int:
    return max((line["step"] for line in metrics), default=0)


def _late_maximum(runs: Iterable[Metrics]) -> float:
    """The highest validation loss after the first steep fall."""
    values = [
        loss
        for metrics in runs
        for step, loss in loss_points(metrics, "val_loss")
        if step >= 0.05 * _last_step(metrics)
    ]
    return max(values, default=1.0)
