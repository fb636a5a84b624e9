"""What a person sees while a run goes on: a live panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mada_lab.run.train import StepReport
from mada_lab.sweep.run_stages import RunReport
from mada_lab.text import count, rounded
from mada_optim.history.notation import SYMBOLS, short

_GAP = 2  # spaces between two values


class Display:
    """A context manager whose ``begin`` and which itself are to be given to :func:`train`.

    Args:
        console: where to write.
        steps: number of steps of the run.
        quiet: write nothing.
    """

    def __init__(self, console: Console, steps: int, quiet: bool = False) -> None:
        self._console, self._steps, self._quiet = console, steps, quiet
        self._start = 0
        # Imports and the first step, which allocates, would spoil the estimate: the clock starts after it.
        self._first: tuple[int, float] | None = None
        self._live: Live | None = None
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", style="progress.data.speed"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._bar = self._progress.add_task("", total=steps, speed="")

    def begin(self, start: int) -> None:
        """Begin to show, ``start`` steps being done already."""
        self._start = start
        if self._quiet:
            return
        if start:
            self._console.print(f"Going on from step {start}.", highlight=False, markup=False, soft_wrap=True)
        if self._console.is_terminal:
            self._progress.update(self._bar, completed=start)
            self._live = Live(self._progress, console=self._console, refresh_per_second=8)
            self._live.start()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, report: StepReport) -> None:
        now = time.perf_counter()
        first_step, began = self._first = self._first or (report.step, now)
        speed = (report.step - first_step) / (now - began) if now > began else 0.0
        if self._live is not None:
            self._progress.update(self._bar, completed=report.step, speed=_speed(speed))
            self._live.update(Group(self._progress, *values_in_rows(report, self._console.width)))
        elif not self._quiet and (report.validated or report.step == self._start + 1):
            self._console.print(self._line(report, speed), highlight=False, markup=False, soft_wrap=True)
        if report.news and not self._quiet:
            self._console.print(f"step {report.step}: {report.news}", highlight=False, markup=False, soft_wrap=True)

    def _line(self, report: StepReport, speed: float) -> str:
        left = f"{(self._steps - report.step) / speed:.0f} s left" if speed else ""
        losses = f"loss {rounded(report.loss)}  val {_number(report.val_loss)}"
        values = "  ".join(f"{name} {value}" for name, value in _learned(report).items())
        head = f"step {report.step:>{len(str(self._steps))}}/{self._steps}"
        return f"{head}  {losses}  {_speed(speed)}  {left}  {values}".rstrip()


def values_in_rows(report: StepReport, width: int) -> list[Table]:
    """Return what a step has shown, losses before what is learned, in as many rows as ``width`` needs."""
    losses = {"loss": rounded(report.loss), "val loss": _number(report.val_loss), "lr": f"{report.lr:.1e}"}
    rows: list[dict[str, str]] = [losses]
    # Where not all fit beside the losses, what is learned begins a row.
    learned = _learned(report)
    if _width(losses | learned) > width:
        rows.append({})
    for name, value in learned.items():
        if rows[-1] and _width({**rows[-1], name: value}) > width:
            rows.append({})
        rows[-1][name] = value
    return [_table(row) for row in rows if row]


class StepsDisplay:
    """A context manager whose calls count steps: a bar on a terminal, elsewhere a line now and then.

    Args:
        console: where to write.
        total: number of steps.
        every: seconds between two lines.
    """

    def __init__(self, console: Console, total: int, every: float = 10.0) -> None:
        self._console, self._total, self._every = console, total, every
        self._done = 0
        self._began = self._last = time.monotonic()
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        # What is printed goes above the bar, unless it goes to a file.
        self._progress = Progress(
            *columns,
            console=console,
            expand=True,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=total)

    def __enter__(self) -> StepsDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._console.is_terminal:
            self._progress.update(self._bar, completed=self._done)
        elif now - self._last >= self._every:
            self._last = now
            left = timedelta(seconds=round((now - self._began) / self._done * (self._total - self._done)))
            line = f"{self._done:,} of {self._total:,} steps, {left} left"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class SweepDisplay:
    """A context manager to be given to :func:`run_stages` as ``on_run``: a line for each run, a bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=None, left="")
        self._bars: dict[str, TaskID] = {}  # of the runs under way, by name

    def __enter__(self) -> SweepDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def kept(self, folder: Path, kept: int, left: int) -> None:
        """Say how many runs are kept. To be given to :func:`run_stages` as ``on_kept``."""
        line = f"{folder}: {kept} of {count(kept + left, 'run')} are over and kept, {left} to train."
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, under_way: Mapping[str, tuple[int, int]]) -> None:
        """Show a bar for each run under way. To be given to :func:`run_stages` as ``on_progress``."""
        for name in self._bars.keys() - under_way.keys():
            self._progress.remove_task(self._bars.pop(name))
        for name, (step, steps) in under_way.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task("", total=steps, left=name)
            self._progress.update(self._bars[name], completed=step)

    def __call__(self, report: RunReport) -> None:
        left = f"{timedelta(seconds=round(report.seconds_left))} left" if report.done < report.total else ""
        line = f"{report.done:>{len(str(report.total))}}/{report.total}  {report.name}  {report.status}  {left}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
        self._progress.update(self._bar, completed=report.done, total=report.total, left=left)


def _speed(value: float) -> str:
    return f"{value:.1f} steps/s" if value else ""


def _learned(report: StepReport) -> dict[str, str]:
    return {SYMBOLS.get(name, name): short(value) for name, value in report.learned.items()}


def _width(cells: Mapping[str, str]) -> int:
    return sum(max(map(cell_len, cell)) for cell in cells.items()) + _GAP * (len(cells) - 1)


def _table(cells: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, _GAP, 0, 0))
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else rounded(value)
