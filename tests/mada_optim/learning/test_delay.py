"""Coefficients that move one step late (``hyper_delay=1``), and the one pass over memory that this makes possible."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from problems import IDS, TABLE, Net, Row, loss_of, train
from twin import Twin, closed_form_alignment

from mada_optim import MADA, LearningRule
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.native.executor import NativeExecutor

ROWS = dict(zip(IDS, TABLE, strict=True))
STEPS = 14
EVERYWHERE = pytest.mark.parametrize("fused", [None, False])


def delayed(params, **kwargs) -> MADA:
    return ROWS["mada-paper"](params, lr=5e-3, **{"hyper_delay": 1, **kwargs})


@EVERYWHERE
@pytest.mark.parametrize(("warmup", "every"), [(0, 1), (4, 1), (2, 3)])
def test_a_slow_twin_that_learns_one_step_late(fused, warmup: int, every: int):
    """h_t, in the closed formulas, moves q_{t+1} to q_{t+2}."""
    model, slow = Net(), Net()
    optimizer = delayed(model.parameters(), fused=fused, hyper_warmup=warmup, hyper_every=every, hyper_clip=1e-3)
    group = optimizer.param_groups[0]
    twin = Twin([p.data for p in slow.parameters()], 5e-3, optimizer.coefficients(), wd=group["weight_decay"])
    momentum = dict.fromkeys(twin.q, 0.0)
    last: tuple[Twin, list] | None = None
    waiting: dict[str, float] | None = None
    for step in range(STEPS):
        loss = loss_of(slow, step)
        gradients = list(torch.autograd.grad(loss, list(slow.parameters())))
        for name, h in (waiting or {}).items():
            momentum[name] = group["hyper_momentum"] * momentum[name] + min(max(h, -1e-3), 1e-3)
            low, high = group["bounds"][name]
            twin.q[name] = min(max(twin.q[name] - group["hyper_lr"][name] * momentum[name], low), high)
        waiting = None
        if last is not None and step >= warmup and (step - warmup) % every == 0:
            aligned = closed_form_alignment(*last, gradients)
            waiting = {name: -5e-3 * value for name, value in aligned.items()}
        last = copy.deepcopy(twin), gradients
        twin.step(gradients)
        train(model, optimizer, 1, first=step)
        assert optimizer.coefficients() == pytest.approx(twin.q, rel=1e-10)
    assert twin.q["rho"] != pytest.approx(0.4, abs=1e-5)
    for ours, theirs in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@EVERYWHERE
@pytest.mark.parametrize("row", [row for row in TABLE if row.learns], ids=lambda row: row.name)
def test_hypergradients_are_those_of_two_passes(row: Row, fused):
    """Where coefficients do not move, nothing tells the one pass from the two."""
    kept = []
    for delay in (0, 1):
        model = Net()
        optimizer = row(model.parameters(), lr=5e-3, hyper_lr=1e-300, hyper_delay=delay, fused=fused)
        found = []
        for step in range(STEPS):
            train(model, optimizer, 1, first=step)
            found.append(list((optimizer.hypergradients() or {}).values()))
        kept.append((list(model.parameters()), optimizer.state_dict()["state"], found))
    torch.testing.assert_close(*kept, rtol=1e-12, atol=1e-15)
    assert any(kept[1][2][-1])


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (1, 5), (4, 2)])
def test_moves_one_step_after_a_hypergradient_was_due(every: int, warmup: int):
    moved = []
    for delay in (0, 1):
        model = Net()
        options = {"hyper_every": every, "hyper_warmup": warmup, "hyper_delay": delay}
        optimizer = MADA(model.parameters(), 0.01, hyper_lr=1e-2, beta3=0.5, rho=0.5, **options)
        values = [optimizer.coefficients()]
        for step in range(STEPS):
            train(model, optimizer, 1, first=step)
            values.append(optimizer.coefficients())
        moved.append([step for step, (before, after) in enumerate(pairwise(values)) if before != after])
    assert moved[1] == [step + 1 for step in moved[0] if step + 1 < STEPS]


@pytest.mark.parametrize(("fused", "kind"), [(None, NativeExecutor), (False, EagerExecutor)])
def test_one_pass_a_step(fused, kind, monkeypatch):
    passes = [0]
    original = kind.run

    def counted(*args):
        passes[0] += 1
        return original(*args)

    monkeypatch.setattr(kind, "run", counted)
    for delay, expected in ((0, 2), (1, 1)):
        model = Net(torch.float32)
        optimizer = MADA(model.parameters(), hyper_warmup=0, hyper_delay=delay, fused=fused)
        train(model, optimizer, 3)
        passes[0] = 0
        train(model, optimizer, 1, first=3)
        assert passes[0] == expected


def test_parameters_that_come_and_go():
    """Some steps have no gradient for a layer: what is pending there is completed, and waits for no gradient."""
    kept = []
    for delay in (0, 1):
        model = Net()
        optimizer = MADA(model.parameters(), 5e-3, hyper_lr=1e-300, hyper_warmup=0, hyper_delay=delay, rho=0.5)
        for step in range(STEPS):
            model.hidden.requires_grad_(step % 3 != 1)
            train(model, optimizer, 1, first=step)
        kept.append((list(model.parameters()), optimizer.state_dict()["state"], optimizer.hypergradients()))
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-12, atol=1e-15)


@EVERYWHERE
def test_turned_off_and_on_between_steps(fused):
    """A hypergradient that waits is used at the next step or not at all."""
    model = Net()
    optimizer = delayed(model.parameters(), fused=fused)
    group = optimizer.param_groups[0]
    train(model, optimizer, 4)
    group["hyper_delay"] = 0
    train(model, optimizer, 2, first=4)
    group["hyper_delay"] = 1
    before = optimizer.coefficients()
    train(model, optimizer, 1, first=6)
    assert optimizer.coefficients() == before  # nothing has waited
    train(model, optimizer, 1, first=7)
    assert optimizer.coefficients() != before
    optimizer.freeze()
    before = optimizer.coefficients()
    train(model, optimizer, 2, first=8)
    group["hyper_lr"] = dict.fromkeys(group["hyper_lr"], 0.1)
    train(model, optimizer, 2, first=10)
    assert optimizer.coefficients() == before
    train(model, optimizer, 1, first=12)
    assert optimizer.coefficients() != before


def test_what_waits_is_used_at_the_next_step_also_without_gradients():
    model = Net()
    optimizer = delayed(model.parameters())
    train(model, optimizer, 4)
    moved = []
    for _ in range(3):
        before = optimizer.coefficients()
        optimizer.zero_grad()
        optimizer.step()
        moved.append(optimizer.coefficients() != before)
    assert moved == [True, False, False]


def test_nothing_is_learned_in_steps_after_which_nothing_waits(monkeypatch):
    """The program knows, and does not ask the device."""
    calls = []
    learn = LearningRule.learn
    monkeypatch.setattr(LearningRule, "learn", lambda *args: (calls.append(0), learn(*args))[1])
    model = Net()
    train(model, delayed(model.parameters(), hyper_warmup=5, hyper_every=4), 15)
    assert len(calls) == 3  # in steps 7, 11 and 15


def test_checkpoints_say_whether_learning_is_delayed():
    """As with every option, a training goes on as it was begun; checkpoints older than the option have no delay."""
    for written, read in ((0, 1), (1, 0)):
        whole, model = Net(), Net()
        one = delayed(whole.parameters(), hyper_delay=written)
        train(whole, one, 5)
        model.load_state_dict(whole.state_dict())
        saved = copy.deepcopy(one.state_dict())
        if written == 0:
            del saved["param_groups"][0]["hyper_delay"], saved["param_groups"][0]["hyper_waiting"]
        other = delayed(model.parameters(), hyper_delay=read)
        other.load_state_dict(saved)
        for each, optimizer in ((whole, one), (model, other)):
            train(each, optimizer, 4, first=5)
        assert one.coefficients() == other.coefficients()
        torch.testing.assert_close(list(whole.parameters()), list(model.parameters()), rtol=0, atol=0)
