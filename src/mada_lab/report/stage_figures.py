"""Figures, drawn from stored metrics alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.tri import Triangulation

from mada_lab.figures import save_figure, spaced
from mada_lab.report.coefficient_panels import Panel
from mada_optim.history.drawing import (
    DASHES,
    EndLabel,
    label_ends,
    label_in_full,
    look,
    style,
)
from mada_optim.history.notation import SYMBOLS, is_logarithmic

if TYPE_CHECKING:
    from mada_lab.sweep.contender_runs import ContenderRuns


def draw_comparison(contenders: Sequence[ContenderRuns], path: Path, title: str) -> None:
    """Draw ``path``.png and .svg: validation loss over steps at the best learning rate, final loss over learning rates.

    Lines are means over seeds, the band is their range, a dash is one run.
    """
    with style():
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1)})
        labels = []
        for number, contender in enumerate(contenders):
            colour, dashes = look(number)
            steps, means, lows, highs = contender.band()
            if steps:
                left.plot(steps, means, color=colour, ls=dashes)
                left.fill_between(steps, lows, highs, color=colour, alpha=0.15, lw=0)
                labels.append(EndLabel(means[-1], f"{contender.label}  {means[-1]:.3f}", colour, dashes))
            finals = {lr: loss for lr in contender.lrs() if (loss := contender.mean_final(lr)) is not None}
            right.plot(list(finals), list(finals.values()), "o", color=colour, ls=dashes, ms=4)
            for lr in finals:
                values = contender.finals(lr)
                right.plot([lr] * len(values), values, "_", color=colour, ms=9, alpha=0.6)
        _zoom_to_end(left, contenders)
        label_ends(left, labels)
        left.set(title="At each optimizer's best learning rate", xlabel="step", ylabel="validation loss")
        right.set(title="At every learning rate", xlabel="learning rate", ylabel="final validation loss", xscale="log")
        lrs = spaced(sorted({lr for contender in contenders for lr in contender.lrs()}))
        right.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        right.minorticks_off()
        figure.suptitle(title, x=0.01, ha="left", color="#555555", fontsize=10)
        save_figure(figure, path)


def draw_betas(entries: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw ``path``.png and .svg: final losses over where the betas start, an optimizer to each column.

    Dots are the starts, crosses those with a diverged run. All columns have the same colours.

    Args:
        entries: as :func:`report.betas_results` makes them.
    """
    with style():
        figure = Figure(figsize=(1.6 + 2.9 * len(entries), 5.6), layout="constrained")
        grid = figure.subplots(2, len(entries), sharex=True, sharey=True, squeeze=False)
        for row, (name, meaning) in zip(grid, (("train_loss", "training"), ("val_loss", "validation")), strict=True):
            levels = colour_levels(entries, name)
            if not levels:
                continue
            drawn = [_draw_contour(axes, entry, name, levels) for axes, entry in zip(row, entries, strict=True)]
            contour = next((contour for contour in drawn if contour is not None), None)
            if contour is not None:
                figure.colorbar(contour, ax=list(row), label=f"final {meaning} loss", format="%.3g")
            row[0].set_ylabel("β2")
        for axes, entry in zip(grid[0], entries, strict=True):
            axes.set_title(f"{entry['optimizer']}, lr {entry['lr']:g}")
        for axes in grid[1]:
            axes.set_xlabel("β1")
        figure.suptitle(title, x=0.01, ha="left", color="#555555", fontsize=10)
        save_figure(figure, path)


def draw_coefficients(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw ``path``.png and .svg: the paths of the coefficients over steps, a small plot for each, a line for each run.

    A cross is where a run diverged.
    """
    with style():
        rows = [-(-len(panel.moving) // 3) for panel in panels]
        legends = [-(-len(panel.groups) // 3) + bool(panel.title) for panel in panels]
        heights = [1.9 * count + 0.2 * legend + 0.4 for count, legend in zip(rows, legends, strict=True)]
        figure = Figure(figsize=(9, 0.4 + sum(heights)), layout="constrained")
        parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)
        for panel, part in zip(panels, parts[:, 0], strict=True):
            _draw_panel(part, panel)
        figure.suptitle(title, x=0.01, ha="left", color="#555555", fontsize=10)
        save_figure(figure, path)


def _draw_panel(figure: SubFigure, panel: Panel) -> None:
    looks, names = panel_looks(panel), panel.moving
    grid = figure.subplots(-(-len(names) // 3), min(3, len(names)), sharex=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        for line in (line for line in panel.lines if name in line.points):
            steps, values = zip(*line.points[name], strict=True)
            colour, dashes = looks[line.group]
            axes.plot(steps, values, color=colour, ls=dashes, lw=1.1)
            if line.diverged:
                axes.plot(steps[-1:], values[-1:], "x", color=colour, ms=5)
        axes.set_title(SYMBOLS.get(name, name))
        axes.set_ylim(panel.limits[name])
        if is_logarithmic(name):
            axes.set_yscale("log")
            label_in_full(axes.yaxis)
    for axes in grid.flat[max(0, len(names) - 3) : len(names)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    keys = [Line2D([], [], color=looks[group][0], ls=looks[group][1]) for group in panel.groups]
    options = {"title": panel.title or None, "alignment": "left", "ncols": 3, "frameon": False}
    figure.legend(keys, list(panel.groups.values()), loc="outside upper left", fontsize=8, **options)


def colour_levels(entries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Thirteen losses from the lowest to a high one, for all contours of the loss ``name``; none: all runs diverged."""
    losses = [start[name] for entry in entries for start in entry["starts"] if start.get(name) is not None]
    if not losses:
        return []
    low, high = min(losses), max(losses)
    # What blew up would leave no colours for the others. Where it starts is Tukey's outer fence.
    quarter, three_quarters = np.quantile(losses, (0.25, 0.75)).tolist()
    high = min(high, three_quarters + 3 * (three_quarters - quarter))
    return [low + (high - low or 1.0) * i / 12 for i in range(13)]


def _draw_contour(axes: Axes, entry: Mapping[str, Any], name: str, levels: Sequence[float]) -> Any:
    """The contour; None where the starts are too few or on one line."""
    starts = [(*start["betas"], start.get(name)) for start in entry["starts"]]
    usable = [start for start in starts if start[2] is not None]
    contour = None
    beta1, beta2, losses = np.array(usable, float).reshape(-1, 3).T
    if np.linalg.matrix_rank([beta1 - beta1[:1], beta2 - beta2[:1]]) == 2:
        triangles = Triangulation(beta1, beta2)
        contour = axes.tricontourf(triangles, losses, levels=levels, extend="max", cmap="viridis_r")
    for marker, chosen in ((".", usable), ("x", [start for start in starts if start[2] is None])):
        # An empty line that is not clipped has no bounds, on which the layout would fail.
        if chosen:
            xs, ys, _ = zip(*chosen, strict=True)
            axes.plot(xs, ys, marker, color="#333333", ms=4, alpha=0.6, clip_on=False)
    return contour


def _zoom_to_end(axes: Axes, contenders: Sequence[ContenderRuns]) -> None:
    """Leave out the first steep fall, beside which differences between optimizers would not be seen."""
    late = [
        value
        for curves in (contender.curves() for contender in contenders)
        for step, values in curves.items()
        if step >= 0.15 * max(curves)
        for value in values
    ]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)


def panel_looks(panel: Panel) -> dict[int, tuple[str, str]]:
    """Colour and dashes of the lines of each group: a scale of colours where groups are in order."""
    if not panel.ordered:
        return {group: look(group) for group in panel.groups}
    scale, last = matplotlib.colormaps["viridis"], max(panel.groups)
    # The end of the scale is too light for a line.
    return {group: (to_hex(scale(0.9 * group / last)), DASHES[0]) for group in panel.groups}
