"""What all figures share: how they are written to files, and how curves and axes are thinned for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with the suffixes .png and .svg."""
    FigureCanvasAgg(figure)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    # Without the date, the same metrics give the same file.
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def smoothed(values: Sequence[float], half: int) -> list[float]:
    """Mean over ``half`` values to each side: unlike an exponential average, it does not lag behind a falling loss.

    >>> smoothed([4.0, 2.0, 0.0, 1.0], 1)
    [3.0, 2.0, 1.0, 0.5]
    """
    sums = [0.0, *itertools.accumulate(values)]
    windows = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def spaced(values: Sequence[float], most: int = 7) -> list[float]:
    """Return those of the values that can be labels of a logarithmic axis beside each other.

    >>> spaced([0.001, 0.003, 0.01, 0.03, 3.0]), spaced([0.001, 0.003, 0.01])
    ([0.001, 0.01, 3.0], [0.001, 0.003, 0.01])
    """
    kept = list(values[:1])
    for value in values[1:]:
        if math.log(value / kept[-1]) >= math.log(values[-1] / values[0]) / most:
            kept.append(value)
    return kept
