"""Interactive figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure
from tiny import stored_run as run

from mada_lab.report import plotly_figures, stage_figures
from mada_lab.report.coefficient_panels import panels
from mada_lab.report.stage_figures import colour_levels
from mada_lab.sweep.contender_runs import ContenderRuns


def test_a_loss_higher_than_at_the_start_is_a_cross() -> None:
    figure = plotly_figures.finals([ContenderRuns("a", [run(0), run(1, val=2.5), run(2, val=None), run(3, lr=0.2)])])
    _, points, crosses = figure.data
    assert list(points.y) == [1.0, 1.0]
    assert list(crosses.hovertext) == ["2.5000, lr 0.1, seed 1", "diverged, lr 0.1, seed 2"]
    assert figure.layout.yaxis.range[1] < 2


def contour_entry(losses: Mapping[tuple[float, float], float | None]) -> dict[str, Any]:
    starts = [{"betas": list(betas), "train_loss": loss, "val_loss": loss} for betas, loss in losses.items()]
    return {"optimizer": "a <b>", "lr": 0.1, "starts": starts}


def test_contours() -> None:
    grid = {(0.1, 0.5): 1.0, (0.1, 0.9): 2.0, (0.3, 0.5): 3.0, (0.3, 0.9): None}
    (small,) = plotly_figures.contours([contour_entry(grid)], "val_loss")
    contour, dots, crosses = small.figure.data
    assert (contour.x, contour.y) == ((0.1, 0.3), (0.5, 0.9))
    assert list(contour.z) == [[1.0, 3.0], [2.0, None]]  # rows are β2
    assert not contour.connectgaps
    assert list(dots.hovertext)[1] == "β1 0.1, β2 0.9: 2.0000"
    assert (crosses.x, crosses.y, crosses.hovertext) == ((0.3,), (0.9,), ("β1 0.3, β2 0.9: diverged",))


def test_losses_that_blew_up_leave_colours_for_the_others() -> None:
    losses = {(0.1 * i, 0.5): 1.0 + 0.01 * i for i in range(8)}
    levels = colour_levels([contour_entry(losses)], "val_loss")
    assert (levels[0], levels[-1]) == pytest.approx((1.0, 1.07))
    levels = colour_levels([contour_entry(losses | {(0.9, 0.5): 1e12, (0.9, 0.6): 1e9})], "val_loss")
    assert levels[0] == 1.0
    assert levels[-1] < 1.3


def test_contours_of_starts_that_are_no_grid() -> None:
    scattered = {(0.1, 0.5): 1.0, (0.2, 0.9): 2.0, (0.3, 0.7): 3.0}
    on_a_line = {(0.1, 0.5): 1.0, (0.1, 0.9): 2.0}
    wild = {(0.1, 0.5): None, (0.2, 0.9): None}
    one, other = plotly_figures.contours([contour_entry(scattered), contour_entry(on_a_line)], "train_loss")
    assert [type(trace) for trace in one.figure.data] == [go.Contour, *[go.Scatter] * 2]
    assert [type(trace) for trace in other.figure.data] == [go.Scatter] * 2
    assert one.figure.data[0].connectgaps
    assert one.title == "a <b>, lr 0.1"
    assert one.figure.layout.coloraxis == other.figure.layout.coloraxis
    (small,) = plotly_figures.contours([contour_entry(wild)], "val_loss")
    assert [type(trace) for trace in small.figure.data] == [go.Scatter] * 2


def test_a_path_ends_with_a_cross_where_its_run_diverged() -> None:
    points = [{"rho": 1.0}, {"rho": 0.9}]
    (panel,) = panels(
        [ContenderRuns("a <b>", [run(0, points, val=None), run(1, points)]), ContenderRuns("b", [run(0, points)])]
    )
    (small,) = plotly_figures.paths(panel)
    diverged, cross, other, named = small.figure.data
    assert (diverged.x, diverged.y) == ((1, 2), (1.0, 0.9))
    assert (cross.marker.symbol, cross.x, cross.y) == ("x", (2,), (0.9,))
    assert "diverged" in cross.hovertemplate
    assert [trace.showlegend for trace in (diverged, cross, other, named)] == [True, False, False, True]
    assert diverged.name == "a &lt;b&gt;, lr 0.1"
    assert diverged.legendgroup == other.legendgroup != named.legendgroup


def test_a_jitter_does_not_look_like_a_change() -> None:
    jitter = [{"rho": 1.0, "beta3": 0.0, "scale": 0.01}, {"rho": 0.9999, "beta3": 0.8, "scale": 0.0101}]
    (panel,) = panels([ContenderRuns("a", [run(0, jitter)]), ContenderRuns("b", [run(0, jitter[:1])])])
    ranges = {small.title: small.figure.layout.yaxis.range for small in plotly_figures.paths(panel)}
    assert ranges["ρ"] == pytest.approx((0.94995, 1.04995))
    assert ranges["β3"] == pytest.approx((-0.04, 0.84))  # as wide as what it goes through
    low, high = (10**end for end in ranges["κ"])
    assert high / low == pytest.approx(5)
    assert low < 0.01 < 0.0101 < high
    # All have the same steps.
    assert {small.figure.layout.xaxis.range for small in plotly_figures.paths(panel)} == {(0, 2)}


def test_the_same_in_the_figure_for_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(stage_figures, "save_figure", lambda figure, path: drawn.append(figure))
    points = [{"rho": 1.0, "scale": 0.01}, {"rho": 0.9999, "scale": 0.5}]
    stage_figures.draw_coefficients(panels([ContenderRuns("a", [run(0, points)])]), tmp_path / "x", "")
    rho, scale = (axes for part in drawn[0].subfigs for axes in part.axes)
    assert rho.get_ylim() == pytest.approx((0.94995, 1.04995))
    drawn[0].canvas.draw()
    low, high = scale.get_ylim()
    texts = [text.get_text() for text in scale.yaxis.get_ticklabels() if low <= text.get_position()[1] <= high]
    assert texts == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    assert not scale.yaxis.get_minorticklocs().size


def test_ticks_of_a_logarithmic_axis_are_whole_numbers() -> None:
    points = [{"scale": 1e-4}, {"scale": 0.5}]
    (small,) = plotly_figures.paths(panels([ContenderRuns("a", [run(0, points)])])[0])
    axis = small.figure.layout.yaxis
    # With dtick "D1" or "D2", or without a format, plotly writes 2 for 0.02.
    assert (axis.type, axis.tickformat, axis.dtick) == ("log", ".3~g", None)
    figure = plotly_figures.finals([ContenderRuns("a", [run(0, lr=0.001 * 1.3**i) for i in range(20)])])
    values = figure.layout.xaxis.tickvals
    assert len(values) <= 8  # as many as have room beside each other
    assert list(figure.layout.xaxis.ticktext) == [f"{value:g}" for value in values]


def test_keys_are_those_of_the_lines() -> None:
    points = [{"rho": 1.0, "c": 1.0}, {"rho": 0.5, "c": 0.9}]
    several = [ContenderRuns(f"<{i}>", [run(0, points), run(1, points)]) for i in range(9)]
    one, other = panels(several)
    figures_of_one = [small.figure for small in plotly_figures.paths(one)]
    found = plotly_figures.keys(figures_of_one)
    assert [key.label for key in found] == [f"&lt;{i}&gt;, lr 0.1" for i in range(7)]
    groups = {trace.legendgroup for figure in figures_of_one for trace in figure.data}
    assert {key.group for key in found} == groups
    assert [key.dash for key in plotly_figures.keys([small.figure for small in plotly_figures.paths(other)])] == [
        "dash",
        "dash",
    ]
    of_a_run = plotly_figures.keys([plotly_figures.losses(several[0].runs[0])])
    assert len({(key.colour, key.width, key.opacity) for key in of_a_run}) == 3
    names = [key.label for key in of_a_run]
    assert names == ["training, each step", "training", "validation"]
    assert (
        plotly_figures.keys([plotly_figures.finals([ContenderRuns("a", [run(0)])])]) == []
    )  # its axis names the lines
