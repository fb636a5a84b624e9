"""The tables of a comparison: rows of text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mada_lab.report.results import FINAL_LOSSES, REFERENCE, Entries
from mada_lab.text import loss_or_diverged, rounded

EDGE_MARK = "†"  # of a best learning rate at the edge of its grid
Table = list[list[str]]  # the first row is the header


def loss_table(entries: Entries) -> Table:
    """Losses of each optimizer at its best learning rate."""
    names = ("val_loss", "best_val_loss", "train_loss")
    table = [["optimizer", "best lr", "final val loss", "best val loss", "final train loss"]]
    for entry in entries:
        if entry["best_lr"] is None:
            table.append([entry["optimizer"], "-", "diverged", "-", "-"])
        else:
            losses = [plus_minus(entry, name) for name in names]
            table.append([entry["optimizer"], marked(f"{entry['best_lr']:g}", entry["best_lr_edge"]), *losses])
    return table


def measures_table(entries: Entries) -> Table:
    """Return what else the last validation measured, at each best learning rate: perplexities, accuracies."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.get("measures", {})))
    table = [["optimizer", *(name.replace("_", " ") for name in names)]]
    for entry in entries:
        values = [entry.get("measures", {}).get(name) for name in names]
        table.append([entry["optimizer"], *("-" if value is None else f"{value:.4g}" for value in values)])
    return table


def reference_table(entries: Entries, reference: str = REFERENCE) -> Table:
    """Each optimizer against the reference and the best, all at their best learning rates, and what it costs."""
    header, *times = time_table(entries)
    losses = [f"final val loss minus {reference}'s", "minus the best's", f"steps to {reference}'s final"]
    table = [[header[0], *losses, *header[1:]]]
    for entry, (label, *seconds) in zip(entries, times, strict=True):
        differences = [difference_cell(entry, name) for name in ("difference", "difference_to_best")]
        steps = entry.get("steps_to_reference")
        table.append([label, *differences, "-" if steps is None else str(steps), *seconds])
    return table


def time_table(entries: Entries) -> Table:
    """What a step of each optimizer costs."""
    table = [["optimizer", "ms per step", "of these optimizer"]]
    for entry in entries:
        seconds = [entry.get(name) for name in ("step_seconds", "optimizer_seconds")]
        table.append([entry["optimizer"], *("-" if each is None else f"{1000 * each:.1f}" for each in seconds)])
    return table


def without_empty_columns(table: Table) -> Table:
    """Return the table without the columns in which there are only dashes.

    >>> without_empty_columns([["", "a", "b"], ["x", "-", "1"], ["y", "-", "-"]])
    [['', 'b'], ['x', '1'], ['y', '-']]
    """
    kept = [i for i, column in enumerate(zip(*table[1:], strict=True)) if i == 0 or set(column) != {"-"}]
    return [[row[i] for i in kept] for row in table]


def lr_table(entries: Entries) -> Table:
    """Mean final validation loss of every optimizer at every learning rate."""
    lrs = sorted({cell["lr"] for entry in entries for cell in entry["by_lr"]})
    table = [["optimizer", *(f"lr {lr:g}" for lr in lrs)]]
    for entry in entries:
        cells = {cell["lr"]: _lr_cell(cell) for cell in entry["by_lr"]}
        if entry["best_lr"] is not None:
            cells[entry["best_lr"]] = marked(cells[entry["best_lr"]], entry["best_lr_edge"])
        table.append([entry["optimizer"], *(cells.get(lr, "-") for lr in lrs)])
    return table


def lr_difference_table(entries: Entries) -> Table:
    """Each optimizer against the reference at every learning rate that both were trained at."""
    cells = {entry["optimizer"]: {at["lr"]: at for at in entry["by_lr"] if "difference" in at} for entry in entries}
    lrs = sorted({lr for by_lr in cells.values() for lr in by_lr})
    table = [["optimizer", *(f"lr {lr:g}" for lr in lrs)]]
    for name, by_lr in cells.items():
        if by_lr:
            shown = {lr: plus_minus(at, "difference", "+") for lr, at in by_lr.items()}
            table.append([name, *(shown.get(lr, "-") for lr in lrs)])
    return table


def edge_note(at_edge: Sequence[str]) -> str:
    """Return what the mark in a table means, and of whom it says so, as :func:`edges` names them."""
    return (
        f"{EDGE_MARK} The best learning rate is at the edge of its grid, and a better one may lie beyond: "
        f"{', '.join(dict.fromkeys(at_edge))}."
    )


def marked(cell: str, edge: str | None) -> str:
    """Return a cell with a mark where its learning rate is at an edge of the grid."""
    return cell if edge is None else f"{cell} {EDGE_MARK}"


def difference_cell(entry: dict[str, Any], name: str) -> str:
    """Return a difference and its interval, marked where the learning rate is at an edge of the grid."""
    return marked(plus_minus(entry, name, "+"), entry["best_lr_edge"] if name in entry else None)


def _lr_cell(cell: dict[str, Any]) -> str:
    if cell["diverged"]:
        return f"{cell['diverged']} of {cell['diverged'] + len(cell['val_loss'])} diverged"
    return rounded(statistics.fmean(cell["val_loss"]))


def betas_table(entries: Entries, threshold: float, reference: str = REFERENCE) -> Table:
    """Share of good starts, median and worst final losses, starts that are better than the reference's."""
    header = f"optimizer|lr|runs|train loss < {threshold:.3g}|median|worst|val loss: median|worst|below {reference}'s"
    table = [header.split("|")]
    for entry in entries:
        losses = [entry[f"{name}_{which}"] for name in FINAL_LOSSES for which in ("median", "worst")]
        cells = [loss_or_diverged(loss) for loss in losses]
        compared = entry.get("compared") and entry["optimizer"] != reference
        cells.append(f"{entry['better']} of {entry['compared']}" if compared else "-")
        lr = marked(f"{entry['lr']:g}", entry["lr_edge"])
        table.append([entry["optimizer"], lr, str(entry["runs"]), f"{entry['share']:.1%}", *cells])
    return table


def markdown(table: Table) -> str:
    """Return the table in Markdown."""
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plus_minus(entry: dict[str, Any], name: str, sign: str = "") -> str:
    """Return a mean and the half width of its interval, as far as they are known."""
    if name not in entry:
        return "-"
    return mean_and_half(entry[name], entry[f"{name}_ci95"], sign)


def mean_and_half(mean: float, half: float | None, sign: str = "") -> str:
    """Return a mean and the half width of its interval, if there is one.

    >>> mean_and_half(-0.1, 0.02, "+"), mean_and_half(1.5, None)
    ('-0.1000 ± 0.0200', '1.5000')
    """
    return rounded(mean, sign) if half is None else f"{rounded(mean, sign)} ± {rounded(half)}"
