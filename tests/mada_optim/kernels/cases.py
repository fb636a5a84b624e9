"""Parameters of every layout, and steps with gradients of every layout, for two kernels to be compared on."""

from __future__ import annotations

import pytest
import torch
from problems import Row
from torch import Tensor, nn

# Relative to the largest element: what a few float32 operations in another order may differ by after some steps.
FLOAT32 = 2e-5


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters of every kind of layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "scalar": random(),
        "vector": random(5),
        "matrix": random(17, 33),
        "large": random(70_001),
        "empty": random(0, 3),
        "transposed": random(9, 4).t(),
        "channels_last": random(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "strided": random(12, 8)[::2, 1::3],
        "ones": random(1, 6, 1),
    }


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Gradients that change from step to step, some of them in another layout than their parameter."""
    generator = torch.Generator().manual_seed(step + 1)
    for name, param in params.items():
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 1)
        param.grad = grad.to(param.dtype)
        if name == "matrix" and step % 2:
            param.grad = param.grad.t().contiguous().t()
        if name == "vector":
            param.grad = param.grad[:1].expand(5)
        if name in ("scalar", "large"):
            param.grad = torch._neg_view(-param.grad)  # as autograd may leave it behind torch.conj


def run(row: Row, dtype: torch.dtype, steps: int = 7, **kwargs):
    params = {name: nn.Parameter(tensor) for name, tensor in layouts(dtype).items()}
    optimizer = row(params.values(), lr=1e-2, weight_decay=0.1, **kwargs)
    for step in range(steps):
        gradients(params, step)
        if step == 4:
            params["matrix"].grad = None
        optimizer.step()
    return params, optimizer


def assert_same(one, other, rtol: float) -> None:
    (params, optimizer), (other_params, other_optimizer) = one, other
    for name, param in params.items():
        scale = float(param.detach().abs().max()) if param.numel() else 1.0
        torch.testing.assert_close(
            param, other_params[name], rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (_, state), (_, other_state) in zip(optimizer.state.items(), other_optimizer.state.items(), strict=True):
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            if key == "pending_grad" and not state["pending"]:
                continue  # nothing is kept: what is there does not matter
            scale = float(value.double().abs().max()) if value.numel() else 1.0
            torch.testing.assert_close(
                value, other_state[key], rtol=0, atol=rtol * scale, msg=lambda m, k=key: f"{k}: {m}"
            )
    for key, value in optimizer.coefficients().items():
        assert value == pytest.approx(other_optimizer.coefficients()[key], abs=max(rtol, 1e-12)), key
