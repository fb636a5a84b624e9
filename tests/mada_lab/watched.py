"""Trainings of nothing, side by side, in a process of their own: python watched.py FOLDER STEPS"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mada_lab.run.train import StepReport
from mada_lab.sweep.side_by_side import SideBySide

NAMES = ("a", "b")


def count(folder: str, name: str, steps: int, *, on_begin: Callable[[int], Any], on_step: Callable[..., Any]) -> str:
    """Count, as a training does: Ctrl-C ends it after a step. The last step, and how it ended, stand in a file."""
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    file = Path(folder) / name
    on_begin(0)
    try:
        for step in range(1, steps + 1):
            on_step(StepReport(step, 1.0, None, 1.0, {}, False))
            if told:
                file.write_text(f"told {len(told)} times")
                return "interrupted"
            time.sleep(0.005)
    except OSError as error:
        file.write_text(type(error).__name__)
        raise
    file.write_text("finished")
    return "finished"


class Printing:
    """A watcher that says when both have begun."""

    def __init__(self) -> None:
        self.begun: set[str] = set()

    def begin(self, name: str, start: int) -> None:
        assert start == 0

    def step(self, name: str, report: StepReport) -> None:
        if self.begun != {*NAMES} and self.begun | {name} == {*NAMES}:
            print("both", flush=True)
        self.begun.add(name)


def main(folder: str, steps: str) -> None:
    calls = {name: (folder, name, int(steps)) for name in NAMES}
    print(SideBySide(Printing()).run(count, calls, lambda *over: print(*over, flush=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
