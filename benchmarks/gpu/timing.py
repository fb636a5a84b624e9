"""What a step takes: by the clock, the device alone, the program alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from gpu.device import Device

ROUNDS = 3
STEPS = 10  # in a row
MOST_FAILURES = 6
LONGEST_SLEEP = 1000.0  # milliseconds


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step.

    Args:
        clock: with the device, steps in a row.
        device: the device alone, which finds the steps waiting.
        program: until a step is in the queue of the device.
        steps: how many were in the queue at once.
        asleep: whether the device slept until all of them were. Otherwise ``device`` may be the program's time.
    """

    clock: float
    device: float
    program: float
    steps: int
    asleep: bool

    def values(self) -> dict[str, Any]:
        """Return the columns of a row."""
        values = {"clock ms": self.clock, "device ms": self.device, "program ms": self.program}
        return values if self.asleep else {**values, "note": "device time may be the program's"}


def time_step(step: Callable[[], Any], device: Device, rounds: int = ROUNDS, steps: int = STEPS) -> StepTime:
    """Time a step that has been compiled.

    For the time of the device, the device is put to sleep while the program fills its queue. The sleep follows from the
    time that the program takes. Whether it was long enough is seen: the device must not have woken before the program
    was done. A queue that is full holds the program up until the device wakes, so fewer steps are tried then.
    """
    clock = median(_by_the_clock(step, device, steps) for _ in range(rounds))
    program = _by_the_program(step, device)
    times: list[float] = []
    programs: list[float] = []
    failures, asleep = 0, True
    while len(times) < rounds:
        device.synchronize()
        device.sleep(min(LONGEST_SLEEP, 2.0 + 1.5 * steps * program))
        begin = device.mark()
        began = device.now()
        for _ in range(steps):
            step()
        program = 1e3 * (device.now() - began) / steps
        asleep = not begin.passed()
        end = device.mark()
        device.synchronize()
        failures += not asleep
        if asleep or failures > MOST_FAILURES:
            times.append(begin.milliseconds_to(end) / steps)
            programs.append(program)
        else:
            steps = max(1, steps // 2)
    return StepTime(clock, median(times), median(programs), steps, failures <= MOST_FAILURES)


def _by_the_clock(step: Callable[[], Any], device: Device, steps: int) -> float:
    device.synchronize()
    began = device.now()
    for _ in range(steps):
        step()
    device.synchronize()
    return 1e3 * (device.now() - began) / steps


def _by_the_program(step: Callable[[], Any], device: Device) -> float:
    device.synchronize()
    began = device.now()
    step()
    return 1e3 * (device.now() - began)
