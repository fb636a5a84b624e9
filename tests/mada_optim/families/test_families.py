"""The engine with families that are not MADA's, that of the documentation among them: a user's few lines learn."""

from __future__ import annotations

import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from own_family import NesterovSGD
from problems import Net, loss_of, train
from torch import nn

from mada_optim import Coefficient, Family, HypergradientOptimizer, OMADAFamily, OrthogonalMixture


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


class RowsByTheirLargest(Family):
    """The gradient over a learned power of the largest element that its row has had: one number a row is kept."""

    coefficients = (Coefficient("power", 0.5, box=(0.0, 1.0), hyper_lr=1e-2),)
    prepares = True

    def buffers(self, q):
        return ("inverse",)

    def statistics(self, q):
        return {"largest": lambda shape: shape[:1]}

    def prepare(self, states, grads, q):
        found = []
        for state, grad in zip(states, grads, strict=True):
            rows = torch.maximum(state["largest"], grad.reshape(len(grad), -1).abs().amax(1).to(state["largest"].dtype))
            inverse = rows.reciprocal().view(-1, *[1] * (grad.dim() - 1)).expand_as(grad)
            found.append({"largest": rows, "inverse": inverse})
        return found

    def update(self, state, grad, q, step):
        assert state.keys() == {"inverse"}
        return grad * state["inverse"] ** q["power"], {}


ROWS = RowsByTheirLargest()


@pytest.mark.parametrize("hyper_lr", [0.0, 1e-300], ids=["fixed", "learned"])
@pytest.mark.parametrize("options", [{"fused": False}, {"fused": True}, {"state_dtype": torch.bfloat16}], ids=str)
def test_statistics_have_shapes_of_their_own(hyper_lr, options):
    """Small tensors are put together and large ones cut, and their statistics are not."""
    shapes = [(3, 4), (5,), (3, 4), (400, 500)]
    params, others = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    optimizer, resumed = (
        HypergradientOptimizer(own, ROWS, lr=1.0, hyper_lr=hyper_lr, hyper_warmup=0, **options)
        for own in (params, others)
    )
    expected, largest = [torch.zeros(shape) for shape in shapes], [torch.zeros(shape[0]) for shape in shapes]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for index, shape in enumerate(shapes):
            grad = torch.randn(shape, generator=generator)
            params[index].grad, others[index].grad = grad, grad.clone()
            for row in range(len(grad)):
                largest[index][row] = max(largest[index][row], grad[row].abs().max())
                expected[index][row] -= grad[row] / largest[index][row].sqrt()
        optimizer.step()
        if step < 2:
            continue
        if step == 2:
            resumed.load_state_dict(optimizer.state_dict())
            for one, other in zip(params, others, strict=True):
                other.data.copy_(one.data)
        else:
            resumed.step()
    rtol = 0.02 if "state_dtype" in options else 1e-5
    for one, other, by_hand, rows in zip(params, others, expected, largest, strict=True):
        torch.testing.assert_close(one.detach(), by_hand, rtol=rtol, atol=rtol)
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["largest"], rows)


def test_a_statistic_with_the_name_of_a_buffer():
    class Twice(RowsByTheirLargest):
        def buffers(self, q):
            return ("largest",)

    with pytest.raises(ValueError, match="Twice has a buffer 'largest', a name that is taken"):
        HypergradientOptimizer([torch.nn.Parameter(torch.zeros(2))], Twice(), lr=1.0)


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


def test_what_a_subclass_of_omadas_family_says_of_itself_holds():
    class Mine(OMADAFamily):
        constants: ClassVar = {**OMADAFamily.constants, "ortho_momentum": 0.5}
        elementwise = False

    assert Mine.constants["ortho_momentum"] == 0.5
    assert Mine.elementwise is False
    assert Mine.coefficients == OMADAFamily.coefficients


def test_a_mixture_of_another_family():
    class Momentum(Family):
        coefficients = (Coefficient("momentum", 0.9, (0.0, 0.99), 0.3),)
        constants: ClassVar = {"nesterov": False}

        def buffers(self, q):
            return ("velocity",)

        def update(self, state, grad, q, step):
            velocity = q["momentum"] * state["velocity"] + grad
            return velocity, {"velocity": velocity}

    class Mixed(OrthogonalMixture):
        inner = Momentum()

    assert [each.name for each in Mixed.coefficients] == ["momentum", "ortho", "row_norm"]
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    groups = [{"params": [weight], "matrices": True}, {"params": [bias]}]
    optimizer = HypergradientOptimizer(groups, Mixed(), lr=0.1, start={"ortho": 0.5}, hyper_lr=0.01, hyper_warmup=0)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        optimizer.step()
    assert optimizer.state[weight].keys() >= {"velocity", "ortho"}
    assert "ortho" not in optimizer.state[bias]
    with pytest.raises(TypeError, match="must name the family that it mixes"):
        type("Nothing", (OrthogonalMixture,), {})


def test_the_former_name_of_frozen_at():
    with pytest.warns(DeprecationWarning, match="special is called frozen_at") as caught:
        coefficient = Coefficient("a", 0.0, (0.0, 1.0), 0.1, special=(0.0,))
    assert caught[0].filename == __file__
    assert coefficient.frozen_at == (0.0,)
    with pytest.warns(DeprecationWarning, match="special is called frozen_at"):
        assert coefficient.special == (0.0,)
    renamed = dataclasses.replace(coefficient, name="b", frozen_at=())
    assert (renamed.label, renamed.frozen_at) == ("b", ())
    older = {"special": (1.0,), **{k: v for k, v in vars(coefficient).items() if k != "frozen_at"}}
    loaded = object.__new__(Coefficient)
    loaded.__setstate__(older)
    assert loaded.frozen_at == (1.0,)
    assert pickle.loads(pickle.dumps(coefficient)) == coefficient
