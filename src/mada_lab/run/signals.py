"""Ctrl-C and SIGTERM, as events between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signal(alone: bool = True) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets: an exception in the middle of a step would leave half of it done.

    A second Ctrl-C interrupts at once. A process that is not alone is stopped by torchrun: with SIGTERM, or with SIGINT
    beside the one that the terminal sent; torchrun itself ends what does not stop in time.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stop.set()
        if alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)[: 1 if alone else 2]}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
