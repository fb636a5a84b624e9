"""What a person sees while a run goes on: a live panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mada_optim.experiments.stages import RunReport
from mada_optim.experiments.train import StepReport

SYMBOLS = {
    **{"beta1": "β1", "beta2": "β2", "beta3": "β3", "rho": "ρ", "c": "c", "gamma": "γ"},
    **{"ortho": "ω", "scale": "κ"},
}


class Display:
    """A context manager to be given to :func:`train` as ``on_step``.

    Args:
        console: where to write.
        steps: number of steps of the run.
        start: steps that were done before.
        quiet: write nothing.
    """

    def __init__(self, console: Console, steps: int, start: int = 0, quiet: bool = False) -> None:
        self._console, self._steps, self._start, self._quiet = console, steps, start, quiet
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
        self._bar = self._progress.add_task("", total=steps, completed=start, speed="")
        if console.is_terminal and not quiet:
            self._live = Live(self._progress, console=console, refresh_per_second=8)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
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
            self._live.update(Group(self._progress, _table(report)))
        elif not self._quiet and (report.validated or report.step == self._start + 1):
            self._console.print(self._line(report, speed), highlight=False, markup=False, soft_wrap=True)

    def _line(self, report: StepReport, speed: float) -> str:
        left = f"{(self._steps - report.step) / speed:.0f} s left" if speed else ""
        losses = f"loss {report.loss:.4f}  val {_number(report.val_loss)}"
        values = "  ".join(f"{SYMBOLS.get(name, name)} {value:.3f}" for name, value in report.coefficients.items())
        head = f"step {report.step:>{len(str(self._steps))}}/{self._steps}"
        return f"{head}  {losses}  {_speed(speed)}  {left}  {values}".rstrip()


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

    def __enter__(self) -> SweepDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, report: RunReport) -> None:
        left = f"{timedelta(seconds=round(report.seconds_left))} left" if report.done < report.total else ""
        line = f"{report.done:>{len(str(report.total))}}/{report.total}  {report.name}  {report.status}  {left}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
        self._progress.update(self._bar, completed=report.done, total=report.total, left=left)


def _speed(value: float) -> str:
    return f"{value:.1f} steps/s" if value else ""


def _table(report: StepReport) -> Table:
    cells = {"loss": f"{report.loss:.4f}", "val loss": _number(report.val_loss), "lr": f"{report.lr:.1e}"}
    cells |= {SYMBOLS.get(name, name): f"{value:.3f}" for name, value in report.coefficients.items()}
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2))
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
