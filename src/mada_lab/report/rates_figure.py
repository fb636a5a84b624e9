"""The figure of final losses over learning rates, a panel for each task, drawn from stored stages."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mada_lab.errors import require
from mada_lab.figures import save_figure, spaced
from mada_lab.files import prepare_file
from mada_lab.run.coefficients import scales_of
from mada_lab.run.config import RunConfig
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import StoredStage, load_stages
from mada_lab.tasks.registry import make_task, without_paths
from mada_lab.text import count
from mada_optim.history.drawing import look, style
from mada_optim.history.notation import SCALE

MOST_COLUMNS = 4
"""Panels beside each other, at most."""
_SCHEDULE = ("warmup", "final_lr", "accumulate", "clip")


@dataclass(frozen=True)
class TaskRates:
    """What was trained on one task for one number of steps: contenders by label."""

    title: str
    contenders: Mapping[str, ContenderRuns]


def by_task(stages: Sequence[StoredStage], labels: Sequence[str] | None = None) -> list[TaskRates]:
    """Join the stages of equal task, data, number of steps and schedule.

    Args:
        stages: a task has the title of its first stage, up to a comma between words. Where two stages have the same
            label, the later one counts.
        labels: what is shown, in this order; None: everything.
    """
    joined: dict[str, tuple[str, dict[str, ContenderRuns]]] = {}
    for stage in stages:
        base = stage.described["base"]
        title = f"{stage.described['title'].partition(', ')[0]}, {count(base['steps'], 'step')}"
        # As a configuration, which gives fields that came later their defaults.
        task = without_paths({"kind": base["task"]["kind"], **dataclasses.asdict(make_task(base["task"]))})
        schedule = {name: base.get(name, getattr(RunConfig, name)) for name in _SCHEDULE}
        key = json.dumps([base["steps"], task, schedule, _weights_and_data(stage)], sort_keys=True)
        _, contenders = joined.setdefault(key, (title, {}))
        contenders |= {contender.label: contender for contender in stage.contenders}
    tasks = [
        TaskRates(title, {label: by_label[label] for label in labels or by_label if label in by_label})
        for title, by_label in joined.values()
    ]
    return [task for task in tasks if task.contenders]


def write_rates(folders: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw the stages of these folders.

    Args:
        folders: each is that of a stage, a comparison or a sweep.
        out: the file; its suffix is replaced by .png and .svg.
        labels: see :func:`by_task`.

    Returns:
        The files.

    Raises:
        InputError: a folder is none of these, there is no run of ``labels``, or a file cannot be written.
    """
    written = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in written:
        prepare_file(path)
    stages = [stage for folder in folders for stage in load_stages(folder) if stage.runs]
    known = {contender.label for stage in stages for contender in stage.contenders}
    for label in labels or ():
        require(label in known, "only", label, f"one of {', '.join(map(repr, sorted(known)))}")
    draw_rates(by_task(stages, labels), out)
    return written


def _weights_and_data(stage: StoredStage) -> list[str]:
    data = stage.records[0]["data"]
    return [data.get("sha256", data["source"]), (data.get("init") or {}).get("sha256", "")]


def finds_its_rate(contender: ContenderRuns) -> bool:
    """Whether all runs searched for the learning rate: the rate that was given then changes nothing."""
    return all(
        any(name.startswith(SCALE) for line in run.metrics for name in line.get("coefficients", ()))
        for run in contender.runs
    )


def draw_rates(tasks: Sequence[TaskRates], path: Path) -> None:
    """Draw ``path``.png and .svg: mean final validation losses over the learning rates that were given.

    Lines are means over seeds, dashes are runs. A learning rate at which a run diverged is left out. An optimizer that
    finds its rate, and ran at one given rate alone, is a line across. Stars are the rates that were found: a full one
    that of matrices, or of all parameters, an empty one that of the rest. Losses far above the others are cut off.
    """
    rows = math.ceil(len(tasks) / MOST_COLUMNS)
    columns = math.ceil(len(tasks) / rows)
    labels = list(dict.fromkeys(label for task in tasks for label in task.contenders))
    with style():
        figure = Figure(figsize=(1.0 + 3.6 * columns, 0.8 + 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(tasks) :]:
            axes.set_axis_off()
        for axes, task in zip(panels.flat, tasks, strict=False):
            for label, contender in task.contenders.items():
                _draw(axes, contender, labels.index(label))
            lrs = spaced(sorted({lr for each in task.contenders.values() for lr in each.lrs()}), most=5)
            axes.set(title=textwrap.fill(task.title, 34), xlabel="given learning rate", xscale="log")
            axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
            axes.minorticks_off()
            axes.set_ylim(*_shown(task))
        for axes in panels[:, 0]:
            axes.set_ylabel("final validation loss")
        keys = {
            text: line for axes in panels.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        options = {"ncols": min(len(labels), 6), "frameon": False}
        figure.legend([keys[label] for label in labels], labels, loc="outside upper center", **options)
        save_figure(figure, path)


def _shown(task: TaskRates) -> tuple[float | None, float | None]:
    """From the lowest loss to the highest mean within Tukey's fence, and a little more; None: there are too few."""
    each = [[contender.mean_final(lr) for lr in contender.lrs()] for contender in task.contenders.values()]
    means = sorted(mean for means in each for mean in means if mean is not None)
    if len(means) < 4:
        return None, None
    low, _, high = statistics.quantiles(means)
    top = max(mean for mean in means if mean <= high + 1.5 * (high - low))
    bottom = min(loss for each in task.contenders.values() for lr in each.lrs() for loss in each.finals(lr))
    margin = 0.05 * (top - bottom)
    return bottom - margin, top + margin


def _draw(axes: Axes, contender: ContenderRuns, number: int) -> None:
    colour, dashes = look(number)
    for run in contender.runs:
        final = math.nan if run.result.val_loss is None else run.result.val_loss
        for kind, rate in scales_of(run.result.coefficients).items():
            face = "none" if kind == "rest" else colour
            axes.plot(rate, final, "*", color=colour, mfc=face, ms=9, mew=0.8, zorder=3)
    finals = {lr: loss for lr in contender.lrs() if (loss := contender.mean_final(lr)) is not None}
    if len(finals) == 1 and finds_its_rate(contender):
        axes.axhline(*finals.values(), color=colour, ls="dashed", label=contender.label)
        return
    axes.plot(list(finals), list(finals.values()), "o", color=colour, ls=dashes, ms=4, label=contender.label)
    for lr in finals:
        values = contender.finals(lr)
        axes.plot([lr] * len(values), values, "_", color=colour, ms=7, alpha=0.6)
