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
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from mada_optim.experiments.pool import Pool
from mada_optim.experiments.train import StepReport
from mada_optim.tasks import InputError

_STOP = "stop"


class Watcher(Protocol):
    """Whoever watches runs, which have names."""

    def begin(self, name: str, start: int) -> None:
        """Called before the first step of a run, ``start`` steps being done already."""

    def step(self, name: str, report: StepReport) -> None:
        """Called after each step of a run."""


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
        processes: dict[Connection, BaseProcess] = {}
        names: dict[Connection, str] = {}
        with _stop_signal() as stop:
            try:
                for name, arguments in calls.items():
                    ours, theirs = get_context("spawn").Pipe()
                    process = get_context("spawn").Process(
                        name=f"mada-{name}", target=_report, args=(theirs, function, arguments), daemon=True
                    )
                    with _ignored_interrupts():
                        process.start()
                    theirs.close()
                    processes[ours], names[ours] = process, name
                told = False
                while names:
                    if stop.is_set() and not told:
                        told = True
                        for connection in names:
                            with suppress(BrokenPipeError):
                                connection.send(_STOP)
                    for connection in wait(list(names), timeout=0.2):
                        assert isinstance(connection, Connection)
                        if (ending := self._receive(connection, names[connection], processes[connection])) is not None:
                            name = names.pop(connection)
                            if ending != "interrupted":
                                on_over(name, ending)
            finally:
                for connection, process in processes.items():
                    if connection in names:
                        process.terminate()
                    process.join()
        return not stop.is_set()

    def _receive(self, connection: Connection, name: str, process: BaseProcess) -> str | None:
        """Take the next message of a process. Returns how it ended, if it did."""
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            return f"failed: its process ended with code {process.exitcode}"
        if isinstance(message, str):
            return message
        if isinstance(message, int):
            self._watcher.begin(name, message)
        else:
            self._watcher.step(name, message)
        return None


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
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """A process that is started meanwhile ignores Ctrl-C until it trains: while it imports, it would die of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
