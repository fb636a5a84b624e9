"""What the tests of torch's demands share: the optimizers, their implementations, and small problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch_database import OPTIMIZERS, inputs

from mada_optim import HypergradientOptimizer

CPU = "cpu"
Optimizer = type[HypergradientOptimizer]
Options = dict[str, Any]

FORLOOP: Options = {"foreach": False, "fused": False}
IMPLEMENTATIONS: dict[str, Options] = {
    "forloop": FORLOOP,
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True, "fused": False},
    "differentiable": {"differentiable": True},
}
NAMES = [optimizer.__name__ for optimizer, _ in OPTIMIZERS]
every_optimizer = pytest.mark.parametrize("optimizer", [optimizer for optimizer, _ in OPTIMIZERS], ids=NAMES)
every_input = pytest.mark.parametrize("given", inputs(CPU))


def every_implementation(*without: str) -> pytest.MarkDecorator:
    """Each optimizer with each implementation that it has."""
    cases = [
        pytest.param(optimizer, IMPLEMENTATIONS[name], id=f"{optimizer.__name__}-{name}")
        for optimizer, learns in OPTIMIZERS
        for name in IMPLEMENTATIONS
        if name not in without and not (learns and name == "differentiable")
    ]
    return pytest.mark.parametrize(("optimizer", "implementation"), cases)


fixed = pytest.mark.parametrize(
    "optimizer", [pytest.param(optimizer, id=optimizer.__name__) for optimizer, learns in OPTIMIZERS if not learns]
)


def options(given: str, implementation: Options) -> Options:
    """Arguments anew: a tensor among them may be changed by a scheduler."""
    return {**inputs(CPU)[given], **implementation}


def weight_and_bias(contiguous: bool = True) -> list[Parameter]:
    if contiguous:
        return [Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))]
    return [Parameter(torch.randn(10, 5, 2)[..., 0]), Parameter(torch.randn(10, 2)[..., 0])]


def loss_at(params: list[Parameter], x: Tensor) -> Tensor:
    weight, bias = params
    return (weight.mv(x) + bias).pow(2).sum()


def some_steps(params: list[Any], optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 0) -> None:
    """Random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def leaf_copies(params: list[Any]) -> list[Any]:
    """New parameters with the same values."""
    return [param.detach().clone().requires_grad_() for param in params]


def same(one: Any, other: Any) -> bool:
    """Equality of nested containers, bit for bit in tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
