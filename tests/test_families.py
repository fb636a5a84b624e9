"""The engine with families that are not MADA's, that of the documentation among them: a user's few lines learn."""

from __future__ import annotations

import pytest
import torch
from own_family import NesterovSGD
from problems import Net, loss_of, train

from mada_optim import Coefficient, Family, HypergradientOptimizer


class NormalizedDescent(Family):
    """Needs whole tensors: the gradient over its norm to a learned power."""

    coefficients = (Coefficient("power", 0.5, box=(0.0, 1.0), hyper_lr=1e-2),)
    elementwise = False

    def buffers(self, q):
        return ()

    def update(self, state, grad, q, step):
        return grad / (grad.norm() + 1e-12) ** q["power"], {}


@pytest.mark.parametrize("nesterov", [False, True])
def test_corners_are_torch_sgd(nesterov):
    ours, theirs = Net(), Net()
    start = {"momentum": 0.8, "nesterov": float(nesterov)}
    train(ours, HypergradientOptimizer(ours.parameters(), NesterovSGD(), lr=0.05, start=start, hyper_lr=0.0), 50)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.8, nesterov=nesterov), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [NesterovSGD(), NormalizedDescent()], ids=lambda family: family.name)
def test_hypergradient_equals_finite_differences(family):
    """Of the loss after a step in which one coefficient is moved, of an optimizer that learns nothing."""
    start = {"nesterov": 0.3} if isinstance(family, NesterovSGD) else {}
    model, last = Net(), 5
    learning = HypergradientOptimizer(model.parameters(), family, lr=0.05, start=start, hyper_lr=1e-300, hyper_warmup=0)
    train(model, learning, last + 2)

    def loss_with(index: int, shift: float) -> float:
        other = Net()
        optimizer = HypergradientOptimizer(other.parameters(), family, lr=0.05, start=start, hyper_lr=0.0)
        train(other, optimizer, last)
        optimizer.param_groups[0]["coefficients"][index] += shift
        train(other, optimizer, 1, first=last)
        return loss_of(other, last + 1).item()

    for index, coefficient in enumerate(family.coefficients):
        difference = (loss_with(index, 1e-5) - loss_with(index, -1e-5)) / 2e-5
        assert learning.hypergradients()[coefficient.name] == pytest.approx(difference, rel=1e-5)


class Delayed(Family):
    """The gradient and half of that before the last: a buffer is handed on as another one."""

    coefficients = (Coefficient("share", 0.5, box=(0.0, 1.0), hyper_lr=1e-2),)

    def buffers(self, q):
        return ("last", "before")

    def update(self, state, grad, q, step):
        return grad + q["share"] * state["before"], {"last": grad, "before": state["last"]}


DELAYED = Delayed()  # one, so that it is compiled once


@pytest.mark.parametrize("shapes", [[(3,)], [(3,), (4,)], [(300_000,)]], ids=["one", "two", "large"])
@pytest.mark.parametrize("hyper_lr", [0.0, 1e-300], ids=["fixed", "learned"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_buffer_may_be_handed_on(shapes, hyper_lr, fused):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = HypergradientOptimizer(params, DELAYED, lr=1.0, hyper_lr=hyper_lr, hyper_warmup=0, fused=fused)
    sizes = [1.0, 10.0, 100.0, 1000.0, 10_000.0]
    for size in sizes:
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.full_like(param, size)
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(old - param.detach(), torch.full_like(old, sizes[-1] + 0.5 * sizes[-3]))


def test_learning_improves_a_bad_start():
    """From no momentum at a small learning rate: what is learned trains faster than what was given."""
    losses = []
    for step_size in (0.0, 1.0):
        model = Net()
        optimizer = HypergradientOptimizer(
            model.parameters(),
            NesterovSGD(),
            lr=0.02,
            start={"momentum": 0.0},
            hyper_lr={"momentum": step_size},
            hyper_warmup=0,
        )
        train(model, optimizer, 150)
        losses.append(sum(loss_of(model, step).item() for step in range(150, 170)) / 20)
    assert optimizer.coefficients()["momentum"] > 0.5
    assert losses[1] < 0.5 * losses[0]
