"""The program for a GPU, rehearsed without one: the CPU for CUDA, Triton's interpreter for Triton, tiny sizes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import gpu_check
import pytest
from gpu import agreement, correctness, first_steps, optimizers
from gpu.device import Cpu, Setting
from gpu.record import Record, failures, read, write_summary
from gpu.stages import OUTPUT, STAGES, Stage, run_stage
from gpu.timing import time_step

from mada_optim import MADA

BENCHMARKS = Path(gpu_check.__file__).parent
REHEARSAL = Setting(Cpu(), small=True)


# The timer.


class Simulated:
    """A device with a queue, which works while the program goes on. Times in milliseconds.

    Args:
        program: what a step takes the program.
        work: what it takes the device.
        places: how many steps the queue holds; a program that finds it full waits.
    """

    def __init__(self, program: float, work: float, places: int = 1000) -> None:
        self.program, self.work, self.places = program, work, places
        self.clock = self.free = 0.0
        self.queue: deque[float] = deque()

    def step(self) -> None:
        self.clock += self.program
        self._append(self.work)
        if len(self.queue) > self.places:
            self.clock = max(self.clock, self.queue[-1 - self.places])

    def _append(self, work: float) -> None:
        self.free = max(self.clock, self.free) + work
        self.queue.append(self.free)

    def now(self) -> float:
        return self.clock / 1e3

    def synchronize(self) -> None:
        self.clock = max(self.clock, self.free)
        self.queue.clear()

    def sleep(self, milliseconds: float) -> None:
        self._append(milliseconds)

    def mark(self) -> SimulatedMoment:
        return SimulatedMoment(self, max(self.clock, self.free))


class SimulatedMoment:
    def __init__(self, device: Simulated, at: float) -> None:
        self.device, self.at = device, at

    def passed(self) -> bool:
        return self.device.clock >= self.at

    def milliseconds_to(self, later: SimulatedMoment) -> float:
        return later.at - self.at


@pytest.mark.parametrize(("program", "work"), [(0.1, 3.0), (38.0, 3.0), (13.0, 12.9), (25.0, 0.01)])
def test_the_time_of_the_device_is_not_the_programs(program: float, work: float) -> None:
    """The program of the last case took 60 ms for 130 to 380 ms of work, as it was timed on a GPU."""
    device = Simulated(program, work)
    taken = time_step(device.step, device)
    assert taken.asleep
    assert taken.device == pytest.approx(work)
    assert taken.program == pytest.approx(program)
    assert taken.clock == pytest.approx(max(program, work), rel=0.5)


def test_a_full_queue_takes_fewer_steps() -> None:
    device = Simulated(2.0, 1.0, places=4)
    taken = time_step(device.step, device)
    assert taken.asleep
    assert taken.device == pytest.approx(1.0)
    assert taken.steps < 5


def test_a_time_that_may_be_the_programs_is_marked() -> None:
    device = Simulated(2.0, 1.0, places=0)
    taken = time_step(device.step, device)
    assert not taken.asleep
    assert "note" in taken.values()


# The stages, each in a process of its own.


def run(code: str, out: Path, limit: float = 60.0) -> str:
    stage = Stage("a stage", "", limit, "what it does")
    return run_stage(stage, [sys.executable, "-c", code], out, limit)


RECORDED = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from gpu.record import Record
Record(Path(sys.argv[1] if len(sys.argv) > 1 else OUT), "a stage").row("one", value=1.0)
"""


def test_results_of_a_stage_that_crashes_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"OUT = {str(tmp_path)!r}\n{RECORDED}\nprint('falls'); os._exit(3)"
    assert run(code, tmp_path) == "failed with code 3"
    assert run("print('goes on')", tmp_path) == "done"
    assert [row["what"] for row in read(tmp_path)] == ["one", "the stage", "the stage"]
    assert failures(read(tmp_path)) == ["a stage: the stage"]
    assert "goes on" in capsys.readouterr().out
    assert "falls" in (tmp_path / OUTPUT).read_text()


def test_a_stage_over_its_limit_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import time, pathlib; time.sleep(5); pathlib.Path({!r}).touch()".format(str(tmp_path / "late"))
    code = f"OUT = {str(tmp_path)!r}\n{RECORDED}\nimport subprocess\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    assert run(code, tmp_path, limit=3.0) == "over its limit"
    assert {"one", "the stage"} >= {row["what"] for row in read(tmp_path)}
    assert failures(read(tmp_path)) == ["a stage: the stage"]
    assert not (tmp_path / "late").exists()


def test_the_limits_are_under_nine_minutes_and_documented() -> None:
    assert sum(stage.limit for stage in STAGES) < gpu_check.SECONDS < 540
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \|", (BENCHMARKS.parent / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE
    )
    assert rows == [(stage.name, f"{stage.limit}") for stage in STAGES]


def test_the_summary_says_what_failed_and_leaves_out_a_line_that_was_cut_off(tmp_path: Path) -> None:
    record = Record(tmp_path, "steps")
    record.bar("everything", 3.14159, 2.9)
    with record.check("holds") as values:
        values["difference"] = 1e-7
    with record.check("does not"):
        raise AssertionError("apart by 1")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "st')
    write_summary(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "Failed: steps: does not." in text
    assert "| steps | everything | 3.142 | 2.9 | NO |" in text
    assert "apart by 1" in text


def test_the_program_runs_a_stage_and_inductor_starts_no_processes(tmp_path: Path) -> None:
    assert gpu_check.main([str(tmp_path), "--rehearse", "--stages", "first"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0]["Inductor's processes"] == 1
    assert rows[-1]["ended"] == "done"
    assert len(list(tmp_path.iterdir())) == 3


# What the stages do.


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_runs_here(stage: Stage, tmp_path: Path) -> None:
    module, _, function = stage.function.partition(":")
    getattr(importlib.import_module(module), function)(REHEARSAL, Record(tmp_path, stage.name))
    rows = write_summary(tmp_path)
    assert failures(rows) == []
    assert len(rows) > 3


def test_stages_run_in_triton(tmp_path: Path, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_steps, "timed_contenders", lambda: optimizers.timed_contenders()[:3])
    first_steps.run(REHEARSAL, Record(tmp_path, "first"))
    monkeypatch.setattr(correctness, "STEPS", 6)
    correctness.replayed_steps(REHEARSAL, {}, fused=None, left_out=2)
    assert failures(read(tmp_path)) == []
    assert launches[0] > 20


def test_optimizers_that_learn_are_the_first_to_be_compared() -> None:
    learning = [optimizers.learns(make) for make in optimizers.named_optimizers().values()]
    assert learning == sorted(learning, reverse=True)
    assert sum(learning) > 4


def test_the_agreement_must_be_of_something_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    late = {"late": lambda params, **kwargs: MADA(params, hyper_warmup=50, **kwargs)}
    monkeypatch.setattr(agreement, "named_optimizers", lambda: late)
    with pytest.raises(AssertionError, match="float32: the coefficients moved by 0"):
        agreement.compare("late", REHEARSAL, {})


def test_the_agreement_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    original = agreement.train

    def train(make, device, dtype, small, **kwargs):
        params, coefficients = original(make, device, dtype, small, **kwargs)
        return [param + 1e-3 * (kwargs.get("fused", 0) is None) for param in params], coefficients

    monkeypatch.setattr(agreement, "train", train)
    values: dict[str, str] = {}
    with pytest.raises(AssertionError, match="float32, fused: 1.0e-03"):
        agreement.compare("lion", REHEARSAL, values)
    assert len(values) == 6


def test_an_optimizer_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def no_waiting(device: Cpu):
        raise RuntimeError("called a synchronizing CUDA operation")
        yield

    monkeypatch.setattr(Cpu, "no_waiting", no_waiting)
    with pytest.raises(AssertionError, match="it waits: called a synchronizing"):
        agreement.compare("lion", REHEARSAL, {})


def test_what_processes_find_comes_back(tmp_path: Path) -> None:
    agreement.compare_in_processes(["lion", "no such optimizer"], REHEARSAL, Record(tmp_path, "agreement"), workers=1)
    lion, unknown = sorted(read(tmp_path), key=lambda row: row["what"])
    assert lion["holds"]
    assert "float64, fused" in lion
    assert not unknown["holds"]
    assert "KeyError" in unknown["reason"]
