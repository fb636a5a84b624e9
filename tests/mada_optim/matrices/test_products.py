"""Products of matrices: against float64, for every size of a tile and every layout."""

from __future__ import annotations

import pytest
import torch

from mada_optim.matrices import products
from mada_optim.matrices.products import multiply

SIZES = [(1, 1, 1), (3, 5, 7), (14, 32, 20), (15, 33, 16), (31, 64, 100), (60, 70, 17)]


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(products, "_library", lambda: None)
    elif products._library() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_products(rows: int, columns: int, inner: int, count: int):
    torch.manual_seed(0)
    added = torch.randn(count, rows, columns)
    for a in (torch.randn(count, rows, inner), torch.randn(count, inner, rows).mT):
        for b in (torch.randn(count, inner, columns), torch.randn(count, columns, inner).mT):
            expected = (a.double() @ b.double()).float()
            torch.testing.assert_close(multiply(a, b), expected, rtol=1e-5, atol=1e-5)
            result = multiply(a, b, alpha=0.5, added=added, beta=-2.0, diagonal=3.0)
            wanted = 0.5 * expected - 2.0 * added + 3.0 * torch.eye(rows, columns)
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "inner"), [(1, 3), (14, 5), (33, 40), (100, 64)])
def test_symmetric_products(rows: int, inner: int):
    torch.manual_seed(0)
    for x in (torch.randn(2, rows, inner), torch.randn(2, inner, rows).mT, torch.randn(2, rows, 2 * inner)[..., ::2]):
        added = torch.randn(2, rows, rows)
        added = added + added.mT
        result = multiply(x, x.mT, alpha=2.0, added=added, beta=0.5, diagonal=1.0, symmetric=True)
        wanted = 2.0 * (x.double() @ x.double().mT).float() + 0.5 * added + torch.eye(rows)
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result, result.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_symmetric_products_are_symmetric_to_the_last_bit(threads: int):
    """Factors that commute give a symmetric product; which tile computes an element must not depend on threads."""
    if products._library() is None:
        pytest.skip("torch computes both halves")
    torch.manual_seed(0)
    x = torch.randn(1, 130, 130, dtype=torch.float64)
    a = x @ x.mT / 130
    b = (a @ a).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = [multiply(a.float(), b, added=b, beta=0.5, diagonal=1.0, symmetric=True) for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, result.mT) for result in results)
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for count in (1, 2, 3, 8):
            x = torch.randn(count, 50, 40)
            expected = (x.double() @ x.double().mT).float()
            torch.testing.assert_close(multiply(x, x.mT, symmetric=True), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
