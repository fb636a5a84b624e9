"""Interactive figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import pytest
from tiny import stored_run as run

from mada_optim.experiments import plots
from mada_optim.experiments.figures import colour_levels
from mada_optim.experiments.paths import panels
from mada_optim.experiments.report import Summary


def test_a_loss_higher_than_at_the_start_is_a_cross() -> None:
    figure = plots.finals([Summary("a", [run(0), run(1, val=2.5), run(2, val=None), run(3, lr=0.2)])])
    _, points, crosses = figure.data
    assert list(points.y) == [1.0, 1.0]
    assert list(crosses.hovertext) == ["2.5000, lr 0.1, seed 1", "diverged, lr 0.1, seed 2"]
    assert figure.layout.yaxis.range[1] < 2


def contour_entry(losses: Mapping[tuple[float, float], float | None]) -> dict[str, Any]:
    starts = [{"betas": list(betas), "train_loss": loss, "val_loss": loss} for betas, loss in losses.items()]
    return {"optimizer": "a <b>", "lr": 0.1, "starts": starts}


def test_contours() -> None:
    grid = {(0.1, 0.5): 1.0, (0.1, 0.9): 2.0, (0.3, 0.5): 3.0, (0.3, 0.9): None}
    contour, dots, crosses = plots.contours([contour_entry(grid)], "val_loss").data
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
    figure = plots.contours([contour_entry(scattered), contour_entry(on_a_line)], "train_loss")
    assert [type(trace) for trace in figure.data] == [go.Contour, *[go.Scatter] * 4]
    assert figure.data[0].connectgaps
    assert figure.layout.annotations[0].text == "a &lt;b&gt;, lr 0.1"
    assert [type(trace) for trace in plots.contours([contour_entry(wild)], "val_loss").data] == [go.Scatter] * 2


def test_a_path_ends_with_a_cross_where_its_run_diverged() -> None:
    points = [{"rho": 1.0}, {"rho": 0.9}]
    (panel,) = panels([Summary("a <b>", [run(0, points, val=None), run(1, points)]), Summary("b", [run(0, points)])])
    diverged, cross, other, named = plots.paths(panel).data
    assert (diverged.x, diverged.y) == ((1, 2), (1.0, 0.9))
    assert (cross.marker.symbol, cross.x, cross.y) == ("x", (2,), (0.9,))
    assert "diverged" in cross.hovertemplate
    assert [trace.showlegend for trace in (diverged, cross, other, named)] == [True, False, False, True]
    assert diverged.name == "a &lt;b&gt;, lr 0.1"
    assert diverged.legendgroup == other.legendgroup != named.legendgroup
