"""What an experiment found, in sentences."""

from __future__ import annotations

from typing import Any

from mada_lab.report.results import Entries
from mada_lab.text import rounded


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
