"""What torch demands of its own optimizers: arguments, steps, gradients, closures and hooks.

These are the optimizers and inputs of ``torch_database.py``.

Not here because they are elsewhere, for the same table: pickling and resuming bit for bit (test_checkpoint.py),
CUDA graphs and never waiting for the device (test_capturable.py), GradScaler (tests/tricks).
Not checked: tensors of 2^32 elements, which need 64 GB. Betas as tensors are taken as the numbers that they are, see
test_arguments.py.
"""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from standard import (
    CPU,
    NAMES,
    Optimizer,
    Options,
    every_implementation,
    every_input,
    every_optimizer,
    fixed,
    leaf_copies,
    loss_at,
    options,
    some_steps,
    weight_and_bias,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_database import OPTIMIZERS, SKIPS, entries, errors, inputs

from mada_optim import MADA, available_optimizers

# ---- The database.


def test_every_named_optimizer_is_in_the_database():
    assert {name.removeprefix("MADA_") for name in NAMES} >= {name.replace("-", "_") for name in available_optimizers()}
    assert len(set(NAMES)) == len(NAMES)


@every_input
def test_the_implementation_is_left_to_the_tests(given):
    assert not {"foreach", "fused", "differentiable"} & inputs("cuda").keys()
    assert not {"foreach", "fused", "differentiable"} & inputs(CPU)[given].keys()


def test_the_entries_run_in_torchs_machinery():
    pytest.importorskip("expecttest", reason="torch's testing modules need the package expecttest")
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import _get_optim_inputs_including_global_cliquey_kwargs, optims
    from torch.testing._internal.common_utils import TestCase

    class TestOptimRenewed(TestCase):
        @optims(entries())
        def test_step(self, device, dtype, optim_info):
            for optim_input in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info):
                param = torch.ones(3, device=device, dtype=dtype)
                optimizer = optim_info.optim_cls([param], **optim_input.kwargs)
                param.grad = torch.ones_like(param)
                optimizer.step()
                assert optimizer.state[param]["step"] == 1

        @optims(entries())
        def test_errors(self, device, dtype, optim_info):
            for given in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
                params, kwargs = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
                with pytest.raises(given.error_type, match=given.error_regex):
                    optim_info.optim_cls(params, **kwargs).step()

        @optims(entries())
        def test_defaults_changed_to_foreach(self, device, dtype, optim_info):
            self.fail("is skipped")

    scope: dict[str, Any] = {"TestOptimRenewed": TestOptimRenewed, "__name__": __name__}
    instantiate_device_type_tests(TestOptimRenewed, scope, only_for=CPU)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(scope["TestOptimRenewedCPU"]).run(result)
    assert result.testsRun == 3 * len(OPTIMIZERS)
    assert not result.failures + result.errors
    assert {why for _, why in result.skipped} == {SKIPS["test_defaults_changed_to_foreach"]}


# ---- Arguments.


@every_optimizer
def test_bad_arguments(optimizer: Optimizer):
    for params, kwargs, error, message in errors(optimizer, CPU, torch.float32):
        with pytest.raises(error, match=message):
            optimizer(params, **kwargs)


@every_implementation()
def test_can_be_printed(optimizer: Optimizer, implementation):
    text = repr(optimizer([Parameter(torch.ones(2))], **implementation))
    assert "lr" in text
    assert all(f"{name}: {value}" in text for name, value in implementation.items())


def test_arguments_have_torchs_names_and_order():
    other = ("amsgrad", "decoupled_weight_decay")
    theirs = [name for name in inspect.signature(torch.optim.Adam).parameters if name not in other]
    ours = list(inspect.signature(MADA).parameters)
    assert [name for name in ours if name in theirs] == theirs


# ---- The direction.


@pytest.mark.parametrize(
    ("contiguous", "scheduled"), [(True, False), (False, False), (True, True)], ids=["plain", "strided", "scheduled"]
)
@every_implementation("differentiable", "capturable")
def test_the_loss_goes_in_the_right_direction(optimizer: Optimizer, implementation, contiguous, scheduled):
    for given in inputs(CPU):
        params, x = weight_and_bias(contiguous), torch.randn(5)
        kwargs = options(given, implementation)
        optim = optimizer(params, **kwargs)
        schedulers = [StepLR(optim, gamma=0.9, step_size=5), ReduceLROnPlateau(optim)] if scheduled else []
        first = float(loss_at(params, x).detach())
        for _ in range(8):
            optim.zero_grad()
            loss = loss_at(params, x)
            loss.backward()
            optim.step()
            for scheduler in schedulers:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        last = float(loss_at(params, x).detach())
        assert last > first if kwargs.get("maximize") else last < first, given


@every_implementation("differentiable", "capturable")
def test_groups_have_options_of_their_own(optimizer: Optimizer, implementation):
    for given in inputs(CPU):
        kwargs = {"lr": 1e-3} | options(given, implementation)
        params, x, idle = weight_and_bias(), torch.randn(5), Parameter(torch.randn(2))
        before = idle.detach().clone()
        groups = [{"params": params[:1], **kwargs}, {"params": params[1:], **kwargs, "weight_decay": 0.0}]
        optim = optimizer([*groups, {"params": []}, {"params": [idle]}], lr=1e-28)
        first = float(loss_at(params, x).detach())
        for _ in range(5):
            optim.zero_grad()
            loss_at(params, x).backward()
            idle.grad = torch.rand(2)
            optim.step()
        last = float(loss_at(params, x).detach())
        assert last > first if kwargs.get("maximize") else last < first, given
        torch.testing.assert_close(idle.detach(), before)


@fixed
def test_groups_are_optimizers_of_their_own(optimizer: Optimizer):
    together = weight_and_bias()
    apart = leaf_copies(together)
    different: list[Options] = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 1e-3, "maximize": True, "eps": 1e-3}]
    both = optimizer([{"params": [param], **kwargs} for param, kwargs in zip(together, different, strict=True)])
    some_steps(together, both)
    ones = [optimizer([param], **kwargs) for param, kwargs in zip(apart, different, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for param, optim in zip(apart, ones, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            optim.step()
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


@every_implementation("differentiable")
def test_maximizing_is_minimizing_the_negative(optimizer: Optimizer, implementation):
    results = []
    for sign, maximize in ((1.0, True), (-1.0, False)):
        param = Parameter(torch.linspace(-1, 1, 7))
        optim = optimizer([param], lr=0.01, maximize=maximize, **implementation)
        for step in range(6):
            param.grad = sign * torch.cos(torch.arange(7.0) + step)
            optim.step()
        results.append((param.detach(), optim.coefficients()))
    torch.testing.assert_close(results[0], results[1])


# ---- Learning rates.


@pytest.mark.parametrize("dimensions", [0, 1, 2])
@every_implementation("differentiable")
def test_lr_may_be_a_tensor(optimizer: Optimizer, implementation, dimensions):
    results = []
    for lr in (1e-2, torch.full((1,) * dimensions, 1e-2)):
        params = [Parameter(torch.linspace(-1, 1, 6).view(2, 3)), Parameter(torch.tensor(1.0))]
        optim = optimizer(params, lr=lr, **implementation)
        schedule = ExponentialLR(optim, 0.8)
        for seed in range(6):
            some_steps(params, optim, 1, seed)
            schedule.step()
        assert isinstance(optim.param_groups[0]["lr"], Tensor) == isinstance(lr, Tensor)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(results[0], results[1])


# ---- Gradients.


@every_implementation()
def test_a_step_without_gradients_changes_nothing(optimizer: Optimizer, implementation):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    optim = optimizer(params, **implementation)
    assert optim.step(lambda: torch.tensor([1.0])) == 1.0
    assert all(map(torch.equal, params, before))
    assert not optim.state


@every_implementation()
def test_a_step_with_zero_gradients_changes_nothing(optimizer: Optimizer, implementation):
    for given, kwargs in inputs(CPU).items():
        if kwargs.get("weight_decay"):
            continue  # decays
        param = torch.randn(5, 1, requires_grad=True)
        param = param.clone() if implementation.get("differentiable") else param
        before = param.detach().clone()
        optim = optimizer([param], **options(given, implementation))
        param.grad = torch.zeros_like(param)
        optim.step()
        torch.testing.assert_close(param.detach(), before)


@every_implementation()
def test_gradients_are_not_changed(optimizer: Optimizer, implementation):
    param = torch.randn(4, 3, requires_grad=True).clone() if "differentiable" in implementation else torch.randn(4, 3)
    optim = optimizer([param], maximize=True, **implementation)
    for step in range(6):
        grad = torch.randn(4, 3)
        param.grad, before = grad, grad.clone()
        optim.step()
        assert param.grad is grad, step
        assert torch.equal(grad, before), step
        assert grad._version == 0, step


@every_implementation("differentiable")
def test_every_parameter_has_a_state_of_tensors(optimizer: Optimizer, implementation):
    model = nn.Linear(5, 5)
    optim = optimizer(model.parameters(), **implementation)
    some_steps(list(model.parameters()), optim, 1)
    assert len(optim.state) == 2
    assert all(state and all(isinstance(v, Tensor) for v in state.values()) for state in optim.state.values())


# ---- Closures and hooks of a step.


@every_implementation("differentiable")
def test_a_closure_is_called_once_with_gradients_enabled(optimizer: Optimizer, implementation):
    params, x = weight_and_bias(), torch.randn(5)
    optim = optimizer(params, **implementation)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optim.zero_grad()
        loss = loss_at(params, x)
        loss.backward()
        return loss

    with torch.no_grad():
        first = optim.step(closure)
        assert not torch.is_grad_enabled()
    assert float(optim.step(closure).detach()) < float(first.detach())
    assert seen == [True, True]


@every_implementation()
def test_hooks_of_step_run_in_order_until_removed(optimizer: Optimizer, implementation):
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda optim, args, kwargs: order.append(name)

    optim = optimizer([torch.ones(2)], **implementation)
    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        optim.register_step_pre_hook(note("before")),
        optim.register_step_post_hook(note("after")),
    ]
    optim.step()
    optim.step()
    for handle in handles:
        handle.remove()
    optim.step()
    assert order == ["all before", "before", "after", "all after"] * 2
