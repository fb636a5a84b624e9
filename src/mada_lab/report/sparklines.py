"""Losses as small curves of characters, for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mada_lab.report.tables import Table
from mada_lab.sweep.contender_runs import ContenderRuns

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # characters of a curve, at most


def curves_table(contenders: Sequence[ContenderRuns]) -> Table:
    """Return final losses over the learning rates and losses over the steps, as characters on common scales."""
    means = {contender.label: {lr: contender.mean_final(lr) for lr in contender.lrs()} for contender in contenders}
    lrs = sorted({lr for each in means.values() for lr in each})
    finals = [loss for each in means.values() for loss in each.values() if loss is not None]
    bands = {contender.label: _thinned(contender.band()[1]) for contender in contenders}
    # The loss at the start, which all share, would flatten the rest.
    losses = [loss for band in bands.values() for loss in band[1:]]
    header = ["optimizer", f"final val loss over lr {lrs[0]:g} to {lrs[-1]:g}", "val loss over steps, at its best lr"]
    return [
        header,
        *(
            [label, sparkline([means[label].get(lr) for lr in lrs], finals), sparkline(bands[label], losses)]
            for label in means
        ),
    ]


def sparkline(values: Sequence[float | None], scale: Sequence[float]) -> str:
    """Return a bar for each value, as high as it lies between the least and the greatest of ``scale``.

    A gap stands for what is missing or diverged.

    >>> sparkline([1.0, None, 2.0, 9.0], [1.0, 3.0])
    '▁ ▅█'
    """
    finite = [value for value in scale if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)

    def bar(value: float | None) -> str:
        if value is None or math.isnan(value):
            return " "
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
        return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]

    return "".join(map(bar, values))


def _thinned(values: Sequence[float]) -> list[float]:
    size = math.ceil(len(values) / _WIDTH) or 1
    return [statistics.fmean(values[begin : begin + size]) for begin in range(0, len(values), size)]
