"""What a person sees during the demo: two trainings side by side, and their losses in one chart below."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mada_lab.display.terminal_chart import ChartLine, chart
from mada_lab.run.coefficients import scales_of
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import StepReport
from mada_lab.text import rounded
from mada_optim.history.notation import SCALE

# Okabe and Ito's lighter orange and blue, which are read on dark and on light ground.
COLOURS = ("#E69F00", "#56B4E9")
_SMOOTHED = 15  # steps
_CHART_HEIGHT = 12
_PANEL_HEIGHT = 7  # of the one with more lines


@dataclass
class _Side:
    """One of the trainings, as far as it is known."""

    title: str
    colour: str
    losses: list[tuple[int, float]] = field(default_factory=list)
    latest: StepReport | None = None
    held: bool = False  # the rates that are learned are not searched for any more
    began: tuple[int, float] | None = None  # step and time of the first step seen

    def take(self, report: StepReport) -> None:
        self.began = self.began or (report.step, time.perf_counter())
        self.held = self.latest is not None and self.latest.learned == report.learned
        self.latest = report
        if math.isfinite(report.loss):
            self.losses.append((report.step, report.loss))

    @property
    def speed(self) -> str:
        if self.latest is None or self.began is None or self.latest.step == self.began[0]:
            return ""
        steps, seconds = self.latest.step - self.began[0], time.perf_counter() - self.began[1]
        return f"{steps / seconds:.1f} steps/s"

    def smoothed(self) -> list[tuple[int, float]]:
        """Means over the last steps: single losses are too noisy to be compared."""
        losses = list(self.losses)  # the display draws in a thread of its own
        return [
            (losses[end - 1][0], statistics.fmean(loss for _, loss in losses[max(0, end - _SMOOTHED) : end]))
            for end in range(1, len(losses) + 1)
        ]


class DemoDisplay:
    """A context manager that watches runs: panels and a chart on a terminal, a line at each validation elsewhere.

    Args:
        console: where to write.
        steps: number of steps of each run.
        titles: of the runs, by name.
    """

    def __init__(self, console: Console, steps: int, titles: Mapping[str, str]) -> None:
        self._console, self._steps = console, steps
        self._sides = {name: _Side(title, COLOURS[i]) for i, (name, title) in enumerate(titles.items())}
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> DemoDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show_stored(self, folder: RunFolder, name: str) -> None:
        """Show what is stored of a run before it goes on, or because it is over."""
        side, val_loss = self._sides[name], None
        for line in folder.metrics():
            val_loss = line.get("val_loss", val_loss)
            if "lr" in line:
                loss = math.nan if line["loss"] is None else line["loss"]
                learned = {key: value for key, value in line.get("coefficients", {}).items() if key.startswith(SCALE)}
                side.take(StepReport(line["step"], loss, val_loss, line["lr"], learned, False))
            elif side.latest is not None:
                side.latest = replace(side.latest, val_loss=val_loss)
        side.began = None

    def begin(self, name: str, start: int) -> None:
        """See :class:`Watcher`."""
        side = self._sides[name]
        side.losses = [point for point in side.losses if point[0] <= start]
        if start and self._live is None:
            self._say(f"{side.title}: going on from step {start}.")

    def step(self, name: str, report: StepReport) -> None:
        """See :class:`Watcher`."""
        side = self._sides[name]
        side.take(report)
        if self._live is None and report.validated:
            values = "  ".join(f"{key} {value}" for key, value in _values(report, side.held).items())
            head = f"step {report.step:>{len(str(self._steps))}}/{self._steps}"
            self._say(f"{side.title:<{max(len(each.title) for each in self._sides.values())}}  {head}  {values}")
        if self._live is None and report.news:
            self._say(f"{side.title}, step {report.step}: {report.news}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the panels and the chart, as they are now."""
        width = min(options.max_width, 110)
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in self._sides:
            grid.add_column(ratio=1)
        grid.add_row(*(self._panel(side) for side in self._sides.values()))
        yield from console.render(grid, options.update(width=width))
        height = min(_CHART_HEIGHT, console.height - _PANEL_HEIGHT - 7)
        if height >= 4 and not options.ascii_only:
            lines = [ChartLine(side.title.split(",")[0], side.colour, side.smoothed()) for side in self._sides.values()]
            yield Text(f"training loss, mean over {_SMOOTHED} steps", style="dim")
            yield chart(lines, self._steps, width, height)

    def _panel(self, side: _Side) -> Panel:
        report = side.latest
        done = 0 if report is None else report.step
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        progress = ProgressBar(self._steps, done, complete_style=side.colour, finished_style=side.colour)
        bar.add_row(progress, f"{done}/{self._steps}  {side.speed}".rstrip())
        values = Table.grid(padding=(0, 2))
        if report is None:
            values.add_row("starting", "")
        else:
            for name, value in _values(report, side.held).items():
                values.add_row(Text(name, style="dim"), value)
        title = Text(side.title, style=f"bold {side.colour}")
        return Panel(Group(bar, values), title=title, title_align="left", height=_PANEL_HEIGHT)


def _values(report: StepReport, held: bool = False) -> dict[str, str]:
    """Losses, and the learning rates: those that are found, or the one that is used."""
    validation = "-" if report.val_loss is None else rounded(report.val_loss)
    values = {"training loss": rounded(report.loss), "validation loss": validation}
    rates = scales_of(report.learned)
    if not rates:
        return values | {"learning rate": f"{report.lr:.2g}"}
    state = "found" if held else "searching"
    return values | {f"rate, {kind}": f"{value:.2g}  {state}" for kind, value in rates.items()}
