"""A stage as it is stored: its runs, the tables that they make, and which of them diverged or are missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mada_lab.report import tables as report
from mada_lab.report.tables import StoredRun, Summary, Table, count, listed
from mada_lab.run.config import TASKS, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.tasks import InputError, require
from mada_lab.tasks.stored import read_json

TUNE, CONFIRM = "tune", "confirm"


@dataclass(frozen=True)
class StoredStage:
    """What is stored of a stage, or of a run alone.

    Args:
        described: what stage.json says is run; for a run alone, the same of it.
        summaries: of the contenders of which a run is over.
        records: of these runs, what config.json says beside the configuration: data, versions, machine.
        missing: by label, names of the runs that are planned and not over.
        reference: label of the contender that the tables compare with.
    """

    described: Mapping[str, Any]
    summaries: Sequence[Summary]
    records: Sequence[Mapping[str, Any]]
    missing: Mapping[str, Sequence[str]]
    reference: str = report.REFERENCE

    @property
    def title(self) -> str:
        """The title of the experiment and the stage."""
        return ": ".join(self.described[name] for name in ("title", "stage") if self.described[name])

    @cached_property
    def runs(self) -> list[StoredRun]:
        return [run for summary in self.summaries for run in summary.runs]

    @property
    def total(self) -> int:
        """Runs that there will be."""
        return sum(entry["total"] for entry in self.described["contenders"].values())

    @property
    def lrs(self) -> list[float]:
        return sorted({run.lr for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def source(self) -> str:
        """The data, and where the weights came from, if not from chance."""
        data = self.records[0]["data"]
        return str(data["source"]) + (f" after {data['init']['source']}" if data.get("init") else "")

    @property
    def caption(self) -> str:
        return f"{self.source}, {self.described['base']['steps']} steps"

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """See :func:`report.results`."""
        return report.results(self.summaries, self.reference)

    @cached_property
    def threshold(self) -> float:
        """Final training loss below which a start of the betas counts as a good one."""
        given: float | None = self.described["threshold"]
        return report.median_train_loss(self._varied) if given is None else given

    @cached_property
    def betas(self) -> list[dict[str, Any]]:
        """See :func:`report.betas_results`; of the contenders whose betas start at several values."""
        return report.betas_results(self._varied, self.threshold, self.reference) if self._varied else []

    @property
    def _varied(self) -> list[Summary]:
        return [summary for summary in self.summaries if len(summary.betas()) > 1]

    @property
    def is_one_run(self) -> bool:
        """Whether it is a run alone, which is compared with nothing."""
        return self.described.get("stage", "") is None

    @property
    def _several_lrs(self) -> bool:
        return any(len(entry["by_lr"]) > 1 for entry in self.entries)

    def tables(self) -> dict[str, Table]:
        """By title."""
        header, *rows = report.loss_table(self.entries)
        if self.is_one_run and self.runs[0].result.status == "interrupted" and self.runs[0].result.val_loss is None:
            tables: dict[str, Table] = {}  # it has not been validated yet
        elif self.is_one_run:
            tables = {"Losses": [["lr" if name == "best lr" else name for name in header], *rows]}
        else:
            tables = {"Losses at each best learning rate": [header, *rows]}
        compared = any("difference" in entry or "difference_to_best" in entry for entry in self.entries)
        title = f"Difference to {self.reference} and to the best, and time of a step" if compared else "Time of a step"
        tables[title] = report.without_empty_columns(
            report.reference_table(self.entries, self.reference) if compared else report.time_table(self.entries)
        )
        if self._several_lrs:
            tables["Mean final validation loss at every learning rate"] = report.lr_table(self.entries)
            differences = report.lr_difference_table(self.entries)
            if len(self.seeds) > 2 and len(differences) > 1:  # of two seeds the interval says nothing
                tables[f"Difference to {self.reference} at every learning rate"] = differences
        if self.betas:
            tables["Starts of the betas"] = report.betas_table(self.betas, self.threshold, self.reference)
        return {title: table for title, table in tables.items() if len(table[0]) > 1}

    def notes(self) -> list[str]:
        """What has to be known to read the tables."""
        base = self.described["base"]
        task = {name: value for name, value in without_paths(base["task"]).items() if name != "kind" and value}
        run = f"{self.source}; {', '.join(f'{name} {value}' for name, value in task.items())}; {base['steps']} steps"
        if self.is_one_run:
            return [f"{run}; losses in nats."]
        notes = [
            f"{run}, {count(len(self.seeds), 'seed')}; losses in nats. ±: half width of the 95 % t "
            "interval over seeds; differences are paired by seed. Best lr: the lowest mean final validation loss."
        ]
        if self._several_lrs:
            notes[0] += (
                " Tables of learning rates: mean final validation loss and, with three seeds or more, the difference "
                f"to {self.reference} at the same rate."
            )
        if at_edge := report.edges([*self.entries, *self.betas]):
            notes.append(report.edge_note(at_edge))
        if len(self.runs) < self.total:
            notes.append(f"INCOMPLETE: {len(self.runs)} of {self.total} runs are over.")
        if self.betas:
            notes.append(
                "Table of betas: all starts at the learning rate with the lowest median validation loss; the last "
                f"column counts the starts with a lower validation loss, a mean over seeds, than {self.reference}'s. "
                "Where the betas vary, the other tables are over all starts, and so is ±."
            )
        return notes

    def problems(self) -> list[str]:
        """Which runs diverged and which are not over, contender by contender."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        summaries = {summary.label: summary for summary in self.summaries}
        for label, entry in self.described["contenders"].items():
            summary = summaries.get(label, Summary(label, []))
            for lr in summary.lrs():
                diverged = [run.name for run in summary.at(lr) if run.result.status == "diverged"]
                if diverged:
                    of_all = f"{len(diverged)} of {len(summary.at(lr))}"
                    yield f"{label}: {of_all} runs at learning rate {lr:g} diverged: {listed(diverged, most=6)}"
            for run in summary.runs:
                if run.result.status == "interrupted":
                    yield f"{label}: the run is not over, it is at step {run.result.step}"
                if run.result.skipped_steps:
                    steps = count(run.result.skipped_steps, "step")
                    yield f"{label}: {run.name} left out {steps} whose loss or gradient was not finite"
            missing = self.missing[label]
            if missing:
                names = f": {listed(missing, most=6)}" if len(missing) < len(entry["runs"]) else ""
                yield f"{label}: {len(missing)} of {entry['total']} runs are not over{names}"
            if unplanned := entry["total"] - len(entry["runs"]):
                reason = "what they build on diverged or is not over"
                yield f"{label}: {unplanned} of {entry['total']} runs are not there: {reason}"


def without_paths(task: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a task; paths mean nothing on another machine."""
    return {name: value for name, value in task.items() if name not in TASKS[task["kind"]].paths}


def load_stage(folder: Path, reference: str | None = None) -> StoredStage:
    """The stage of a folder with a stage.json.

    Args:
        folder: of the stage.
        reference: label of the contender that the tables compare with; None: AdamW, where it is one.

    Raises:
        InputError: there is no stage, or no such contender.
    """
    if not (folder / "stage.json").exists():
        raise InputError(f"report must be the folder of a comparison, got {str(folder)!r}, which has no stage.json")
    described = read_json(folder / "stage.json")
    contenders = described["contenders"]
    if reference is not None:
        check_reference(reference, contenders)
    grids = _grids(folder) if described["stage"] == CONFIRM else {}
    summaries, records, missing = [], [], {}
    for label, entry in contenders.items():
        folders = [RunFolder(folder / "runs" / name) for name in entry["runs"]]
        summary = report.load_summary(label, folders)
        over = [run.name for run in summary.runs]
        missing[label] = [run.path.name for run in folders if run.path.name not in over]
        records += [run.recorded() for run in folders if run.path.name in over]
        if over:
            summaries.append(dataclasses.replace(summary, grid=grids.get(label, ())))
    return StoredStage(described, summaries, records, missing, reference or report.REFERENCE)


def _grids(folder: Path) -> dict[str, list[float]]:
    """Learning rates of the runs of each contender in the first stage, beside the folder of the second."""
    stage = folder.resolve().parent / TUNE
    if not (stage / "stage.json").exists():
        return {}
    runs = {label: entry["runs"] for label, entry in read_json(stage / "stage.json")["contenders"].items()}
    folders = {label: [RunFolder(stage / "runs" / name) for name in names] for label, names in runs.items()}
    return {
        label: [lr for run in several if run.result_file.exists() and (lr := run.config().optimizer.lr) is not None]
        for label, several in folders.items()
    }


def check_reference(reference: str, labels: Collection[str]) -> None:
    require(reference in labels, "reference", reference, f"one of {', '.join(map(repr, labels))}")


def load_run_alone(folder: Path) -> StoredStage:
    """The run of a folder with a config.json, as a stage with nothing but it. It need not be over.

    Raises:
        InputError: there is none, or it has not begun.
    """
    run_folder = RunFolder(folder)
    config = run_folder.config()
    run = report.load_run(run_folder, under_way=True)
    if run is None:
        raise InputError(f"the run of {folder} has not begun: there are no metrics")
    label = config.optimizer.name
    described = {
        "title": f"{label}, learning rate {config.optimizer.lr:g}, seed {config.seed}",
        "stage": None,
        "threshold": None,
        "contenders": {label: {"runs": [run.name], "total": 1}},
        "base": to_dict(config),
    }
    return StoredStage(described, [Summary(label, [run])], [run_folder.recorded()], {label: []})


def check_any_run(folder: Path, stages: Sequence[StoredStage]) -> None:
    """Raise :class:`InputError` where all that is stored in a folder is what was to be run."""
    if not any(stage.runs for stage in stages):
        raise InputError(f"no run of {folder} is over yet")


def load_stages(folder: Path, reference: str | None = None) -> list[StoredStage]:
    """Return what is stored in the folder of a sweep, of a stage or comparison, or of a run.

    Args:
        folder: any of these.
        reference: see :func:`load_stage`.

    Raises:
        InputError: the folder is none of these, or no run of it is over.
    """
    if (folder / "config.json").exists():
        return [load_run_alone(folder)]
    begun = [path for path in (folder, folder / TUNE, folder / CONFIRM) if (path / "stage.json").exists()]
    allowed = f"that of a sweep, a stage or a run, with {TUNE}/stage.json, stage.json or config.json in it"
    require(bool(begun), "folder", str(folder), allowed)
    stages = [load_stage(path, reference) for path in begun]
    check_any_run(folder, stages)
    return stages
