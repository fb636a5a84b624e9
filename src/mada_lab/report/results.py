"""What a comparison found, as JSON values: everything that tables say, unrounded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mada_lab.files import finite
from mada_lab.run.stored import StoredRun
from mada_lab.stats import mean_interval, paired_difference
from mada_lab.sweep.contender_runs import ContenderRuns, final_losses, or_infinite

REFERENCE = "adamw"
FINAL_LOSSES = ("train_loss", "val_loss")
Entries = Sequence[dict[str, Any]]  # of each optimizer, see results()


def results(contenders: Sequence[ContenderRuns], reference: str = REFERENCE) -> list[dict[str, Any]]:
    """Return one entry for each optimizer, as JSON values: everything that the tables say, unrounded.

    ``reference`` is the label of the one that the others are compared with, if it is there.
    """
    compared = next((contender for contender in contenders if contender.label == reference), None)
    usable = [contender for contender in contenders if contender.best_lr() is not None]
    best = min(usable, key=lambda contender: statistics.fmean(contender.finals(contender.best_lr())), default=None)
    return [_entry(contender, compared, best) for contender in contenders]


def _entry(
    contender: ContenderRuns, reference: ContenderRuns | None, best_of_all: ContenderRuns | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "optimizer": contender.label,
        "by_lr": [_at_lr(contender, lr, reference) for lr in contender.lrs()],
        "best_lr": contender.best_lr(),
        "best_lr_edge": contender.edge(contender.best_lr()),
    }
    best = contender.at(contender.best_lr())
    if not best:
        return entry
    for name in ("val_loss", "best_val_loss", "train_loss"):
        entry[name], entry[f"{name}_ci95"] = mean_interval([getattr(run.result, name) for run in best])
    measured = [run.result.val for run in best if run.result.status != "diverged"]
    names = [name for name in measured[0] if all(name in values for values in measured)] if measured else []
    entry["measures"] = {name: statistics.fmean(values[name] for values in measured) for name in names}
    for name in ("step_seconds", "optimizer_seconds"):
        entry[name] = statistics.median(getattr(run.result, name) for run in best)
    if reference is not None and reference.at(reference.best_lr()):
        target = statistics.fmean(reference.finals(reference.best_lr()))
        entry["steps_to_reference"] = contender.steps_to(target)
    for name, other in (("difference", reference), ("difference_to_best", best_of_all)):
        if other is not None and other is not contender:
            entry |= _difference(name, best, other.at(other.best_lr()))
    return entry


def _at_lr(contender: ContenderRuns, lr: float, reference: ContenderRuns | None) -> dict[str, Any]:
    cell = {"lr": lr, "val_loss": contender.finals(lr), "diverged": contender.diverged(lr)}
    if reference is not None and reference is not contender:
        cell |= _difference("difference", contender.at(lr), reference.at(lr))
    return cell


def _difference(name: str, runs: Sequence[StoredRun], others: Sequence[StoredRun]) -> dict[str, Any]:
    """Return the difference of final validation losses, paired by seed, and its interval; {} where there is none."""
    pairs = [[run.result.val_loss for run in each] for each in (runs, others)]
    if not runs or [run.seed for run in runs] != [run.seed for run in others] or None in (*pairs[0], *pairs[1]):
        return {}
    mean, half = paired_difference(*pairs)  # type: ignore[arg-type]
    return {name: mean, f"{name}_ci95": half}


def edges(entries: Entries) -> list[str]:
    """Return which optimizers of :func:`results` or :func:`betas_results` are best at the edge of their grid."""
    at_edge = [
        (entry["optimizer"], entry[name], entry[f"{name}_edge"])
        for entry in entries
        for name in ("best_lr", "lr")
        if entry.get(f"{name}_edge") is not None
    ]
    return [f"{label} ({lr:g}, the {edge})" for label, lr, edge in at_edge]


def median_train_loss(contenders: Sequence[ContenderRuns]) -> float:
    """Return the median training loss of all runs."""
    return statistics.median(loss for contender in contenders for loss in final_losses(contender.runs, "train_loss"))


def betas_results(
    contenders: Sequence[ContenderRuns], threshold: float, reference: str = REFERENCE
) -> list[dict[str, Any]]:
    """Return how much the start of the betas matters: one entry for each optimizer, as JSON values.

    ``share`` is that of the runs whose final training loss is below ``threshold``; losses at a start are means over
    seeds. None stands for a diverged run. ``better`` counts the starts at which the validation loss is below that of
    the ``reference``, of those ``compared``, which both have.
    """
    entries = []
    for contender in contenders:
        runs = contender.at(contender.robust_lr())
        starts: list[dict[str, Any]] = []
        for betas in contender.betas():
            there = [run for run in runs if run.betas == betas]
            means = {name: finite(statistics.fmean(final_losses(there, name))) for name in FINAL_LOSSES if there}
            starts.append({"betas": list(betas), **means})
        train = final_losses(runs, "train_loss")
        entry: dict[str, Any] = {"optimizer": contender.label, "lr": contender.robust_lr(), "runs": len(runs)}
        entry["lr_edge"] = contender.edge(contender.robust_lr())
        entry["starts"] = starts
        entry["share"] = sum(loss < threshold for loss in train) / len(train)
        for name in FINAL_LOSSES:
            losses = final_losses(runs, name)
            entry[f"{name}_median"], entry[f"{name}_worst"] = finite(statistics.median(losses)), finite(max(losses))
        entries.append(entry)
    theirs = next((_by_start(entry) for entry in entries if entry["optimizer"] == reference), None)
    if theirs is not None:
        for entry in entries:
            ours = _by_start(entry)
            common = ours.keys() & theirs.keys()
            entry["better"], entry["compared"] = sum(ours[start] < theirs[start] for start in common), len(common)
    return entries


def _by_start(entry: dict[str, Any]) -> dict[tuple[float, ...], float]:
    """Return the validation losses of an entry of :func:`betas_results`, infinite where a run diverged."""
    trained = (start for start in entry["starts"] if "val_loss" in start)
    return {tuple(start["betas"]): or_infinite(start["val_loss"]) for start in trained}
