"""Autograd is told of every tensor that a step writes: a graph that needs the old value raises, as with AdamW."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import IDS, TABLE, Net, Row, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mada_optim import MADA
from mada_optim.engine import group_step as engine
from mada_optim.kernels import select
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.native.executor import NativeExecutor
from mada_optim.kernels.traced.compiled import CompiledExecutor
from mada_optim.kernels.triton import launch, multi_tensor
from mada_optim.kernels.triton.multi_tensor import TritonExecutor

# Of numpy, in which Triton's interpreter computes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
MODIFIED = "modified (by an inplace operation|inplace)"

needs_interpreter = pytest.mark.skipif(
    not launch.is_available() or torch.cuda.is_available(), reason="needs Triton, and no GPU: its interpreter"
)
# The implementations of a step: their kernels, and the arguments that choose them.
PATHS: dict[str, tuple[type[EagerExecutor], dict[str, Any]]] = {
    "native": (NativeExecutor, {}),
    "fused=False": (EagerExecutor, {"fused": False}),
    "foreach=True": (EagerExecutor, {"foreach": True}),
    "foreach=False": (EagerExecutor, {"foreach": False}),
    "capturable": (EagerExecutor, {"capturable": True}),
    "Triton": (TritonExecutor, {}),
}


NAME = operator.attrgetter("name")


def some(*names: str) -> list[Row]:
    return [row for row in TABLE if row.name in names]


@pytest.fixture(params=[pytest.param(name, marks=[needs_interpreter] if name == "Triton" else []) for name in PATHS])
def path(request, monkeypatch) -> dict[str, Any]:
    """The arguments of one implementation, which is what steps use then."""
    return choose(request.param, monkeypatch)


def choose(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    expected, arguments = PATHS[name]
    if expected is TritonExecutor:
        monkeypatch.setattr(engine, "select_executor", lambda family, *_: select.the(TritonExecutor))
        monkeypatch.setattr(multi_tensor, "TILE", 1 << 15)
        monkeypatch.setattr(multi_tensor, "BLOCK", 1 << 14)
    else:
        optimizer = MADA([nn.Parameter(torch.ones(1))], **arguments)
        selected = select.select_executor(optimizer.family, optimizer.param_groups[0], torch.device("cpu"))
        assert type(selected) is expected
    return arguments


def gradient(param: Tensor) -> Tensor:
    values = torch.randn(param.shape).to(param.dtype)
    return distribute_tensor(values, param.device_mesh, param.placements) if isinstance(param, DTensor) else values


def kept_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Parameters, their state, and the tensors that parameter groups keep."""
    for group in optimizer.param_groups:
        yield from group["params"]
        yield from (value for value in group.values() if isinstance(value, Tensor))
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def assert_versions_rise(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    """Each tensor that has other values after a step than before has a higher version, too."""
    written: set[int] = set()
    for step in range(steps):
        for index, param in enumerate(params):
            last = step == steps - 1 and index == 0  # whose pending step is settled without another one
            param.grad = None if last else gradient(param) * (1 + step)
        before = [(tensor, tensor.detach().clone(), tensor._version) for tensor in kept_tensors(optimizer)]
        optimizer.step()
        for tensor, values, version in before:
            if not same(tensor.detach(), values):
                written.add(id(tensor))
                assert tensor._version > version, f"{tuple(tensor.shape)} in step {step}"
    assert len(written) > len(params)


def same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        one, other = one.to_local(), other.to_local()
    return torch.equal(one, other)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_the_version_of_all_that_a_step_writes_rises(row: Row, path):
    """Of parameters that are dense in memory, and of one with gaps."""
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 6)[::2])]
    matrices = {"matrices": True} if row.name == "omada" else {}
    assert_versions_rise(row([{"params": params, **matrices}], lr=1e-2, **path), params, steps=6)


@pytest.mark.parametrize("row", some("mada-paper", "omada"), ids=NAME)
def test_the_version_rises_in_bfloat16(row: Row, path):
    """Parameters and buffers, all of them rounded stochastically."""
    params = [nn.Parameter(torch.randn(5).bfloat16())]
    optimizer = row(params, lr=1e-1, state_dtype=torch.bfloat16, stochastic_rounding=True, **path)
    assert_versions_rise(optimizer, params, steps=6)


def test_the_version_of_complex_parameters_rises(path):
    """Kernels see them as pairs of reals."""
    params = [nn.Parameter(torch.randn(3, dtype=torch.complex64))]
    assert_versions_rise(MADA(params, lr=1e-2, hyper_warmup=0, **path), params, steps=6)


def test_the_version_of_all_that_a_compiled_step_writes_rises(monkeypatch):
    """By torch.compile itself, which is handed large tensors in place."""
    monkeypatch.setattr(select, "NativeExecutor", CompiledExecutor)
    params = [nn.Parameter(torch.randn(100, 100)), nn.Parameter(torch.randn(7))]
    optimizer = MADA(params, lr=1e-2, hyper_lr=0.0, fused=True)
    try:
        assert_versions_rise(optimizer, params, steps=4)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_graph_that_needs_the_old_value_raises(row: Row, path):
    """Of a product, the derivative by one factor is the other."""
    for make in (row, torch.optim.AdamW):
        factor, param = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
        optimizer = make([param], lr=0.5, **(path if make is row else {}))
        product = factor * param
        param.grad = torch.ones(1)
        optimizer.step()
        with pytest.raises(RuntimeError, match=MODIFIED):
            product.backward()


def test_a_graph_of_a_buffer_raises(path):
    """What users log or penalize may be made of an optimizer's state."""
    param, weight = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = MADA([param], lr=0.5, hyper_warmup=0, **path)
    for _ in range(2):
        param.grad = torch.ones(1)
        optimizer.step()
    product = weight * optimizer.state[param]["exp_avg"]
    optimizer.step()
    with pytest.raises(RuntimeError, match=MODIFIED):
        product.backward()


@pytest.mark.parametrize("row", some("adamw", "mada-paper", "omada"), ids=NAME)
def test_two_optimizers_on_one_graph(row: Row, path):
    """The discriminator of a GAN that steps before the generator's loss, which goes through it, is differentiated."""

    def train(make: Callable[..., Any], late: bool) -> None:
        generator, discriminator = nn.Linear(2, 3), nn.Linear(3, 1)
        optimizers = [make(net.parameters(), lr=1e-2) for net in (discriminator, generator)]
        for step in range(4):
            made = generator(torch.randn(9, 2))
            loss = -discriminator(made).mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            discriminator(made.detach()).square().mean().backward()
            if late and step == 3:
                optimizers[0].step()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    for make in (lambda params, lr: row(params, lr=lr, **path), torch.optim.AdamW):
        train(make, late=False)
        with pytest.raises(RuntimeError, match=MODIFIED):
            train(make, late=True)


def test_nothing_is_said_of_a_parameter_that_is_left_alone(path):
    model = Net(torch.float32)
    optimizer = MADA(model.parameters(), lr=1e-2, hyper_warmup=0, **path)
    loss_of(model, 0).backward()
    optimizer.step()
    frozen = model.out.weight
    frozen.grad, version = None, frozen._version
    optimizer.step()
    assert frozen._version == version


@pytest.mark.parametrize("row", some("mada-paper", "omada"), ids=NAME)
def test_parameters_that_are_spread_over_processes(row: Row, path, tmp_path):
    """Kernels write to local parts; what autograd has saved are the DTensors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = [nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])) for _ in range(2)]
        matrices = {"matrices": True} if row.name == "omada" else {}
        optimizer = row([{"params": params, **matrices}], lr=1e-2, **path)
        assert_versions_rise(optimizer, params, steps=6)
        product, part = params[0] * params[1], params[1].to_local() ** 2
        params[1].grad = gradient(params[1])
        optimizer.step()
        for graph in (product.sum(), part.sum()):
            with pytest.raises(RuntimeError, match=MODIFIED):
                graph.backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        version = params[1].grad._version
        optimizer.step()
        assert params[1].grad._version > version
    finally:
        dist.destroy_process_group()
