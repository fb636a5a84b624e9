"""Devices without float64, as Apple's MPS, and parameters that have no values yet (the meta device).

There is no MPS here. The meta device stands in for it: nothing on it may be float64, and nothing of it can be read, so
that a step which waited for its device would fail.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import IDS, TABLE, Net, Row, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mada_optim import MADA, OMADA, HypergradientOptimizer
from mada_optim.tensors import devices

DEVICE = torch.device("meta")
COPIES = ("_to_copy", "copy_", "_foreach_copy_")


class WithoutFloat64(TorchDispatchMode):
    """Raises where a device would: at a float64 tensor on it, or where its tensors meet those of the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == DEVICE.type]
        if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in on_device):
            raise TypeError(f"{func}: the device has no float64")
        host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim() > 0]
        if on_device and host and func.overloadpacket.__name__ not in COPIES:
            raise TypeError(f"{func}: tensors are on two devices")
        return result


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the meta device one with memory and without float64."""
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({DEVICE.type}))
    monkeypatch.setattr(devices, "WITHOUT_VALUES", frozenset())
    with WithoutFloat64():
        yield


class Parameters(nn.Module):
    """A matrix, a bias, a number and a complex tensor."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        for name, shape in {"matrix": (4, 3), "bias": (3,), "number": ()}.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=torch.float32, **kwargs)))
        self.complex = nn.Parameter(torch.ones(2, dtype=torch.complex64, **kwargs))

    def swap(self, device: torch.device) -> None:
        """``.to``, which keeps the parameters where both devices have memory."""
        for param in self.parameters():
            torch.utils.swap_tensors(param, nn.Parameter(param.detach().to(device)))


def make(row: Row, model: Parameters, **options: Any) -> HypergradientOptimizer:
    groups: list[dict[str, Any]] = [{"params": [model.matrix]}, {"params": list(model.parameters())[1:]}]
    if row.make is OMADA:
        groups[0]["matrices"] = True
    if row.learns:
        options = {"hyper_warmup": 1, **options}
    return row(groups, **options)


def take_steps(model: Parameters, optimizer: HypergradientOptimizer, count: int = 3) -> None:
    for _ in range(count):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()


def numbers(optimizer: HypergradientOptimizer) -> Tensor:
    values: Tensor = optimizer.param_groups[0]["coefficients"]
    return values


def save_and_load(optimizer: HypergradientOptimizer, other: HypergradientOptimizer) -> None:
    saved = optimizer.state_dict()
    # torch.load(map_location="mps") fails where anything in the file is float64.
    assert all(leaf.dtype != torch.float64 for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other.load_state_dict(torch.load(file))


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_device_without_float64(row: Row):
    """Construction, steps, save, load, and a model that moves after the optimizer was made."""
    model = Parameters(device=DEVICE)
    optimizer = make(row, model)
    assert numbers(optimizer).device == DEVICE
    take_steps(model, optimizer)
    loaded_model = Parameters(device=DEVICE)
    loaded = make(row, loaded_model)
    save_and_load(optimizer, loaded)
    take_steps(loaded_model, loaded)
    assert numbers(loaded).dtype == torch.float32

    moved = Parameters(device="cpu")
    optimizer = make(row, moved)
    assert numbers(optimizer).dtype == torch.float64
    moved.swap(DEVICE)
    take_steps(moved, optimizer)
    assert (numbers(optimizer).dtype, numbers(optimizer).device) == (torch.float32, DEVICE)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("name", ["mada-paper", "omada"])
@pytest.mark.parametrize(
    "options",
    [
        {"hyper_lr": 0.0},
        {"foreach": True},
        {"foreach": False},
        {"capturable": True},
        {"hyper_per_group": True},
        {"maximize": True},
        {"lr": torch.tensor(1e-2, dtype=torch.float64)},
        {"lr": torch.tensor(1e-2), "capturable": True},
    ],
    ids=repr,
)
def test_options_on_a_device_without_float64(name: str, options: dict[str, Any]):
    model = Parameters(device="cpu")
    optimizer = make(next(row for row in TABLE if row.name == name), model, **options)
    model.swap(DEVICE)
    optimizer.hyper_grad_scale = torch.tensor(2.0, dtype=torch.float64)
    with DEVICE:  # torch.set_default_device
        take_steps(model, optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=DEVICE), torch.zeros(())
    take_steps(model, optimizer, 1)
    if not optimizer.defaults["capturable"]:
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2, device=DEVICE))})
    take_steps(model, optimizer, 1)
    assert numbers(optimizer).device == DEVICE


@pytest.mark.usefixtures("_stand_in")
def test_freeze_on_a_device_without_float64():
    model = Parameters(device=DEVICE)
    optimizer = MADA(model.parameters(), hyper_lr={"beta3": 0.1, "rho": 0.1}, hyper_warmup=1)
    take_steps(model, optimizer)
    optimizer.freeze()
    take_steps(model, optimizer)
    assert "pending_grad" not in optimizer.state[model.matrix]


@pytest.mark.usefixtures("_stand_in")
def test_bfloat16_on_a_device_without_float64():
    param = nn.Parameter(torch.ones(5, device=DEVICE, dtype=torch.bfloat16))
    optimizer = MADA([param], hyper_warmup=1, state_dtype=torch.bfloat16, stochastic_rounding=True)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()


@pytest.mark.usefixtures("_stand_in")
def test_parameters_on_the_host_beside_a_device_without_float64():
    params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", DEVICE)]
    optimizer = MADA(params, hyper_warmup=10)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert numbers(optimizer).dtype == torch.float64


@pytest.mark.parametrize("kwargs", [{}, {"fused": False}], ids=repr)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_numbers_in_float32_lead_to_the_same_training(
    row: Row, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """The CPU as a device without float64."""
    trained = []
    for without in ({"mps"}, {"cpu"}):
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset(without))
        model = Net(torch.float32)
        optimizer = row(model.parameters(), lr=5e-3, **kwargs)
        train(model, optimizer, 15)
        trained.append((model, optimizer))
    (model, expected), (other, optimizer) = trained
    assert numbers(optimizer).dtype == torch.float32
    assert optimizer.coefficients() == pytest.approx(expected.coefficients(), rel=3e-6, abs=1e-6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)
    # What was learned there goes on where there is float64.
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({"mps"}))
    loaded = row(model.parameters(), lr=5e-3, **kwargs)
    loaded.load_state_dict(optimizer.state_dict())
    assert numbers(loaded).dtype == torch.float64
    assert torch.equal(numbers(loaded).float(), numbers(optimizer))


def test_coefficients_in_float32_are_shown_as_they_were_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    optimizer = MADA([nn.Parameter(torch.ones(2))], betas=(0.99, 0.95), rho=1 / 3)
    assert optimizer.coefficients() | {"rho": None} == MADA(
        [nn.Parameter(torch.ones(2))], betas=(0.99, 0.95)
    ).coefficients() | {"rho": None}
    assert torch.tensor(optimizer.coefficients()["rho"]) == torch.tensor(1 / 3)


def test_intel_gpus_differ_in_float64(monkeypatch: pytest.MonkeyPatch):
    for has_fp64 in (True, False):
        found = SimpleNamespace(has_fp64=has_fp64)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, found=found: found)
        assert devices.has_float64(torch.device("xpu")) == has_fp64


# ---- Parameters without values.


@pytest.fixture
def _same_parameters() -> Iterator[None]:
    """``to_empty`` keeps the parameters, as it does those of FSDP2; else torch puts new ones in their place."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def materialize(model: Net) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict())


@pytest.mark.usefixtures("_same_parameters")
@pytest.mark.parametrize("kwargs", [{}, {"capturable": True}], ids=repr)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_parameters_on_meta_when_the_optimizer_is_made(row: Row, kwargs: dict[str, Any]):
    model, other = Net(), on_meta()
    optimizer = row(model.parameters(), lr=5e-3, **kwargs)
    with torch.device("meta"):
        early = row(other.parameters(), lr=5e-3, **kwargs)
    assert early.coefficients() == optimizer.coefficients()
    early.load_state_dict(early.state_dict())
    materialize(other)
    train(model, optimizer, 8)
    train(other, early, 8)
    assert early.coefficients() == optimizer.coefficients()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)

    # What was saved is loaded into an optimizer that was made on meta.
    resumed = on_meta()
    late = row(resumed.parameters(), lr=5e-3, **kwargs)
    before = late.coefficients()
    with pytest.raises(ValueError, match="to_empty"):
        late.load_state_dict(optimizer.state_dict())
    assert late.coefficients() == before
    materialize(resumed)
    resumed.load_state_dict(model.state_dict())
    late.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, first=8)
    train(resumed, late, 4, first=8)
    assert late.coefficients() == optimizer.coefficients()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_same_parameters")
def test_omada_of_a_model_on_meta():
    model, other = Net(), on_meta()
    optimizer, early = OMADA(model), OMADA(other)
    materialize(other)
    train(model, optimizer, 8)
    train(other, early, 8)
    assert early.coefficients() == optimizer.coefficients()
    assert early.scale.values == optimizer.scale.values
    assert early.scale.value > 1e-4


@pytest.mark.parametrize("make", [torch.optim.AdamW, MADA])
def test_a_step_on_meta_is_one_of_shapes(make: Any):
    """As torch's optimizers take it, to see what a training needs."""
    param = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = make([param])
    for lr in (0.0, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].device.type == "meta"


def test_parameters_that_to_empty_replaced():
    """The optimizer has those of before, which get no gradients: nothing happens, as with torch's optimizers."""
    model = on_meta()
    optimizer = MADA(model.parameters())
    start = optimizer.coefficients()
    materialize(model)
    train(model, optimizer, 2)
    assert optimizer.coefficients() == start
