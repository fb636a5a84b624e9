"""What torch demands of its own optimizers: ``differentiable``."""

from __future__ import annotations

import pytest
import torch
from problems import INTERIOR, STARTS, Net, batch, loss_of
from standard import (
    CPU,
    FORLOOP,
    Optimizer,
    Options,
    fixed,
    options,
    same,
    some_steps,
)
from torch import Tensor, nn
from torch_database import inputs

from mada_optim import MADA, load_optimizer


@fixed
def test_differentiable_changes_no_value(optimizer: Optimizer):
    for given in inputs(CPU):
        start = [torch.randn(4, 3), torch.randn(2, dtype=torch.complex64)]
        results = []
        for differentiable in (False, True):
            params = [tensor.clone().requires_grad_() for tensor in start]
            params = [param.clone() for param in params] if differentiable else params
            kwargs = options(given, {"differentiable": True} if differentiable else FORLOOP)
            optim = optimizer(params, **kwargs)
            some_steps(params, optim)
            results.append([param.detach() for param in params])
            assert all((param.grad_fn is not None) == differentiable for param in params)
        assert same(results[0], results[1])


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@fixed
def test_derivatives_of_a_step(optimizer: Optimizer, maximize):
    """By parameter, gradient, every buffer and the learning rate, against finite differences."""
    example = torch.ones(5, dtype=torch.float64)
    probe = optimizer([example], maximize=maximize)
    some_steps([example], probe, 1)
    names = [name for name in probe.state[example] if name not in ("step", "pending")]

    def step(param: Tensor, grad: Tensor, lr: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
        param = param.clone()
        optim = optimizer([param], lr=lr, maximize=maximize, differentiable=True)
        param.grad = grad
        optim.state[param] = {"step": torch.tensor(9.0, dtype=torch.float64)}
        optim.state[param].update((name, tensor.clone()) for name, tensor in zip(names, buffers, strict=True))
        optim.step()
        optim.step()
        return param, *(optim.state[param][name] for name in names if optim.state[param][name].requires_grad)

    arguments = [torch.rand(5, dtype=torch.float64) + 0.1 for _ in range(2 + len(names))]
    arguments.insert(2, torch.tensor(0.7, dtype=torch.float64))
    assert torch.autograd.gradcheck(step, [argument.requires_grad_() for argument in arguments])


def test_autograd_through_a_step_is_the_hypergradient():
    """Learning computes it otherwise: when the next gradient is there, from one direction kept."""
    start: Options = {"lr": 0.05, "betas": (INTERIOR["beta1"], INTERIOR["beta2"])}
    start |= {name: INTERIOR[name] for name in STARTS}

    def gradients(model: nn.Module, step: int) -> list[Tensor]:
        return list(torch.autograd.grad(loss_of(model, step), list(model.parameters())))

    model = Net()
    learner = MADA(model.parameters(), hyper_warmup=0, hyper_clip=float("inf"), **start)
    twin = Net()
    params = [param.detach().clone() for param in twin.parameters()]
    fixed_optimizer = MADA(params, hyper_lr=0.0, differentiable=True, **start)
    q = fixed_optimizer.param_groups[0]["coefficients"]
    for step in range(2):
        for param, mirrored, grad in zip(model.parameters(), params, gradients(model, step), strict=True):
            param.grad = grad
            mirrored.grad = grad.clone()
        if step == 0:
            fixed_optimizer.param_groups[0]["coefficients"] = q = q.clone().requires_grad_()
            fixed_optimizer.step()
        learner.step()
    hypergradients = learner.hypergradients()
    assert hypergradients is not None
    loss = loss_of_parameters(twin, params, step=1)
    (wanted,) = torch.autograd.grad(loss, q)
    assert list(hypergradients.values()) == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-15)


def loss_of_parameters(model: nn.Module, params: list[Tensor], step: int) -> Tensor:
    x, y = batch(step)
    named = dict(zip((name for name, _ in model.named_parameters()), params, strict=True))
    return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mada", {}, "differentiable=True needs coefficients that are not learned: hyper_lr=0.0"),
        ("hyperadam", {}, "differentiable=True needs coefficients that are not learned"),
        ("adamw", {"fused": True}, "differentiable and fused cannot both be True"),
        ("adamw", {"state_dtype": torch.bfloat16}, "differentiable=True excludes rounding to bfloat16"),
        ("adamw", {"stochastic_rounding": True}, "differentiable=True excludes rounding to bfloat16"),
    ],
)
def test_what_is_not_differentiable_says_so(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_optimizer(name)([torch.ones(2)], differentiable=True, **kwargs)
    with pytest.raises(TypeError, match="differentiable must be a bool, got 1"):
        load_optimizer(name)([torch.ones(2)], differentiable=1)
