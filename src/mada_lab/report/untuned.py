"""What optimizers give without tuning, beside what tuning gives, from sweeps that have both.

A sweep has contenders on a grid of learning rates. Beside "adamw" it has one of the label "adamw, defaults", which runs
at the default arguments of its package. ``experiments/untuned`` has such sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mada_lab.errors import require
from mada_lab.files import prepare_file
from mada_lab.report.results import REFERENCE, results
from mada_lab.report.tables import Table, markdown, mean_and_half, without_empty_columns
from mada_lab.stats import mean_interval, paired_difference
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import StoredStage, load_stages
from mada_lab.text import count, rounded

DEFAULTS = ", defaults"
"""What the label of a contender at the default arguments of its package ends with."""
_NOTE = (
    "Differences of final validation losses to tuned {reference}, whose own are in the first row; negative is better. "
    "±: half width of the 95 % t interval over seeds, paired by seed. Last column: on how many tasks an optimizer is "
    "better, equal and worse, by more than the interval."
)


@dataclass(frozen=True)
class Sweep:
    """The stages of a sweep: the grid, and the runs with more seeds, which are the grid's where there are no others."""

    title: str
    grid: StoredStage
    full: StoredStage

    def contender(self, label: str) -> ContenderRuns | None:
        """Return the runs of a label with all seeds; None where there are none."""
        return next((each for each in self.full.contenders if each.label == label), None)

    def labels(self) -> list[str]:
        """Return the labels without those that end with :data:`DEFAULTS`."""
        labels = [each.label for stage in (self.grid, self.full) for each in stage.contenders]
        return list(dict.fromkeys(label.removesuffix(DEFAULTS) for label in labels))


def load_sweep(folder: Path) -> Sweep:
    """Return the sweep of a folder. Raise :class:`InputError` where it has no run that is over."""
    stages = [stage for stage in load_stages(folder) if stage.runs]
    return Sweep(stages[0].described["title"], stages[0], stages[-1])


def write_untuned(
    folders: Sequence[Path], out: Path, labels: Sequence[str] | None = None, reference: str | None = None
) -> None:
    """Write the tables in Markdown: all tasks untuned, all tasks tuned, and each task by itself.

    Args:
        folders: of sweeps.
        out: the file.
        labels: optimizers to be shown, in this order; None: all.
        reference: optimizer at whose best learning rate the others are measured; None: AdamW.

    Raises:
        InputError: a folder holds no sweep, or there is no run of a label.
    """
    prepare_file(out)
    sweeps = [load_sweep(folder) for folder in folders]
    known = list(dict.fromkeys(label for sweep in sweeps for label in sweep.labels()))
    for label in (*(labels or ()), reference or REFERENCE):
        require(label in known, "label", label, f"one of {', '.join(map(repr, known))}")
    shown = list(labels or known)
    parts = [
        "Untuned, at the default arguments of its package:",
        markdown(joint_table(sweeps, [(label, f"{label}{DEFAULTS}") for label in shown], reference or REFERENCE)),
        "At the best learning rate of the grid:",
        markdown(joint_table(sweeps, [(label, label) for label in shown], reference or REFERENCE)),
        _NOTE.format(reference=reference or REFERENCE),
    ]
    for sweep in sweeps:
        parts += [f"### {sweep.title}", markdown(task_table(sweep, shown))]
    out.write_text("\n\n".join(part.rstrip() for part in parts) + "\n", "utf-8")


def joint_table(sweeps: Sequence[Sweep], rows: Sequence[tuple[str, str]], reference: str = REFERENCE) -> Table:
    """Return one row for each optimizer, with a column for each sweep: minus the tuned reference.

    Args:
        sweeps: of the columns.
        rows: header of a row, and the label of its contender. Labels that no sweep has are left out.
        reference: label of the contender that the others are compared with, in the first row.
    """
    bases = [sweep.contender(reference) for sweep in sweeps]
    table = [["optimizer", *(sweep.title for sweep in sweeps), "better, equal, worse"]]
    table.append([f"{reference}, tuned", *map(_loss, bases), "-"])
    for header, label in rows:
        contenders = [sweep.contender(label) for sweep in sweeps]
        if label == reference or not any(contenders):
            continue
        cells, counts = [], [0, 0, 0]
        for contender, base in zip(contenders, bases, strict=True):
            diverged = contender is not None and contender.best_lr() is None
            mean, half = _difference(contender, base) or (math.nan, None)
            cells.append("diverged" if diverged else "-" if math.isnan(mean) else mean_and_half(mean, half, "+"))
            if diverged or half is not None:
                counts[2 if diverged or mean > (half or 0.0) else 0 if mean < -(half or 0.0) else 1] += 1
        table.append([header, *cells, ", ".join(map(str, counts))])
    return table


def task_table(sweep: Sweep, labels: Sequence[str]) -> Table:
    """Return one row for each contender of a sweep: at its best learning rate, and over the grid where it has one."""
    rows = [row for label in labels for row in (f"{label}{DEFAULTS}", label)]
    contenders = [contender for row in rows if (contender := sweep.contender(row)) is not None]
    grids = {each.label: each for each in sweep.grid.contenders}
    entries = results(contenders)
    measures = list(dict.fromkeys(name for entry in entries for name in entry.get("measures", {})))
    seeds = len(sweep.grid.seeds)
    worst = f"worst of the grid, {count(seeds, 'seed')}"
    table = [["optimizer", "seeds", "final loss", *measures, "learning rate", worst, "its learning rate", "range"]]
    for contender, entry in zip(contenders, entries, strict=True):
        best = contender.best_lr()
        known = entry.get("measures", {})
        others = [rounded(known[name]) if name in known else "-" for name in measures]
        grid = grids.get(contender.label)
        spread = ["-", "-", "-"] if grid is None or len(grid.lrs()) < 2 else _spread(grid)
        rate = "-" if best is None else f"{best:g}"
        number = str(len(contender.at(best)) or "-")
        table.append([contender.label, number, _loss(contender), *others, rate, *spread])
    return without_empty_columns(table)


def _spread(grid: ContenderRuns) -> list[str]:
    """Return the worst mean loss of a grid, its learning rate, and how far it is above the best."""
    means = {lr: grid.mean_final(lr) for lr in grid.lrs()}
    diverged = [lr for lr, mean in means.items() if mean is None]
    if diverged:
        return ["diverged", ", ".join(f"{lr:g}" for lr in diverged), "-"]
    finite = {lr: mean for lr, mean in means.items() if mean is not None}
    worst = max(finite, key=finite.__getitem__)
    return [rounded(finite[worst]), f"{worst:g}", rounded(finite[worst] - min(finite.values()))]


def _loss(contender: ContenderRuns | None) -> str:
    if contender is None:
        return "-"
    finals = contender.finals(contender.best_lr())
    return mean_and_half(*mean_interval(finals)) if finals else "diverged"


def _difference(contender: ContenderRuns | None, base: ContenderRuns | None) -> tuple[float, float | None] | None:
    """Return the mean difference over the seeds that both have, and its interval; None: there is none."""
    if contender is None or base is None:
        return None
    ours, theirs = (
        {run.seed: run.result.val_loss for run in each.at(each.best_lr()) if run.result.val_loss is not None}
        for each in (contender, base)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None
