"""The stages in their order, most valuable first, and how each of them is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu.record import Record

OUTPUT = "output.txt"
# Before torch is imported: Inductor would start as many processes as there are cores, in each process.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4"}


@dataclass(frozen=True)
class Stage:
    """A part of the program that runs in a process of its own.

    Args:
        name: on the command line.
        function: of a :class:`gpu.device.Setting` and a :class:`gpu.record.Record`, as "module:name".
        limit: seconds after which it is ended, its start and the compilation included.
        what: for people.
    """

    name: str
    function: str
    limit: float
    what: str


# The budgets and a quarter more: some eight and a half minutes together.
STAGES = [
    Stage("first", "gpu.first_steps:run", 40, "versions, imports, two steps of each timed optimizer"),
    Stage("steps", "gpu.steps:gpt2", 75, "a step on GPT-2's 148 tensors: clock, device, program"),
    Stage("captured", "gpu.captured:run", 50, "the same in a captured graph, and eager"),
    Stage("correctness", "gpu.correctness:run", 100, "graphs, layouts, recompilations, rounding"),
    Stage("tensor", "gpu.steps:one_tensor", 40, "a step on one tensor of 20 million elements"),
    Stage(
        "agreement",
        "gpu.agreement:run",
        130,
        "every named optimizer, learning, agrees with the CPU and never waits",
    ),
    Stage("training", "gpu.training:run", 60, "whole training steps of GPT-2 124M"),
    Stage("pace", "gpu.pace:run", 35, "steps of experiments/gpt-30m.toml that fit into some minutes"),
]


def run_stage(stage: Stage, command: Sequence[str], out: Path, limit: float) -> str:
    """Run a stage's command. Print what it prints, write it to a file, and say how it ended.

    Args:
        stage: which.
        command: that runs it.
        out: folder of the results.
        limit: seconds after which the process, and all that it has started, is ended.

    Returns:
        "done", "over its limit", or with which code it failed.
    """
    print(f"\n{stage.name}: {stage.what} (at most {limit:.0f} s)", flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, out / OUTPUT), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"failed with code {code}"
    except subprocess.TimeoutExpired:
        ended = "over its limit"
    finally:
        _end_all(process)
    reader.join(5)
    if not reader.is_alive():
        process.stdout.close()
    Record(out, stage.name).row("the stage", ended=ended, seconds=time.perf_counter() - began)
    return ended


def _end_all(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started: they are a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pass_on(lines: IO[str], file: Path) -> None:
    with file.open("a", encoding="utf-8") as copy:
        for line in lines:
            copy.write(line)
            copy.flush()
            sys.stdout.write(line)
            sys.stdout.flush()
