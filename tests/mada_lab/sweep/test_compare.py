from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import stored_run, tiny_config
from torch import nn

from mada_lab.cli.main import main
from mada_lab.display.progress import SweepDisplay
from mada_lab.errors import InputError
from mada_lab.optimizers import build as optimizers
from mada_lab.optimizers.config import OptimizerConfig, parse
from mada_lab.report.stage_figures import draw_comparison
from mada_lab.report.stage_files import write_stage_files
from mada_lab.run.folder import RunFolder
from mada_lab.sweep.comparison import comparison
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.experiment import Experiment
from mada_lab.sweep.run_stages import Ending, RunReport, run_stages
from mada_lab.sweep.stage_folder import TUNE

BASE = dataclasses.replace(tiny_config(steps=20, eval_every=5), optimizer=OptimizerConfig())
GRID = comparison(["adamw", "mada:rho=0"], [1e-3, 1e-2], [0, 1], BASE)


def _ignore(*_: object) -> None:
    pass


def compare(grid: Experiment, out: Path, on_run: Callable[[RunReport], None] = _ignore) -> None:
    assert run_stages(grid, {TUNE: out}, 2, on_run) == Ending()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "grid"
    seen: list[str] = []
    compare(GRID, folder, lambda run: seen.append(f"{run.status} {run.done}/{run.total}"))
    assert seen == [f"finished {i}/8" for i in range(1, 9)]
    return folder


def test_all_see_the_same_model_and_data(out: Path) -> None:
    def first(folder: str) -> float:
        loss: float = RunFolder(out / "runs" / folder).metrics()[1]["loss"]
        return loss

    assert first("adamw-lr0.001-seed0") == first("adamw-lr0.01-seed0") == first("mada+rho=0-lr0.01-seed0")
    assert first("adamw-lr0.001-seed0") != first("adamw-lr0.001-seed1")


def test_again_trains_nothing(out: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    compare(GRID, out, lambda _: pytest.fail("trained again"))
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}


def test_what_is_kept_is_said(out: Path) -> None:
    said: list[tuple[Path, int, int]] = []

    def again(grid: Experiment) -> None:
        run_stages(grid, {TUNE: out}, 2, _ignore, on_kept=lambda *counts: said.append(counts), only=["adamw"])

    again(GRID)
    result = RunFolder(out / "runs" / "adamw-lr0.01-seed1").result_file
    result.unlink()
    again(GRID)
    assert said == [(out, 4, 0), (out, 3, 1)]
    console = Console(file=io.StringIO())
    with SweepDisplay(console) as display:
        display.kept(out, 3, 1)
    assert console.file.getvalue() == f"{out}: 3 of 4 runs are over and kept, 1 to train.\n"  # type: ignore[attr-defined]


def test_unfinished_run_goes_on(out: Path) -> None:
    folder = RunFolder(out / "runs" / "adamw-lr0.01-seed1")
    before = folder.result_file.read_text()
    folder.result_file.unlink()
    seen: list[tuple[str, int, int]] = []
    compare(GRID, out, lambda run: seen.append((run.name, run.done, run.total)))
    assert seen == [(folder.path.name, 8, 8)]
    assert json.loads(folder.result_file.read_text()) == json.loads(before)


def test_another_config_is_refused(out: Path) -> None:
    with pytest.raises(InputError, match=r"another configuration .steps: 21, there 20"):
        compare(dataclasses.replace(GRID, base=dataclasses.replace(BASE, steps=21)), out)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="new or empty folder or one of an experiment"):
        compare(GRID, tmp_path)


def test_report_from_stored_files(out: Path) -> None:
    report = write_stage_files(out)
    tables, notes = list(report.tables().values()), report.notes()
    written = {name: (out / name).read_bytes() for name in ("table.md", "results.json", "curves.svg")}
    assert [row[0] for row in tables[0]] == ["optimizer", "adamw", "mada:rho=0"]
    assert len(tables[2][0]) == 3
    assert "2 seeds" in notes[0]
    assert len(notes) == 2  # the other says that best rates are at an edge
    stored = json.loads(written["results.json"])
    assert [entry["optimizer"] for entry in stored["results"]] == ["adamw", "mada:rho=0"]
    assert len(stored["results"][0]["by_lr"][0]["val_loss"]) == 2
    write_stage_files(out)
    assert written == {name: (out / name).read_bytes() for name in written}


def test_report_says_what_is_missing(out: Path) -> None:
    result = RunFolder(out / "runs" / "adamw-lr0.01-seed1").result_file
    content = result.read_bytes()
    result.unlink()
    try:
        assert "INCOMPLETE: 7 of 8" in write_stage_files(out).notes()[-1]
    finally:
        result.write_bytes(content)


def test_report_with_another_reference(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stage_files(out)
    difference = json.loads((out / "results.json").read_text())["results"][1]["difference"]
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["compare", "--report", str(out), "--reference", "mada:rho=0"]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["reference"] == "mada:rho=0"
    assert found["results"][0]["difference"] == pytest.approx(-difference)
    assert "final val loss minus mada:rho=0's" in (out / "table.md").read_text()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if f"{-difference:+.4f}" in line)
    assert len(line.split()) > 6  # nothing is left out or broken in a terminal that is too narrow
    write_stage_files(out)


@pytest.mark.parametrize("folder", ["--out", "--report"])
def test_unknown_reference(folder: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out if folder == "--report" else tmp_path / "new"
    command = ["compare", "--optimizers", "adamw,mada:rho=0", folder, str(path), "--reference", "adan"]
    assert main(command) == 2
    assert "reference must be one of 'adamw', 'mada:rho=0', got 'adan'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_more_lines_than_colours_differ_in_their_dashes(tmp_path: Path) -> None:
    contenders = [ContenderRuns(f"optimizer {number}", [stored_run(0, val=1.0 + number)]) for number in range(9)]
    draw_comparison(contenders, tmp_path / "curves", "nine")
    drawn = (tmp_path / "curves.svg").read_text()
    # The eighth and ninth: a line in both plots, and the piece of it beside its name.
    assert drawn.count("stroke-dasharray") == 6
    draw_comparison(contenders[:7], tmp_path / "curves", "seven")
    assert "stroke-dasharray" not in (tmp_path / "curves.svg").read_text()


def test_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no stage.json"):
        write_stage_files(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("optimizers", []), ("lrs", [1e-3, 1e-3]), ("seeds", [])])
def test_bad_grid(name: str, value: list[object]) -> None:
    grid = {"optimizers": ["adamw"], "lrs": [1e-3], "seeds": [0], name: value}
    with pytest.raises(InputError, match=name):
        comparison(**grid, base=BASE)  # type: ignore[arg-type]


def test_unknown_optimizer_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 'adamx'"):
        compare(comparison(["adamw", "adamx"], [1e-3], [0], BASE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipe_defaults_are_those_of_each_optimizer() -> None:
    grid = comparison(["adam", "adan", "schedulefree"], [1e-3], [0], BASE)
    configs = [config for label in grid.contenders for config in grid.tune(label).values()]
    assert all(config.optimizer.betas is None and config.final_lr is None for config in configs)


def test_options_of_a_contender_are_honoured_or_refused() -> None:
    base = dataclasses.replace(BASE, optimizer=OptimizerConfig(weight_decay=0.3))
    grid = comparison(["adamw", "adamw:weight_decay=5", "adamw:beta1=0.5:beta2=0.7"], [1e-2], [0], base)
    configs = [
        optimizers.resolve_optimizer(config.optimizer)
        for label in grid.contenders
        for config in grid.tune(label).values()
    ]
    assert [(config.weight_decay, config.betas) for config in configs] == [
        (0.3, (0.9, 0.99)),
        (5, (0.9, 0.99)),
        (0.3, (0.5, 0.7)),
    ]
    with pytest.raises(InputError, match="options of adamw must not have lr, got 1: .* --lrs"):
        comparison(["adamw:lr=1"], [1e-2], [0], BASE)


def test_betas_that_an_optimizer_does_not_take_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What is refused later is refused after it has been said.
    command = ["compare", "--optimizers", "adamw,lion,adan:beta1=0.9:beta2=0.9", "--betas", "0.5", "0.7"]
    assert main([*command, "--workers", "-1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mada: --betas do not reach lion, for which they mean something else" in error
    assert "adan" not in error


@pytest.mark.parametrize(
    "spec", ["mada:rho", "mada:rho=x", "mada:beta1=0.3", "mada:betas=0.1", "mada:lr=1", "mada:rho=1:rho=0"]
)
def test_bad_specs(spec: str) -> None:
    with pytest.raises(InputError, match=spec.split(":")[1].partition("=")[0]):
        parse(spec)


def test_buffers_in_bfloat16_by_name():
    config = optimizers.resolve_optimizer(parse("mada:state_dtype=bfloat16"))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["options"] == {"state_dtype": "bfloat16"}
    assert optimizers.build(config, nn.Linear(1, 1)).param_groups[0]["state_dtype"] is torch.bfloat16
    with pytest.raises(InputError, match="state_dtype must be None, torch.float32 or torch.bfloat16, got 'Frodo'"):
        optimizers.resolve_optimizer(parse("mada:state_dtype=Frodo"))


def test_betas_are_not_given_to_optimizers_for_which_they_mean_something_else() -> None:
    base = dataclasses.replace(BASE, optimizer=OptimizerConfig(betas=(0.8, 0.95)))
    grid = comparison(["adamw", "adan", "lion:beta1=0.9:beta2=0.98"], [1e-3], [0], base)
    betas = {label: grid.config(label).optimizer.betas for label in grid.contenders}
    assert betas == {"adamw": (0.8, 0.95), "adan": None, "lion:beta1=0.9:beta2=0.98": (0.9, 0.98)}


def test_options_may_be_integers() -> None:
    model = nn.Linear(2, 2)
    optimizer = optimizers.build(
        optimizers.resolve_optimizer(parse("mada:hyper_every=10:hyper_warmup=0:rho=1e-1")), model
    )
    group = optimizer.param_groups[0]
    assert (group["hyper_every"], group["hyper_warmup"], group["coefficients"][3]) == (10, 0, 0.1)
