"""Train the stages of an experiment. Each has a folder, in which its runs are.

stage.json  what is run
runs/NAME   folder of a run
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mada_lab.errors import require
from mada_lab.run.config import ResolvedRun, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.sweep.begun import check_begun, over_and_left
from mada_lab.sweep.experiment import Experiment
from mada_lab.sweep.plan import NotReady, Plan, Runs
from mada_lab.sweep.pool import Pool
from mada_lab.sweep.stage_folder import CONFIRM, TUNE, run_folder, write_stage


@dataclass(frozen=True)
class RunReport:
    """A run that is over. ``seconds_left`` is an estimate for all others, by the steps that they take."""

    name: str
    status: str
    done: int
    total: int
    seconds_left: float


@dataclass
class Ending:
    """How it ended: by Ctrl-C or not, which runs failed and why, which contenders were left out of a stage and why."""

    interrupted: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def run_stages(
    experiment: Experiment,
    folders: Mapping[str, Path],
    workers: int,
    on_run: Callable[[RunReport], None],
    *,
    stages: Sequence[str] = (TUNE, CONFIRM),
    address: str | None = None,
    only: Sequence[str] = (),
    on_kept: Callable[[Path, int, int], None] | None = None,
    on_progress: Callable[[Mapping[str, tuple[int, int]]], None] | None = None,
    pool: Pool | None = None,
) -> Ending:
    """Train what has not been trained yet.

    Args:
        experiment: what is trained.
        folders: of the stages, by name. One that has been started before goes on, and may get more contenders and more
            values on the axes, but nothing else may change.
        workers: number of runs at the same time.
        on_run: called after each run.
        stages: which of them to run, where the experiment has them.
        address: of a cluster of Ray; None: this machine.
        only: labels of the contenders to train; none: all.
        on_kept: called before runs are trained, with the folder of their stage, where some are over already: how many,
            and how many are left to train.
        on_progress: called about every second with the runs under way, by name: the step that was last written, and
            the number of all steps.
        pool: in which runs are trained; None: one of Ray, with ``workers`` and ``address``.

    Raises:
        InputError: something cannot be trained as described; nothing has been written then.
    """
    for label in only:
        require(label in experiment.contenders, "only", label, f"one of {', '.join(map(repr, experiment.contenders))}")
    labels = [label for label in experiment.contenders if not only or label in only]
    stages = [stage for stage in stages if stage == TUNE or experiment.confirm is not None]
    require(bool(stages), "stage", CONFIRM, f"{TUNE} for an experiment without [confirm]")
    pool = Pool(workers, address) if pool is None else pool
    plan = Plan(experiment, folders)
    check_begun(plan, stages, labels)
    tally = _Tally(on_run, [draft for stage in stages for label in labels for draft in plan.drafts(stage, label)])
    ending = Ending()
    with pool:
        for stage in stages:
            folders[stage].mkdir(parents=True, exist_ok=True)
            for wave in plan.waves:
                kept, left = _look_up(plan, stage, [label for label in wave if label in labels], tally, ending)
                if kept and on_kept is not None:
                    on_kept(folders[stage], kept, len(left))
                _describe(plan, stage)
                if on_progress is not None:
                    pool.on_wait = partial(_report_progress, folders[stage], left, on_progress)
                if not _train_all(pool, folders[stage], left, tally, ending):
                    ending.interrupted = True
                    return ending
    return ending


class _Tally:
    """Counts runs and steps."""

    def __init__(self, on_run: Callable[[RunReport], None], all_runs: Sequence[ResolvedRun]) -> None:
        self._on_run = on_run
        self._done, self._total = 0, len(all_runs)
        self._steps, self._steps_left = 0, sum(run.steps for run in all_runs)
        self._began = time.monotonic()

    def skip(self, run: ResolvedRun, counts: bool) -> None:
        """Count a run that needs no training; it ``counts`` where that is because it is over."""
        self._done += counts
        self._total -= not counts
        self._steps_left -= run.steps

    def over(self, name: str, status: str, run: ResolvedRun) -> None:
        """Count a run that has just ended, and report it."""
        self._done += 1
        self._steps += run.steps
        self._steps_left -= run.steps
        seconds_left = (time.monotonic() - self._began) / self._steps * self._steps_left
        self._on_run(RunReport(name, status, self._done, self._total, seconds_left))


def _look_up(plan: Plan, stage: str, labels: Sequence[str], tally: _Tally, ending: Ending) -> tuple[int, Runs]:
    """Return how many runs of these contenders are over, and those that are left.

    Seeds come last to change: early on there is one of everything.
    """
    kept = 0
    all_left: Runs = {}
    for label in labels:
        try:
            over, left = over_and_left(plan.folders[stage], plan.runs(stage, label))
        except NotReady as reason:
            ending.left_out.append(f"{stage} of {label}: {reason}")
            for draft in plan.drafts(stage, label):
                tally.skip(draft, counts=False)
            continue
        for run in over.values():
            tally.skip(run, counts=True)
        kept += len(over)
        all_left |= left
    return kept, dict(sorted(all_left.items(), key=lambda item: item[1].seed))


def _train_all(pool: Pool, folder: Path, runs: Runs, tally: _Tally, ending: Ending) -> bool:
    """Train the runs in the pool. Return whether all are over: False after Ctrl-C."""

    def on_over(name: str, status: str) -> None:
        if status not in ("finished", "diverged"):
            ending.failed[name] = status
        tally.over(name, status, runs[name])

    calls = {name: (run, run_folder(folder, name).path.resolve()) for name, run in runs.items()}
    return pool.run(_train, calls, on_over, cuda=any(run.device.startswith("cuda") for run in runs.values()))


def _train(run: ResolvedRun, folder: Path, **watchers: Callable[[Any], None]) -> str:
    """Train or go on; ``watchers`` are those of :func:`train`."""
    resume = RunFolder(folder).config_file.exists()
    return train(run, folder, resume=resume, draw=False, **watchers).status


def _report_progress(
    folder: Path,
    runs: Runs,
    on_progress: Callable[[Mapping[str, tuple[int, int]]], None],
    names: Sequence[str],
) -> None:
    on_progress({name: (run_folder(folder, name).last_step(), runs[name].steps) for name in names})


def _describe(plan: Plan, stage: str) -> None:
    """Write stage.json; runs that are not known yet come with the next call."""
    experiment = plan.experiment
    contenders = {}
    for label in experiment.contenders:
        try:
            names = list(plan.runs(stage, label))
        except NotReady:
            names = []
        contenders[label] = {"runs": names, "total": len(plan.drafts(stage, label))}
    described = {
        "title": experiment.title,
        "stage": stage,
        "threshold": experiment.threshold,
        "contenders": contenders,
        "base": to_dict(plan.bases[stage]),
    }
    write_stage(plan.folders[stage], described)
