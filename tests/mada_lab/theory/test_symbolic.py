"""The algebraic steps of docs/theory.md, with symbols."""

from __future__ import annotations

import pytest
import sympy
from sympy import Rational, simplify, symbols

from mada_lab.theory import gradient_threshold, mean_factor

beta1, beta2, rho = symbols("beta1 beta2 rho", positive=True)
alpha, eps, eta, L, R, w = symbols("alpha epsilon eta L R w", positive=True)
t, T = symbols("t T", positive=True, integer=True)


def zero(expression) -> bool:
    return simplify(sympy.expand(expression)) == 0


def gradients(count):
    return symbols(f"g1:{count + 1}", real=True)


def second_moments(g):
    """v_1, ..., v_T by the recursion."""
    v, out = sympy.Integer(0), []
    for value in g:
        v = beta2 * v + (1 - beta2) * value**2
        out.append(v)
    return out


@pytest.mark.parametrize("steps", range(1, 7))
def test_running_mean_as_a_sum_of_squares(steps):
    """Equation 4, and that AVGrad with a little of v is AdaGrad."""
    g = gradients(steps)
    v = second_moments(g)
    assert zero(sum(v) - sum((1 - beta2 ** (steps - j)) * g[j] ** 2 for j in range(steps)))
    assert zero(sum(v) + beta2 / (1 - beta2) * v[-1] - sum(x**2 for x in g))


def test_scaled_mean_does_not_decrease_with_bias_correction():
    """The numerator of the difference of (1-β2^(t-k))/(1-β2^t) over one step, k = j-1."""
    k = symbols("k", nonnegative=True, integer=True)
    difference = (1 - beta2 ** (t + 1 - k)) * (1 - beta2**t) - (1 - beta2 ** (t - k)) * (1 - beta2 ** (t + 1))
    assert zero(difference - (1 - beta2) * beta2**t * (beta2 ** (-k) - 1))


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("step", [2, 3, 10])
def test_conditions_are_where_the_rates_are_equal(step, bias_correction):
    """The functions themselves, on symbols: at the threshold V_t = V_{t-1}, and V_t grows with g_t²."""
    old_v, old_mean, square = symbols("v vbar s", positive=True)
    v = beta2 * old_v + (1 - beta2) * square
    mean = old_mean + (v - old_mean) / step
    now, before = (1 - beta2**step, 1 - beta2 ** (step - 1)) if bias_correction else (1, 1)
    threshold = gradient_threshold(old_v, old_mean, beta2, step, bias_correction)
    assert zero((mean / now - old_mean / before).subs(square, threshold))
    assert zero(v.subs(square, threshold) - mean_factor(beta2, step, bias_correction) * old_mean)
    assert zero(sympy.diff(mean / now, square) - (1 - beta2) / (step * now))


@pytest.mark.parametrize("step", [2, 3, 7])
def test_what_is_left_without_the_newest_gradient(step):
    """Lemma 2: b_t - w_t g_t² in terms of v_{t-1} and v̄_{t-1}, and the two ratios to b_{t-1}."""
    old_v, old_mean, square = symbols("v vbar s", positive=True)

    def u(s):
        return (1 - beta2**s) / (1 - beta2)

    v = beta2 * old_v + (1 - beta2) * square
    mean = old_mean + (v - old_mean) / step
    share = rho + (1 - rho) / step
    V = (rho * v + (1 - rho) * mean) / (1 - beta2**step)
    old_V = (rho * old_v + (1 - rho) * old_mean) / (1 - beta2 ** (step - 1))
    rest = sympy.expand(V - share / u(step) * square)
    assert zero(sympy.diff(rest, square))
    ratio_v = sympy.diff(rest, old_v) / sympy.diff(old_V, old_v)
    ratio_mean = sympy.diff(rest, old_mean) / sympy.diff(old_V, old_mean)
    assert zero(ratio_v - u(step - 1) / u(step) * beta2 * share / rho)
    assert zero(ratio_mean - u(step - 1) / u(step) * Rational(step - 1, step))


def test_critical_rho():
    """The difference of the two ratios in Lemma 2 has the sign of ρ_c(t) - ρ, and at ρ_c the weight is 1/(1-β2)/T."""
    share = rho + (1 - rho) / t
    critical = beta2 / ((1 - beta2) * (t - 1))
    assert zero(beta2 * share / rho - (t - 1) / t - (1 - beta2) * (t - 1) * (critical - rho) / (t * rho))
    assert zero((share * t).subs(rho, critical) - 1 / (1 - beta2))


def test_young_in_lemma_1():
    """The two squares give the product of the error term; their expectations are the two terms of the lemma."""
    g, dF, sigma, D, expected_D, absolute = symbols("g dF sigma D Dtilde a", positive=True)
    first = dF * (sigma - g) / (2 * sigma * sympy.sqrt(expected_D))
    second = sympy.sqrt(w) * sigma * g / (D * sympy.sqrt(expected_D))
    assert zero(2 * first * second - dF * g * sympy.sqrt(w) * (sigma - g) / (D * expected_D))
    # E(σ - |g|)² = 2σ² - 2σ E|g| with E g² = σ² and E|g| = a.
    constant, linear, square = sympy.Poly((sigma - g) ** 2, g).all_coeffs()[::-1]
    assert zero(constant + linear * absolute + square * sigma**2 - 2 * sigma * (sigma - absolute))
    assert zero(dF**2 * 2 * sigma**2 / (4 * sigma**2 * expected_D) - dF**2 / (2 * expected_D))


def test_shifted_iterates_of_momentum():
    """Theorem 2: z_{t+1} - z_t = N (A_{t-1} - A_t) m_{t-1} - A_t g_t."""
    x, m, g, A, old_A = symbols("x m g A A0", real=True)
    N = beta1 / (1 - beta1)
    old_x = x + old_A * m
    new_x = x - A * (beta1 * m + (1 - beta1) * g)
    z, new_z = x + N * (x - old_x), new_x + N * (new_x - x)
    assert zero(new_z - z - (N * (old_A - A) * m - A * g))


def test_constants_of_momentum():
    """The curvature terms of Theorem 2 add up, and (x+y)² <= (1+N) x² + (1+1/N) y²."""
    N, x, y = symbols("N x y", positive=True)
    assert zero(L * N + L / 2 * (1 + N) - L / 2 * (1 + 3 * N))
    assert zero(L / 2 * (1 + 1 / N) * N**2 - L / 2 * N * (1 + N))
    assert zero((1 + N) * x**2 + (1 + 1 / N) * y**2 - (x + y) ** 2 - (N * x - y) ** 2 / N)


def test_total_relative_variation():
    """Υ: ln(η_1/η_T) plus twice the growth that p = 1/2 - q allows."""
    q, logT, ratio = symbols("q logT ratio", positive=True)
    p = Rational(1, 2) - q
    total = ratio + q * logT + p * logT + p * (1 + logT)
    assert zero(total - (ratio + (1 - q) * logT + Rational(1, 2) - q))


def test_from_the_summed_descent_to_the_bound():
    """Adam's cost per coordinate, times 2R/(α√T), is that of Défossez et al. with 2 instead of 4."""
    u, logs, d = symbols("u Lambda d", positive=True)
    rate = alpha / sympy.sqrt(T)
    cost = (rate * R * sympy.sqrt(u) + rate**2 * L * u / 2) * logs
    assert zero(
        2 * R / (alpha * sympy.sqrt(T)) * d * cost - (2 * d * R**2 * sympy.sqrt(u) + rate * d * R * L * u) * logs / T
    )
