"""The learned scale on a noisy quadratic: exact moments beside simulations, and where the rule comes to rest."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mada_lab.cli.main import main
from mada_lab.theory.scale import (
    NoisyQuadratic,
    best_rate,
    cosine_shares,
    expected_loss,
    harmonic_quadratic,
    horizon_signal,
    moments,
    resting_rate,
    searched_rates,
    whole_way_signal,
)
from mada_lab.theory.scale_figure import Setting, summarize
from mada_optim.scale import SearchSettings

DOCUMENT = Path(__file__).parents[3] / "docs" / "scale-theory.md"
FLAT = torch.ones(150, dtype=torch.float64)


def quadratic(curvature: list[float], distance: list[float], noise: list[float]) -> NoisyQuadratic:
    return NoisyQuadratic(*torch.tensor([curvature, distance, noise], dtype=torch.float64))


def rest(problem: NoisyQuadratic, shares: Tensor = FLAT, swing: float = 0.5) -> float:
    return resting_rate(problem, lambda rate: whole_way_signal(problem, rate, shares, swing=swing))


@pytest.mark.parametrize("swing", [1.0, 0.5, 0.0])
def test_the_signal_is_the_mean_of_what_a_simulation_measures(swing: float) -> None:
    problem = quadratic([1.0, 0.2, 0.03], [1.0, 2.0, 9.0], [0.5, 0.3, 0.1])
    shares, rate, window, seeds = cosine_shares(60)[:40], 0.4, 0.9, 20_000
    x_1 = problem.distance.sqrt().expand(seeds, 3)
    way, mean_way, x = torch.zeros_like(x_1), torch.zeros_like(x_1), x_1
    for share in shares.tolist():
        grad = problem.curvature * x + problem.noise.sqrt() * torch.randn_like(x)
        way = way + share * grad
        mean_way = window * mean_way + (1 - window) * way
        x = x_1 - rate * way
    grad = problem.curvature * x + problem.noise.sqrt() * torch.randn_like(x)
    measured = -rate * (grad * (swing * way + (1 - swing) * mean_way)).sum(-1)
    expected = whole_way_signal(problem, torch.tensor(rate), shares, swing, window)
    assert abs(float(measured.mean() - expected)) < 4 * float(measured.std()) / math.sqrt(seeds)
    loss = 0.5 * (problem.curvature * x**2).sum(-1)
    error = 4 * float(loss.std()) / math.sqrt(seeds)
    assert float(loss.mean()) == pytest.approx(float(expected_loss(problem, torch.tensor(rate), shares)), abs=error)


@pytest.mark.parametrize("horizon", [1, 5, None])
def test_the_signal_of_a_horizon_is_the_derivative_of_the_loss(horizon: int | None) -> None:
    problem, shares, rate = harmonic_quadratic(100.0, count=5), cosine_shares(30), torch.tensor(0.7).double()
    counted = (torch.arange(30) >= 30 - (horizon or 30)).double()
    high, low = (expected_loss(problem, rate, shares * (step * counted).exp()) for step in (1e-5, -1e-5))
    numeric = float(high - low) / 2e-5
    assert float(horizon_signal(problem, rate, shares, horizon)) == pytest.approx(numeric, rel=1e-6)


def test_coordinates_of_one_curvature_may_be_added() -> None:
    two = quadratic([0.5, 0.5, 0.1], [1.0, 3.0, 2.0], [0.2, 0.4, 1.0])
    one = quadratic([0.5, 0.1], [4.0, 2.0], [0.6, 1.0])
    rate = torch.logspace(-2, 0, 5)
    torch.testing.assert_close(whole_way_signal(two, rate, FLAT), whole_way_signal(one, rate, FLAT))
    assert moments(two, rate, FLAT).square.shape == (5, 3)


def test_a_swing_that_counts_by_one_half_is_what_differentiating_through_the_steps_says() -> None:
    """Noise in a direction of high curvature, once it is stationary: κ s²/4 for small κh, by both."""
    problem, rate, shares = quadratic([1.0], [0.0], [1.0]), torch.tensor(0.02).double(), torch.ones(3000).double()
    through = float(horizon_signal(problem, rate, shares))
    assert through == pytest.approx(0.02 / 4, rel=0.05)
    # A mean way that does not follow the swings.
    assert float(whole_way_signal(problem, rate, shares, window=1 - 1e-9)) == pytest.approx(through, rel=0.05)
    assert float(whole_way_signal(problem, rate, shares, swing=1.0)) == pytest.approx(2 * through, rel=0.05)


@pytest.mark.parametrize("gone", [0.3, 1.0, 3.0])
def test_a_coordinate_that_has_gone_far_counts_for_more_than_differentiating_through_says(gone: float) -> None:
    """With z = κ h t: by (e^z - 1)/z."""
    problem, rate = quadratic([gone / 1000], [1.0], [0.0]), torch.tensor(1.0).double()
    shares = torch.ones(1000).double()
    ratio = whole_way_signal(problem, rate, shares, swing=1.0) / horizon_signal(problem, rate, shares)
    assert float(ratio) == pytest.approx((math.exp(gone) - 1) / gone, rel=0.01)


@pytest.mark.parametrize("condition", [1e2, 1e4])
@pytest.mark.parametrize("noise", [1.0, 10.0, 100.0])
def test_one_step_is_short_sighted_and_the_whole_way_less_so(condition: float, noise: float) -> None:
    problem, shares = harmonic_quadratic(condition, noise, count=20), cosine_shares(600)
    until = shares[:150]
    by_horizon = [
        resting_rate(problem, partial(horizon_signal, problem, shares=until, horizon=last)) for last in (1, 10, 100)
    ]
    rule, best = rest(problem, until), best_rate(problem, shares)
    assert by_horizon == sorted(by_horizon)
    assert by_horizon[-1] < rule
    assert 1.2 * rule < best < 3.1 * rule
    losses = expected_loss(problem, torch.tensor([best, 1.5 * rule, rule, by_horizon[0]]), shares).tolist()
    assert losses == sorted(losses)
    assert losses[1] < 1.1 * losses[0]


@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize("far", [0.4, 2.5])
def test_a_search_that_begins_near_comes_to_rest_where_the_signal_is_zero(noise: float, far: float) -> None:
    problem = harmonic_quadratic(100.0, noise, count=20)
    rate = rest(problem)
    searched = searched_rates(problem, FLAT, SearchSettings(start=far * rate), seeds=8)
    assert float(searched.log().mean().exp()) == pytest.approx(rate, rel=0.35)


def test_a_search_that_begins_far_below_ends_lower() -> None:
    """What the model's fixed point leaves out: W keeps the gradients of the climb."""
    problem = harmonic_quadratic(100.0, 1.0, count=20)
    from_far, from_near = (
        float(searched_rates(problem, FLAT, SearchSettings(start=start), seeds=6).median()) for start in (1e-4, 1e-1)
    )
    assert 0.1 * rest(problem) < from_far < 0.75 * from_near


def test_a_signal_that_never_asks_for_more_is_refused() -> None:
    problem = quadratic([1.0], [0.0], [1.0])
    with pytest.raises(ValueError, match="lowest must be a rate"):
        rest(problem)


# ---- mada scale


def test_scale_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mada_lab.theory.scale_figure.LENGTHS", (300, 400))
    computed_once = cache(summarize)
    monkeypatch.setattr("mada_lab.theory.scale_figure.summarize", computed_once)
    options = ["--steps", "300", "--seeds", "1", "--condition", "100"]
    assert main(["scale", *options, "--out", str(tmp_path / "figure")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}
    assert computed_once(Setting(condition=100.0, steps=300, seeds=1)) in capsys.readouterr().out


def test_the_documents_table_is_what_the_command_prints() -> None:
    rows = re.findall(r"^\|[^|]+\| ([\d.]+) \| ([\d.]+) \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    printed = re.findall(r"rate ([\d.]+) +loss ([\d.]+)", summarize(Setting()))
    assert sorted(rows) == sorted(printed)
    assert len(rows) == 8


def test_the_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scale", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Setting):
        assert f"default: {field.default:g})" in text.partition("options:")[2].split(f"--{field.name} ")[1], field.name


def test_arguments_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--steps", "100"]) == 2
    assert "steps must be at least 300, got 100" in capsys.readouterr().err
