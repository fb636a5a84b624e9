"""What stands in the folders of a sweep already: runs of the same experiment go on, all else is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mada_lab.errors import InputError
from mada_lab.files import read_json
from mada_lab.run.config import RunConfig, differences, from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.sweep.plan import AllDiverged, NotReady, Plan, Runs
from mada_lab.sweep.stage_folder import CONFIRM, STAGE, TUNE, run_folder
from mada_lab.tasks.registry import without_paths


def check_begun(plan: Plan, stages: Sequence[str], labels: Sequence[str]) -> None:
    """Raise :class:`InputError` where the stages cannot go on in their folders, or the data cannot be read."""
    all_over: list[tuple[RunFolder, RunConfig]] = []
    for stage in stages:
        folder = plan.folders[stage]
        _check_folder(folder, plan.bases[stage])
        for label, contender in plan.experiment.contenders.items():
            try:
                over, _ = over_and_left(folder, plan.runs(stage, label))
                all_over += [(run_folder(folder, name), run) for name, run in over.items()]
            except AllDiverged:
                pass
            except NotReady as reason:
                if TUNE not in stages and label in labels and not contender.sources:
                    raise InputError(f"{CONFIRM} needs {TUNE}: {reason}") from None
    tasks = plan.tasks()
    data = [task.build().describe() for task in tasks]
    for stored, run in all_over:
        here, there = data[tasks.index(run.task)], stored.recorded()["data"]
        if differing := differences(_content(here), _content(there)):
            raise InputError(f"{stored.path} is a run on other data ({'; '.join(differing)}); choose a new folder")


def over_and_left(folder: Path, runs: Runs) -> tuple[Runs, Runs]:
    """Return the runs that are over, and those that are not.

    Raises:
        InputError: a folder holds another run of that name.
    """
    over: Runs = {}
    left: Runs = {}
    for name, run in runs.items():
        stored = run_folder(folder, name)
        is_over = stored.result_file.exists()
        if stored.config_file.exists():
            here, there = to_dict(run), to_dict(stored.config())
            if is_over:  # what is not is to be resumed, and that is possible only with the data where they were
                here, there = _portable(here), _portable(there)
            if differing := differences(here, there):
                raise InputError(f"{stored.path} is a run of another configuration ({'; '.join(differing)})")
        (over if is_over else left)[name] = run
    return over, left


def _check_folder(folder: Path, base: RunConfig) -> None:
    stored = folder / STAGE
    if not stored.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out must be a new or empty folder or one of an experiment, got {str(folder)!r}")
        return
    # As a configuration, which gives fields that came later their defaults.
    there = to_dict(from_dict(read_json(stored)["base"]))
    if differing := differences(_common(_portable(to_dict(base))), _common(_portable(there))):
        raise InputError(f"{folder} is of another configuration ({'; '.join(differing)}); choose a new folder")


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal in two configurations on two machines: not where the data lie, whose hashes are."""
    return {**config, "task": without_paths(config["task"])}


def _common(base: dict[str, Any]) -> dict[str, Any]:
    """Return a base without what each run replaces."""
    optimizer = {key: value for key, value in base["optimizer"].items() if key in ("betas", "weight_decay")}
    return {**base, "optimizer": optimizer, "seed": None}


def _content(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task's description says of the data themselves, wherever they came from."""
    return {
        key: _content(value) if key == "init" and value else value for key, value in data.items() if key != "source"
    }
