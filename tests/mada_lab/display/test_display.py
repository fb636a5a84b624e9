"""What a person sees while something goes on, on terminals of several widths."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console, Group
from tiny import tiny_config

from mada_lab.display import progress as display
from mada_lab.display.progress import Display, StepsDisplay, values_in_rows
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import StepReport, train
from mada_optim.history.notation import SYMBOLS

EIGHT = {**dict.fromkeys(list(SYMBOLS)[:7], 0.5), "scale": 1.234e-4}
WIDTHS = (60, 80, 120)


def report(learned: dict[str, float], loss: float = 4.0532) -> StepReport:
    return StepReport(123, loss, 4.1234, 3.21e-3, learned, True)


def shown(step: StepReport, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(Group(*values_in_rows(step, width)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", range(len(EIGHT) + 1))
def test_no_value_is_cut(width: int, count: int) -> None:
    learned = dict(list(EIGHT.items())[-count:]) if count else {}
    lines = shown(report(learned), width)
    values = [value for line in lines[1::2] for value in line.split()]
    assert values == ["4.0532", "4.1234", "3.2e-03", *("1.23e-04" if v < 0.01 else "0.500" for v in learned.values())]
    names = [name for line in lines[::2] for name in line.replace("val loss", "val_loss").split()]
    assert names == ["loss", "val_loss", "lr", *(SYMBOLS[name] for name in learned)]


def test_rows_are_as_many_as_the_width_needs() -> None:
    assert [len(shown(report(EIGHT), width)) // 2 for width in (*WIDTHS, 40)] == [2, 2, 1, 3]
    # What is learned begins a row, and does not end one.
    assert shown(report(EIGHT), 80)[0].split() == ["loss", "val", "loss", "lr"]


def test_a_loss_that_blew_up_and_one_that_is_none() -> None:
    for loss in (1.5e12, float("nan")):
        assert not any("…" in line for line in shown(report(EIGHT, loss), 60))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["mada", "omada"])
def test_the_panel_of_a_run(name: str, width: int, tmp_path: Path) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    config = dataclasses.replace(tiny_config(steps=4), optimizer=OptimizerConfig(name))
    reports: list[StepReport] = []
    with Display(console, config.steps) as panel:

        def on_step(step: StepReport) -> None:
            reports.append(step)
            panel(step)

        train(config, tmp_path / "run", on_begin=panel.begin, on_step=on_step, draw=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "4/4" in text
    assert reports[-1].learned
    panel_lines = text[text.rindex("val loss") :].splitlines()
    assert set(" ".join(panel_lines).split()) >= {SYMBOLS[coefficient] for coefficient in reports[-1].learned}
    assert "β2" not in text  # neither of them learns it unless it is asked to


def test_coefficients_that_are_not_learned_are_left_out(tmp_path: Path) -> None:
    options = {"hyper_lr": {"rho": 0.1, "c": 0.1}}
    reports: list[StepReport] = []
    config = dataclasses.replace(tiny_config(steps=2), optimizer=OptimizerConfig("mada", options=options))
    train(config, tmp_path / "some", on_step=reports.append, draw=False)
    config = tiny_config("avgrad", steps=2)
    train(config, tmp_path / "none", on_step=reports.append, draw=False)
    assert [list(step.learned) for step in reports] == [["rho", "c"]] * 2 + [[]] * 2


def test_steps_are_counted_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display.time, "monotonic", iter(range(0, 1000, 4)).__next__)
    console = Console(file=io.StringIO())
    with StepsDisplay(console, 6) as on_step:
        for _ in range(6):
            on_step()
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "3 of 6 steps, 0:00:12 left",
        "6 of 6 steps, 0:00:00 left",
    ]


def test_the_progress_of_the_runs_of_a_sweep() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    with display.SweepDisplay(console) as sweep:
        sweep.progress({"adamw-lr0.1": (20, 60), "mada-lr0.1": (0, 60)})
        sweep.progress({"mada-lr0.1": (30, 60)})
        tasks = [(task.fields["left"], task.completed) for task in sweep._progress.tasks]
    assert tasks == [("", 0), ("mada-lr0.1", 30)]


def test_the_last_step_of_a_run_that_is_being_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.last_step() == 0
    run.metrics_file.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 400)) + '{"step": 40')
    assert run.last_step() == 399
