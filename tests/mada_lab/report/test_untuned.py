"""What optimizers give without tuning, from sweeps that are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import stored_run

from mada_lab.cli.main import main
from mada_lab.report.untuned import Sweep, joint_table, task_table
from mada_lab.run.stored import StoredRun
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import StoredStage

EXPERIMENT = """
title = "Tiny"

[base]
task = { kind = "tabular", width = 4 }
steps = 4
eval_every = 4
threads = 1

[axes]
"optimizer.lr" = [1e-3, 1e-2]
seed = [0]

[confirm]
seeds = [0, 1]

[contenders.adamw]
name = "adamw"

[contenders."adamw, defaults"]
name = "adamw"
axes = { "optimizer.lr" = [1e-3] }

[contenders.omada]
name = "omada"
axes = { "optimizer.lr" = [3e-3] }
"""


def stage(**runs: list[StoredRun]) -> StoredStage:
    labels = {"adamw_defaults": "adamw, defaults", "omada_defaults": "omada, defaults"}
    contenders = [ContenderRuns(labels.get(label, label), each) for label, each in runs.items()]
    return StoredStage({"title": "T"}, contenders, [], {})


GRID = stage(
    adamw=[stored_run(0, lr=lr, val=val) for lr, val in ((1e-3, 3.0), (1e-2, 1.0), (1e-1, 2.0))],
    omada=[stored_run(0, lr=lr, val=val) for lr, val in ((1e-3, 0.9), (1e-2, None), (1e-1, 0.8))],
)
FULL = stage(
    adamw=[stored_run(seed, lr=1e-2, val=1.0 + 0.1 * seed) for seed in range(3)],
    adamw_defaults=[stored_run(seed, lr=1e-3, val=3.0 + 0.1 * seed) for seed in range(3)],
    omada_defaults=[stored_run(seed, lr=3e-3, val=0.5 + 0.1 * seed) for seed in range(3)],
    wild=[stored_run(seed, lr=1.0, val=None) for seed in range(3)],
)
SWEEP = Sweep("T", GRID, FULL)


def test_differences_are_paired_by_seed() -> None:
    table = joint_table([SWEEP, SWEEP], [(name, f"{name}, defaults") for name in ("adamw", "omada", "lost")])
    assert table == [
        ["optimizer", "T", "T", "better, equal, worse"],
        ["adamw, tuned", "1.1000 ± 0.2484", "1.1000 ± 0.2484", "-"],
        ["adamw", "+2.0000 ± 0.0000", "+2.0000 ± 0.0000", "0, 0, 2"],
        ["omada", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000", "2, 0, 0"],
    ]


def test_a_task_by_itself() -> None:
    header, *rows = task_table(SWEEP, ["adamw", "omada", "wild", "lost"])
    worst = "worst of the grid, 1 seed"
    assert header == ["optimizer", "seeds", "final loss", "learning rate", worst, "its learning rate", "range"]
    assert rows == [
        ["adamw, defaults", "3", "3.1000 ± 0.2484", "0.001", "-", "-", "-"],
        ["adamw", "3", "1.1000 ± 0.2484", "0.01", "3.0000", "0.001", "2.0000"],
        ["omada, defaults", "3", "0.6000 ± 0.2484", "0.003", "-", "-", "-"],
        ["wild", "-", "diverged", "-", "-", "-", "-"],
    ]


def test_a_grid_with_a_rate_that_diverges_and_other_measures() -> None:
    runs = [stored_run(seed, lr=lr, val=val) for lr, val in ((1e-3, 0.9), (1e-2, None), (1e-1, 0.8)) for seed in (0, 1)]
    measured = [replace(run, result=replace(run.result, val={"accuracy": 0.5 + 0.2 * run.seed})) for run in runs]
    only = stage(omada=measured)
    header, row = task_table(Sweep("T", only, only), ["omada"])
    assert header[:4] == ["optimizer", "seeds", "final loss", "accuracy"]
    assert row == ["omada", "2", "0.8000 ± 0.0000", "0.6000", "0.1", "diverged", "0.01"]


def test_fewer_seeds_than_the_reference_and_one_that_diverged() -> None:
    full = stage(
        adamw=[stored_run(seed, val=1.0 + seed) for seed in range(3)],
        omada=[stored_run(0, val=0.5), stored_run(1, val=2.0)],
        half=[stored_run(0, val=0.5), stored_run(1, val=None), stored_run(2, val=1.0)],
    )
    table = joint_table([Sweep("T", GRID, full)], [(name, name) for name in ("adamw", "omada", "half")])
    assert table[2][1].startswith("-0.2500 ±")  # of seeds 0 and 1
    assert table[3][1] == "diverged"  # a mean over the lucky ones would flatter
    assert [row[-1] for row in table[2:]] == ["0, 1, 0", "0, 0, 1"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    assert main(["sweep", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "untuned.md"
    assert main(["report", str(tmp_path / "out"), "--untuned", "--out", str(out)]) == 0
    text = out.read_text()
    assert "| adamw, tuned | " in text
    assert "### Tiny" in text
    assert "| worst of the grid, 1 seed |" in text
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out"), "--untuned", "--only", "lion", "--out", str(out)]) == 2
    assert "label must be one of 'adamw', 'omada', got 'lion'" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out"), "--untuned", "--out", str(tmp_path / "x.html")]) == 2
    assert "the name of a Markdown file" in capsys.readouterr().err
