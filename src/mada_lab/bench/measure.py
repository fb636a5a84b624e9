"""Timing two steps in turn, and the memory that training takes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from mada_lab.bench.contender import Contender
from mada_lab.bench.contenders import contenders
from mada_lab.bench.workloads import WORKLOADS, Running, Workload
from mada_lab.errors import require, require_device

COPIED = 20_000_000
QUEUED = 10  # steps that a GPU is given at a time, as in training: it works on one while the program prepares the next
PROCESS_STATUS = Path("/proc/self/status")
PACKAGES = ("torch", "triton", "transformers")


@dataclass(frozen=True)
class Result:
    """One contender on one workload.

    Args:
        workload: letter.
        title: of the workload.
        name, kind: of the contender.
        ratio: median over rounds of its time by the baseline's just before. Where a low quantile of times is shown, it
            is the ratio of these.
        low, high: quartiles over rounds.
        seconds, baseline_seconds: times of a step in the same rounds, the median or a low quantile.
        rounds: how many.
        words: float32 numbers that a step must move for each parameter, where known.
        bandwidth: bytes in a second, from ``words``.
        state_words: float32 numbers of state for each parameter.
        singular_values: smallest and largest, where only matrices are orthogonalized.
        peak_memory: bytes, of the process (CPU) or of torch's allocator (CUDA); None where not measured.
    """

    workload: str
    title: str
    name: str
    kind: str
    ratio: float
    low: float
    high: float
    seconds: float
    baseline_seconds: float
    rounds: int
    words: float | None
    bandwidth: float | None
    state_words: float | None
    peak_memory: int | None
    singular_values: tuple[float, float] | None = None


def choose(letters: str, device: str, only: str | None = None) -> tuple[list[Contender], list[Contender]]:
    """Contenders to be measured, and those of them that are left out because the package is not there.

    Args:
        letters: which workloads, of "abcdefghijk".
        device: "cpu" or "cuda".
        only: part of the names of those wanted; None: all.

    Raises:
        InputError: an argument is none of what is allowed.
    """
    known = bool(letters) and all(letter in WORKLOADS for letter in letters)
    require(known, "workloads", letters, f"letters of {''.join(WORKLOADS)}")
    require(device in ("cpu", "cuda"), "device", device, "cpu or cuda")
    require_device(device)
    chosen = [contender for contender in contenders() if only is None or only in contender.name]
    require(bool(chosen), "only", only, "part of a contender's name")
    there = [contender for contender in chosen if contender.is_there]
    missing = [contender for contender in chosen if not contender.is_there]
    fit = any(letter in contender.workloads for contender in there for letter in letters)
    require(fit, "only", only, f"part of the name of a contender that is installed and runs on workloads {letters}")
    return there, missing


def run(letters: str, device: str, seconds: float, chosen: Sequence[Contender]) -> Iterator[Result]:
    """Measure contenders on workloads, one after the other; see :func:`choose`.

    ``seconds`` is for how long each is timed in turn with the baseline, but at least 5 rounds (2 for those whose step
    takes more than a second).
    """
    for letter in letters:
        workload = WORKLOADS[letter](device)
        for contender in chosen:
            if letter not in contender.workloads:
                continue
            baseline = next(other for other in contenders() if other.name == workload.baseline)
            running, reference = workload.start(contender), workload.start(baseline)
            if running is None or reference is None:
                continue
            steps = contender.unit * (workload.repeats if device == "cpu" else -(-QUEUED // contender.unit))
            ours, theirs = _time_in_turn(running, reference, steps, seconds, device, workload.clock)
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            low, _, high = quantiles(ratios, n=4)
            words = contender.words
            seconds_of_step, baseline_seconds = (_quantile(times, workload.quantile) for times in (ours, theirs))
            is_median = workload.quantile == 0.5
            yield Result(
                letter,
                workload.title,
                contender.name,
                contender.kind,
                median(ratios) if is_median else seconds_of_step / baseline_seconds,
                low,
                high,
                seconds_of_step,
                baseline_seconds,
                len(ours),
                words,
                None if words is None or letter in "cjk" else 4 * words * workload.numel / seconds_of_step,
                running.state_words(workload.numel),
                _peak_memory(letter, device, contender.name) if letter == "c" else None,
                None if running.singular_values is None else running.singular_values(),
            )


def _time_in_turn(
    running: Running, reference: Running, unit: int, seconds: float, device: str, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of a step of both, round by round, each of ``unit`` steps, by a clock."""
    _seconds(running.step, 2 * unit + 2, device)
    _seconds(reference.step, 2, device)
    ours: list[float] = []
    theirs: list[float] = []
    begin = time.perf_counter()
    least = 5
    while len(ours) < least or time.perf_counter() - begin < seconds:
        theirs.append(_seconds(reference.step, unit, device, clock))
        ours.append(_seconds(running.step, unit, device, clock))
        if ours[-1] > 1.0:
            least = 2
    return ours, theirs


def _quantile(times: Sequence[float], share: float) -> float:
    """The median of times, or the one that a share of them does not exceed."""
    return median(times) if share == 0.5 else sorted(times)[int(share * len(times))]


def _seconds(step: Callable[[], Any], count: int, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean of ``count`` steps."""
    _synchronize(device)
    begin = clock()
    for _ in range(count):
        step()
    _synchronize(device)
    return (clock() - begin) / count


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: str) -> float:
    """Bytes that a copy of a large tensor reads and writes in a second."""
    source, target = torch.ones(COPIED, device=device), torch.empty(COPIED, device=device)
    times = [_seconds(lambda: target.copy_(source), 1, device) for _ in range(15)]
    return 2 * 4 * COPIED / median(times[3:])


# Peak memory, each in a process of its own: what was used once stays counted.


def _peak_memory(letter: str, device: str, name: str) -> int | None:
    if device == "cpu" and not PROCESS_STATUS.exists():
        return None
    command = [sys.executable, "-m", "mada_lab.bench.measure", letter, device, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _train_alone(letter: str, device: str, name: str) -> int:
    workload: Workload = WORKLOADS[letter](device)
    contender: Contender = next(c for c in contenders() if c.name == name)
    running = workload.start(contender)
    assert running is not None
    for _ in range(4):
        running.step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's: that one starts at what the parent process had used.
    peak = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


# What it was measured on.


def machine(device: str) -> dict[str, Any]:
    """Date, hardware and versions."""
    versions = {}
    peers = dict.fromkeys(contender.package for contender in contenders() if contender.package is not None)
    for package in (*PACKAGES, *(peer.replace("_", "-") for peer in peers)):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": _cpu() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "copy_bandwidth": copy_bandwidth(device),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(path: Path, described: dict[str, Any], results: list[Result]) -> None:
    """Write everything as JSON."""
    content = {"machine": described, "results": [result.__dict__ for result in results]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(_train_alone(*sys.argv[1:]))
