"""Any elementwise family by torch.compile. One small network for all tests: compiling is what takes the time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import FLOAT32, assert_same, run
from problems import TABLE, Row
from torch import nn

from mada_optim import Coefficient, Family, HypergradientOptimizer
from mada_optim.kernels import select
from mada_optim.kernels.traced import compiled
from mada_optim.tensors import devices


class NesterovLike(Family):
    """A family of a user: momentum with a learned look ahead. No closed form exists for it."""

    coefficients = (
        Coefficient("beta", 0.9, (0.0, 0.99), 1e-2, domain=(0.0, 1.0)),
        Coefficient("look", 0.5, (0.0, 1.0), 1e-1),
    )

    def buffers(self, q):
        return ("momentum",)

    def update(self, state, grad, q, step):
        momentum = q["beta"] * state["momentum"] + (1 - q["beta"]) * grad
        corrected = momentum / (1 - q["beta"] ** step)
        return (1 - q["look"]) * corrected + q["look"] * grad, {"momentum": momentum}


def family_row(family: Family, **kwargs) -> Row:
    make = partial(HypergradientOptimizer, family=family, hyper_warmup=0, **kwargs)
    return Row(family.name, make, {"gamma": 1.0}, 0, learns=True)


@pytest.fixture(scope="module")
def _compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, FLOAT32), (torch.float64, 1e-12)], ids=str)
def test_compiled_agrees_with_plain(dtype, rtol):
    row = family_row(NesterovLike(), hyper_lr=1e-6)
    assert_same(run(row, dtype, fused=True), run(row, dtype, fused=False), rtol)


@pytest.mark.usefixtures("_compiled")
def test_compiled_mada_agrees_with_plain(monkeypatch):
    """What CUDA uses for MADA's own family, here on the CPU."""
    row = next(row for row in TABLE if row.name == "mada-paper")
    with monkeypatch.context() as patch:
        patch.setattr(select, "NativeExecutor", select.CompiledExecutor)
        fused = run(row, torch.float32, fused=True, hyper_lr=1e-6)
    assert_same(fused, run(row, torch.float32, fused=False, hyper_lr=1e-6), FLOAT32)


@pytest.mark.usefixtures("_compiled")
def test_the_arithmetic_on_numbers_may_be_compiled_too(monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(compiled, "on_numbers", lambda function, _: torch.compile(function, fullgraph=True))
    row = family_row(type("OnNumbers", (NesterovLike,), {})(), hyper_lr=1e-6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(run(row, torch.float32, fused=True), run(row, torch.float32, fused=False), FLOAT32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before > 3  # one more for each of its functions


@pytest.mark.usefixtures("_compiled")
def test_compiled_stochastic_rounding():
    row = family_row(NesterovLike(), hyper_lr=0.0, state_dtype=torch.bfloat16, stochastic_rounding=True)
    x = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = row([x], lr=1e-5, fused=True)
    for _ in range(100):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert 1.0 - float(x.detach().double().mean()) == pytest.approx(0.001, rel=0.1)


@pytest.mark.usefixtures("_compiled")
def test_compiled_once_for_all_coefficients_rates_steps_and_shapes():
    row = family_row(NesterovLike())
    optimizers = []
    graphs = []
    for shapes in ([(30_000,), (7, 3)], [(5,)], [(200, 300), (9_000,), (4, 5, 6), ()], [(8_191,)], [(1,)]):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizers.append(row(params, lr=10.0 ** -len(shapes), fused=True, start={"beta": 0.1 * len(shapes)}))
        for step in range(4):
            optimizers[-1].param_groups[0]["lr"] /= step + 1
            for param in params:
                param.grad = torch.randn_like(param)
            optimizers[-1].step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs


def test_a_family_that_is_not_elementwise_is_not_compiled():
    class Normalized(NesterovLike):
        elementwise = False

        def update(self, state, grad, q, step):
            direction, new = super().update(state, grad, q, step)
            return direction / direction.norm(), new

    class Wrong(Normalized):
        elementwise = True

    with pytest.raises(RuntimeError, match="fused=True needs an elementwise family; Normalized is not"):
        family_row(Normalized())([nn.Parameter(torch.ones(2))], fused=True)
    x = nn.Parameter(torch.ones(2))
    x.grad = torch.ones(2)
    with pytest.raises(ValueError, match="an element depends on a sum over elements"):
        family_row(Wrong())([x], fused=True).step()


@pytest.mark.usefixtures("_compiled")
def test_compiled_with_numbers_in_float32(monkeypatch):
    """As on devices without float64."""
    row = family_row(NesterovLike(), hyper_lr=1e-6)
    plain = run(row, torch.float32, fused=False)
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    assert_same(run(row, torch.float32, fused=True), plain, FLOAT32)
