from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from tiny import stored_run

from mada_lab.report.joint_table import joint_table
from mada_lab.report.results import betas_results, edges, results
from mada_lab.report.stage_report import StageReport
from mada_lab.report.tables import betas_table, loss_table, lr_difference_table, lr_table, markdown, reference_table
from mada_lab.run.result import Result
from mada_lab.run.stored import StoredRun
from mada_lab.stats import mean_interval, paired_difference, t_quantile
from mada_lab.sweep.contender_runs import ContenderRuns
from mada_lab.sweep.stage_folder import TUNE, StoredStage

STAGE: dict[str, Any] = {
    "title": "t",
    "threshold": None,
    "contenders": {},
    "base": {"steps": 9, "task": {"kind": "language", "width": 16}},
}
RECORDS = [{"data": {"source": "s"}}]


def test_mean_interval_by_hand() -> None:
    # mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3, standard error sqrt(5/12), t with 3 degrees 3.182
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182 * math.sqrt(5 / 12))


def test_one_value_has_no_interval() -> None:
    assert mean_interval([1.5]) == (1.5, None)


def test_pairing_removes_what_seeds_have_in_common() -> None:
    mean, half = paired_difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert (mean, half) == (-1.0, 0.0)


def test_quantiles_fall_towards_the_normal() -> None:
    quantiles = [t_quantile(degrees) for degrees in range(1, 31)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[0] == 12.706
    assert t_quantile(1000) == quantiles[-1] > 1.96


def _run(lr: float, seed: int, curve: list[float], status: str = "finished") -> StoredRun:
    final = None if status == "diverged" else curve[-1]
    best = None if status == "diverged" else min(curve)
    metrics = [{"step": 10 * i, "val_loss": value} for i, value in enumerate(curve)]
    return StoredRun(lr, None, seed, Result(status, 20, final, final, best, 0.02, 0.001, {}, 0), metrics)


def test_tables_by_hand() -> None:
    adamw = ContenderRuns("adamw", [_run(0.1, 0, [5.0, 3.0, 2.0]), _run(0.1, 1, [5.0, 3.0, 2.2])])
    # At 0.2 one seed of mada is very good and the other diverged: that is not its best learning rate.
    mada = ContenderRuns(
        "mada",
        [
            _run(0.1, 0, [5.0, 1.9, 1.8]),
            _run(0.1, 1, [5.0, 2.0, 1.9]),
            _run(0.2, 0, [5.0, 1.0, 0.1]),
            _run(0.2, 1, [5.0], "diverged"),
        ],
    )
    entries = results([adamw, mada])
    assert [entry["best_lr"] for entry in entries] == [0.1, 0.1]
    # differences -0.2 and -0.3: mean -0.25, standard error 0.05, t with one degree 12.706
    assert entries[1]["difference"] == pytest.approx(-0.25)
    assert entries[1]["difference_ci95"] == pytest.approx(12.706 * 0.05)
    assert [entry["steps_to_reference"] for entry in entries] == [20, 10]
    # The best of two rates is at an edge of its grid.
    assert reference_table(entries)[2] == ["mada", "-0.2500 ± 0.6353 †", "-", "10", "20.0", "1.0"]
    assert reference_table(entries)[1][:3] == ["adamw", "-", "+0.2500 ± 0.6353"]
    assert lr_difference_table(entries) == [["optimizer", "lr 0.1"], ["mada", "-0.2500 ± 0.6353"]]
    against = reference_table(results([adamw, mada], "mada"), "mada")
    assert [row[1] for row in against] == ["final val loss minus mada's", "+0.2500 ± 0.6353", "-"]
    assert loss_table(entries)[1][:2] == ["adamw", "0.1"]
    assert lr_table(entries)[1:] == [["adamw", "2.1000", "-"], ["mada", "1.8500 †", "1 of 2 diverged"]]
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ([1.0, 2.0, 3.0], 0.1, "lowest"),
        ([2.0, 1.0, 3.0], 0.2, None),
        ([3.0, 2.0, 1.0], 0.3, "highest"),
        ([3.0, 2.0, None], 0.2, None),  # beyond it is a rate at which it diverged
        ([1.0], 0.1, None),  # no grid
        ([1.0, 2.0], 0.1, "lowest"),
    ],
)
def test_best_rates_at_the_edge_of_their_grid_are_marked_in_every_table(
    losses: list[float | None], best: float, edge: str | None
) -> None:
    grid = [0.1, 0.2, 0.3][: len(losses)]
    contenders = [
        ContenderRuns(
            label,
            [
                stored_run(seed, lr=lr, val=None if loss is None else loss + shift)
                for lr, loss in zip(grid, losses, strict=True)
                for seed in (0, 1, 2)
            ],
        )
        for label, shift in (("adamw", 0.0), ("mada", 0.5))
    ]
    report = StageReport(StoredStage({**STAGE, "stage": TUNE}, contenders, RECORDS, {}))
    entries = report.entries
    assert [(entry["best_lr"], entry["best_lr_edge"]) for entry in entries] == [(best, edge)] * 2
    tables = report.tables()
    marked = {title for title, table in tables.items() if any("†" in cell for row in table for cell in row)}
    of_best_rates = {title for title in tables if title != "Difference to adamw at every learning rate"}
    assert marked == (of_best_rates if edge else set())
    names = f"adamw ({best:g}, the {edge}), mada ({best:g}, the {edge})"
    note = f"† The best learning rate is at the edge of its grid, and a better one may lie beyond: {names}."
    assert [note for note in report.notes() if "†" in note] == ([note] if edge else [])
    joint = joint_table([("one", entries), ("two", entries)])
    assert joint is not None
    assert all((" †" in cell) == (edge is not None) for row in joint[1:] for cell in row[1:3])


def test_starts_of_betas_at_the_edge() -> None:
    runs = [stored_run(0, lr=lr, betas=(beta, 0.9), val=lr) for lr in (0.1, 0.2) for beta in (0.1, 0.5)]
    entries = betas_results([ContenderRuns("mada", runs)], 1.0)
    assert betas_table(entries, 1.0)[1][1] == "0.1 †"
    assert edges(entries) == ["mada (0.1, the lowest)"]


def test_a_second_stage_knows_the_grid_of_the_first() -> None:
    confirmed = ContenderRuns("mada", [stored_run(0)], grid=[0.1, 0.2, 0.2])
    assert results([confirmed])[0]["best_lr_edge"] == "lowest"
    assert dataclasses.replace(confirmed, grid=[0.05, 0.1, 0.2]).edge(0.1) is None


def test_a_run_alone_is_compared_with_nothing() -> None:
    for name in ("adamw", "mada"):
        report = StageReport(StoredStage({**STAGE, "stage": None}, [ContenderRuns(name, [stored_run(0)])], RECORDS, {}))
        assert list(report.tables()) == ["Losses", "Time of a step"]
        assert report.tables()["Losses"][0][:2] == ["optimizer", "lr"]
        assert all(cell != "-" for table in report.tables().values() for row in table for cell in row)
        assert report.notes() == ["s; width 16; 9 steps; losses in nats."]


def test_a_report_says_in_what_losses_are() -> None:
    base = {**STAGE["base"], "task": {"kind": "bandit", "width": 16}}
    stage = StoredStage({**STAGE, "base": base, "stage": None}, [ContenderRuns("mada", [stored_run(0)])], RECORDS, {})
    assert StageReport(stage).notes() == ["s; width 16; 9 steps; losses in shares of wrong guesses."]


def test_columns_of_a_comparison_without_its_reference() -> None:
    stage = StoredStage(
        {}, [ContenderRuns("mada", [stored_run(0)]), ContenderRuns("adan", [stored_run(0, val=2.0)])], [], {}
    )
    table = StageReport(stage).tables()["Difference to adamw and to the best, and time of a step"]
    assert table[0] == ["optimizer", "minus the best's", "ms per step", "of these optimizer"]


def test_differences_at_every_learning_rate_need_three_seeds() -> None:
    title = "Difference to adamw at every learning rate"
    for seeds in (2, 3):
        adamw, mada = (
            ContenderRuns(
                label, [_run(lr, seed, [5.0, last + lr * seed]) for lr in (0.1, 0.2) for seed in range(seeds)]
            )
            for label, last in (("adamw", 2.0), ("mada", 1.5))
        )
        tables = StageReport(StoredStage({}, [adamw, mada], [], {})).tables()
        assert (title in tables) == (seeds == 3)
    assert tables[title][1] == ["mada", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000"]


def test_runs_are_paired_by_the_start_of_their_betas() -> None:
    starts = [(0.1, 0.9), (0.5, 0.9), (0.9, 0.5)]
    runs = [dataclasses.replace(_run(0.1, 0, [float(i)]), betas=betas) for i, betas in enumerate(starts)]
    others = [
        dataclasses.replace(run, result=dataclasses.replace(run.result, val_loss=i + 1.0)) for i, run in enumerate(runs)
    ]
    entries = results([ContenderRuns("adamw", runs), ContenderRuns("mada", others[::-1])])
    assert (entries[1]["difference"], entries[1]["difference_ci95"]) == (1.0, 0.0)


def test_diverged_everywhere() -> None:
    entries = results([ContenderRuns("mada", [_run(0.1, 0, [5.0], "diverged")])])
    assert loss_table(entries)[1] == ["mada", "-", "diverged", "-", "-"]
    assert reference_table(entries)[1] == ["mada", "-", "-", "-", "-", "-"]
