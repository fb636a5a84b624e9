"""The online problem of Reddi et al. ("On the convergence of Adam and beyond", 2018), on which Adam goes wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mada_lab.theory.online import ADAM, AVGRAD, FROM_ADAM, Setting
from mada_lab.theory.online_problems import PROBLEMS, Trace, average_regret, play

PERIOD, BETAS = 101, (0.95, 0.99)


def played(name: str, setting: Setting) -> Trace:
    return setting.play(setting.contenders()[name])[0]


def final_iterate(trace: Trace) -> float:
    """The mean of the last ten periods."""
    return trace.iterates[-10 * PERIOD :].mean().item()


# 1010 x once in a period and -10 x otherwise, on [-1, 1]: the minimum is at -1.


def test_adam_runs_to_the_wrong_end():
    assert final_iterate(played(ADAM, Setting(betas=BETAS, steps=75 * PERIOD))) > 0.9


def test_avgrad_goes_to_the_right_end():
    assert final_iterate(played(AVGRAD, Setting(betas=BETAS, steps=75 * PERIOD))) < -0.9


def test_mada_that_starts_as_adam_and_learns_rho_turns_to_the_right_end():
    """With the default step size of ρ; its first thousands of steps, near Adam's point, have to be made good."""
    trace = played(FROM_ADAM, Setting(betas=BETAS, steps=240 * PERIOD))
    assert final_iterate(trace) < -0.4
    assert trace.rho[0].item() == 1.0
    assert trace.rho[-1].item() == pytest.approx(0.0, abs=0.1)


def test_mada_turns_round_on_the_theorems_problem():
    """Without momentum, and with a β2 that forgets within a period of three."""
    setting = Setting("theorem", steps=1500)
    assert setting.resolved_betas == (0.0, 0.1)
    assert final_iterate(played(ADAM, setting)) > 0.9
    trace = played(FROM_ADAM, setting)
    assert trace.iterates[120:150].mean() > 0.7
    assert trace.iterates[-30:].mean() < -0.9


@pytest.mark.parametrize(
    ("betas", "towards_avgrad"), [((0.0, 0.99), False), ((0.95, 0.99), True), ((0.0, 0.999), False)]
)
def test_the_hypergradient_that_docs_online_explains_with(betas: tuple[float, float], towards_avgrad: bool):
    """Near ρ = 0 it points at AVGrad or away from it; ρ itself is held."""
    setting = Setting(betas=betas, steps=20 * PERIOD)
    trace = setting.play(setting.held(0.1))[0]
    assert trace.rho.unique().tolist() == [0.1]
    assert (trace.hypergradient[-2 * PERIOD :].mean() > 0) == towards_avgrad


def test_mada_stays_where_adam_goes_if_it_learns_from_what_is_paid():
    """At the wrong end the projection cuts the steps before the rare losses: less ρ would have changed nothing."""
    trace = played(FROM_ADAM, Setting("theorem", steps=1500, projected=True))
    assert trace.rho.min() > 0.99
    assert trace.iterates[-30:].mean() > 0.9


@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_hypergradients_of_what_is_paid(rho: float):
    """With ρ held the iterates are the same, and so are the hypergradients, but for 0 after a step that was cut."""
    setting = Setting("theorem", steps=600)
    plain, projected = (replace(setting, projected=flag) for flag in (False, True))
    one, other = (each.play(each.held(rho))[0] for each in (plain, projected))
    assert torch.equal(one.iterates, other.iterates)
    inside = one.iterates.abs() < 1  # whoever is not at an end was not cut; h_t is known one step after the iterate
    begun = torch.arange(600) > 60
    assert torch.equal(one.hypergradient[inside & begun], other.hypergradient[inside & begun])
    assert not other.hypergradient[~inside & begun].any()
    assert one.hypergradient[~inside & begun].any()


# The module itself.


def test_slopes():
    assert PROBLEMS["theorem"].slopes(5).tolist() == [3, -1, -1, 3, -1]
    slopes = PROBLEMS["periodic"].slopes(2 * PERIOD)
    assert slopes.nonzero().numel() == 2 * PERIOD
    assert (slopes == 1010).nonzero().flatten().tolist() == [0, PERIOD]
    assert slopes.sum() == 2 * (1010 - 100 * 10)


def test_stochastic_slopes():
    problem = PROBLEMS["stochastic"]
    slopes = problem.slopes(100_000, seed=3)
    assert set(slopes.tolist()) == {1010.0, -10.0}
    assert (slopes > 0).double().mean().item() == pytest.approx(0.01, abs=4 * math.sqrt(0.01 * 0.99 / 100_000))
    assert torch.equal(problem.slopes(100, seed=3), slopes[:100])
    assert not torch.equal(problem.slopes(1000, seed=4), slopes[:1000])


def test_the_regret_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(40, dtype=torch.float64, generator=generator)
    iterates = 2 * torch.rand(40, dtype=torch.float64, generator=generator) - 1
    grid = torch.linspace(-1, 1, 201, dtype=torch.float64)
    expected = []
    for t in range(1, 41):
        paid = sum(slopes[s].item() * iterates[s].item() for s in range(t))
        best = min(sum(slopes[s].item() * x for s in range(t)) for x in grid.tolist())
        expected.append((paid - best) / t)
    assert average_regret(slopes, iterates).tolist() == pytest.approx(expected)


def test_play_against_gradient_descent_by_hand():
    """x_1 = 0 is paid before the first step; the rate falls; x is projected."""
    slopes = PROBLEMS["theorem"].slopes(30)
    trace = play(slopes, lambda params: torch.optim.SGD(params, lr=1.0), alpha=0.4)
    x, paid, regrets = 0.0, 0.0, []
    for t, slope in enumerate(slopes.tolist(), start=1):
        assert trace.iterates[t - 1].item() == pytest.approx(x)
        paid += slope * x
        regrets.append((paid - min(-slopes[:t].sum().item(), slopes[:t].sum().item())) / t)
        x = min(1.0, max(-1.0, x - 0.4 / math.sqrt(t) * slope))
    assert trace.iterates.min() == -1.0
    assert trace.average_regret.tolist() == pytest.approx(regrets)
    assert trace.rho.isnan().all()
    assert trace.hypergradient.isnan().all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_that_is_refused(alpha: float):
    with pytest.raises(ValueError, match=f"alpha must be a finite number > 0, got {alpha}"):
        play(torch.ones(1), lambda params: torch.optim.SGD(params, lr=1.0), alpha)
