"""How lines are drawn: one look for the figures of the laboratory and for :meth:`mada_optim.History.plot`.

This module imports matplotlib, so it is imported only where something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mada_optim.history.notation import SCALE, is_logarithmic, is_rate, label_of, short

Points = Sequence[tuple[int, float]]
# The least height of an axis, and its least factor from the bottom to the top: a jitter must not look like a change.
_LEAST_SPAN, _LEAST_FACTOR = 0.1, 5.0
# The largest factor from the bottom to the top of an axis of learning rates in use.
_MOST_FACTOR = 1000.0
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


@contextmanager
def style() -> Iterator[None]:
    """How all figures look."""
    with matplotlib.rc_context(_STYLE):
        yield


def label_in_full(axis: Axis, multiples: Sequence[float] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each power of ten, written as numbers."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of a line by its number. The first 28 look different."""
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def split(paths: Mapping[str, Points]) -> list[tuple[float, dict[str, Points]]]:
    """Return which paths share an axis, and the height of their plot: coefficients, then what moves by factors.

    Coefficients that all stand still are left out beside a learning rate.
    """
    coefficients = {name: points for name, points in paths.items() if not is_logarithmic(name)}
    logarithmic = {name: points for name, points in paths.items() if is_logarithmic(name)}
    if logarithmic and not any(moves(points) for points in coefficients.values()):
        coefficients = {}
    return [(height, part) for height, part in ((2.6, coefficients), (1.6, logarithmic)) if part]


def moves(points: Points) -> bool:
    """Whether a value changes at all."""
    return len({value for _, value in points}) > 1


def draw_paths(axes: Axes, paths: Mapping[str, Points]) -> None:
    """Draw values over steps, all of them coefficients, or all of them on a logarithmic axis; see :func:`split`."""
    logarithmic = all(map(is_logarithmic, paths))
    if logarithmic:  # a schedule may end at 0
        positive = {name: [point for point in points if point[1] > 0] for name, points in paths.items()}
        paths = {name: points for name, points in positive.items() if points}
    labels = []
    for index, (name, points) in enumerate(paths.items()):
        colour, _ = look(index)
        steps, values = zip(*points, strict=True)
        # Several stay at 1 together: each is thinner than the one below it, so that all are seen.
        axes.plot(steps, values, color=colour, lw=max(1.0, 2.6 - 0.3 * index))
        # A schedule ends where it ends; how high it was is what is learned.
        text = f"max {max(values):.2g}" if is_rate(name) else short(values[-1])
        labels.append(EndLabel(values[-1], f"{label_of(name)}  {text}", colour))
    shown = [value for points in paths.values() for _, value in points]
    if not logarithmic:
        margin = 0.03 * (max(1.0, *shown) - min(0.0, *shown))
        axes.set(ylabel="coefficient", ylim=(min(0.0, *shown) - margin, max(1.0, *shown) + margin))
    elif shown:
        in_use, are_scales = (all(map(kind, paths)) for kind in (is_rate, lambda name: name.startswith(SCALE)))
        label = "learning rate in use" if in_use else "learning rate" if are_scales else "coefficient"
        if in_use:  # where a schedule ends near 0, the rest would not be seen
            shown = [max(value, max(shown) / _MOST_FACTOR) for value in shown]
        low, high = axis_limits(shown, next(iter(paths)))
        axes.set(ylabel=label, yscale="log", ylim=(low, high))
        label_in_full(axes.yaxis, (1, 2, 5) if high / low < 20 else (1, 3) if high / low < 200 else (1,))
    label_ends(axes, labels)


def draw_parts(rows: Sequence[Axes], parts: Sequence[tuple[float, Mapping[str, Points]]], title: str) -> None:
    """Draw what an optimizer became: each part of :func:`split` on the axes of its row."""
    for axes, (_, paths) in zip(rows, parts, strict=True):
        draw_paths(axes, paths)
    for axes in rows[:1]:
        axes.set_title(title)


def draw_history(paths: Mapping[str, Points], title: str, file: str | Path | None) -> list[Axes]:
    """Draw what an optimizer became as a figure by itself: in a file, or, with None, as a figure of pyplot."""
    parts = split(paths)
    heights = [height for height, _ in parts] if len(parts) > 1 else [2.6]
    with style():
        options: Any = {"figsize": (8, 0.8 + sum(heights)), "layout": "constrained"}
        if file is None:
            from matplotlib import pyplot

            figure = pyplot.figure(**options)
        else:
            figure = Figure(**options)
        ratios = {"height_ratios": heights}
        rows = list(figure.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0])
        draw_parts(rows, parts, title)
        rows[-1].set_xlabel("step")
        if file is not None:
            figure.savefig(file, dpi=150)
    return rows


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


def axis_limits(values: Sequence[float], name: str) -> tuple[float, float]:
    """The range of the axis of a coefficient: all values, and no less than it takes to tell a change from a jitter."""
    if is_logarithmic(name):
        low, high = _widened([math.log10(value) for value in values], math.log10(_LEAST_FACTOR))
        return 10**low, 10**high
    return _widened(values, _LEAST_SPAN)


def _widened(values: Sequence[float], least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    half = max(1.1 * (high - low), least) / 2
    return (low + high) / 2 - half, (low + high) / 2 + half
