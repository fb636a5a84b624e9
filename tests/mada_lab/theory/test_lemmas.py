"""The inequalities of docs/theory.md, each on random instances, with how much room they leave."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mada_lab.theory import Problem, critical_rho, log_terms, newest_weight, step_sizes, variation


def second_moment(g, rho, beta2):
    """V_t by the definitions, for gradients of shape (T,)."""
    v, all_v = 0.0, []
    for value in g:
        v = beta2 * v + (1 - beta2) * value**2
        all_v.append(v)
    times = np.arange(1, len(g) + 1)
    mean = np.cumsum(all_v) / times
    return (rho * np.array(all_v) + (1 - rho) * mean) / (1 - beta2**times)


def sequences(rng, count):
    """(g, ρ, β2, ε) with |g| <= 1 - ε: noise, geometric growth, rare spikes, all orders of magnitude, bursts."""
    for index in range(count):
        steps = int(rng.integers(2, 150))
        beta2 = rng.choice([0.1, 0.5, 0.9, 0.99, 0.999])
        rho = rng.choice([0.0, 1.0, 0.5, rng.random(), 10 ** rng.uniform(-5, 0), critical_rho(beta2, steps).item()])
        eps = 10 ** rng.uniform(-8, -0.5)
        g = (
            rng.random(steps),
            eps ** np.linspace(1, 0, steps),
            (rng.random(steps) < 0.1) * 1.0,
            eps ** rng.random(steps),
            np.repeat(rng.random(steps) < 0.3, 10)[:steps] * rng.random(steps),
        )[index % 5] * (1 - eps)
        yield g, float(rho), float(beta2), float(eps)


@pytest.mark.parametrize("inside", [False, True], ids=["√V + ε", "√(V + ε²)"])
def test_lemma_1(inside):
    """On random discrete distributions of g, exactly. With 1/2 instead of 1 before its last term it fails."""
    rng = np.random.default_rng(0)
    needed = 0.0
    for _ in range(20_000):
        count = rng.integers(2, 5)
        g, p = rng.standard_t(1.5, count), rng.dirichlet(np.full(count, rng.choice([0.1, 1.0])))
        mean, sigma = p @ g, math.sqrt(p @ g**2)
        w = rng.random() ** rng.choice([1, 4])
        old = 10 ** rng.uniform(-6, 2) * sigma**2 * rng.integers(0, 2)
        eps = 10 ** rng.uniform(-6, 1) * sigma
        root = (lambda V, eps=eps: np.sqrt(V + eps**2)) if inside else (lambda V, eps=eps: np.sqrt(V) + eps)
        denominator, expected = root(old + w * g**2), root(old + w * sigma**2)
        missing = mean**2 / (2 * expected) - p @ (mean * g / denominator)
        needed = max(needed, missing / (math.sqrt(w) * sigma * (p @ (g**2 / denominator**2))))
    assert 0.5 < needed <= 1


def test_lemma_2():
    """For the constant weights and for random falling ones; some sequence uses three quarters of the bound."""
    rng = np.random.default_rng(1)
    largest = 0.0
    for g, rho, beta2, eps in sequences(rng, 1000):
        steps = len(g)
        share = newest_weight(rho, beta2, steps).numpy() * g**2 / (eps**2 + second_moment(g, rho, beta2))
        terms = log_terms(Problem(1, 1.0, 1.0, 1.0), rho=rho, beta2=beta2, eps=eps, steps=steps).numpy()
        assert share.sum() <= terms.sum()
        falling = np.sort(rng.random(steps) ** 4)[::-1]
        assert falling @ share <= falling @ terms
        largest = max(largest, share.sum() / terms.sum())
    assert largest > 0.75


def test_second_moment_is_at_most_the_bound_on_gradients():
    for g, rho, beta2, _ in sequences(np.random.default_rng(2), 500):
        assert second_moment(g, rho, beta2).max() <= (g**2).max() * (1 + 1e-12)


def test_comparison_of_two_interpolations():
    """V(ρ) >= (1-ρ)/(1-r) V(r) for r <= ρ."""
    rng = np.random.default_rng(3)
    for g, rho, beta2, _ in sequences(rng, 500):
        reference = rho * rng.random()
        if reference < 1:
            smaller = (1 - rho) / (1 - reference) * second_moment(g, reference, beta2)
            assert (second_moment(g, rho, beta2) >= smaller * (1 - 1e-12)).all()


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5])
def test_effective_rates_of_avgrad(decay):
    """What Theorem 2 needs of them: √t-scaled they do not increase, and their total relative variation is below Υ."""
    largest = 0.0
    for g, _, beta2, eps in sequences(np.random.default_rng(4), 500):
        steps = len(g)
        denominator = np.sqrt(second_moment(g, 0.0, beta2)) + eps
        scaled = 1 / (np.sqrt(np.arange(1, steps + 1)) * denominator)
        assert (np.diff(scaled) <= 1e-12 * scaled[1:]).all()
        rates = step_sizes(1.0, steps, decay).numpy() / denominator
        total = np.abs(1 - rates[1:] / rates[:-1]).sum()
        bound = variation(Problem(1, 1.0, 1.0, 1.0), eps=eps, steps=steps, decay=decay).item()
        assert total <= bound
        largest = max(largest, total / bound)
    assert largest > 0.3


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5])
def test_steps_with_momentum(decay):
    """Theorem 2's bounds on A|m| and on Σ (A m)², for g of both signs."""
    rng = np.random.default_rng(5)
    for g, _, beta2, eps in sequences(rng, 300):
        steps, beta1, alpha = len(g), rng.choice([0.0, 0.5, 0.9, 0.99]), 0.7
        signed = g * rng.choice([-1, 1], steps)
        rates = step_sizes(alpha, steps, decay).numpy() / (np.sqrt(second_moment(g, 0.0, beta2)) + eps)
        m, moves = 0.0, []
        for value, rate in zip(signed, rates, strict=True):
            m = beta1 * m + (1 - beta1) * value
            moves.append(rate * abs(m))
        window = (1 - beta2**steps) / (1 - beta2)
        logs = log_terms(Problem(1, 1.0, 1.0, 1.0), rho=0.0, beta2=beta2, eps=eps, steps=steps).sum().item()
        assert max(moves) <= alpha * math.sqrt(window)
        assert np.square(moves).sum() <= alpha**2 * window * logs
        assert np.square(rates * g).sum() <= alpha**2 * window * logs
