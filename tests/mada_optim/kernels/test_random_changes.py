"""Random steps and random changes between them: kernels that keep addresses do what kernels do that keep nothing.

Each change is one that users or libraries make, and that a kept table must not outlive.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import FLOAT32
from test_many_tensors import CHANGES, STEPS, Change, make, take_steps, without_gradients
from test_multi_tensor import launches, pytestmark  # noqa: F401  a fixture, and where it is needed
from torch import Tensor, nn

from mada_optim import MADA
from mada_optim.engine import group_step as engine
from mada_optim.kernels import select
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.triton import columns
from mada_optim.kernels.triton.multi_tensor import TritonExecutor
from mada_optim.tensors import alike

Memory = dict[tuple[int, str], Tensor]
LEARNED = {"beta1": 1e-3, "rho": 0.1}


@pytest.fixture(autouse=True)
def by_fused(launches, monkeypatch):  # noqa: F811
    """Kernels in Triton, and torch's operators where an optimizer asks for them by ``fused=False``."""

    def chosen(_, group, __):
        return select.the(EagerExecutor if group["fused"] is False else TritonExecutor)

    monkeypatch.setattr(engine, "select_executor", chosen)


class Case:
    """An optimizer and its parameters, which actions change. They draw from ``random``, the same for two cases."""

    def __init__(self, seed: int, fused: bool | None) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        dtypes = [torch.float64] * 5 + [torch.complex128] * 2
        self.random.shuffle(dtypes)  # a complex parameter is the first one now and then
        shapes = [(4, 4), (3,), (2, 3, 2, 2), (), (4, 4), (5,), (3, 4)]
        self.params = [nn.Parameter(self.normal(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        learned = self.random.choice([0.0, LEARNED, LEARNED])
        options = {"hyper_warmup": 0, "hyper_every": self.random.choice([1, 1, 2]), "rho": 0.5}
        groups = [self.params[:5], self.params[5:]] if seed % 2 else [self.params]
        given = [{"params": params} for params in groups]
        self.optimizer = MADA(given, lr=1e-2, hyper_lr=learned, fused=fused, **options)
        self.memory: Memory = {}
        self.other: MADA | None = None

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def one(self, of: Callable[[Tensor], bool] = lambda _: True) -> int:
        """The number of a parameter."""
        return self.random.choice([number for number, param in enumerate(self.params) if of(param)])

    def a_buffer(self, of: Callable[[Tensor], bool] = lambda _: True) -> tuple[int, str] | None:
        """The number of a parameter, and the name of a buffer that is kept for it."""
        number = self.one(of)
        state = self.optimizer.state.get(self.params[number], {})
        names = [name for name in sorted(state) if name not in ("step", "pending")]
        choice = self.random.random()  # drawn always, so that two cases stay in step
        return (number, names[int(choice * len(names))]) if names else None

    def gradients(self) -> None:
        """New ones, in one layout or another; of some parameters none; of others in the memory of the last ones."""
        for param in self.params:
            kind = self.random.choice(["new", "new", "new", "old", "none", "transposed", "negative", "one"])
            values = self.normal(tuple(param.shape), param.dtype)
            if kind == "old" and param.grad is not None and param.grad.is_contiguous():
                param.grad.copy_(values)
            elif kind == "none":
                param.grad = None
            elif kind == "transposed" and values.dim() == 2:
                param.grad = values.t().contiguous().t()
            elif kind == "negative":
                param.grad = torch._neg_view(-values) if not values.is_complex() else values.conj_physical().conj()
            elif kind == "one" and values.dim():
                param.grad = values[:1].expand(values.shape)
            else:
                param.grad = values


# ---- What may happen between two steps. None of it changes what the other case would draw next.


def names_in_another_order(case: Case) -> None:
    for param in case.params:
        items = list(case.optimizer.state.get(param, {}).items())
        if items:
            case.random.shuffle(items)
            case.optimizer.state[param] = dict(items)


def checkpoint(case: Case) -> None:
    case.optimizer.load_state_dict(copy.deepcopy(case.optimizer.state_dict()))


def copied(case: Case) -> None:
    case.params, case.optimizer, case.other = copy.deepcopy((case.params, case.optimizer, case.other))
    case.memory.clear()


def stored(case: Case) -> None:
    case.params, case.optimizer, case.other = pickle.loads(pickle.dumps((case.params, case.optimizer, case.other)))
    case.memory.clear()


def another_buffer(case: Case) -> None:
    if chosen := case.a_buffer():
        number, name = chosen
        state = case.optimizer.state[case.params[number]]
        state[name] = state[name] * 1.5


def _is_square(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def buffer_transposed_in_its_memory(case: Case) -> None:
    if chosen := case.a_buffer(_is_square):
        number, name = chosen
        buffer = case.optimizer.state[case.params[number]][name]
        buffer.data = buffer.data.t()


def parameter_transposed_in_its_memory(case: Case) -> None:
    param = case.params[case.one(_is_square)]
    param.data = param.data.t()


def buffer_with_memory_of_its_own(case: Case) -> None:
    """With room to spare, for :func:`buffer_narrowed_in_its_memory`."""
    if chosen := case.a_buffer(lambda param: not param.is_complex()):
        number, name = chosen
        buffer = case.optimizer.state[case.params[number]][name]
        if buffer.dtype == torch.float64:
            case.memory[chosen] = torch.empty(2 * buffer.numel(), dtype=torch.float64)
            buffer.data = case.memory[chosen][: buffer.numel()].view(buffer.shape).copy_(buffer.data)


def buffer_narrowed_in_its_memory(case: Case) -> None:
    """Another dtype, at the same address."""
    if case.memory:
        (number, name), memory = case.memory.popitem()
        state = case.optimizer.state.get(case.params[number], {})
        if name in state and state[name].data_ptr() == memory.data_ptr():
            values = state[name].float()
            state[name].data = memory.view(torch.float32)[: values.numel()].view(values.shape).copy_(values)


def parameter_elsewhere(case: Case) -> None:
    param = case.params[case.one()]
    param.data = param.data.clone()


def channels_last(case: Case) -> None:
    param = case.params[2]
    param.data = param.data.contiguous(memory_format=torch.channels_last)


def count_of_one(case: Case) -> None:
    state = case.optimizer.state.get(case.params[case.one()])
    if state:
        state["step"].fill_(2.0)


def nothing_pending_for_one(case: Case) -> None:
    state = case.optimizer.state.get(case.params[case.one()], {})
    if "pending" in state:
        state["pending"].fill_(False)
        state["pending_grad"].zero_()


def state_of_one_forgotten(case: Case) -> None:
    case.optimizer.state.pop(case.params[case.one()], None)


def new_group(case: Case) -> None:
    case.params.append(nn.Parameter(case.normal((2, 2), torch.float64)))
    case.optimizer.add_param_group({"params": [case.params[-1]], "lr": 3e-2})


def other_options(case: Case) -> None:
    lr = case.random.choice([1e-2, 3e-2, torch.tensor(2e-2, dtype=torch.float64)])
    for group in case.optimizer.param_groups:
        group.update(lr=lr, weight_decay=0.3)


def frozen(case: Case) -> None:
    case.optimizer.freeze()


def other_order(case: Case) -> None:
    case.optimizer.param_groups[0]["params"].reverse()


def another_optimizer_steps(case: Case) -> None:
    """On some of the same parameters, with a state of its own."""
    if case.other is None:
        case.other = MADA(case.params[:3], lr=1e-2, hyper_lr=0.0, rho=0.5, fused=case.optimizer.defaults["fused"])
    case.other.step()


def nothing(_: Case) -> None:
    pass


ACTIONS: list[Callable[[Case], None]] = [
    *[nothing] * 6,
    *[names_in_another_order, another_buffer, buffer_transposed_in_its_memory, parameter_transposed_in_its_memory] * 2,
    *[names_in_another_order, buffer_narrowed_in_its_memory],
    *[buffer_with_memory_of_its_own, buffer_narrowed_in_its_memory, parameter_elsewhere, channels_last] * 2,
    *[checkpoint, copied, stored, count_of_one, nothing_pending_for_one, state_of_one_forgotten],
    *[new_group, other_options, frozen, other_order, another_optimizer_steps],
]


def assert_agree(one: Case, other: Case, history: list[str]) -> None:
    def same(name: str, x: Tensor, y: Tensor) -> None:
        tolerance = 1e-5 if torch.float32 in (x.dtype, y.dtype) else 1e-9
        message = f"{name} after {history}"
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m: f"{message}: {m}")

    for number, (x, y) in enumerate(zip(one.params, other.params, strict=True)):
        same(f"parameter {number}", x.detach(), y.detach())
        state, theirs = (case.optimizer.state.get(param, {}) for case, param in ((one, x), (other, y)))
        assert state.keys() == theirs.keys()
        for name in state:
            if name != "pending_grad" or state["pending"]:
                same(f"{name} of parameter {number}", state[name], theirs[name])
    assert one.optimizer.coefficients() == pytest.approx(other.optimizer.coefficients(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_are_seen(seed, launches):  # noqa: F811
    cases, history = (Case(seed, None), Case(seed, False)), []
    for _ in range(10):
        for case in cases:
            action = case.random.choice(ACTIONS)
            action(case)
            case.gradients()
            case.optimizer.step()
        history.append(action.__name__)
        assert_agree(*cases, history)
    assert launches[0] > 0


# ---- One change at a time.


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_two_steps_is_seen(change: Change):
    results = []
    for fused in (None, False):
        params, optimizer = make(fused)
        take_steps(params, optimizer, first=0)
        change(params, optimizer)
        take_steps(params, optimizer, first=STEPS)
        results.append((params, [optimizer.state[param] for param in params], optimizer.coefficients()))
    (params, states, q), (others, other_states, other_q) = results
    for one, other in zip(params, others, strict=True):
        tolerance = 1e-2 if one.dtype == torch.bfloat16 else FLOAT32
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for state, other in zip(states, other_states, strict=True):
        assert state.keys() == other.keys()
        assert all(state[name].equal(other[name]) for name in ("step", "pending") if name in state)
    assert q == pytest.approx(other_q, abs=FLOAT32)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_nothing_is_kept_alive(layout):
    """Neither gradients, nor buffers that were replaced, nor what an optimizer without references held."""
    gc.disable()
    try:
        params, optimizer = without_gradients(layout, LEARNED)
        state = optimizer.state[params[0]]
        buffers = [weakref.ref(state[name]) for name in ("exp_avg", "pending_grad")]
        optimizer.load_state_dict(optimizer.state_dict())
        del state
        assert not any(buffer() is not None for buffer in buffers)
        kept = [weakref.ref(param) for param in params]
        del params, optimizer
        assert not any(param() is not None for param in kept)
    finally:
        gc.enable()


def test_one_layout_does_not_send_others_to_copies(monkeypatch):
    """Of dense tensors none is copied, and only what lies otherwise than its parameter is."""
    copied: list[int] = []
    original = columns._copied
    monkeypatch.setattr(columns, "_copied", lambda batch, numbers: copied.extend(numbers) or original(batch, numbers))
    params = [nn.Parameter(torch.randn(2, 3, 2, 2)) for _ in range(4)]
    params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
    optimizer = MADA(params, hyper_lr=LEARNED, hyper_warmup=0)
    for step in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        if step == 2:
            params[2].grad = torch.randn(2, 2, 2, 3).permute(0, 3, 2, 1)
        optimizer.step()
    assert copied == [2]


@pytest.mark.parametrize("reliable", [True, False])
def test_what_torch_compares_at_once_is_asked_if_it_can_be_trusted(reliable, monkeypatch):
    monkeypatch.setattr(alike, "_is_reliable", lambda: reliable)
    check = alike.compare_at_once([torch.zeros(2, 3)])
    assert check(torch.ones(2, 3)) is reliable
    assert not check(torch.ones(2, 3).double())


def test_torchs_comparison_is_used_here():
    """It is not public. Without it steps are right, and slower."""
    assert alike._is_reliable()
