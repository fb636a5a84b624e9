"""The figure of final losses over learning rates, from stages that are stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny import stored_run

from mada_lab.cli.main import main
from mada_lab.report import rates_figure as rates
from mada_lab.report.rates_figure import TaskRates, by_task, draw_rates, finds_its_rate
from mada_lab.run.stored import StoredRun
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import StoredStage

SEARCHED = [{"beta1": 0.9, "scale_matrices": 1e-3}]
LOSSES = {1e-4: 1.8, 3e-4: 1.7, 1e-3: 1.6, 3e-3: 1.5, 1e-1: 9.0}
GRID = {
    "adamw": [stored_run(seed, lr=lr, val=val) for lr, val in LOSSES.items() for seed in (0, 1)],
    "wild": [stored_run(0, lr=1e-3, val=1.9), stored_run(0, lr=1e-2, val=None)],
}
FOUND = {"omada": [stored_run(0, SEARCHED, lr=3e-3, val=1.4)]}


def stage(title: str, runs: Mapping[str, Sequence[StoredRun]], steps: int = 600, data: str = "a") -> StoredStage:
    task = {"kind": "language", "layers": 1, "data": f"/somewhere/{title}"}
    described = {"title": title, "base": {"task": task, "steps": steps}}
    contenders = [ContenderRuns(label, each) for label, each in runs.items()]
    records = [{"data": {"source": "a text", "sha256": data, "init": None}}]
    return StoredStage(described, contenders, records, {})


def test_titles_end_at_a_comma_between_words() -> None:
    assert [task.title for task in by_task([stage("2,000 steps: texts, long", GRID)])] == [
        "2,000 steps: texts, 600 steps"
    ]


def test_stages_of_the_same_task_share_a_panel() -> None:
    tasks = by_task([stage("Texts, long", GRID), stage("Searched", FOUND), stage("Other", GRID, data="b")])
    assert [(task.title, [*task.contenders]) for task in tasks] == [
        ("Texts, 600 steps", ["adamw", "wild", "omada"]),
        ("Other, 600 steps", ["adamw", "wild"]),
    ]


def test_another_number_of_steps_is_another_panel() -> None:
    assert len(by_task([stage("Short", GRID), stage("Long", FOUND, steps=2000)])) == 2


def test_the_later_stage_counts_and_labels_choose() -> None:
    again = {"adamw": [stored_run(0, lr=1e-3, val=1.0)]}
    (task,) = by_task([stage("First", GRID), stage("Again", again), stage("Searched", FOUND)], ["omada", "adamw"])
    assert [*task.contenders] == ["omada", "adamw"]
    assert task.contenders["adamw"].runs == again["adamw"]


def test_another_schedule_is_another_panel_and_a_field_that_came_later_is_not() -> None:
    constant, later = stage("Constant", FOUND), stage("Later", FOUND)
    constant.described["base"]["final_lr"] = 1.0
    later.described["base"] |= {"warmup": 0.05, "final_lr": None}
    later.described["base"]["task"] |= {"adapt": "all", "retained": None}
    tasks = by_task([stage("First", GRID), constant, later])
    assert [[*task.contenders] for task in tasks] == [["adamw", "wild", "omada"], ["omada"]]


def test_found_rates_are_stars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FOUND["omada"][0]
    found = {"scale_matrices": 2e-3, "scale_rest": 4e-3, "rho": 1.0}
    searched = dataclasses.replace(run, result=dataclasses.replace(run.result, coefficients=found))
    titles = ["A", "B", "C", "D", "E"]
    tasks = by_task([stage(title, {"omada": [searched]}, data=title) for title in titles])
    figure = drawn(tasks, tmp_path / "rates", monkeypatch)
    stars = [line for line in figure.axes[4].lines if line.get_marker() == "*"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(2e-3, 1.4), (4e-3, 1.4)]
    assert [line.get_markerfacecolor() == "none" for line in stars] == [False, True]
    assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]  # two rows of three


def drawn(tasks: Sequence[TaskRates], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    save = rates.save_figure
    monkeypatch.setattr(rates, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    draw_rates(tasks, path)
    return figures[0]


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finds_its_rate(ContenderRuns("omada", FOUND["omada"]))
    assert not finds_its_rate(ContenderRuns("adamw", GRID["adamw"]))
    figure = drawn(by_task([stage("Texts", GRID), stage("Searched", FOUND)]), tmp_path / "rates", monkeypatch)
    lines = {line.get_label(): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    assert list(lines["adamw"].get_ydata()) == [*LOSSES.values()]
    assert list(lines["wild"].get_xdata()) == [1e-3]  # at 1e-2 it diverged
    assert list(lines["omada"].get_ydata()) == [1.4, 1.4]  # across: whatever rate is given
    assert list(lines["omada"].get_xdata()) == [0, 1]
    low, high = figure.axes[0].get_ylim()
    assert 1.3 < low < 1.4  # nothing is below
    assert high < 3  # 9.0 would press the others to the ground
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.png", "rates.svg"]


def test_the_command_draws_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder as mada sweep writes it."""
    folder = tmp_path / "tune"
    names = {f"adamw-lr{lr:g}": lr for lr in (1e-3, 1e-2)}
    base = {"task": {"kind": "language", "layers": 1}, "steps": 10}
    contenders = {"adamw": {"runs": [*names], "total": 2}}
    described = {"title": "Tiny", "stage": "tune", "threshold": None, "contenders": contenders, "base": base}
    folder.mkdir()
    (folder / "stage.json").write_text(json.dumps(described), "utf-8")
    for name, lr in names.items():
        run = folder / "runs" / name
        run.mkdir(parents=True)
        optimizer = {"name": "adamw", "lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.1, "options": {}}
        config = {**base, "optimizer": optimizer, "seed": 0, "final_lr": 0.1, "threads": 1, "device": "cpu"}
        data = {"source": "text", "sha256": "0"}
        (run / "config.json").write_text(
            json.dumps({"config": config, "data": data, "versions": {}, "machine": {}}), "utf-8"
        )
        (run / "metrics.jsonl").write_text('{"step": 10, "val_loss": 1.5}\n', "utf-8")
        result = {"status": "finished", "step": 10, "train_loss": 1.0, "val_loss": 1.5, "best_val_loss": 1.5}
        result |= {"step_seconds": 0.1, "optimizer_seconds": 0.1, "coefficients": {}, "skipped_hypergradients": 0}
        (run / "result.json").write_text(json.dumps(result), "utf-8")
    out = tmp_path / "rates.png"
    assert main(["report", str(folder), "--only", "adamw", "--out", str(out)]) == 0
    assert f"Written: {out}, {out.with_suffix('.svg')}" in capsys.readouterr().out
    assert out.stat().st_size > 1000
    assert main(["report", str(folder), "--only", "adam", "--out", str(out)]) == 2
    assert "only must be one of 'adamw', got 'adam'" in capsys.readouterr().err
    assert main(["report", str(folder), "--only", "adamw", "--out", str(tmp_path / "all.md")]) == 2
    assert "--out NAME.png" in capsys.readouterr().err
