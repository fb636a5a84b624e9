"""The stages of an experiment. Each has a folder, in which its runs are, and the tables and figures made from them.

stage.json              what is run
runs/NAME               folder of a run
table.md, results.json  what was found
curves.png, .svg        losses over steps and learning rates
betas.png, .svg         final losses over the betas, where these are an axis
coefficients.png, .svg  paths of the coefficients, where any are learned
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mada_lab.optimizers import build as optimizers
from mada_lab.report import tables as report
from mada_lab.run.config import RunConfig, differences, from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import resolve, train
from mada_lab.sweep.experiment import Experiment, changed, fixed
from mada_lab.sweep.pool import Pool
from mada_lab.sweep.stage_folder import CONFIRM, TUNE, check_any_run, load_stage, without_paths
from mada_lab.tasks import InputError, TaskConfig, require
from mada_lab.tasks.stored import read_json, write_json

Configs = dict[str, RunConfig]


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


class NotReady(Exception):
    """Runs on which others depend are not over."""


class AllDiverged(NotReady):
    """They are, but none can be built on."""


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
    experiment = dataclasses.replace(experiment, base=_resolved_base(experiment.base))
    for label in only:
        require(label in experiment.contenders, "only", label, f"one of {', '.join(map(repr, experiment.contenders))}")
    labels = [label for label in experiment.contenders if not only or label in only]
    stages = [stage for stage in stages if stage == TUNE or experiment.confirm is not None]
    require(bool(stages), "stage", CONFIRM, f"{TUNE} for an experiment without [confirm]")
    pool = Pool(workers, address) if pool is None else pool
    _check(experiment, folders, stages, labels)
    tally = _Tally(
        on_run, [config for stage in stages for label in labels for config in _size(experiment, stage, label)]
    )
    ending = Ending()
    with pool:
        for stage in stages:
            folders[stage].mkdir(parents=True, exist_ok=True)
            # What starts at the coefficients of others comes after them.
            for dependent in (False, True):
                wave = [
                    name for name in labels if (experiment.contenders[name].coefficients_from is not None) is dependent
                ]
                kept, configs = _plan_all(experiment, stage, folders, wave, tally, ending)
                if kept and on_kept is not None:
                    on_kept(folders[stage], kept, len(configs))
                _describe(experiment, stage, folders)
                if on_progress is not None:
                    pool.on_wait = partial(_report_progress, folders[stage], configs, on_progress)
                if not _run(pool, folders[stage], configs, tally, ending):
                    ending.interrupted = True
                    return ending
    return ending


class _Tally:
    """Counts runs and steps."""

    def __init__(self, on_run: Callable[[RunReport], None], all_runs: Sequence[RunConfig]) -> None:
        self._on_run = on_run
        self._done, self._total = 0, len(all_runs)
        self._steps, self._steps_left = 0, sum(config.steps for config in all_runs)
        self._began = time.monotonic()

    def skip(self, config: RunConfig, counts: bool) -> None:
        """A run that needs no training; it ``counts`` where that is because it is over."""
        self._done += counts
        self._total -= not counts
        self._steps_left -= config.steps

    def over(self, name: str, status: str, config: RunConfig) -> None:
        self._done += 1
        self._steps += config.steps
        self._steps_left -= config.steps
        seconds_left = (time.monotonic() - self._began) / self._steps * self._steps_left
        self._on_run(RunReport(name, status, self._done, self._total, seconds_left))


def _resolved_base(base: RunConfig) -> RunConfig:
    # Its optimizer and final_lr stay as given: what is None in them means something else for each optimizer.
    return dataclasses.replace(resolve(base), optimizer=base.optimizer, final_lr=base.final_lr)


# Before anything runs.


def _check(experiment: Experiment, folders: Mapping[str, Path], stages: Sequence[str], labels: Sequence[str]) -> None:
    tasks: list[TaskConfig] = []
    for label in experiment.contenders:
        start = _first_coefficients(experiment, label)
        for stage in (TUNE, CONFIRM) if experiment.confirm else (TUNE,):
            for config in _size(experiment, stage, label):
                config = resolve(config if start is None else fixed(config, start))
                if config.task not in tasks:
                    tasks.append(config.task)
    begun: dict[Path, RunConfig] = {}
    for stage in stages:
        _check_folder(folders[stage], _stage_base(experiment, stage))
        for label in experiment.contenders:
            try:
                over, _ = _open(folders[stage], _plan(experiment, stage, folders, label))
                begun |= {folders[stage] / "runs" / name: config for name, config in over.items()}
            except AllDiverged:
                pass
            except NotReady as reason:
                if TUNE not in stages and label in labels and experiment.contenders[label].coefficients_from is None:
                    raise InputError(f"{CONFIRM} needs {TUNE}: {reason}") from None
    data = [task.build().describe() for task in tasks]
    for path, config in begun.items():
        here, there = data[tasks.index(config.task)], RunFolder(path).recorded()["data"]
        if found := differences(_content(here), _content(there)):
            raise InputError(f"{path} is a run on other data ({'; '.join(found)}); choose a new folder")


def _content(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's description says of the data themselves, wherever they came from."""
    return {
        key: _content(value) if key == "init" and value else value for key, value in data.items() if key != "source"
    }


def _first_coefficients(experiment: Experiment, label: str) -> dict[str, float] | None:
    """Where the optimizer starts whose final coefficients a contender wants; None: it wants none."""
    source = experiment.contenders[label].coefficients_from
    if source is None:
        return None
    optimizer = optimizers.build(resolve(experiment.config(source)).optimizer, nn.Linear(1, 1))
    read = getattr(optimizer, "coefficients", None)
    require(callable(read), f"coefficients_from of {label!r}", source, "a contender whose optimizer has coefficients")
    return dict(read()) if read is not None else None


def _check_folder(folder: Path, base: RunConfig) -> None:
    stored = folder / "stage.json"
    if not stored.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out must be a new or empty folder or one of an experiment, got {str(folder)!r}")
        return
    # As a configuration, which gives fields that came later their defaults.
    there = to_dict(from_dict(read_json(stored)["base"]))
    found = differences(_common(_portable(to_dict(base))), _common(_portable(there)))
    if found:
        raise InputError(f"{folder} is of another configuration ({'; '.join(found)}); choose a new folder")


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in two configurations on two machines: not where the data lie; their hashes are compared."""
    return {**config, "task": without_paths(config["task"])}


def _common(base: dict[str, Any]) -> dict[str, Any]:
    """Without what each run replaces."""
    optimizer = {key: value for key, value in base["optimizer"].items() if key in ("betas", "weight_decay")}
    return {**base, "optimizer": optimizer, "seed": None}


# What is run.


def _size(experiment: Experiment, stage: str, label: str) -> list[RunConfig]:
    """Runs of a contender, before it is known at which learning rate or coefficients."""
    if stage == TUNE:
        return list(experiment.tune(label).values())
    return list(experiment.confirmed(label, experiment.base.optimizer.lr).values())


def _stage_base(experiment: Experiment, stage: str) -> RunConfig:
    return changed(experiment.base, experiment.confirm.run if stage == CONFIRM and experiment.confirm else {})


def _plan(experiment: Experiment, stage: str, folders: Mapping[str, Path], label: str) -> Configs:
    """Runs of a contender in a stage. Raises :class:`NotReady` where they depend on others that are not over."""
    if stage == TUNE:
        configs = experiment.tune(label)
    else:
        names = _plan(experiment, TUNE, folders, label)
        configs = experiment.confirmed(label, _best_lr(_summary(folders[TUNE], label, names), len(names)))
    source = experiment.contenders[label].coefficients_from
    if source is not None:
        names = _plan(experiment, stage, folders, source)
        summary = _summary(folders[stage], source, names)
        best = _best_lr(summary, len(names))
        finals = [run.result.coefficients for run in summary.at(best)]
        means = {name: statistics.fmean(final[name] for final in finals) for name in finals[0]}
        # More seeds of the source give other coefficients, and thus other runs.
        origin = f"from-lr{best:g}-x{len(finals)}"
        configs = {f"{name}-{origin}": fixed(config, means) for name, config in configs.items()}
    return configs


def _best_lr(summary: report.Summary, total: int) -> float:
    if len(summary.runs) < total:
        raise NotReady(f"{len(summary.runs)} of {total} runs of {summary.label} are over")
    best = summary.best_lr()
    if best is None:
        raise AllDiverged(f"{summary.label} has a diverged run at each learning rate")
    return best


def _summary(folder: Path, label: str, names: Sequence[str] | Mapping[str, Any]) -> report.Summary:
    return report.load_summary(label, (RunFolder(folder / "runs" / name) for name in names))


def _open(folder: Path, configs: Configs) -> tuple[Configs, Configs]:
    """Resolved runs that are over, and those that are not. Raises where a folder holds another run of that name."""
    over: Configs = {}
    left: Configs = {}
    for name, config in configs.items():
        config, run = resolve(config), RunFolder(folder / "runs" / name)
        is_over = run.result_file.exists()
        if run.config_file.exists():
            here, there = to_dict(config), to_dict(run.config())
            if is_over:  # what is not is to be resumed, and that is possible only with the data where they were
                here, there = _portable(here), _portable(there)
            found = differences(here, there)
            if found:
                raise InputError(f"{run.path} is a run of another configuration ({'; '.join(found)})")
        (over if is_over else left)[name] = config
    return over, left


def _plan_all(
    experiment: Experiment,
    stage: str,
    folders: Mapping[str, Path],
    labels: Sequence[str],
    tally: _Tally,
    ending: Ending,
) -> tuple[int, Configs]:
    """How many runs of these contenders are over, and those that are left.

    Seeds come last to change: early on there is one of everything.
    """
    kept = 0
    all_left: Configs = {}
    for label in labels:
        try:
            over, left = _open(folders[stage], _plan(experiment, stage, folders, label))
        except NotReady as reason:
            ending.left_out.append(f"{stage} of {label}: {reason}")
            for config in _size(experiment, stage, label):
                tally.skip(config, counts=False)
            continue
        for config in over.values():
            tally.skip(config, counts=True)
        kept += len(over)
        all_left |= left
    return kept, dict(sorted(all_left.items(), key=lambda item: item[1].seed))


def _run(pool: Pool, folder: Path, configs: Configs, tally: _Tally, ending: Ending) -> bool:
    def on_over(name: str, status: str) -> None:
        if status not in ("finished", "diverged"):
            ending.failed[name] = status
        tally.over(name, status, configs[name])

    calls = {name: (to_dict(config), str((folder / "runs" / name).resolve())) for name, config in configs.items()}
    cuda = any((config.device or "").startswith("cuda") for config in configs.values())
    return pool.run(_train, calls, on_over, cuda)


def _report_progress(
    folder: Path,
    configs: Configs,
    on_progress: Callable[[Mapping[str, tuple[int, int]]], None],
    names: Sequence[str],
) -> None:
    on_progress({name: (RunFolder(folder / "runs" / name).last_step(), configs[name].steps) for name in names})


def _train(config: dict[str, Any], folder: str, **watchers: Callable[[Any], None]) -> str:
    """Train or go on; ``watchers`` are those of :func:`train`."""
    resume = RunFolder(folder).config_file.exists()
    return train(from_dict(config), folder, resume=resume, draw=False, **watchers).status


# What was found.


def _describe(experiment: Experiment, stage: str, folders: Mapping[str, Path]) -> None:
    """Write stage.json; runs that are not known yet come with the next call."""
    contenders = {}
    for label in experiment.contenders:
        try:
            names = list(_plan(experiment, stage, folders, label))
        except NotReady:
            names = []
        contenders[label] = {"runs": names, "total": len(_size(experiment, stage, label))}
    write_json(
        folders[stage] / "stage.json",
        {
            "title": experiment.title,
            "stage": stage,
            "threshold": experiment.threshold,
            "contenders": contenders,
            "base": to_dict(_stage_base(experiment, stage)),
        },
    )


def make_report(folder: Path, reference: str | None = None) -> tuple[list[report.Table], list[str]]:
    """Write table.md, results.json and the figures of what is stored in a stage's folder; the tables and notes.

    See :func:`load_stage` for the ``reference``.
    """
    from mada_lab.report.coefficient_paths import panels
    from mada_lab.report.figures import draw_betas, draw_coefficients, draw_comparison

    stage = load_stage(folder, reference)
    check_any_run(folder, [stage])
    described = stage.described
    settings = {key: value for key, value in described["base"].items() if key not in ("optimizer", "seed")}
    settings["task"] = without_paths(settings["task"])
    found = {"title": described["title"], "stage": described["stage"], "data": stage.records[0]["data"]}
    found |= {"settings": settings, "lrs": stage.lrs, "seeds": stage.seeds}
    found |= {"reference": stage.reference, "results": stage.entries}
    if stage.betas:
        found["betas"] = stage.betas
        draw_betas(stage.betas, folder / "betas", f"{stage.caption}; mean over seeds")
    write_json(folder / "results.json", found)
    tables, notes = list(stage.tables().values()), stage.notes()
    text = "\n".join([*map(report.markdown, tables), *(f"{note}\n" for note in notes)])
    (folder / "table.md").write_text(text, "utf-8")
    title = f"{stage.caption}; mean and range over {len(stage.seeds)} seeds"
    draw_comparison(stage.summaries, folder / "curves", title)
    if paths := panels(stage.summaries):
        draw_coefficients(paths, folder / "coefficients", f"{stage.caption}; a line for each run")
    return tables, notes
