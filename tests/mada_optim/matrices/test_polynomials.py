"""The polynomials of the orthogonalization: nearest to one, and evaluated by few products."""

from __future__ import annotations

import pytest
import torch

from mada_optim.matrices.newton_schulz import DEGREES, LOW, POLYNOMIALS, TOP, TORCH_COEFFICIENTS, TORCH_STEPS
from mada_optim.matrices.polynomials import composition, nearest_to_one, rows


def evaluated(steps, x: float) -> float:
    """What the steps of an iteration make of a singular value, row by row."""
    for *first, last in steps:
        y = x * x
        before = value = y
        for alpha, beta, constant in first:
            before, value = value, alpha * y * value + beta * value + constant
        alpha, beta, constant = last
        x *= alpha * value * value + beta * before + constant
    return x


def test_the_constants_are_what_the_functions_compute():
    computed = [rows(p) for p in composition(LOW, DEGREES, TOP)]
    assert [len(step) for step in computed] == [len(step) for step in POLYNOMIALS]
    for ours, theirs in zip(POLYNOMIALS, computed, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-7)


def test_singular_values_arrive_near_one():
    values = [evaluated(POLYNOMIALS, x) for x in torch.logspace(-2.8538, 0, 20_001, dtype=torch.float64).tolist()]
    assert 0.73 < min(values) <= max(values) < TOP + 1e-3


def test_small_singular_values_come_as_far_as_by_torchs_quintic():
    """It brings them to 0.7 from 0.0016 of the norm, and multiplies the smallest by 3.4445⁵."""
    a, b, c = TORCH_COEFFICIENTS
    for share in (1e-9, 1e-6, 1e-4, 1e-3, 0.0016):
        assert evaluated(POLYNOMIALS, share) > evaluated([((c, b, a),)] * TORCH_STEPS, share)
    assert evaluated(POLYNOMIALS, 0.0014) > 0.73


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
def test_the_nearest_polynomial_has_its_largest_error_at_degree_plus_two_points(degree: int):
    """Chebyshev's criterion: the errors are equal there, with changing signs, so no other polynomial is nearer."""
    p, distance = nearest_to_one(degree, 0.05, 1.0)
    x = torch.linspace(0.05, 1.0, 100_001, dtype=torch.float64)
    error = 1 - sum(c * x ** (2 * k + 1) for k, c in enumerate(p))
    assert error.abs().max() == pytest.approx(distance, rel=1e-6)
    signs = error.sign()[error.abs() > 0.9999 * distance]
    assert int((signs[1:] != signs[:-1]).sum()) == degree + 1


def test_the_first_quintic_is_that_of_the_polar_express():
    """Amsel et al., 2025, from 0.001 on. They take the nearest polynomial from 0.024 on, and centre its values."""
    low, cushion = 1e-3, 0.02407327424182761
    p, _ = nearest_to_one(2, cushion, 1.0)
    centre = (sum(c * low ** (2 * k + 1) for k, c in enumerate(p)) + sum(p)) / 2
    expected = [8.28721201814563, -23.595886519098837, 17.300387312530933]
    assert [c / centre for c in p] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "p", [[4.0, -6.0, 2.5], [7.0, -16.0, 14.0, -5.0, 0.5], [20.0, -440.0, 3e3, -1e4, 2e4, -1e4, 4e3]]
)
def test_rows_evaluate_the_polynomial(p: list[float]):
    for x in (0.0, 0.01, 0.3, 1.0, 1.1):
        expected = x * sum(c * x ** (2 * k) for k, c in enumerate(p))
        assert evaluated([rows(p)], x) == pytest.approx(expected, rel=1e-7, abs=1e-9)
