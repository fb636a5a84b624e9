"""What a comparison found: summaries and tables, made from the folders of its runs alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mada_lab.report.stats import mean_interval, paired_difference
from mada_lab.run.folder import Metrics, RunFolder, finite
from mada_lab.run.result import Result, summarize
from mada_lab.tasks.stored import read_json

REFERENCE = "adamw"
EDGE_MARK = "†"  # of a best learning rate at the edge of its grid
FINAL_LOSSES = ("train_loss", "val_loss")
Table = list[list[str]]  # the first row is the header
Entries = Sequence[dict[str, Any]]  # of each optimizer, see results()


@dataclass(frozen=True)
class StoredRun:
    """A run that is over. ``betas`` is where they started; None: where the optimizer has them start.

    ``name`` is that of its folder.
    """

    lr: float
    betas: tuple[float, float] | None
    seed: int
    result: Result
    metrics: Metrics
    name: str = ""


@dataclass(frozen=True)
class Summary:
    """All runs of one optimizer.

    ``grid`` are the learning rates among which that of the runs was chosen in an earlier stage, if there was one.
    """

    label: str
    runs: Sequence[StoredRun]
    grid: Sequence[float] = ()

    def lrs(self) -> list[float]:
        return sorted({run.lr for run in self.runs})

    def at(self, lr: float | None) -> list[StoredRun]:
        """Runs at one learning rate, by start of the betas, where these vary, and seed."""
        return sorted((run for run in self.runs if run.lr == lr), key=lambda run: (run.betas or (), run.seed))

    def finals(self, lr: float | None) -> list[float]:
        """Final validation losses; those of diverged runs are missing."""
        return [run.result.val_loss for run in self.at(lr) if run.result.val_loss is not None]

    def diverged(self, lr: float | None) -> int:
        return len(self.at(lr)) - len(self.finals(lr))

    def mean_final(self, lr: float) -> float | None:
        """Mean final validation loss; None where any seed diverged: a mean over the lucky ones would flatter."""
        return None if self.diverged(lr) or not self.at(lr) else statistics.fmean(self.finals(lr))

    def best_lr(self) -> float | None:
        """Learning rate with the lowest mean final validation loss; None where each has a diverged run."""
        means = {lr: mean for lr in self.lrs() if (mean := self.mean_final(lr)) is not None}
        return min(means, key=means.__getitem__) if means else None

    def edge(self, lr: float | None) -> str | None:
        """Which edge of its grid a learning rate is, "lowest" or "highest"; None for one that lies inside."""
        grid = {*self.grid, *self.lrs()}
        if lr is None or len(grid) < 2:
            return None
        return {min(grid): "lowest", max(grid): "highest"}.get(lr)

    def betas(self) -> list[tuple[float, float]]:
        return sorted({run.betas for run in self.runs if run.betas is not None})

    def robust_lr(self) -> float:
        """Learning rate with the lowest median final validation loss, a diverged run counting as the worst."""
        return min(self.lrs(), key=lambda lr: statistics.median(_losses(self.at(lr), "val_loss")))

    def shown_lr(self) -> float:
        """Where single runs are shown: the best learning rate, or that of the table of betas where these vary."""
        best = self.best_lr()
        return self.robust_lr() if best is None or len(self.betas()) > 1 else best

    def curves(self) -> dict[int, list[float]]:
        """Validation losses of all seeds by step, at the best learning rate."""
        curves: dict[int, list[float]] = {}
        for run in self.at(self.best_lr()):
            for line in run.metrics:
                if line.get("val_loss") is not None:
                    curves.setdefault(line["step"], []).append(line["val_loss"])
        return curves

    def band(self) -> tuple[list[int], list[float], list[float], list[float]]:
        """Steps, and mean, lowest and highest validation loss of all seeds at each, at the best learning rate."""
        curves = sorted(self.curves().items())
        means, lows, highs = ([pick(losses) for _, losses in curves] for pick in (statistics.fmean, min, max))
        return [step for step, _ in curves], means, lows, highs

    def steps_to(self, target: float) -> int | None:
        """First validated step at which the mean over seeds is at ``target`` or below."""
        reached = (step for step, values in sorted(self.curves().items()) if statistics.fmean(values) <= target)
        return next(reached, None)


def load_run(folder: RunFolder, under_way: bool = False) -> StoredRun | None:
    """A run from its folder. None where it is not over, or, where it may be ``under_way``, has not begun."""
    if not folder.result_file.exists() and not under_way:
        return None
    config, metrics = folder.config(), folder.metrics()
    if folder.result_file.exists():
        result = Result(**read_json(folder.result_file))
    elif metrics:
        result = summarize(metrics, "interrupted", {}, 0)
    else:
        return None
    assert config.optimizer.lr is not None  # what is stored is resolved
    return StoredRun(config.optimizer.lr, config.optimizer.betas, config.seed, result, metrics, folder.path.name)


def load_summary(label: str, folders: Iterable[RunFolder]) -> Summary:
    """The runs of these folders that are over."""
    return Summary(label, [run for folder in folders if (run := load_run(folder)) is not None])


def results(summaries: Sequence[Summary], reference: str = REFERENCE) -> list[dict[str, Any]]:
    """One entry for each optimizer, as JSON values: everything that the tables say, unrounded.

    ``reference`` is the label of the one that the others are compared with, if it is there.
    """
    compared = next((summary for summary in summaries if summary.label == reference), None)
    usable = [summary for summary in summaries if summary.best_lr() is not None]
    best = min(usable, key=lambda summary: statistics.fmean(summary.finals(summary.best_lr())), default=None)
    return [_entry(summary, compared, best) for summary in summaries]


def _entry(summary: Summary, reference: Summary | None, best_of_all: Summary | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "optimizer": summary.label,
        "by_lr": [_at_lr(summary, lr, reference) for lr in summary.lrs()],
        "best_lr": summary.best_lr(),
        "best_lr_edge": summary.edge(summary.best_lr()),
    }
    best = summary.at(summary.best_lr())
    if not best:
        return entry
    for name in ("val_loss", "best_val_loss", "train_loss"):
        entry[name], entry[f"{name}_ci95"] = mean_interval([getattr(run.result, name) for run in best])
    for name in ("step_seconds", "optimizer_seconds"):
        entry[name] = statistics.median(getattr(run.result, name) for run in best)
    if reference is not None and reference.at(reference.best_lr()):
        target = statistics.fmean(reference.finals(reference.best_lr()))
        entry["steps_to_reference"] = summary.steps_to(target)
    for name, other in (("difference", reference), ("difference_to_best", best_of_all)):
        if other is not None and other is not summary:
            entry |= _difference(name, best, other.at(other.best_lr()))
    return entry


def _at_lr(summary: Summary, lr: float, reference: Summary | None) -> dict[str, Any]:
    cell = {"lr": lr, "val_loss": summary.finals(lr), "diverged": summary.diverged(lr)}
    if reference is not None and reference is not summary:
        cell |= _difference("difference", summary.at(lr), reference.at(lr))
    return cell


def _difference(name: str, runs: Sequence[StoredRun], others: Sequence[StoredRun]) -> dict[str, Any]:
    """Return the difference of final validation losses, paired by seed, and its interval; {} where there is none."""
    pairs = [[run.result.val_loss for run in each] for each in (runs, others)]
    if not runs or [run.seed for run in runs] != [run.seed for run in others] or None in (*pairs[0], *pairs[1]):
        return {}
    mean, half = paired_difference(*pairs)  # type: ignore[arg-type]
    return {name: mean, f"{name}_ci95": half}


def loss_table(entries: Entries) -> Table:
    """Losses of each optimizer at its best learning rate."""
    names = ("val_loss", "best_val_loss", "train_loss")
    table = [["optimizer", "best lr", "final val loss", "best val loss", "final train loss"]]
    for entry in entries:
        if entry["best_lr"] is None:
            table.append([entry["optimizer"], "-", "diverged", "-", "-"])
        else:
            losses = [_plus_minus(entry, name) for name in names]
            table.append([entry["optimizer"], _marked(f"{entry['best_lr']:g}", entry["best_lr_edge"]), *losses])
    return table


def reference_table(entries: Entries, reference: str = REFERENCE) -> Table:
    """Each optimizer against the reference and the best, all at their best learning rates, and what it costs."""
    header, *times = time_table(entries)
    losses = [f"final val loss minus {reference}'s", "minus the best's", f"steps to {reference}'s final"]
    table = [[header[0], *losses, *header[1:]]]
    for entry, (label, *seconds) in zip(entries, times, strict=True):
        differences = [_difference_cell(entry, name) for name in ("difference", "difference_to_best")]
        steps = entry.get("steps_to_reference")
        table.append([label, *differences, "-" if steps is None else str(steps), *seconds])
    return table


def time_table(entries: Entries) -> Table:
    """What a step of each optimizer costs."""
    table = [["optimizer", "ms per step", "of these optimizer"]]
    for entry in entries:
        seconds = [entry.get(name) for name in ("step_seconds", "optimizer_seconds")]
        table.append([entry["optimizer"], *("-" if each is None else f"{1000 * each:.1f}" for each in seconds)])
    return table


def without_empty_columns(table: Table) -> Table:
    """
    >>> without_empty_columns([["", "a", "b"], ["x", "-", "1"], ["y", "-", "-"]])
    [['', 'b'], ['x', '1'], ['y', '-']]
    """
    kept = [i for i, column in enumerate(zip(*table[1:], strict=True)) if i == 0 or set(column) != {"-"}]
    return [[row[i] for i in kept] for row in table]


def lr_table(entries: Entries) -> Table:
    """Mean final validation loss of every optimizer at every learning rate."""
    lrs = sorted({cell["lr"] for entry in entries for cell in entry["by_lr"]})
    table = [["optimizer", *(f"lr {lr:g}" for lr in lrs)]]
    for entry in entries:
        cells = {cell["lr"]: _lr_cell(cell) for cell in entry["by_lr"]}
        if entry["best_lr"] is not None:
            cells[entry["best_lr"]] = _marked(cells[entry["best_lr"]], entry["best_lr_edge"])
        table.append([entry["optimizer"], *(cells.get(lr, "-") for lr in lrs)])
    return table


def lr_difference_table(entries: Entries) -> Table:
    """Each optimizer against the reference at every learning rate that both were trained at."""
    cells = {entry["optimizer"]: {at["lr"]: at for at in entry["by_lr"] if "difference" in at} for entry in entries}
    lrs = sorted({lr for found in cells.values() for lr in found})
    table = [["optimizer", *(f"lr {lr:g}" for lr in lrs)]]
    for name, found in cells.items():
        if found:
            shown = {lr: _plus_minus(at, "difference", "+") for lr, at in found.items()}
            table.append([name, *(shown.get(lr, "-") for lr in lrs)])
    return table


JOINT_NOTE = (
    "Final validation losses in nats minus those of the optimizer in the first row, whose own stand there; each at its "
    "best learning rate. ±: half width of the 95 % t interval over seeds, paired by seed. Lower, higher: in how many "
    "of the experiments, by more than the interval; of many such comparisons some are chance."
)


def joint_table(experiments: Sequence[tuple[str, Entries]], reference: str = REFERENCE) -> Table | None:
    """Each optimizer against the reference in several experiments, given by title; None: fewer than two compare any."""
    experiments = [(title, entries) for title, entries in experiments if any("difference" in each for each in entries)]
    if len(experiments) < 2:
        return None
    found = [{entry["optimizer"]: entry for entry in entries} for _, entries in experiments]
    table = [["optimizer", *(title for title, _ in experiments), "lower", "higher"]]
    losses = [_marked(_plus_minus(each[reference], "val_loss"), each[reference]["best_lr_edge"]) for each in found]
    table.append([reference, *losses, "-", "-"])
    for label in dict.fromkeys(label for entries in found for label in entries if label != reference):
        entries = [each.get(label, {}) for each in found]
        sure = [each for each in entries if each.get("difference_ci95") is not None]
        counts = [sum(sign * each["difference"] > each["difference_ci95"] for each in sure) for sign in (-1, 1)]
        cells = [_difference_cell(each, "difference") for each in entries]
        table.append([label, *cells, *(f"{number} of {len(sure)}" for number in counts)])
    return table


def edges(entries: Entries) -> list[str]:
    """Which of the optimizers, of :func:`results` or :func:`betas_results`, are best at the edge of their grid."""
    found = [
        (entry["optimizer"], entry[name], entry[f"{name}_edge"])
        for entry in entries
        for name in ("best_lr", "lr")
        if entry.get(f"{name}_edge") is not None
    ]
    return [f"{label} ({lr:g}, the {edge})" for label, lr, edge in found]


def edge_note(at_edge: Sequence[str]) -> str:
    """Return what the mark in a table means, and of whom it says so, as :func:`edges` names them."""
    return (
        f"{EDGE_MARK} The best learning rate is at the edge of its grid, and a better one may lie beyond: "
        f"{', '.join(dict.fromkeys(at_edge))}."
    )


def _marked(cell: str, edge: str | None) -> str:
    return cell if edge is None else f"{cell} {EDGE_MARK}"


def _difference_cell(entry: dict[str, Any], name: str) -> str:
    return _marked(_plus_minus(entry, name, "+"), entry["best_lr_edge"] if name in entry else None)


def _lr_cell(cell: dict[str, Any]) -> str:
    if cell["diverged"]:
        return f"{cell['diverged']} of {cell['diverged'] + len(cell['val_loss'])} diverged"
    return rounded(statistics.fmean(cell["val_loss"]))


def median_train_loss(summaries: Sequence[Summary]) -> float:
    """Return the median training loss of all runs."""
    return statistics.median(loss for summary in summaries for loss in _losses(summary.runs, "train_loss"))


def betas_results(summaries: Sequence[Summary], threshold: float, reference: str = REFERENCE) -> list[dict[str, Any]]:
    """How much it matters where the betas start: one entry for each optimizer, at one learning rate, as JSON values.

    ``share`` is that of the runs whose final training loss is below ``threshold``; losses at a start are means over
    seeds. None stands for a diverged run. ``better`` counts the starts at which the validation loss is below that of
    the ``reference``, of those ``compared``, which both have.
    """
    entries = []
    for summary in summaries:
        runs = summary.at(summary.robust_lr())
        starts: list[dict[str, Any]] = []
        for betas in summary.betas():
            there = [run for run in runs if run.betas == betas]
            means = {name: finite(statistics.fmean(_losses(there, name))) for name in FINAL_LOSSES if there}
            starts.append({"betas": list(betas), **means})
        train = _losses(runs, "train_loss")
        entry: dict[str, Any] = {"optimizer": summary.label, "lr": summary.robust_lr(), "runs": len(runs)}
        entry["lr_edge"] = summary.edge(summary.robust_lr())
        entry["starts"] = starts
        entry["share"] = sum(loss < threshold for loss in train) / len(train)
        for name in FINAL_LOSSES:
            losses = _losses(runs, name)
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
    """Validation losses of an entry of :func:`betas_results`, infinite where a run diverged."""
    trained = (start for start in entry["starts"] if "val_loss" in start)
    return {tuple(start["betas"]): _or_infinite(start["val_loss"]) for start in trained}


def betas_table(entries: Entries, threshold: float, reference: str = REFERENCE) -> Table:
    """Share of good starts, median and worst final losses, starts that are better than the reference's."""
    header = f"optimizer|lr|runs|train loss < {threshold:.3g}|median|worst|val loss: median|worst|below {reference}'s"
    table = [header.split("|")]
    for entry in entries:
        losses = [entry[f"{name}_{which}"] for name in FINAL_LOSSES for which in ("median", "worst")]
        cells = [loss_or_diverged(loss) for loss in losses]
        compared = entry.get("compared") and entry["optimizer"] != reference
        cells.append(f"{entry['better']} of {entry['compared']}" if compared else "-")
        lr = _marked(f"{entry['lr']:g}", entry["lr_edge"])
        table.append([entry["optimizer"], lr, str(entry["runs"]), f"{entry['share']:.1%}", *cells])
    return table


def _losses(runs: Sequence[StoredRun], name: str) -> list[float]:
    """Infinite where a run diverged."""
    return [_or_infinite(getattr(run.result, name)) for run in runs]


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def markdown(table: Table) -> str:
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "seed"), count(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(names: Sequence[str], most: int) -> str:
    """
    >>> listed(["a", "b", "c", "d"], most=2), listed(["a"], most=2)
    ('a, b and 2 others', 'a')
    """
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {count(others, 'other')}" if others > 0 else "")


def _plus_minus(entry: dict[str, Any], name: str, sign: str = "") -> str:
    """A mean and the half width of its interval, as far as they are known."""
    if name not in entry:
        return "-"
    mean, half = rounded(entry[name], sign), entry[f"{name}_ci95"]
    return mean if half is None else f"{mean} ± {rounded(half)}"


def loss_or_diverged(loss: float | None) -> str:
    return "diverged" if loss is None else rounded(loss)


def rounded(value: float, sign: str = "") -> str:
    """A loss, in a form that stays short where one blew up.

    >>> rounded(1.70123), rounded(-0.1, "+"), rounded(1534319905996.8)
    ('1.7012', '-0.1000', '1.53e+12')
    """
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
