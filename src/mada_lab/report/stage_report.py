"""What is said of a stage: results, tables, notes, and what went wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mada_lab.errors import require
from mada_lab.report.results import REFERENCE, betas_results, edges, median_train_loss, results
from mada_lab.report.tables import (
    Table,
    betas_table,
    edge_note,
    loss_table,
    lr_difference_table,
    lr_table,
    measures_table,
    reference_table,
    time_table,
    without_empty_columns,
)
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import StoredStage
from mada_lab.tasks.registry import task_type, without_paths
from mada_lab.text import count, listed


@dataclass(frozen=True)
class StageReport:
    """What is said of a stage.

    Args:
        stage: what is stored.
        reference: label of the contender that the tables compare with.
    """

    stage: StoredStage
    reference: str = REFERENCE

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The results of each optimizer, see :func:`results`."""
        return results(self.stage.contenders, self.reference)

    @cached_property
    def threshold(self) -> float:
        """Final training loss below which a start of the betas counts as a good one."""
        threshold: float | None = self.stage.described["threshold"]
        return median_train_loss(self._varied) if threshold is None else threshold

    @cached_property
    def betas(self) -> list[dict[str, Any]]:
        """The results of contenders whose betas start at several values, see :func:`betas_results`."""
        return betas_results(self._varied, self.threshold, self.reference) if self._varied else []

    @property
    def _varied(self) -> list[ContenderRuns]:
        return [contender for contender in self.stage.contenders if len(contender.betas()) > 1]

    @property
    def _several_lrs(self) -> bool:
        return any(len(entry["by_lr"]) > 1 for entry in self.entries)

    def tables(self) -> dict[str, Table]:
        """Return the tables by title."""
        header, *rows = loss_table(self.entries)
        if self.stage.is_one_run and self._is_not_validated():
            tables: dict[str, Table] = {}
        elif self.stage.is_one_run:
            tables = {"Losses": [["lr" if name == "best lr" else name for name in header], *rows]}
        else:
            tables = {"Losses at each best learning rate": [header, *rows]}
        tables["Last validation"] = measures_table(self.entries)
        compared = any("difference" in entry or "difference_to_best" in entry for entry in self.entries)
        title = f"Difference to {self.reference} and to the best, and time of a step" if compared else "Time of a step"
        tables[title] = without_empty_columns(
            reference_table(self.entries, self.reference) if compared else time_table(self.entries)
        )
        if self._several_lrs:
            tables["Mean final validation loss at every learning rate"] = lr_table(self.entries)
            differences = lr_difference_table(self.entries)
            if len(self.stage.seeds) > 2 and len(differences) > 1:  # of two seeds the interval says nothing
                tables[f"Difference to {self.reference} at every learning rate"] = differences
        if self.betas:
            tables["Starts of the betas"] = betas_table(self.betas, self.threshold, self.reference)
        return {title: table for title, table in tables.items() if len(table[0]) > 1}

    def _is_not_validated(self) -> bool:
        result = self.stage.runs[0].result
        return result.status == "interrupted" and result.val_loss is None

    def notes(self) -> list[str]:
        """Return what has to be known to read the tables."""
        stage, base = self.stage, self.stage.described["base"]
        task = {name: value for name, value in without_paths(base["task"]).items() if name != "kind" and value}
        unit = task_type(base["task"]["kind"]).unit
        run = f"{stage.source}; {', '.join(f'{name} {value}' for name, value in task.items())}; {base['steps']} steps"
        if stage.is_one_run:
            return [f"{run}; losses in {unit}."]
        notes = [
            f"{run}, {count(len(stage.seeds), 'seed')}; losses in {unit}. ±: half width of the 95 % t "
            "interval over seeds; differences are paired by seed. Best lr: the lowest mean final validation loss."
        ]
        if self._several_lrs:
            notes[0] += (
                " Tables of learning rates: mean final validation loss and, with three seeds or more, the difference "
                f"to {self.reference} at the same rate."
            )
        if at_edge := edges([*self.entries, *self.betas]):
            notes.append(edge_note(at_edge))
        if len(stage.runs) < stage.total:
            notes.append(f"INCOMPLETE: {len(stage.runs)} of {stage.total} runs are over.")
        if self.betas:
            notes.append(
                "Table of betas: all starts at the learning rate with the lowest median validation loss; the last "
                f"column counts the starts with a lower validation loss, a mean over seeds, than {self.reference}'s. "
                "Where the betas vary, the other tables are over all starts, and so is ±."
            )
        return notes

    def problems(self) -> list[str]:
        """Return which runs diverged and which are not over, contender by contender."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        contenders = {contender.label: contender for contender in self.stage.contenders}
        for label, entry in self.stage.described["contenders"].items():
            contender = contenders.get(label, ContenderRuns(label, []))
            for lr in contender.lrs():
                diverged = [run.name for run in contender.at(lr) if run.result.status == "diverged"]
                if diverged:
                    of_all = f"{len(diverged)} of {len(contender.at(lr))}"
                    yield f"{label}: {of_all} runs at learning rate {lr:g} diverged: {listed(diverged, most=6)}"
            for run in contender.runs:
                if run.result.status == "interrupted":
                    yield f"{label}: the run is not over, it is at step {run.result.step}"
                if run.result.skipped_steps:
                    steps = count(run.result.skipped_steps, "step")
                    yield f"{label}: {run.name} left out {steps} whose loss or gradient was not finite"
            missing = self.stage.missing[label]
            if missing:
                names = f": {listed(missing, most=6)}" if len(missing) < len(entry["runs"]) else ""
                yield f"{label}: {len(missing)} of {entry['total']} runs are not over{names}"
            if unplanned := entry["total"] - len(entry["runs"]):
                reason = "what they build on diverged or is not over"
                yield f"{label}: {unplanned} of {entry['total']} runs are not there: {reason}"


def report_on(stage: StoredStage, reference: str | None = None) -> StageReport:
    """Return the report on a stage.

    Args:
        stage: what is stored.
        reference: label of the contender that the tables compare with; None: AdamW, where it is one.

    Raises:
        InputError: there is no such contender. A run alone is compared with nothing.
    """
    if reference is None or stage.is_one_run:
        return StageReport(stage)
    check_reference(reference, stage.described["contenders"])
    return StageReport(stage, reference)


def check_reference(reference: str, labels: Collection[str]) -> None:
    """Raise :class:`InputError` where no contender has the label ``reference``."""
    require(reference in labels, "reference", reference, f"one of {', '.join(map(repr, labels))}")
