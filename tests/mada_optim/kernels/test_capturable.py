"""Capturable, and never waiting for the device."""

from __future__ import annotations

import pytest
import torch
from problems import IDS, TABLE, Net, Row, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mada_optim import MADA
from mada_optim.kernels import select


@pytest.mark.parametrize("row", TABLE, ids=IDS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_capturable_changes_nothing(row: Row, state_dtype):
    results = []
    for capturable in (False, True):
        model = Net(torch.float64 if state_dtype is None else torch.float32)
        # One by one: noise of stochastic rounding depends on what is put together.
        optimizer = row(model.parameters(), lr=1e-2, capturable=capturable, fused=False, foreach=False)
        train(model, optimizer, 9)
        assert optimizer.skipped_hypergradients == 0
        results.append((list(model.parameters()), optimizer.coefficients(), optimizer.hypergradients()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-13)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-12)
    if row.name != "mada-every-3":  # there it is computed at each step, used or not
        assert (results[0][2] or {}) == pytest.approx(results[1][2] or {}, rel=1e-9)


class NoTransfer(TorchDispatchMode):
    """Fails where memory is copied between devices, which the host would wait for. Reading from "meta" fails anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.copy_.default,
            torch.ops.aten._to_copy.default,
            torch.ops.aten._local_scalar_dense.default,
        ):
            involved = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, Tensor)}
            assert len(involved) == 1, f"{func} between {involved}"
        return out


# Every pair of the three choices: each kind of kernels with each kind of learning rate, capturable or not.
NUMBER, TENSOR = 1e-2, torch.tensor(1e-2, device="meta")
CHOICES = [(False, False, NUMBER), (False, True, TENSOR), (True, False, TENSOR), (True, True, NUMBER)]


@pytest.mark.parametrize(
    ("compiled", "capturable", "lr"), CHOICES, ids=["plain", "plain-capturable", "compiled", "compiled-capturable"]
)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_step_never_waits_for_the_device(row: Row, capturable, compiled, lr, monkeypatch):
    """The device is played by "meta", whose tensors have no values that a program could read."""
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda module, **_: module)
        monkeypatch.setattr(select, "NativeExecutor", select.CompiledExecutor)
        select.the.cache_clear()
    params = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(40, 300), (5,), (3, 2), ()]]
    optimizer = row(params, lr=1e-2, fused=compiled, capturable=capturable)

    def step():
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()

    step()  # a checkpoint's pretended step is told from a first one by looking at the learning rate
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(4):  # traces, and copies constants once
        step()
    with NoTransfer():
        for _ in range(3):
            step()
    select.the.cache_clear()


def test_capturing_needs_capturable(monkeypatch):
    """A graph that is captured otherwise replays one step count, seed and learning rate for ever."""
    model = Net()
    capturable = MADA(model.parameters(), capturable=True)
    train(model, capturable, 1)
    monkeypatch.setattr("mada_optim.optimizers.torch_protocols.is_capturing", lambda device: True)
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    with pytest.raises(RuntimeError, match="capturable=True in all parameter groups"):
        train(model, optimizer, 1)
    assert not optimizer.state
    train(model, capturable, 1)
