"""A few runs at the same time, each in a process of its own, watched step by step.

Ray's pool is for many runs, which nobody watches. Here the processes report each step through a pipe. A process whose
pipe is broken ends: when this one is killed, so are they, and their run folders hold what is needed to go on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from mada_lab.errors import InputError
from mada_lab.run.signals import stop_signal
from mada_lab.run.train import StepReport
from mada_lab.sweep.pool import Pool

_STOP = "stop"


class Watcher(Protocol):
    """Whoever watches runs, which have names."""

    def begin(self, name: str, start: int) -> None:
        """Called before the first step of a run, ``start`` steps being done already."""

    def step(self, name: str, report: StepReport) -> None:
        """Called after each step of a run."""


@dataclass(frozen=True)
class _Running:
    """A run under way."""

    name: str
    process: BaseProcess


class SideBySide(Pool):
    """A pool for :func:`run_stages` that runs all calls at once, and reports each step of each to a watcher."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(workers=1)
        self._watcher = watcher

    def run(
        self,
        function: Callable[..., str],
        calls: Mapping[str, tuple[Any, ...]],
        on_over: Callable[[str, str], None],
        cuda: bool = False,  # noqa: ARG002
    ) -> bool:
        """See :meth:`Pool.run`. ``function`` takes ``on_begin`` and ``on_step``, too."""
        running: dict[Connection, _Running] = {}
        with stop_signal() as stop:
            try:
                for name, arguments in calls.items():
                    connection, process = _start(name, function, arguments)
                    running[connection] = _Running(name, process)
                told = False
                while running:
                    if stop.is_set() and not told:
                        told = True
                        for connection in running:
                            with suppress(BrokenPipeError):  # it has just ended
                                connection.send(_STOP)
                    for ready in wait(list(running), timeout=0.2):
                        assert isinstance(ready, Connection)
                        ending = self._receive(ready, running[ready])
                        if ending is not None:
                            over = running.pop(ready)
                            over.process.join()
                            if ending != "interrupted":
                                on_over(over.name, ending)
            finally:
                for left in running.values():
                    left.process.terminate()
                    left.process.join()
        return not stop.is_set()

    def _receive(self, connection: Connection, run: _Running) -> str | None:
        """Take the next message of a run, and pass it on. Returns how the run ended, if it did."""
        try:
            message = connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
            run.process.join()
            return f"failed: its process ended with code {run.process.exitcode}"
        if isinstance(message, str):
            return message
        if isinstance(message, int):
            self._watcher.begin(run.name, message)
        else:
            self._watcher.step(run.name, message)
        return None


def _start(name: str, function: Callable[..., str], arguments: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
    """Start the process of a run; the connection is to it."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(name=f"mada-{name}", target=_report, args=(theirs, function, arguments), daemon=True)
    with _ignored_interrupts():
        process.start()
    theirs.close()  # the process has its own: when it ends, so does the connection
    return ours, process


def _report(connection: Connection, function: Callable[..., str], arguments: tuple[Any, ...]) -> None:
    """The process of a run: how it began, each step, and how it ended go through the connection."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in the terminal is for the process that watches, which passes it on once

    def on_step(report: StepReport) -> None:
        connection.send(report)
        if connection.poll():
            signal.raise_signal(signal.SIGINT)  # the training ends after this step, with a checkpoint

    with suppress(BrokenPipeError, ConnectionResetError):
        try:
            ending = function(*arguments, on_begin=connection.send, on_step=on_step)
        except InputError as error:
            ending = f"failed: {error}"
        connection.send(ending)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Let a process that is started meanwhile ignore Ctrl-C until it trains: while it imports, it would die of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
