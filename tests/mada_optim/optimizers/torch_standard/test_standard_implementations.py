"""What torch demands of its own optimizers: every implementation does the same, for all dtypes, devices and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from standard import (
    FORLOOP,
    Optimizer,
    Options,
    every_implementation,
    every_optimizer,
    leaf_copies,
    loss_at,
    options,
    same,
    some_steps,
    weight_and_bias,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch_database import OPTIMIZERS

from mada_optim.tensors import blocks

# ---- Implementations, dtypes, devices, layouts.


def compare(optimizer: Optimizer, one: Options, other: Options, dtype: torch.dtype) -> None:
    """Step by step; the states are made equal after each, so that differences do not add up."""
    runs = []
    for kwargs in (one, other):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
        scalar = torch.ones((), dtype=dtype, requires_grad=True)
        runs.append((model, optimizer([*model.parameters(), scalar], **kwargs)))
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    for step in range(7):
        for model, optim in runs:
            optim.zero_grad()
            model[2].requires_grad_(not 3 <= step < 5)  # a layer without gradients
            if step != 2:  # a step without any
                model(x).sum().backward()
            optim.step()
        (reference, reference_optim), (tested, tested_optim) = runs
        for wanted, found in zip(reference.parameters(), tested.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)
            wanted_state, found_state = reference_optim.state.get(wanted, {}), tested_optim.state.get(found, {})
            assert wanted_state.keys() == found_state.keys()
            with torch.no_grad():
                found.copy_(wanted)
                for key, value in wanted_state.items():
                    torch.testing.assert_close(found_state[key], value, msg=lambda m, k=key, s=step: f"{k}, {s}: {m}")
                    found_state[key].copy_(value)
        torch.testing.assert_close(tested_optim.coefficients(), reference_optim.coefficients(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_implementation("forloop", "capturable", "differentiable")
def test_implementations_match_the_loop(optimizer: Optimizer, implementation, dtype):
    given = "non-default lr"
    compare(optimizer, options(given, FORLOOP), options(given, implementation), dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@every_optimizer
def test_another_default_dtype(optimizer: Optimizer, dtype):
    with default_dtype(dtype):
        compare(optimizer, FORLOOP, {"foreach": True}, torch.float64)
        param = Parameter(torch.ones(2, dtype=torch.float32))
        optim = optimizer([param])
        some_steps([param], optim, 1)
    assert optim.state[param]["step"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_implementation("differentiable")
def test_dtypes_may_be_mixed(optimizer: Optimizer, implementation):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    params = [torch.linspace(-1, 1, 6).view(2, 3).to(dtype).requires_grad_() for dtype in dtypes]
    alone = leaf_copies(params)
    optim = optimizer(params, weight_decay=0.1, **implementation)
    ones = [optimizer([param], weight_decay=0.1, **implementation) for param in alone]
    # Those that learn would go on with coefficients of their own.
    for step in range(1 if dict(OPTIMIZERS)[optimizer] else 3):
        for param, other, one in zip(params, alone, ones, strict=True):
            param.grad = torch.full_like(param, (-0.5) ** step)
            other.grad = param.grad.clone()
            one.step()
        optim.step()
    for param, other in zip(params, alone, strict=True):
        assert torch.equal(param, other), param.dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@every_optimizer
def test_devices_may_be_mixed(optimizer: Optimizer):
    here = weight_and_bias()
    mixed = [here[0].detach().clone().requires_grad_(), here[1].detach().cuda().requires_grad_()]
    for params in (here, mixed):
        optim = optimizer(params, lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.device)
            optim.step()
    for one, other in zip(here, mixed, strict=True):
        torch.testing.assert_close(one, other.cpu())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded gradient"])
@every_implementation("differentiable")
def test_layouts(optimizer: Optimizer, implementation, layout):
    plain = torch.linspace(-1, 1, 120).view(2, 3, 4, 5)
    laid_out = {
        "channels_last": lambda: plain.to(memory_format=torch.channels_last),
        "transposed": lambda: plain.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": lambda: torch.stack([plain, plain], dim=-1)[..., 0],
        "expanded gradient": lambda: plain.clone(),
    }[layout]()
    assert layout == "expanded gradient" or laid_out.stride() != plain.stride()
    results = []
    for value in (plain.clone(), laid_out):
        param = value.requires_grad_()
        strides = param.stride()
        optim = optimizer([param], lr=1e-2, **implementation)
        for step in range(5):
            grad = torch.cos(torch.arange(5.0) + step).expand(2, 3, 4, 5)
            param.grad = grad if layout == "expanded gradient" and value is laid_out else grad.contiguous()
            optim.step()
        assert param.stride() == strides
        results.append((param.detach(), optim.coefficients()))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


@every_implementation("differentiable", "capturable")
def test_complex_parameters_are_pairs_of_reals(optimizer: Optimizer, implementation):
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 5, 2), (10, 2)]
    for given in ("non-default lr", "maximize"):
        reals = [torch.randn(shape, generator=generator) for shape in shapes]
        runs = []
        for as_complex in (False, True):
            params = [torch.view_as_complex(real.clone()) if as_complex else real.clone() for real in reals]
            params.append(torch.ones(3))  # one is real in both
            optim = optimizer([param.requires_grad_() for param in params], **options(given, implementation))
            for step in range(4):
                for param, shape in zip(params, [*shapes, (3,)], strict=True):
                    grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
                    param.grad = torch.view_as_complex(grad) if param.is_complex() else grad
                optim.step()
            runs.append([torch.view_as_real(p) if p.is_complex() else p for p in params])
        torch.testing.assert_close(runs[1], runs[0])


@every_implementation("differentiable")
def test_complex_parameters_are_their_two_parts(optimizer: Optimizer, implementation):
    def loss(z: Tensor) -> Tensor:
        return ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs()

    start = torch.randn(2, dtype=torch.complex64)
    whole = start.clone().requires_grad_()
    parts = [start.real.clone().requires_grad_(), start.imag.clone().requires_grad_()]
    optims = [optimizer([whole], **implementation), optimizer(parts, **implementation)]
    for _ in range(3):
        for optim, z in ((optims[0], whole), (optims[1], torch.complex(*parts))):
            optim.zero_grad()
            loss(z).backward()
            optim.step()
    torch.testing.assert_close(whole.detach(), torch.complex(*parts).detach())


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes, above what there was at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@every_optimizer
def test_peak_memory_of_foreach_does_not_depend_on_the_number_of_parameters(optimizer: Optimizer, monkeypatch):
    block = 1 << 13
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    peaks = []
    for count in (10, 30):
        params = [torch.ones(3000) for _ in range(count)]
        optim = optimizer(params, foreach=True)
        some_steps(params, optim, 4)
        peaks.append(peak_memory(optim.step))
    assert 0 < peaks[0] < 32 * 4 * block  # 32 blocks of float32: buffers put together, and intermediate results
    assert peaks[1] <= 1.02 * peaks[0]


# ---- torch.compile.


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_optimizer
def test_torch_compile_of_step_changes_nothing(optimizer: Optimizer, backend):
    """It leaves the step alone, whose kernels are compiled already; a closure and what is around it are compiled."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params, x = weight_and_bias(), torch.randn(5)
        optim = optimizer(params)
        step = torch.compile(optim.step, backend=backend) if compiled else optim.step
        for _ in range(6):
            optim.zero_grad()
            loss_at(params, x).backward()
            step()
        results.append(([param.detach() for param in params], optim.coefficients()))
    assert same(results[0], results[1])
