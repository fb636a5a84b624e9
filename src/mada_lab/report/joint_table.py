"""Several experiments in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mada_lab.report.results import REFERENCE, Entries, edges
from mada_lab.report.tables import Table, difference_cell, edge_note, marked, plus_minus

_NOTE = (
    "Final validation losses minus those of the optimizer in the first row, whose own stand there; each at its "
    "best learning rate. ±: half width of the 95 % t interval over seeds, paired by seed. Lower, higher: in how many "
    "of the experiments, by more than the interval; of many such comparisons some are chance."
)


class JointTable(NamedTuple):
    """The table of several experiments, and what has to be known to read it."""

    table: Table
    notes: Sequence[str]


def join(experiments: Sequence[tuple[str, Entries]], reference: str = REFERENCE) -> JointTable | None:
    """Return the table of several experiments, given by title; None: fewer than two compare anything."""
    table = joint_table(experiments, reference)
    if table is None:
        return None
    at_edge = [f"{each} in {title}" for title, entries in experiments for each in edges(entries)]
    return JointTable(table, [_NOTE, *([edge_note(at_edge)] if at_edge else [])])


def joint_table(experiments: Sequence[tuple[str, Entries]], reference: str = REFERENCE) -> Table | None:
    """Return each optimizer against the reference, experiment by experiment; None: fewer than two compare any."""
    experiments = [(title, entries) for title, entries in experiments if any("difference" in each for each in entries)]
    if len(experiments) < 2:
        return None
    by_label = [{entry["optimizer"]: entry for entry in entries} for _, entries in experiments]
    table = [["optimizer", *(title for title, _ in experiments), "lower", "higher"]]
    losses = [marked(plus_minus(each[reference], "val_loss"), each[reference]["best_lr_edge"]) for each in by_label]
    table.append([reference, *losses, "-", "-"])
    for label in dict.fromkeys(label for entries in by_label for label in entries if label != reference):
        entries = [each.get(label, {}) for each in by_label]
        sure = [each for each in entries if each.get("difference_ci95") is not None]
        counts = [sum(sign * each["difference"] > each["difference_ci95"] for each in sure) for sign in (-1, 1)]
        cells = [difference_cell(each, "difference") for each in entries]
        table.append([label, *cells, *(f"{number} of {len(sure)}" for number in counts)])
    return table
