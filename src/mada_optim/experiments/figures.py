"""Figures, drawn from stored metrics alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.tri import Triangulation

from mada_optim.experiments.display import SYMBOLS, short
from mada_optim.experiments.paths import LOGARITHMIC, Panel, Points, axis_limits, coefficient_points
from mada_optim.experiments.result import SCALE
from mada_optim.experiments.run_folder import Metrics, RunFolder

if TYPE_CHECKING:
    from mada_optim.experiments.report import Summary

# Okabe and Ito's palette, without its yellow, which is too light for a line. Distinct to colour-blind eyes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted", "dashdot")
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "mada",
}


def draw_run(folder: RunFolder) -> None:
    """figure.png and figure.svg of a run: losses above, the path of the coefficients below."""
    config, metrics = folder.config(), folder.metrics()
    paths = coefficient_points(metrics)
    rate = "found" if any(name.startswith(SCALE) for name in paths) else f"{config.optimizer.lr:g}"
    title = f"{config.optimizer.name}, learning rate {rate}, seed {config.seed}"
    with style():
        linear = {name: points for name, points in paths.items() if name not in LOGARITHMIC}
        logarithmic = {name: points for name, points in paths.items() if name in LOGARITHMIC}
        if logarithmic and not any(value != points[0][1] for points in linear.values() for _, value in points):
            linear = {}  # nothing but the scale is learned
        parts = {2.6: linear, 1.6: logarithmic}
        parts = {height: part for height, part in parts.items() if part}
        figure = Figure(figsize=(8, 3.8 + sum(parts)), layout="constrained")
        ratios = {"height_ratios": (3.0, *parts)}
        rows = figure.subplots(1 + len(parts), 1, sharex=True, squeeze=False, gridspec_kw=ratios)
        top, *below = rows[:, 0]
        _draw_losses(top, metrics, title)
        for axes, part in zip(below, parts.values(), strict=True):
            _draw_coefficients(axes, part)
        rows[-1, 0].set_xlabel("step")
        if below:
            below[0].set_title("What the optimizer became")
        save_figure(figure, folder.path / "figure")


def draw_comparison(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """``path``.png and .svg: validation loss over steps at each best learning rate, final loss over learning rates.

    Lines are means over seeds, the band is their range, a dash is one run.
    """
    with style():
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1)})
        labels = []
        for number, summary in enumerate(summaries):
            colour, dashes = look(number)
            steps, means, lows, highs = summary.band()
            if steps:
                left.plot(steps, means, color=colour, ls=dashes)
                left.fill_between(steps, lows, highs, color=colour, alpha=0.15, lw=0)
                labels.append(EndLabel(means[-1], f"{summary.label}  {means[-1]:.3f}", colour, dashes))
            finals = {lr: loss for lr in summary.lrs() if (loss := summary.mean_final(lr)) is not None}
            right.plot(list(finals), list(finals.values()), "o", color=colour, ls=dashes, ms=4)
            for lr in finals:
                values = summary.finals(lr)
                right.plot([lr] * len(values), values, "_", color=colour, ms=9, alpha=0.6)
        _zoom_to_end(left, summaries)
        label_ends(left, labels)
        left.set(title="At each optimizer's best learning rate", xlabel="step", ylabel="validation loss")
        right.set(title="At every learning rate", xlabel="learning rate", ylabel="final validation loss", xscale="log")
        lrs = spaced(sorted({lr for summary in summaries for lr in summary.lrs()}))
        right.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        right.minorticks_off()
        figure.suptitle(title, x=0.01, ha="left", color="#555555", fontsize=10)
        save_figure(figure, path)


def spaced(values: Sequence[float], most: int = 7) -> list[float]:
    """Those that can be labels of a logarithmic axis beside each other.

    >>> spaced([0.001, 0.003, 0.01, 0.03, 3.0]), spaced([0.001, 0.003, 0.01])
    ([0.001, 0.01, 3.0], [0.001, 0.003, 0.01])
    """
    kept = list(values[:1])
    for value in values[1:]:
        if math.log(value / kept[-1]) >= math.log(values[-1] / values[0]) / most:
            kept.append(value)
    return kept


def draw_betas(entries: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """``path``.png and .svg: final losses over where the betas start, an optimizer to each column.

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
    """``path``.png and .svg: the paths of the coefficients over steps, a small plot for each, a line for each run.

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
        if name in LOGARITHMIC:
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


def _draw_losses(axes: Axes, metrics: Metrics, title: str) -> None:
    training = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    validation = [(line["step"], line["val_loss"]) for line in metrics if line.get("val_loss") is not None]
    labels = []
    if training:
        steps, losses = zip(*training, strict=True)
        smooth = smoothed(losses, len(losses) // 80)
        axes.plot(steps, losses, color=PALETTE[0], alpha=0.22, lw=0.7)
        axes.plot(steps, smooth, color=PALETTE[0])
        # The height of the first step is that of guessing, and would press all that is of interest to the ground.
        low, high = min(losses), max(smooth[len(smooth) // 40 :])
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        labels.append(EndLabel(smooth[-1], f"training {smooth[-1]:.3f}", PALETTE[0]))
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color=PALETTE[1], marker="o", ms=3)
        labels.append(EndLabel(losses[-1], f"validation {losses[-1]:.3f}", PALETTE[1]))
    axes.set(title=title, ylabel="loss (nats)")
    label_ends(axes, labels)


def _draw_coefficients(axes: Axes, paths: Mapping[str, Points]) -> None:
    labels = []
    for index, (name, points) in enumerate(paths.items()):
        colour, _ = look(index)
        steps, values = zip(*points, strict=True)
        # Several stay at 1 together: each is thinner than the one below it, so that all are seen.
        axes.plot(steps, values, color=colour, lw=max(1.0, 2.6 - 0.3 * index))
        labels.append(EndLabel(values[-1], f"{SYMBOLS.get(name, name)}  {short(values[-1])}", colour))
    if paths.keys() <= LOGARITHMIC:
        shown = [value for points in paths.values() for _, value in points]
        label = "learning rate" if all(name.startswith(SCALE) for name in paths) else "coefficient"
        axes.set(ylabel=label, yscale="log", ylim=axis_limits(shown, next(iter(paths))))
        label_in_full(axes.yaxis)
    else:
        axes.set(ylabel="coefficient", ylim=(-0.03, 1.03))
    label_ends(axes, labels)


def smoothed(values: Sequence[float], half: int) -> list[float]:
    """Mean over ``half`` values to each side: unlike an exponential average, it does not lag behind a falling loss.

    >>> smoothed([4.0, 2.0, 0.0, 1.0], 1)
    [3.0, 2.0, 1.0, 0.5]
    """
    sums = [0.0, *itertools.accumulate(values)]
    windows = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _zoom_to_end(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Leave out the first steep fall, beside which differences between optimizers would not be seen."""
    late = [
        value
        for curves in (summary.curves() for summary in summaries)
        for step, values in curves.items()
        if step >= 0.15 * max(curves)
        for value in values
    ]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)


class EndLabel(NamedTuple):
    """Name of a line, and where and how the line ends."""

    value: float
    text: str
    colour: str
    dashes: str = DASHES[0]


def label_ends(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Name each line at its right end, in its colour, with as much distance as text needs.

    Where not all are solid, a piece of the line is beside its name.
    """
    # In shares of the height, which are even on any scale.
    to_share = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    ordered = sorted(labels)
    dashed = any(label.dashes != DASHES[0] for label in ordered)
    shares = [float(to_share.transform((right, label.value))[1]) for label in ordered]
    gap = 12 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    heights = _spread([min(max(share, 0.0), 1.0) for share in shares], gap, 0.0, 1.0)
    for label, height in zip(ordered, heights, strict=True):
        place: Any = {"xy": (1, height), "xycoords": "axes fraction", "textcoords": "offset points"}
        place |= {"va": "center", "annotation_clip": False}
        axes.annotate(label.text, xytext=(34 if dashed else 6, 0), color=label.colour, **place)
        if dashed:
            line = {"arrowstyle": "-", "color": label.colour, "ls": label.dashes, "lw": 1.8, "shrinkA": 0, "shrinkB": 6}
            axes.annotate("", xytext=(30, 0), arrowprops=line, **place)


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted ``heights``, moved apart to at least ``gap``, and kept below ``high`` where there is room.

    >>> _spread([0.0, 0.9, 1.0], 0.2, 0.0, 1.0)
    [0.0, 0.8, 1.0]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = max(high, low + gap * (len(placed) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of a line by its number. The first 28 look different."""
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def panel_looks(panel: Panel) -> dict[int, tuple[str, str]]:
    """Colour and dashes of the lines of each group: a scale of colours where groups are in order."""
    if not panel.ordered:
        return {group: look(group) for group in panel.groups}
    scale, last = matplotlib.colormaps["viridis"], max(panel.groups)
    # The end of the scale is too light for a line.
    return {group: (to_hex(scale(0.9 * group / last)), DASHES[0]) for group in panel.groups}


@contextmanager
def style() -> Iterator[None]:
    """How all figures look."""
    with matplotlib.rc_context(_STYLE):
        yield


def label_in_full(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each power of ten, written as numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with the suffixes .png and .svg."""
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    # Without the date, the same metrics give the same file.
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
