"""The folder of a stage: what is written there of the plan, and what is read of the runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mada_lab.errors import InputError, require
from mada_lab.files import CONFIG, read_json, write_json
from mada_lab.run.config import to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.stored import StoredRun, load_run
from mada_lab.sweep.contender_runs import ContenderRuns, load_contender

TUNE, CONFIRM = "tune", "confirm"
STAGE = "stage.json"


@dataclass(frozen=True)
class StoredStage:
    """What is stored of a stage, or of a run alone.

    Args:
        described: what stage.json says is run; for a run alone, the same of it.
        contenders: the runs of each of which one is over.
        records: of these runs, what config.json says beside the configuration: data, versions, machine.
        missing: by label, names of the runs that are planned and not over.
    """

    described: Mapping[str, Any]
    contenders: Sequence[ContenderRuns]
    records: Sequence[Mapping[str, Any]]
    missing: Mapping[str, Sequence[str]]

    @property
    def title(self) -> str:
        """The title of the experiment and the stage."""
        return ": ".join(self.described[name] for name in ("title", "stage") if self.described[name])

    @cached_property
    def runs(self) -> list[StoredRun]:
        """All runs that are over."""
        return [run for contender in self.contenders for run in contender.runs]

    @property
    def total(self) -> int:
        """The number of runs that there will be."""
        return sum(entry["total"] for entry in self.described["contenders"].values())

    @property
    def lrs(self) -> list[float]:
        """The learning rates of all runs."""
        return sorted({run.lr for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        """The seeds of all runs."""
        return sorted({run.seed for run in self.runs})

    @property
    def source(self) -> str:
        """The data, and where the weights came from, if not from chance."""
        data = self.records[0]["data"]
        return str(data["source"]) + (f" after {data['init']['source']}" if data.get("init") else "")

    @property
    def caption(self) -> str:
        """The data and the number of steps, for figures."""
        return f"{self.source}, {self.described['base']['steps']} steps"

    @property
    def is_one_run(self) -> bool:
        """Whether it is a run alone, which is compared with nothing."""
        return self.described.get("stage", "") is None


def run_folder(stage: Path, name: str) -> RunFolder:
    """Return the folder of a run in the folder of a stage."""
    return RunFolder(stage / "runs" / name)


def write_stage(folder: Path, described: Mapping[str, Any]) -> None:
    """Write what is run in a stage."""
    write_json(folder / STAGE, described)


def load_stage(folder: Path) -> StoredStage:
    """Read the stage of a folder with a stage.json. Raise :class:`InputError` where there is none."""
    if not (folder / STAGE).exists():
        raise InputError(f"report must be the folder of a comparison, got {str(folder)!r}, which has no stage.json")
    described = read_json(folder / STAGE)
    grids = _grids(folder) if described["stage"] == CONFIRM else {}
    contenders, records, missing = [], [], {}
    for label, entry in described["contenders"].items():
        folders = [run_folder(folder, name) for name in entry["runs"]]
        contender = load_contender(label, folders)
        over = [run.name for run in contender.runs]
        missing[label] = [run.path.name for run in folders if run.path.name not in over]
        records += [run.recorded() for run in folders if run.path.name in over]
        if over:
            contenders.append(dataclasses.replace(contender, grid=grids.get(label, ())))
    return StoredStage(described, contenders, records, missing)


def _grids(folder: Path) -> dict[str, list[float]]:
    """Return the learning rates of each contender's runs in the first stage, beside the folder of the second."""
    stage = folder.resolve().parent / TUNE
    if not (stage / STAGE).exists():
        return {}
    runs = {label: entry["runs"] for label, entry in read_json(stage / STAGE)["contenders"].items()}
    folders = {label: [run_folder(stage, name) for name in names] for label, names in runs.items()}
    return {
        label: [run.config().optimizer.lr for run in several if run.result_file.exists()]
        for label, several in folders.items()
    }


def load_run_alone(folder: Path) -> StoredStage:
    """Read the run of a folder with a config.json, as a stage with nothing but it. It need not be over.

    Raises:
        InputError: there is none, or it has not begun.
    """
    alone = RunFolder(folder)
    config = alone.config()
    run = load_run(alone, under_way=True)
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
    return StoredStage(described, [ContenderRuns(label, [run])], [alone.recorded()], {label: []})


def check_any_run(folder: Path, stages: Sequence[StoredStage]) -> None:
    """Raise :class:`InputError` where all that is stored in a folder is what was to be run."""
    if not any(stage.runs for stage in stages):
        raise InputError(f"no run of {folder} is over yet")


def load_stages(folder: Path) -> list[StoredStage]:
    """Return what is stored in the folder of a sweep, of a stage or comparison, or of a run.

    Raises:
        InputError: the folder is none of these, or no run of it is over.
    """
    if (folder / CONFIG).exists():
        return [load_run_alone(folder)]
    begun = [path for path in (folder, folder / TUNE, folder / CONFIRM) if (path / STAGE).exists()]
    allowed = f"that of a sweep, a stage or a run, with {TUNE}/stage.json, stage.json or config.json in it"
    require(bool(begun), "folder", str(folder), allowed)
    stages = [load_stage(path) for path in begun]
    check_any_run(folder, stages)
    return stages
