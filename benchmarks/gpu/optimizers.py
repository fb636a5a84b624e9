"""The optimizers that are checked, and a problem for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mada_optim
from gpu.device import Device
from mada_lab.bench.contender import Contender
from mada_lab.bench.contenders import contenders, matrices_apart
from mada_optim import MADA, OMADA, Family, MADAFamily, OMADAFamily

Optimizer = Callable[..., torch.optim.Optimizer]

SHAPES: Sequence[tuple[int, ...]] = [(), (7,), (65, 129), (300, 400), (1 << 20,)]
SMALL_SHAPES: Sequence[tuple[int, ...]] = [(), (7,), (33, 17)]


def all_learned(family: type[Family]) -> dict[str, float]:
    """Return step sizes with which all coefficients of a family are learned."""
    return {each.name: 5e-4 if each.name in ("beta1", "beta2") else 0.1 for each in family.coefficients}


def everything(params: Any, **kwargs: Any) -> MADA:
    """Return MADA inside its box, with all coefficients learned from the first step on."""
    inside = {"beta3": 0.3, "rho": 0.5, "c": 0.6, "gamma": 0.7, "hyper_lr": all_learned(MADAFamily)}
    return MADA(params, **{**inside, "hyper_warmup": 0, **kwargs})


def omada(params: Sequence[nn.Parameter], **kwargs: Any) -> OMADA:
    """Return OMADA with all tensors of two dimensions as matrices."""
    return OMADA(matrices_apart(params), **kwargs)


def named_optimizers() -> dict[str, Optimizer]:
    """Return every named point, MADA inside its box and OMADA with matrices: those that learn first.

    They learn from the first step on.
    """
    named: dict[str, Optimizer] = {
        "mada inside": everything,
        "mada inside, hyper_delay=0": partial(everything, hyper_delay=0),
        "omada, everything": partial(omada, hyper_lr=all_learned(OMADAFamily), ortho=0.6, scale=False),
        **{name: mada_optim.load_optimizer(name) for name in mada_optim.available_optimizers()},
        "omada": omada,
    }
    learning = {name: partial(make, hyper_warmup=0) for name, make in named.items() if learns(make)}
    return learning | {name: make for name, make in named.items() if name not in learning}


def learns(make: Optimizer) -> bool:
    """Return whether an optimizer changes its coefficients."""
    group = make([nn.Parameter(torch.ones(2, 2))], lr=1e-3).param_groups[0]
    return max(group["hyper_lr"].values()) > 0


def timed_contenders() -> list[Contender]:
    """Return AdamW, and MADA's lines of ``mada bench`` whose steps are all alike: the two with a bar come first."""
    first = ("AdamW, fused", "MADA, everything", "MADA, nothing learned (Adam)")
    lines = {each.name: each for each in contenders()}
    others = [name for name, each in lines.items() if name.startswith("MADA") and each.unit == 1 and name not in first]
    return [lines[name] for name in (*first, *others)]


def new_params(device: str, dtype: torch.dtype, small: bool) -> list[nn.Parameter]:
    """Return parameters of all shapes, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = SMALL_SHAPES if small else SHAPES
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def gradients(params: Sequence[nn.Parameter], steps: int) -> Iterator[list[Tensor]]:
    """Yield gradients of each step, the same on every device. They keep a direction, so coefficients move."""
    generator = torch.Generator().manual_seed(1)
    drift = [torch.randn(param.shape, generator=generator) for param in params]
    for _ in range(steps):
        noise = [torch.randn(param.shape, generator=generator) for param in params]
        pairs = zip(params, drift, noise, strict=True)
        yield [(mean + noise_).to(param.device, param.dtype) for param, mean, noise_ in pairs]


def train(
    make: Optimizer, device: Device, dtype: torch.dtype, small: bool, steps: int = 8, **kwargs: Any
) -> tuple[list[Tensor], dict[str, float]]:
    """Return parameters after some steps as float64 on the CPU, and the coefficients."""
    params = new_params(device.name, dtype, small)
    optimizer: Any = make(params, lr=1e-3, **kwargs)
    for grads in gradients(params, steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach().cpu().double() for param in params], dict(optimizer.coefficients())
