"""What torch demands of its own optimizers, over the optimizers and inputs of ``torch_database.py``.

Not here because they are elsewhere, for the same table: pickling and resuming bit for bit (test_checkpoint.py),
CUDA graphs and never waiting for the device (test_kernels.py), GradScaler (test_tricks.py).
Not checked: tensors of 2^32 elements, which need 64 GB; betas as tensors, which no argument of ours can be: they are
where coefficients start, and those are tensors anyway.
"""

from __future__ import annotations

import copy
import inspect
import io
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import INTERIOR, Net, batch, loss_of
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_database import LATER_ARGUMENTS, OPTIMIZERS, SKIPS, entries, errors, inputs

from mada_optim import MADA, HypergradientOptimizer, available_optimizers, load_optimizer
from mada_optim.kernels import blocks

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


# ---- The database.


def test_every_named_optimizer_is_in_the_database():
    assert {name if name == "AVGrad" else name.removeprefix("MADA_") for name in NAMES} >= {
        {"avgrad": "AVGrad"}.get(name, name.replace("-", "_")) for name in available_optimizers()
    }
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
    for params, kwargs, error, message in errors(CPU, torch.float32):
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


# ---- State.


def primed(
    optimizer: Optimizer, kwargs: Options, named: bool = False
) -> tuple[list[Parameter], HypergradientOptimizer]:
    torch.manual_seed(0)
    params = weight_and_bias()
    optim = optimizer([(f"name{i}", p) for i, p in enumerate(params)] if named else params, **kwargs)
    some_steps(params, optim, 6)
    return params, optim


def same(one: Any, other: Any) -> bool:
    """Equality of nested containers, bit for bit in tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@every_implementation("differentiable", "capturable")
def test_state_dict_is_deterministic(optimizer: Optimizer, implementation, named):
    for given in ("tensor lr",) if any(named) else inputs(CPU):
        params, optim = primed(optimizer, options(given, implementation), named[0])
        copies = [Parameter(param.detach().clone()) for param in params]
        taken = [(f"name{i}", p) for i, p in enumerate(copies)] if named[1] else copies
        other = optimizer(taken, **options(given, implementation))
        saved = optim.state_dict()
        kept = copy.deepcopy(saved)
        other.load_state_dict(saved)
        assert same(saved, kept)
        some_steps(params, optim, 3)
        some_steps(copies, other, 3)
        assert same(params, copies)
        ours, theirs = optim.state_dict(), other.state_dict()
        names = [state["param_groups"][0].pop("param_names", None) for state in (ours, theirs)]
        assert same(ours, theirs)
        assert names[1] == (["name0", "name1"] if any(named) else None)
        # A parameter that is listed again has the same number.
        other.param_groups.extend(other.param_groups)
        groups = other.state_dict()["param_groups"]
        assert groups[0]["params"] == groups[1]["params"]


@every_implementation("differentiable")
def test_state_from_before_some_arguments_existed_is_loaded(optimizer: Optimizer, implementation):
    params, optim = primed(optimizer, options("no weight decay", implementation))
    old = copy.deepcopy(optim.state_dict())
    for group in old["param_groups"]:
        for name in LATER_ARGUMENTS:
            del group[name]
    for state in old["state"].values():
        state["step"] = float(state["step"])  # which was no tensor then
    optim.load_state_dict(old)
    fresh = optimizer([Parameter(torch.ones(1))])
    for name in LATER_ARGUMENTS:
        assert optim.param_groups[0][name] == fresh.param_groups[0][name]
    assert all(state["step"] == torch.tensor(6.0) for state in optim.state.values())
    some_steps(params, optim)
    assert all(state["step"] == torch.tensor(10.0) for state in optim.state.values())


@every_optimizer
def test_an_optimizer_pickled_before_some_arguments_existed_is_loaded(optimizer: Optimizer):
    params, optim = primed(optimizer, {})
    old = copy.deepcopy(optim.__getstate__())
    for given in (old["defaults"], *old["param_groups"]):
        for name in LATER_ARGUMENTS:
            del given[name]
    renewed = optimizer.__new__(optimizer)
    renewed.__setstate__(old)
    some_steps(params, optim)
    copies = renewed.param_groups[0]["params"]
    some_steps(copies, renewed)
    assert same(params, copies)
    renewed.add_param_group({"params": [Parameter(torch.zeros(2))]})


@every_implementation("differentiable")
def test_state_dict_is_loaded_from_a_file_as_it_was(optimizer: Optimizer, implementation):
    for given in ("no weight decay", "maximize", "tensor lr"):
        saved = primed(optimizer, options(given, implementation))[1].state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        assert same(torch.load(file, weights_only=True), saved)


@every_implementation()
def test_hooks_of_state_dict(optimizer: Optimizer, implementation):
    optim = optimizer([torch.ones(2)], **implementation)
    optim.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
    assert optim.state_dict()["state"]["test"] == 1

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "found": state["state"].pop("test")}

    optim.register_state_dict_post_hook(replace)
    state = optim.state_dict()
    assert state["found"] == 1
    assert not state["state"]


@every_implementation()
def test_hooks_of_load_state_dict(optimizer: Optimizer, implementation):
    optim = optimizer([torch.ones(2)], **implementation)

    def change(_: Any, state: dict[str, Any]) -> None:
        state["param_groups"][0]["lr"] = 0.002

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    optim.register_load_state_dict_pre_hook(change)
    optim.register_load_state_dict_post_hook(lambda o: o.state.update(lr=o.param_groups[0]["lr"]))
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.002
    optim.register_load_state_dict_pre_hook(replace, prepend=True)
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.002
    optim.register_load_state_dict_pre_hook(replace)
    optim.load_state_dict(optim.state_dict())
    assert optim.state["lr"] == 0.003


@every_optimizer
def test_state_that_is_no_parameters_is_loaded_too(optimizer: Optimizer):
    _, optim = primed(optimizer, {})
    optim.state["note"] = 7
    other = optimizer(weight_and_bias())
    other.load_state_dict(optim.state_dict())
    assert other.state["note"] == 7
    assert len(other.state) == 3


@every_optimizer
def test_deepcopy_has_all_public_attributes(optimizer: Optimizer):
    _, optim = primed(optimizer, {})
    public = [{name for name in vars(o) if not name.startswith("_")} for o in (optim, copy.deepcopy(optim))]
    assert public[0] == public[1] >= {"defaults", "state", "param_groups", "family"}


# ---- Differentiable.


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
    start |= {name: INTERIOR[name] for name in ("beta3", "rho", "c", "gamma")}

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
    found = learner.hypergradients()
    assert found is not None
    loss = loss_of_parameters(twin, params, step=1)
    (wanted,) = torch.autograd.grad(loss, q)
    assert list(found.values()) == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-15)


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
