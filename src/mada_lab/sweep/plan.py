"""The plan of an experiment: each of its runs, resolved once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from mada_lab.errors import require
from mada_lab.optimizers.build import build
from mada_lab.run.config import ResolvedRun, RunConfig, on_this_machine, resolve
from mada_lab.sweep.changes import changed
from mada_lab.sweep.contender_runs import ContenderRuns, load_contender
from mada_lab.sweep.experiment import LR, Experiment, fixed
from mada_lab.sweep.stage_folder import CONFIRM, TUNE, run_folder
from mada_lab.tasks.base import TaskConfig

Runs = dict[str, ResolvedRun]
"""Runs by the name of their folder."""


class NotReady(Exception):
    """Runs on which others depend are not over."""


class AllDiverged(NotReady):
    """They are over, and none can be built on."""


class Plan:
    """All runs of an experiment, resolved when the plan is made and never again.

    Some values are known only when other runs are over: the best learning rate, the coefficients of another contender.
    Until then a run is a draft with others in their place.

    Args:
        experiment: what is trained.
        folders: of the stages, by name; from there comes what is known of runs that are over.

    Raises:
        InputError: a run cannot be trained as described.
    """

    def __init__(self, experiment: Experiment, folders: Mapping[str, Path]) -> None:
        self.experiment, self.folders = experiment, folders
        self.bases = {TUNE: on_this_machine(experiment.base)}
        """What all runs of a stage have in common, by the name of the stage."""
        if experiment.confirm is not None:
            self.bases[CONFIRM] = changed(self.bases[TUNE], experiment.confirm.run)
        dependent = [label for label, each in experiment.contenders.items() if each.sources]
        independent = [label for label in experiment.contenders if label not in dependent]
        self.waves = [independent, dependent] if dependent else [independent]
        """Labels of the contenders: those that need what others found come after these."""
        self._drafts: dict[tuple[str, str], Runs] = {}
        self._ready: dict[tuple[str, str], Runs] = {}
        for label in (*independent, *dependent):
            start = self._first_coefficients(label)
            for stage in self.bases:
                configs = self._configs(stage, label, experiment.base.optimizer.lr if stage == CONFIRM else None)
                self._drafts[stage, label] = {
                    name: resolve(config if start is None else fixed(config, start)) for name, config in configs.items()
                }

    def drafts(self, stage: str, label: str) -> list[ResolvedRun]:
        """Return the runs of a contender in a stage, with other values where theirs are not known yet."""
        return list(self._drafts[stage, label].values())

    def runs(self, stage: str, label: str) -> Runs:
        """Return the runs of a contender in a stage. Raise :class:`NotReady` where others must be over before."""
        if (stage, label) not in self._ready:
            self._ready[stage, label] = self._finished(stage, label, self._drafts[stage, label])
        return self._ready[stage, label]

    def tasks(self) -> list[TaskConfig]:
        """Return the tasks of all runs, each once."""
        tasks: list[TaskConfig] = []
        for drafts in self._drafts.values():
            tasks += [draft.task for draft in drafts.values() if draft.task not in tasks]
        return tasks

    def _finished(self, stage: str, label: str, runs: Runs) -> Runs:
        """Put what is known by now into drafts, and into their names."""
        contender = self.experiment.contenders[label]
        chosen_by = label if stage == CONFIRM else contender.lr_from
        if chosen_by is not None:
            lr, _ = self._best(TUNE, chosen_by)
            names = self._configs(stage, label, lr)
            runs = {name: changed(run, {LR: lr}) for name, run in zip(names, runs.values(), strict=True)}
        source = contender.coefficients_from
        if source is not None:
            best, learners = self._best(stage, source)
            finals = [run.result.coefficients for run in learners.at(best)]
            means = {name: statistics.fmean(final[name] for final in finals) for name in finals[0]}
            # More seeds of the source give other coefficients, and thus other runs.
            runs = {f"{name}-from-lr{best:g}-x{len(finals)}": fixed(run, means) for name, run in runs.items()}
        return runs

    def _configs(self, stage: str, label: str, lr: float | None) -> Mapping[str, RunConfig]:
        return self.experiment.tune(label, lr) if stage == TUNE else self.experiment.confirmed(label, lr)

    def _best(self, stage: str, label: str) -> tuple[float, ContenderRuns]:
        """Return the best learning rate of a contender in a stage, and its runs there."""
        planned = self.runs(stage, label)
        contender = load_contender(label, (run_folder(self.folders[stage], name) for name in planned))
        if len(contender.runs) < len(planned):
            raise NotReady(f"{len(contender.runs)} of {len(planned)} runs of {label} are over")
        best = contender.best_lr()
        if best is None:
            raise AllDiverged(f"{label} has a diverged run at each learning rate")
        return best, contender

    def _first_coefficients(self, label: str) -> dict[str, float] | None:
        """Return where the optimizer starts whose final coefficients a contender wants; None: it wants none."""
        source = self.experiment.contenders[label].coefficients_from
        if source is None:
            return None
        optimizer = build(self.drafts(TUNE, source)[0].optimizer, nn.Linear(1, 1))
        read = getattr(optimizer, "coefficients", None)
        allowed = "a contender whose optimizer has coefficients"
        require(callable(read), f"coefficients_from of {label!r}", source, allowed)
        return dict(read()) if read is not None else None
