"""The GPU, and what stands for it where a stage is rehearsed without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch


class Moment(Protocol):
    """A place in the queue of a device."""

    def passed(self) -> bool:
        """Return whether the device has come to it."""

    def milliseconds_to(self, later: Any) -> float:
        """Return the time of the device from here to a later place. Both must have been passed."""


class Device(Protocol):
    """What stages need of a device."""

    name: str
    """As torch has it."""

    def now(self) -> float:
        """Return the time of the program, in seconds."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def mark(self) -> Moment:
        """Put a moment into the queue."""

    def sleep(self, milliseconds: float) -> None:
        """Let the device do nothing for about this time. The program goes on."""

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a function in a graph, without running it. Return what replays the graph."""

    def no_waiting(self) -> AbstractContextManager[Any]:
        """Return a context in which it is an error that the program waits for the device."""


@dataclass(frozen=True)
class Setting:
    """Where a stage runs, and how much it does.

    Args:
        device: the GPU, or the CPU in its place.
        small: sizes for a rehearsal, not for figures.
    """

    device: Device
    small: bool = False

    @property
    def repeats(self) -> dict[str, int]:
        """Arguments of :func:`gpu.timing.time_step`."""
        return {"rounds": 1, "steps": 1} if self.small else {}


class Event:
    """A moment of CUDA."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def passed(self) -> bool:
        return bool(self._event.query())

    def milliseconds_to(self, later: Event) -> float:
        return float(self._event.elapsed_time(later._event))


class Cuda:
    """The GPU that torch uses."""

    name = "cuda"

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Event:
        return Event()

    def sleep(self, milliseconds: float) -> None:
        torch.cuda._sleep(int(milliseconds * self._cycles))

    @cached_property
    def _cycles(self) -> float:
        """Cycles in a millisecond. The first sleep brings the clock up."""
        torch.cuda._sleep(20_000_000)
        begin = self.mark()
        torch.cuda._sleep(20_000_000)
        end = self.mark()
        self.synchronize()
        return 20_000_000 / begin.milliseconds_to(end)

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    @contextmanager
    def no_waiting(self) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Instant:
    """A moment of the CPU, to which a rehearsal never gets before the program has gone on."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def passed(self) -> bool:
        return False

    def milliseconds_to(self, later: Instant) -> float:
        return 1e3 * (later._at - self._at)


class Cpu:
    """The CPU in the place of a GPU: everything is done at once, nothing is captured."""

    name = "cpu"

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def mark(self) -> Instant:
        return Instant()

    def sleep(self, milliseconds: float) -> None:
        pass

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return function

    def no_waiting(self) -> AbstractContextManager[Any]:
        return nullcontext()
