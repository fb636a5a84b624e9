"""The orthogonal factor: against a singular value decomposition in float64, at every spectrum, shape and scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mada_optim.matrices import newton_schulz as iteration
from mada_optim.matrices import orthogonalize, products
from mada_optim.matrices.newton_schulz import newton_schulz

# From the place k = 1, 2, ... of a singular value and their number n.
SPECTRA = {
    "1/k": lambda k, n: 1 / k,
    "1/k²": lambda k, n: 1 / k**2,
    "exponential": lambda k, n: torch.exp(-12 * k / n),
    "six orders": lambda k, n: 10 ** (-6 * (k - 1) / n),
    "equal": lambda k, n: torch.ones_like(k),
    "one of all": lambda k, n: torch.where(k == 1, 1.0, 1e-6),
    "one above many at the threshold": lambda k, n: torch.where(k == 1, 1.0, 0.0017),
    "few": lambda k, n: torch.where(k <= max(n // 8, 1), 1.0, 0.0),
}
SHAPES = [(96, 96), (48, 192), (192, 48), (64, 2), (3, 5), (70, 100)]


@pytest.fixture(params=["compiled", "torch"])
def products_by(request, monkeypatch):
    """Who multiplies."""
    if request.param == "torch":
        monkeypatch.setattr(products, "_library", lambda: None)
    elif products._library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def with_spectrum(name: str, shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(0)
    n = min(shape)
    values = SPECTRA[name](torch.arange(1.0, n + 1, dtype=torch.float64), n)
    u, v = (torch.linalg.qr(torch.randn(length, n, dtype=torch.float64)).Q for length in shape)
    return (u * values @ v.mT).float()


def assert_orthogonalized(matrix: Tensor, result: Tensor) -> None:
    """Where the norm's share is 0.0016 or more, as by torch's quintic; nothing is turned, nothing beyond 1.2."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.mT @ result.double() @ vh.mT
    values = inner.diagonal()
    large = values[s >= 0.0016 * torch.linalg.vector_norm(s)]
    assert 0.72 < large.min() <= large.max() < 1.16
    assert torch.linalg.svdvals(result.double()).max() < 1.16
    assert (inner - torch.diag(values)).abs().max() < 3e-3


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_spectrum(shape: tuple[int, int]):
    for name in SPECTRA:
        matrix = with_spectrum(name, shape)
        assert_orthogonalized(matrix, newton_schulz(matrix[None])[0])


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_matrices_of_every_size_of_numbers(shape: tuple[int, int]):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e20, 1e30):
        assert_orthogonalized(matrix * scale, newton_schulz(matrix[None] * scale)[0])


def test_large_matrices():
    """The norm of many numbers must not come out too small: a singular value beyond one would go astray."""
    torch.manual_seed(0)
    matrix = torch.randn(600, 1) @ torch.randn(1, 600) + 1e-4 * torch.randn(600, 600)
    assert torch.linalg.svdvals(newton_schulz(matrix[None])[0].double()).max() < 1.16


def test_equal_rows():
    torch.manual_seed(0)
    matrix = torch.randn(20, 30).repeat(2, 1)
    assert_orthogonalized(matrix, newton_schulz(matrix[None])[0])


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)], ids=str)
def test_zeros_stay_zero_and_what_vanishes_fades(shape: tuple[int, int]):
    assert newton_schulz(torch.zeros(1, *shape)).abs().max() == 0
    torch.manual_seed(0)
    assert newton_schulz(1e-20 * torch.randn(1, *shape)).abs().max() < 1e-9


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_its_matrix_alone(shape: tuple[int, int], value: float):
    torch.manual_seed(0)
    batch = torch.randn(3, *shape)
    clean = newton_schulz(batch)
    batch[1, 2, 0] = value
    result = newton_schulz(batch)
    assert result[1].isnan().any()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_the_same_bits_in_every_batch_and_with_any_number_of_threads(shape: tuple[int, int], monkeypatch):
    if products._library() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    batch = torch.randn(5, *shape)
    together = newton_schulz(batch)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(newton_schulz(batch), together)
            assert torch.equal(newton_schulz(batch[3:4]), together[3:4])
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(iteration, "_TOGETHER", 1)
    assert torch.equal(newton_schulz(batch), together)


@pytest.mark.parametrize("options", [{}, {"ns_steps": 5}], ids=["polynomials", "quintics"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float64, 1e300)])
def test_what_is_finite_has_a_direction(options: dict, dtype: torch.dtype, scale: float):
    """Squares that overflow must not make a step of zeros or NaN."""
    torch.manual_seed(0)
    matrix = torch.randn(6, 9, dtype=torch.float64).clamp(-3, 3).to(dtype)
    small, large = orthogonalize([matrix, matrix * scale], **options)
    assert small.abs().max() > 0.1
    torch.testing.assert_close(large, small, rtol=2e-2, atol=2e-2)


def test_where_the_smallest_singular_value_arrives():
    """It is measured by the fourth root of the sum of fourth powers: n^¼ times the largest where all are the same."""
    values = torch.ones(81, dtype=torch.float64)
    values[-1] = 0.0015 * values.pow(4).sum() ** 0.25
    u, v = (torch.linalg.qr(torch.randn(81, 81, dtype=torch.float64)).Q for _ in range(2))
    result = newton_schulz((u * values @ v.mT).float()[None])[0]
    assert 0.7 < torch.linalg.svdvals(result.double()).min() < 0.9


def test_what_is_given_is_not_changed():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        batch = torch.randn(2, 6, 6).to(dtype)
        before = batch.clone()
        newton_schulz(batch)
        orthogonalize([batch[0]])
        assert torch.equal(batch, before)


def test_empty_matrices():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 6), (2, 5, 2)])
def test_autograd_goes_through_it(shape, steps):
    """As ``differentiable=True`` asks for: in float64 equal to finite differences, in float32 equal to that."""
    torch.manual_seed(0)
    batch = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, steps), batch)
    weight = torch.randn(shape, dtype=torch.float64)
    (wide,) = torch.autograd.grad((newton_schulz(batch, steps) * weight).sum(), batch)
    narrow = batch.detach().float().requires_grad_()
    (found,) = torch.autograd.grad((newton_schulz(narrow, steps) * weight.float()).sum(), narrow)
    torch.testing.assert_close(found.double(), wide, rtol=1e-3, atol=1e-3)
