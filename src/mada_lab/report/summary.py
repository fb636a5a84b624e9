"""What an experiment found, in one sentence; and its losses as small curves of characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from mada_lab.report.tables import Entries, Summary, Table, rounded

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # characters of a curve, at most


def verdict(entries: Entries, reference: str) -> str:
    """Return which optimizer won, at which learning rate, and by how much.

    The winner is compared with the reference, or with the second best where the reference itself won.

    Args:
        entries: of each optimizer, see :func:`report.results`.
        reference: label of the optimizer that others are compared with.

    >>> adamw = {"optimizer": "adamw", "best_lr": 1e-3, "best_lr_edge": None, "val_loss": 2.5}
    >>> omada = {"optimizer": "omada", "best_lr": 3e-3, "best_lr_edge": "highest", "val_loss": 2.4}
    >>> verdict([adamw, {**omada, "difference": -0.1, "difference_ci95": 0.02}], "adamw")  # doctest: +ELLIPSIS
    'omada won at learning rate 0.003 (the highest of its grid). ... is 0.1000 ± 0.0200 below that of adamw, ...'
    """
    ranked = sorted(
        (entry for entry in entries if entry.get("val_loss") is not None), key=lambda each: each["val_loss"]
    )
    if not ranked:
        return "No optimizer finished all its runs at any learning rate."
    best, *others = ranked
    rate = f"learning rate {best['best_lr']:g}{_at_edge(best)}"
    if not others:
        return f"{best['optimizer']} ended at a validation loss of {rounded(best['val_loss'])}, at {rate}."
    compared = next((entry for entry in others if entry["optimizer"] == reference), others[0])
    lower = compared["val_loss"] - best["val_loss"]
    half = (
        best.get("difference_ci95") if compared["optimizer"] == reference else compared.get("difference_to_best_ci95")
    )
    interval, doubt = ("", " No interval: it needs several seeds.") if half is None else (f" ± {rounded(half)}", "")
    if half is not None and half >= lower:
        doubt = " The interval includes 0, so chance may have decided."
    return (
        f"{best['optimizer']} won at {rate}. Its final validation loss of {rounded(best['val_loss'])} is "
        f"{rounded(lower)}{interval} below that of {compared['optimizer']}, whose best learning rate is "
        f"{compared['best_lr']:g}{_at_edge(compared)}.{doubt}"
    )


def _at_edge(entry: dict[str, Any]) -> str:
    return f" (the {entry['best_lr_edge']} of its grid)" if entry["best_lr_edge"] else ""


def curves_table(summaries: Sequence[Summary]) -> Table:
    """Return final losses over the learning rates and losses over the steps, as characters on common scales."""
    means = {summary.label: {lr: summary.mean_final(lr) for lr in summary.lrs()} for summary in summaries}
    lrs = sorted({lr for each in means.values() for lr in each})
    finals = [loss for each in means.values() for loss in each.values() if loss is not None]
    bands = {summary.label: _thinned(summary.band()[1]) for summary in summaries}
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


def edge_warnings(entries: Entries, option: str) -> list[str]:
    """Return a line for each optimizer that is best at the edge of its grid: which, and what to try next.

    >>> edge_warnings([{"optimizer": "mada", "best_lr": 0.01, "best_lr_edge": "highest"}], "--lrs")
    ['the best learning rate of mada, 0.01, is the highest of its grid; a better one may lie beyond: add --lrs 0.03']
    """
    return [
        f"the best learning rate of {entry['optimizer']}, {entry['best_lr']:g}, is the {entry['best_lr_edge']} of its "
        f"grid; a better one may lie beyond: add {option} "
        f"{entry['best_lr'] * (3 if entry['best_lr_edge'] == 'highest' else 1 / 3):.1g}"
        for entry in entries
        if entry.get("best_lr_edge")
    ]
