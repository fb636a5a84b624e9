"""The demo: two trainings side by side, watched, interrupted, and gone on with."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from multiprocessing import active_children
from pathlib import Path

import pytest
import watched
from rich.console import Console
from tiny import assert_same_run, stored_run, without_times

from mada_lab.cli.main import main
from mada_lab.demo import experiment as demo
from mada_lab.demo.display import DemoDisplay
from mada_lab.display.terminal_chart import ChartLine, chart
from mada_lab.optimizers.registry import ENTRIES
from mada_lab.run.config import RunConfig
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import StepReport, train
from mada_lab.sweep.side_by_side import SideBySide

REPOSITORY = Path(__file__).parents[3]
MODEL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--val-windows", "8"]
TINY = [*MODEL, "--steps", "40", "--eval-every", "10", "--checkpoint-every", "10"]
RUNS = ("adamw-lr0.0003-seed0", "omada-lr0.0003-seed0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted demo, and what it printed where there is no terminal."""
    folder = tmp_path_factory.mktemp("demo") / "whole"
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["demo", *TINY, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def test_what_a_demo_prints_without_a_terminal(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    assert "\x1b" not in printed
    said = " ".join(printed.split())
    assert "The same model, text, which is Python's language reference, and learning rate for both: 0.0003." in said
    for title in ("AdamW, learning rate 0.0003", "OMADA, finds its rate      "):
        steps = re.findall(rf"^{title}  step (\d+)/40  training loss ", printed, re.MULTILINE)
        assert [int(step) for step in steps] == [10, 20, 30, 40]
    assert re.search(
        r"^OMADA, finds its rate, step \d+: learning rate found: .* after \d+ steps$", printed, re.MULTILINE
    )
    finals = {name: RunFolder(folder / "runs" / name).metrics()[-1]["val_loss"] for name in RUNS}
    assert re.search(rf"^AdamW  0.0003, the guess +{finals[RUNS[0]]:.4f} ", printed, re.MULTILINE)
    assert re.search(rf"^OMADA  .*\(rest\), .* \(matrices\) +{finals[RUNS[1]]:.4f} ", printed, re.MULTILINE)
    difference = finals[RUNS[0]] - finals[RUNS[1]]
    assert difference > 0
    assert f"From the same guess, OMADA ends {difference:.2f} nats below AdamW after 40 steps" in printed
    assert "tuned" not in printed  # nothing is stored about so small a model


def test_what_a_demo_leaves_behind(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = whole
    assert {path.name for path in folder.iterdir()} == {"runs", "stage.json", "demo.png", "demo.svg"}
    figure = (folder / "demo.svg").read_text("utf-8")
    for text in (
        "loss (nats)",
        "learning rate",
        "step",
        "AdamW, the guess  0.0003",
        "OMADA, matrices  ",
        "OMADA, rest  ",
    ):
        assert text in figure
    assert main(["report", str(folder), "--out", str(folder / "all.md")]) == 0
    (folder / "all.md").unlink()


def test_both_begin_at_the_same_place(whole: tuple[Path, str]) -> None:
    first, other = (without_times(whole[0] / "runs" / name) for name in RUNS)
    assert first[:2] != other[:2]
    assert first[0] == other[0]
    assert first[1]["loss"] == other[1]["loss"]


def test_the_same_command_shows_a_demo_that_is_over(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = whole
    assert main(["demo", *TINY, "--out", str(folder)]) == 0
    again = capsys.readouterr().out
    assert again.partition("\n       learning rate")[2] == printed.partition("\n       learning rate")[2] != ""


def test_another_command_is_refused(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY, "--steps", "50", "--out", str(whole[0])]) == 2
    assert "is of another configuration (steps: 50, there 40)" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--lr", "-1"], ["--width", "10"]])
def test_wrong_input_is_one_line(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mada: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_demo_that_was_interrupted_goes_on_bit_for_bit(whole: tuple[Path, str], tmp_path: Path) -> None:
    """As a kill leaves it: one training in the middle, behind its last checkpoint, the other before its first step."""
    shutil.copy(whole[0] / "stage.json", tmp_path)
    folder = tmp_path / "runs" / RUNS[1]
    with pytest.raises(ZeroDivisionError):
        train(RunFolder(whole[0] / "runs" / RUNS[1]).config(), folder, on_step=lambda report: 1 // (17 - report.step))
    assert main(["demo", *TINY, "--out", str(tmp_path)]) == 0
    for name in RUNS:
        assert_same_run(tmp_path / "runs" / name, whole[0] / "runs" / name)


# The processes, with trainings of nothing.

needs_signals = pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")


def started(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, watched.__file__, str(folder), "1000000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "both\n", process.communicate()
    return process


@needs_signals
def test_ctrl_c_ends_both_after_a_step(tmp_path: Path) -> None:
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all that is in the foreground
    assert process.communicate(timeout=60) == ("False\n", "")
    assert [(tmp_path / name).read_text() for name in watched.NAMES] == ["told 1 times"] * 2


@needs_signals
def test_both_end_when_the_process_that_watches_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in watched.NAMES):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {(tmp_path / name).read_text() for name in watched.NAMES} <= {"BrokenPipeError", "ConnectionResetError"}


@needs_signals
def test_a_training_that_dies_is_named_and_the_other_goes_on(tmp_path: Path) -> None:
    class Killing:
        def begin(self, name: str, start: int) -> None:
            if name == "a":
                os.kill(next(child.pid for child in active_children() if child.name.endswith("-a")), signal.SIGKILL)

        def step(self, name: str, report: StepReport) -> None:
            pass

    over: dict[str, str] = {}
    calls = {"a": (str(tmp_path), "a", 1_000_000), "b": (str(tmp_path), "b", 100)}
    assert SideBySide(Killing()).run(watched.count, calls, over.__setitem__)
    assert over == {"a": "failed: its process ended with code -9", "b": "finished"}


def test_make_demo_runs_it() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "demo", "ARGS=--lr 0.1"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == ".venv/bin/mada demo --lr 0.1"


# What a tuned AdamW reaches, which the demo prints so that nobody is misled.


def test_the_tuned_baseline_is_the_stored_one() -> None:
    tuned = demo.Tuned()
    page = (REPOSITORY / tuned.page / "table.md").read_text("utf-8")
    assert f"| adamw | {tuned.lr:g} | {tuned.loss:.4f} ± {tuned.half_width:.4f} |" in page
    config = RunConfig()
    task = config.task
    described = (
        f"layers {task.layers}, heads {task.heads}, width {task.width}, context {task.context}, batch {task.batch}"
    )
    assert f"{described}, val_windows {task.val_windows}; {demo.STEPS} steps, {tuned.seeds} seeds" in page
    assert ENTRIES["adamw"].lr == tuned.lr


def test_the_baseline_is_named_where_it_fits_and_nowhere_else() -> None:
    fits = demo.demo(demo.GUESS, RunConfig(steps=600, eval_every=50, checkpoint_every=100, threads=1))
    assert demo.tuned(fits) == demo.Tuned()
    assert "AdamW's best rate here is 0.003" in demo.introduction(fits)
    assert demo.tuned(demo.demo(demo.GUESS, RunConfig(steps=500, threads=1))) is None
    too_high = demo.demo(0.1, RunConfig(steps=600, threads=1))
    assert "many people" not in demo.introduction(too_high)


def test_the_verdict_is_honest() -> None:
    experiment = demo.demo(demo.GUESS, RunConfig(steps=5))
    runs = {"adamw": stored_run(0, val=1.0), "omada": stored_run(0, val=1.5)}
    assert demo.verdict(experiment, runs) == "From the same guess, OMADA ends 0.50 nats above AdamW after 5 steps."
    runs["adamw"] = stored_run(0, val=None)
    assert demo.verdict(experiment, runs) == "From this guess, AdamW diverged."
    assert demo.table(experiment, runs)[1][2] == "diverged"


# What is seen while it goes on.


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_panels_and_the_chart(width: int) -> None:
    console = Console(width=width, height=40, file=io.StringIO(), color_system=None)
    display = DemoDisplay(console, 600, {"a": "AdamW, learning rate 0.0003", "b": "OMADA, finds its rate"})
    console.print(display)
    for step in range(1, 301):
        display.step("a", StepReport(step, 4.5 - 0.001 * step, 4.5, 3e-4, {}, False))
        found = {"scale_matrices": 0.0084, "scale_rest": 0.0092}
        display.step("b", StepReport(step, 4.5 - 0.01 * step, 2.0, 1e-2, found, False))
    console.print(display)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    first, last = text.split("starting")[1], text.rpartition("300/600")[2]
    assert "training loss" not in first.splitlines()[0]
    assert re.search(r"learning rate +0.0003 .* rate, matrices +0.0084  found .*\n.* rate, rest +0.0092  found ", last)
    assert re.search(r"[\u2801-\u28ff] *AdamW 4\.2", last.replace("\u2800", " "))
    assert re.search(r"[\u2801-\u28ff] *OMADA 1\.5", last.replace("\u2800", " "))


def test_a_chart() -> None:
    falling = ChartLine("a", "red", [(step, 4.0 - step / 50) for step in range(101)])
    flat = ChartLine("b", "blue", [(step, 3.0) for step in range(101)])
    lines = chart([falling, flat], 100, 40, 6).plain.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("3.9 ")  # the first steep fall is left out
    assert lines[4].startswith("2.0 ")
    assert lines[4].endswith(" a 2.00")
    assert any(line.endswith(" b 3.00") for line in lines[1:4])
    assert lines[5].split() == ["step", "0", "100"]
    # A line without gaps: each column of the flat one has a dot.
    (row,) = [line for line in lines if line.endswith(" b 3.00")]
    assert "\u2800" not in row[4:-7]
    assert chart([ChartLine("a", "red", [])], 100, 40, 6).plain.count("\n") == 5
    assert "a 1.00" in chart([ChartLine("a", "red", [(1, 1.0)])], 100, 40, 6).plain
