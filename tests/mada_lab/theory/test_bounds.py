"""The bounds as functions: their special cases, limits and arguments."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from mada_lab.theory import (
    Problem,
    avgrad_bound,
    best_rho,
    critical_rho,
    direct_bound,
    interpolation_bound,
    log_terms,
    newest_weight,
    step_sizes,
)

PROBLEM = Problem(dimension=3, smoothness=2.0, gradient_bound=1.5, gap=0.7)
SETTING = {"beta2": 0.9, "alpha": 0.2, "eps": 1e-2, "steps": 500}


def written_out(rho, r, beta2, alpha, eps, T, q):
    """Equation 13 for PROBLEM term by term, as it stands in the document; at r = ρ equation 12."""
    d, L, R, gap = 3, 2.0, 1.5, 0.7

    def u(t):
        return (1 - beta2**t) / (1 - beta2)

    def w(t, share):
        return (share + (1 - share) / t) / u(t)

    def cost(t):
        eta = alpha * T ** (q - 0.5) * t**-q
        kappa = 1 if r == rho else (1 - rho) / (1 - r)
        return (eta * R * math.sqrt(w(t, rho)) + eta**2 * L / 2) / (kappa * w(t, r))

    logs = [math.log(1 + (R - eps) ** 2 / eps**2)]
    for t in range(2, T + 1):
        ratios = [r * t / (beta2 * (r * t + 1 - r))] + ([t / (t - 1)] if r < 1 else [])
        logs.append(math.log(u(t) / u(t - 1)) + math.log(max(ratios)))
    largest = total = 0.0
    for t in range(T, 0, -1):
        largest = max(largest, cost(t))
        total += largest * logs[t - 1]
    return 2 * R / (alpha * math.sqrt(T)) * (gap + d * total)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("rho", [0.0, 5e-4, 2e-3, 0.01, 0.5, 1.0])
def test_theorem_3_is_what_the_document_says(rho, decay):
    beta2, alpha, eps, steps = 0.6, 0.2, 1e-2, 2000
    setting = {"rho": rho, "beta2": beta2, "alpha": alpha, "eps": eps, "steps": steps, "decay": decay}
    direct = written_out(rho, rho, beta2, alpha, eps, steps, decay)
    assert direct_bound(PROBLEM, **setting).item() == pytest.approx(direct, rel=1e-12)
    reference = min(rho, beta2 / (1 - beta2) / (steps - 1))
    compared = written_out(rho, reference, beta2, alpha, eps, steps, decay) if rho < 1 else math.inf
    assert (compared < direct) == (rho in (2e-3, 0.01))
    assert interpolation_bound(PROBLEM, **setting).item() == pytest.approx(min(direct, compared), rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_theorem_2_is_what_the_document_says(decay):
    d, L, R, gap = 3, 2.0, 1.5, 0.7
    beta2, alpha, eps, T = SETTING["beta2"], SETTING["alpha"], SETTING["eps"], SETTING["steps"]
    N, u = 9.0, (1 - beta2**T) / (1 - beta2)
    logs = math.log((1 + (R - eps) ** 2 / eps**2) * u * T)
    noise, curvature = alpha * R * math.sqrt(u), alpha**2 * L * u / 2
    moved = math.log(R / eps) + (1 - decay) * math.log(T) + 0.5 - decay
    cost = logs * (noise + (1 + 3 * N) * curvature) + N * moved * (noise + (1 + N) * curvature)
    bound = avgrad_bound(PROBLEM, beta1=0.9, **SETTING, decay=decay).item()
    assert bound == pytest.approx(2 * R / (alpha * math.sqrt(T)) * (gap + d * cost), rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("beta2", [0.3, 0.9, 0.999])
def test_theorem_3_at_rho_0_is_theorem_1(beta2, decay):
    setting = {**SETTING, "beta2": beta2, "decay": decay}
    torch.testing.assert_close(interpolation_bound(PROBLEM, rho=0.0, **setting), avgrad_bound(PROBLEM, **setting))


def test_adams_bound_is_that_of_defossez_with_half_the_constant():
    """Their theorem for Adam without momentum in our notation, written out: 4 there is 2 here, and (1-β2^T) is kept."""
    d, L, R, gap = 3, 2.0, 1.5, 0.7
    beta2, alpha, eps, T = SETTING["beta2"], SETTING["alpha"], SETTING["eps"], SETTING["steps"]
    rate, window = alpha / math.sqrt(T), (1 - beta2**T) / (1 - beta2)
    logs = math.log((1 + (R - eps) ** 2 / eps**2) * window) - (T - 1) * math.log(beta2)
    written = 2 * R * gap / (rate * T) + (2 * d * R**2 * math.sqrt(window) + rate * d * R * L * window) * logs / T
    assert interpolation_bound(PROBLEM, rho=1.0, **SETTING).item() == pytest.approx(written, rel=1e-12)


def test_log_terms_of_avgrad_add_up_to_the_closed_form():
    window = (1 - 0.9**500) / 0.1
    total = log_terms(PROBLEM, rho=0.0, beta2=0.9, eps=1e-2, steps=500).sum().item()
    assert total == pytest.approx(math.log((1 + (149**2)) * window * 500), rel=1e-12)


def test_corollary_at_the_critical_rho():
    """The direct bound loses all powers of 1/(1-β2), and keeps AVGrad's logarithm."""
    beta2, alpha, T = SETTING["beta2"], SETTING["alpha"], SETTING["steps"]
    rho, kept = critical_rho(beta2, T), 1 - beta2**T
    logs = log_terms(PROBLEM, rho=0.0, beta2=beta2, eps=1e-2, steps=T).sum()
    written = 2 * 1.5 / (alpha * T**0.5) * (0.7 + 3 * logs * (alpha * 1.5 * kept**0.5 + alpha**2 * 2.0 * kept / 2))
    torch.testing.assert_close(direct_bound(PROBLEM, rho=rho, **SETTING), written)


def test_the_bound_falls_up_to_the_critical_rho():
    rho = critical_rho(0.9, 500) * torch.linspace(0, 1, 50, dtype=torch.float64)
    assert (interpolation_bound(PROBLEM, rho=rho, **SETTING).diff() < 0).all()


def test_comparison_never_makes_it_worse_and_helps_in_between():
    rho = torch.linspace(0, 1, 201, dtype=torch.float64)
    setting = {**SETTING, "steps": 10_000}
    bound, direct = interpolation_bound(PROBLEM, rho=rho, **setting), direct_bound(PROBLEM, rho=rho, **setting)
    assert (bound <= direct).all()
    assert (bound / direct).min() < 0.5


def test_avgrad_converges_at_any_beta2_and_adam_does_not():
    """With 100 times the steps AVGrad's bound falls by 10 but for the logarithm, Adam's stays above its limit."""
    for beta2 in (0.5, 0.9, 0.99):
        few, many = ({**SETTING, "beta2": beta2, "steps": steps} for steps in (10_000, 1_000_000))
        fall = avgrad_bound(PROBLEM, **few) / avgrad_bound(PROBLEM, **many)
        assert 6 < fall < 10
        limit = 2 * 3 * 1.5**2 * math.log(1 / beta2) / math.sqrt(1 - beta2)
        adam = interpolation_bound(PROBLEM, rho=1.0, **many).item()
        assert limit < adam < 1.1 * limit


def test_best_rho_is_near_the_critical_one_for_long_and_one_for_short_training():
    def best(steps):
        return best_rho(PROBLEM, beta2=0.9, alpha=0.2, eps=1e-2, steps=steps)

    assert best(100)[0] == 1.0
    rho, bound = best(20_000)
    assert 1 <= rho / critical_rho(0.9, 20_000).item() < 1.2
    ends = interpolation_bound(PROBLEM, rho=torch.tensor([0.0, 1.0]), **{**SETTING, "steps": 20_000})
    assert bound < ends.min().item()


def test_momentum_makes_the_bound_larger():
    beta1 = torch.tensor([0.0, 0.5, 0.9, 0.99])
    assert (avgrad_bound(PROBLEM, beta1=beta1, **SETTING).diff() > 0).all()


def test_arguments_are_broadcast():
    problem = Problem(torch.tensor([1.0, 2.0]), 2.0, torch.tensor([[1.5], [2.0], [3.0]]), 0.7)
    rho, eps = torch.tensor([0.0, 0.5]), torch.tensor([[0.1], [0.2], [0.3]])
    together = interpolation_bound(problem, rho=rho, beta2=0.9, alpha=0.2, eps=eps, steps=50)
    momentum = avgrad_bound(problem, beta1=rho, beta2=0.9, alpha=0.2, eps=eps, steps=50, decay=0.5)
    assert together.shape == momentum.shape == (3, 2)
    alone = Problem(2.0, 2.0, 3.0, 0.7)
    torch.testing.assert_close(
        together[2, 1], interpolation_bound(alone, rho=0.5, beta2=0.9, alpha=0.2, eps=eps[2, 0], steps=50)
    )
    torch.testing.assert_close(
        momentum[2, 1], avgrad_bound(alone, beta1=0.5, beta2=0.9, alpha=0.2, eps=eps[2, 0], steps=50, decay=0.5)
    )


def test_one_step():
    for rho in (0.0, 0.5, 1.0):
        # w_1 = 1, u_1 = 1: the descent inequality of a single step.
        expected = 2 * 1.5 / 0.2 * (0.7 + 3 * (0.2 * 1.5 + 0.2**2) * math.log(1 + 149**2))
        assert interpolation_bound(PROBLEM, rho=rho, **{**SETTING, "steps": 1}).item() == pytest.approx(expected)


def test_digits_where_beta2_is_close_to_1():
    assert newest_weight(1.0, 1 - 1e-12, 4)[-1].item() == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 1.5}, "rho must be in .0, 1., got 1.5"),
        ({"beta2": 1.0}, "beta2 must be in .0, 1., got 1.0"),
        ({"beta2": 0.0}, "beta2 must be in .0, 1., got 0.0"),
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
        ({"alpha": math.nan}, "alpha must be a finite number > 0, got nan"),
        ({"eps": 1.5}, "eps must be positive and below gradient_bound, got 1.5"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"decay": 0.6}, "decay must be in .0, 0.5., got 0.6"),
    ],
)
def test_errors_name_argument_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        interpolation_bound(PROBLEM, **{**SETTING, "rho": 0.5, **change})


@pytest.mark.parametrize("steps", [-1, 0, 1.5])
def test_every_function_of_the_steps_checks_them(steps):
    message = f"steps must be an integer >= 1, got {steps}"
    setting = {**SETTING, "rho": 0.5, "steps": steps}
    for bound in (interpolation_bound, direct_bound):
        with pytest.raises(ValueError, match=message):
            bound(PROBLEM, **setting)
    for function in (partial(step_sizes, 1.0), partial(critical_rho, 0.9), partial(newest_weight, 0.5, 0.9)):
        with pytest.raises(ValueError, match=message):
            function(steps)


def test_the_critical_rho_of_one_step_is_one():
    assert critical_rho(torch.tensor([0.1, 0.9]), 1).tolist() == [1.0, 1.0]


def test_errors_of_momentum_and_of_the_constants():
    with pytest.raises(ValueError, match="beta1 must be in .0, 1., got 1.0"):
        avgrad_bound(PROBLEM, beta1=1.0, **SETTING)
    with pytest.raises(ValueError, match="smoothness must be a finite number >= 0, got -1.0"):
        Problem(1, -1.0, 1.0, 1.0)


def test_step_sizes_end_at_the_same_rate():
    rates = step_sizes(0.3, 50, torch.tensor([0.0, 0.25, 0.5]))
    torch.testing.assert_close(rates[:, -1], torch.full((3,), 0.3 / 50**0.5, dtype=torch.float64))
    # What the proofs use of them.
    times = torch.arange(1, 51, dtype=torch.float64)
    assert (rates.diff() <= 0).all()
    assert ((rates * times.sqrt()).diff() >= -1e-15).all()
