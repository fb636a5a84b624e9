"""Steps of many tensors: little is done in Python for each, and nothing is taken for what it was at the last step."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from cases import FLOAT32
from torch import Tensor, nn

from mada_optim import MADA, HypergradientOptimizer
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.native import executor as native

EVERYTHING = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
STEPS = 3
SHAPES = [(3, 4), (5,), (3, 4), (2, 3, 2, 2)]

Params = list[nn.Parameter]
Change = Callable[[Params, HypergradientOptimizer], None]


def make(fused: bool | None = None, groups: int = 1, **options) -> tuple[Params, MADA]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    given = [{"params": params[index::groups]} for index in range(groups)]
    return params, MADA(given, lr=1e-2, hyper_lr=EVERYTHING, hyper_warmup=0, gamma=0.5, fused=fused, **options)


def take_steps(params: Params, optimizer: HypergradientOptimizer, first: int, count: int = STEPS) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


# ---- What may change between two steps.


def data_is_another_tensor(params: Params, _: HypergradientOptimizer) -> None:
    for param in params:
        param.data = param.data + 1.0


def data_lies_elsewhere_for_one(params: Params, _: HypergradientOptimizer) -> None:
    params[2].data = params[2].data.clone()


def data_has_another_dtype(params: Params, _: HypergradientOptimizer) -> None:
    for param in params:
        param.data = param.data.double()


def data_has_another_dtype_in_one(params: Params, _: HypergradientOptimizer) -> None:
    params[0].data = params[0].data.to(torch.bfloat16)


def memory_format_is_another(params: Params, _: HypergradientOptimizer) -> None:
    params[3].data = params[3].data.to(memory_format=torch.channels_last)


def layout_is_another_in_the_same_memory(params: Params, optimizer: HypergradientOptimizer) -> None:
    """Nothing but the strides differs: the same tensors, in the same place, of the same size."""
    square = params[0].data.view(2, 6)[:, :2]
    params[0].data = square.clone()
    optimizer.state[params[0]] = {
        name: value[:2, :2].clone() if value.dim() else value for name, value in optimizer.state[params[0]].items()
    }
    take_steps(params, optimizer, first=20, count=1)
    params[0].data.t_()


def buffers_are_other_tensors(params: Params, optimizer: HypergradientOptimizer) -> None:
    for param in params:
        for name in ("exp_avg", "pending_grad", "previous_grad"):
            optimizer.state[param][name] = optimizer.state[param][name].clone() * 1.5


def buffers_lie_elsewhere(params: Params, optimizer: HypergradientOptimizer) -> None:
    for param in params:
        for buffer in optimizer.state[param].values():
            buffer.data = buffer.data.clone() * 1


def buffers_have_another_dtype_in_one(params: Params, optimizer: HypergradientOptimizer) -> None:
    state = optimizer.state[params[1]]
    for name, buffer in state.items():
        if buffer.dim():
            state[name] = buffer.double()


def one_buffer_has_another_dtype(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.state[params[0]]["exp_avg_sq"] = optimizer.state[params[0]]["exp_avg_sq"].double()


def a_buffer_has_another_layout(params: Params, optimizer: HypergradientOptimizer) -> None:
    state = optimizer.state[params[2]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def a_buffer_has_another_layout_in_its_memory(params: Params, optimizer: HypergradientOptimizer) -> None:
    buffer = optimizer.state[params[2]]["exp_avg"]
    buffer.data = buffer.data.view(4, 3).t()


def a_buffer_has_another_dtype_in_its_memory(params: Params, optimizer: HypergradientOptimizer) -> None:
    buffer = optimizer.state[params[1]]["exp_avg"]
    memory = buffer.double()
    buffer.data = memory.view(torch.float32)[: buffer.numel()].copy_(buffer)
    take_steps(params, optimizer, first=20, count=1)
    buffer.data = memory.copy_(buffer.clone())


def buffers_are_named_in_another_order(params: Params, optimizer: HypergradientOptimizer) -> None:
    for param in params:
        optimizer.state[param] = dict(reversed(optimizer.state[param].items()))


def state_is_loaded(_: Params, optimizer: HypergradientOptimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for buffers in saved["state"].values():
        buffers["exp_avg"] *= 2.0
    optimizer.load_state_dict(saved)


def state_of_one_is_forgotten(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.state.pop(params[1])


def state_of_one_has_more(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.state[params[0]]["note"] = torch.zeros_like(params[0])


def count_of_one_is_another(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.state[params[1]]["step"].fill_(1.0)


def nothing_is_pending_for_one(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.state[params[1]]["pending"].fill_(False)


def one_is_frozen(params: Params, _: HypergradientOptimizer) -> None:
    params[1].requires_grad_(False)


def one_was_frozen_for_a_while(params: Params, optimizer: HypergradientOptimizer) -> None:
    params[1].requires_grad_(False)
    take_steps(params, optimizer, first=20, count=2)
    params[1].requires_grad_(True)


def a_group_is_added(params: Params, optimizer: HypergradientOptimizer) -> None:
    params.append(nn.Parameter(torch.linspace(-1, 1, 6)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.1})


def one_is_taken_away(params: Params, optimizer: HypergradientOptimizer) -> None:
    removed = params.pop(0)
    for group in optimizer.param_groups:
        group["params"] = [param for param in group["params"] if param is not removed]
    optimizer.state.pop(removed)


def their_order_is_another(_: Params, optimizer: HypergradientOptimizer) -> None:
    for group in optimizer.param_groups:
        group["params"].reverse()


def options_are_others(_: Params, optimizer: HypergradientOptimizer) -> None:
    for group in optimizer.param_groups:
        group.update(lr=0.03, weight_decay=0.3, maximize=True, eps=1e-3, lion_betas=(0.5, 0.6))


def less_is_learned(_: Params, optimizer: HypergradientOptimizer) -> None:
    for group in optimizer.param_groups:
        group["hyper_lr"] = {**dict.fromkeys(EVERYTHING, 0.0), "rho": 0.2}


def nothing_is_learned(_: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.freeze()


def learning_stops_and_begins_again(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.freeze()
    take_steps(params, optimizer, first=20, count=2)
    for group in optimizer.param_groups:
        group["hyper_lr"] = dict(EVERYTHING)


def the_graph_is_scaled_and_a_step_skipped(params: Params, optimizer: HypergradientOptimizer) -> None:
    optimizer.found_inf = torch.ones(())
    take_steps(params, optimizer, first=20, count=1)
    del optimizer.found_inf


CHANGES: list[Change] = [
    data_is_another_tensor,
    data_lies_elsewhere_for_one,
    data_has_another_dtype,
    data_has_another_dtype_in_one,
    memory_format_is_another,
    layout_is_another_in_the_same_memory,
    buffers_are_other_tensors,
    buffers_lie_elsewhere,
    buffers_have_another_dtype_in_one,
    one_buffer_has_another_dtype,
    a_buffer_has_another_layout,
    a_buffer_has_another_layout_in_its_memory,
    a_buffer_has_another_dtype_in_its_memory,
    buffers_are_named_in_another_order,
    state_is_loaded,
    state_of_one_is_forgotten,
    state_of_one_has_more,
    count_of_one_is_another,
    nothing_is_pending_for_one,
    one_is_frozen,
    one_was_frozen_for_a_while,
    a_group_is_added,
    one_is_taken_away,
    their_order_is_another,
    options_are_others,
    less_is_learned,
    nothing_is_learned,
    learning_stops_and_begins_again,
    the_graph_is_scaled_and_a_step_skipped,
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_two_steps_is_seen(change: Change, groups):
    """By native kernels, which go by addresses, on many tensors as by plain ones on one at a time."""
    results = []
    for fused, count in ((None, groups), (False, len(SHAPES))):
        params, optimizer = make(fused, count)
        take_steps(params, optimizer, first=0)
        change(params, optimizer)
        take_steps(params, optimizer, first=STEPS)
        buffers = [optimizer.state[param] for param in params]
        results.append(([param.detach() for param in params], buffers, list(optimizer.coefficients().values())))
    (params, buffers, q), (others, other_buffers, other_q) = results
    for one, other in zip(params, others, strict=True):
        tolerance = 1e-2 if one.dtype == torch.bfloat16 else FLOAT32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for own, theirs in zip(buffers, other_buffers, strict=True):
        assert own.keys() == theirs.keys()
        assert all(own[name].equal(theirs[name]) for name in ("step", "pending") if name in own)
    assert q == pytest.approx(other_q, abs=FLOAT32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "file"])
def test_a_copy_works_on_its_own_tensors(copied):
    params, optimizer = make()
    take_steps(params, optimizer, first=0)
    before = [param.detach().clone() for param in params]
    others, other = copied((params, optimizer))
    take_steps(others, other, first=STEPS)
    assert all(map(torch.equal, params, before))
    take_steps(params, optimizer, first=STEPS)
    assert all(map(torch.equal, params, others))


def test_sets_of_coefficients_do_not_mix():
    """Groups that learn on their own do what optimizers of their own do."""
    params, optimizer = make(groups=2, hyper_per_group=True)
    take_steps(params, optimizer, first=0, count=2 * STEPS)
    for index in range(2):
        apart, alone = make(groups=2, hyper_per_group=True)
        del alone.param_groups[1 - index]
        take_steps(apart, alone, first=0, count=2 * STEPS)
        assert all(map(torch.equal, params[index::2], apart[index::2]))
        assert optimizer.coefficients(index) == alone.coefficients()


def test_two_optimizers_on_the_same_parameters():
    """In turn, each with a state of its own."""
    results = []
    for fused in (None, False):
        params, one = make(fused)
        other = MADA(params, lr=1e-3, hyper_lr=0.0, fused=fused)
        for step in range(STEPS):
            take_steps(params, one, first=step, count=1)
            take_steps(params, other, first=step, count=1)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=FLOAT32, atol=FLOAT32)


def without_gradients(layout: str, learned: Mapping[str, float]) -> tuple[list[nn.Parameter], MADA]:
    """Two parameters after some steps, and their optimizer. Nothing keeps their gradients."""
    params = [nn.Parameter(torch.randn(6, 4)[:, ::2] if layout == "strided" else torch.randn(6, 2)) for _ in "ab"]
    optimizer = MADA(params, hyper_lr=learned, hyper_warmup=0)
    take_steps(params, optimizer, first=0)
    for param in params:
        param.grad = torch.ones_like(param)
    gradients = [weakref.ref(param.grad) for param in params if param.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)
    return params, optimizer


@pytest.mark.parametrize("without_compiler", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_nothing_is_kept_alive(layout, without_compiler, monkeypatch):
    """Neither gradients, nor buffers that were replaced (moved to another device, say), nor parameters taken away."""
    if without_compiler:
        monkeypatch.setattr(native, "why_unavailable", lambda *_: "no compiler")
    gc.disable()
    try:
        params, optimizer = without_gradients(layout, EVERYTHING)
        state = optimizer.state[params[0]]
        buffers = [weakref.ref(state[name]) for name in ("exp_avg", "pending_grad", "previous_grad")]
        for name in ("exp_avg", "pending_grad", "previous_grad"):
            state[name] = state[name].clone()
        assert not any(buffer() is not None for buffer in buffers)
        taken_away = weakref.ref(params[0])
        one_is_taken_away(params, optimizer)
        assert taken_away() is None
    finally:
        gc.enable()


def test_parameters_of_one_batch_whose_buffers_differ_in_dtype():
    """One of them was unfrozen after ``state_dtype`` had been changed."""
    results = []
    for fused in (None, False):
        params, optimizer = make(fused)
        params[1].requires_grad_(False)
        take_steps(params, optimizer, first=0, count=1)
        optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
        params[1].requires_grad_(True)
        for param in (params[0], params[2], params[3]):  # as if they had been unfrozen with it
            optimizer.state[param]["step"].zero_()
            optimizer.state[param]["pending"].fill_(False)
        take_steps(params, optimizer, first=1)
        results.append([param.detach() for param in params])
        assert {optimizer.state[param]["exp_avg"].dtype for param in params} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


def test_tensors_with_nothing_special_are_not_looked_at_one_by_one(monkeypatch):
    monkeypatch.setattr(native, "_is_dense", lambda _: pytest.fail("asked of one parameter"))
    monkeypatch.setattr(EagerExecutor, "run", lambda *_: pytest.fail("left to the plain kernels"))
    take_steps(*make(), first=0)


def test_little_is_called_for_each_tensor():
    """At most twice as many functions of Python as by AdamW with ``foreach``: what a clock would say less surely."""

    def called_for_each(make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> float:
        few, many = (count_calls(make_optimizer, tensors) for tensors in (20, 60))
        return (many - few) / 40

    foreach = called_for_each(lambda params: torch.optim.AdamW(params, foreach=True))
    assert foreach > 5
    assert called_for_each(lambda params: MADA(params, hyper_lr=EVERYTHING, hyper_warmup=0)) <= 2 * foreach
    assert called_for_each(lambda params: MADA(params, hyper_lr=0.0)) <= 1.5 * foreach


def count_calls(make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], tensors: int) -> int:
    """Functions of Python that a step calls."""
    params: list[Tensor] = [nn.Parameter(torch.randn(8)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones(8)
    optimizer = make_optimizer(params)
    for _ in range(STEPS):
        optimizer.step()
    events: list[str] = []
    sys.setprofile(lambda _, event, __: events.append(event))
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return events.count("call")
