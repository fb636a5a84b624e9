"""Schedules of the learning rate."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import assert_same, everything
from problems import Net, loss_of
from torch.optim import lr_scheduler, swa_utils

from mada_optim import MADA, load_optimizer

Schedule = Callable[[torch.optim.Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    # The next and OneCycleLR would move a momentum too: MADA's is a learned coefficient, not a setting of the group.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _warm_up),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, _shrink),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=15),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 10)], milestones=[4]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4),
    "SWALR": lambda o: swa_utils.SWALR(o, 1e-3, anneal_epochs=6),
}


def _warm_up(step: int) -> float:
    return min(1.0, step / 5)


def _shrink(step: int) -> float:
    return 0.9


def scheduled(model: Net, optimizer: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> list[float]:
    """Learning rates of the steps."""
    rates = []
    for step in range(first, last):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(loss.item())
        else:
            schedule.step()
    return rates


def test_every_schedule_of_torch_is_in_the_table():
    classes = [*vars(lr_scheduler).values(), swa_utils.SWALR]
    schedulers = {
        c.__name__
        for c in classes
        if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler) and not c.__name__.startswith(("_", "LRSch"))
    }
    assert schedulers == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_what_it_does_to_adamw(name: str):
    ours, theirs, rates = Net(), Net(), []
    for model, make in ((ours, load_optimizer("adamw")), (theirs, torch.optim.AdamW)):
        optimizer = make(model.parameters(), lr=1e-2)
        rates.append(scheduled(model, optimizer, SCHEDULES[name](optimizer), 0, 16))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_resumes_with_the_optimizer(name: str):
    whole, model = Net(), Net()
    optimizer = MADA(whole.parameters(), lr=1e-2, hyper_warmup=2)
    schedule = SCHEDULES[name](optimizer)
    rates = scheduled(whole, optimizer, schedule, 0, 8)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    rates += scheduled(whole, optimizer, schedule, 8, 16)

    resumed = MADA(model.parameters(), lr=1e-2, hyper_warmup=2)
    resumed_schedule = SCHEDULES[name](resumed)
    for target, state in zip((model, resumed, resumed_schedule), saved, strict=True):
        target.load_state_dict(state)
    assert scheduled(model, resumed, resumed_schedule, 8, 16) == rates[8:]
    assert_same(everything(resumed), everything(optimizer))


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedules_that_would_move_the_momentum_say_so(name: str):
    optimizer = MADA(Net().parameters(), lr=1e-2)
    arguments = {"OneCycleLR": (1e-2, 20), "CyclicLR": (1e-3, 1e-2)}[name]
    with pytest.raises(ValueError, match="cycle_momentum"):
        getattr(lr_scheduler, name)(optimizer, *arguments)


def test_a_learning_rate_that_is_a_tensor():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = Net()
        optimizer = MADA(model.parameters(), lr=lr, hyper_warmup=2)
        scheduled(model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=10), 0, 12)
        results.append(([p.detach() for p in model.parameters()], optimizer.coefficients()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
