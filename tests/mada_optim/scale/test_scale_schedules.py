"""Learning rates that are given and shown: schedulers of all kinds, tensors, and what becomes of a rate."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Net, train
from searches import SHORT, search, vector
from torch import nn
from torch.optim import AdamW, lr_scheduler

from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.scale.rate import ScaledRate, given_rate

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 5) * 0.98**t),
    "from zero": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 5)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.98),
    "step": lambda o: lr_scheduler.StepLR(o, 6, 0.7),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.8),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=8),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 40),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=1e-4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.004, 0.02, step_size_up=5, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=40, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 30)], [5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_give_the_shape_and_the_scale_survives_them(name: str) -> None:
    plain = AdamW([nn.Parameter(torch.ones(2))], lr=0.01)
    schedule = SCHEDULES[name](plain)
    given = []
    for _ in range(30):
        given.append(float(plain.param_groups[0]["lr"]))
        plain.step()
        schedule.step()
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    scale = LearnedScale(optimizer, settings=SHORT)
    scheduler = SCHEDULES[name](optimizer)
    for step in range(30):
        train(model, optimizer, 1, first=step)
        shown = optimizer.param_groups[0]["lr"]
        peak = max(given[: step + 1])
        share = given[step] / peak if peak else 0.0
        assert shown == pytest.approx(scale.value * share, rel=1e-12)
        assert given_rate(shown) == pytest.approx(given[step], rel=1e-12)
        scheduler.step()
    assert not scale.searching


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("cyclic", "one cycle", "cosine")])
def test_last_lr_is_what_is_used(name: str) -> None:
    # Rates of a scheduler's own (cyclic, one cycle, this cosine's lowest) are shown as given until the next step.
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    LearnedScale(optimizer, settings=SHORT)
    scheduler = SCHEDULES[name](optimizer)
    for step in range(14):
        train(model, optimizer, 1, first=step)
        scheduler.step()
    (announced,) = scheduler.get_last_lr()
    train(model, optimizer, 1, first=14)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(announced, rel=1e-12)


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """As those of libraries, which change a part of it."""

    def _reduce_lr(self, epoch: int) -> None:
        super()._reduce_lr(epoch)


@pytest.mark.parametrize("kind", [lr_scheduler.ReduceLROnPlateau, Plateau])
@pytest.mark.parametrize("by_hand", [False, True])
def test_plateau(by_hand: bool, kind: type[lr_scheduler.ReduceLROnPlateau]) -> None:
    model, optimizer, scale = search(steps=13)
    if by_hand:  # a warm-up, with a log of what is used
        for group in optimizer.param_groups:
            assert float(group["lr"]) > 0.001
            group["lr"] = 0.001
        train(model, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.01
        train(model, optimizer, 1)
    scheduler = kind(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * scale.value)


@pytest.mark.parametrize("steps", [6, 13])
def test_a_checkpoint_after_a_plateau(steps: int) -> None:
    """Saved before the next step, as at the end of an epoch."""
    model, optimizer, scale = search(steps=steps)
    (before,) = scale.rates(optimizer)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == pytest.approx(0.005)
    assert scale.rates(optimizer) == pytest.approx([0.5 * before])
    again = Net()
    resumed = AdamW(again.parameters(), lr=0.01)
    LearnedScale(resumed, settings=SHORT)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (again, resumed)):
        train(each, its, 10, first=steps)
    assert torch.equal(vector(again), vector(model))


def test_plateau_of_a_wrapped_optimizer() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
            return self.optimizer.param_groups

    model, optimizer, scale = search(steps=13)
    scheduler = lr_scheduler.ReduceLROnPlateau(Wrapper(optimizer), factor=0.1, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * scale.value)
    # A rate that is written by hand is given, whatever a scheduler did before.
    optimizer.param_groups[0]["lr"] = 0.001
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * scale.value)


def test_held_early_where_the_schedule_falls() -> None:
    cosine = lambda o: lr_scheduler.CosineAnnealingLR(o, 60)  # noqa: E731
    scale = search(steps=60, settings=SearchSettings(), schedule=cosine)[2]
    assert not scale.searching
    assert 28 <= scale.steps <= 32


@pytest.mark.parametrize("name", ["inverse root", "short restarts", "early steps"])
def test_a_schedule_that_falls_at_once_does_not_end_the_search(name: str) -> None:
    schedules: dict[str, Callable[[Any], Any]] = {
        "inverse root": lambda o: lr_scheduler.LambdaLR(o, lambda t: (t + 1) ** -0.5),
        "short restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
        "early steps": lambda o: lr_scheduler.StepLR(o, 8, 0.3),
    }
    scale = search(steps=100, settings=SearchSettings(), schedule=schedules[name])[2]
    assert scale.steps >= 30
    assert scale.value > 3e-3


def test_held_scales_keep_the_warm_up() -> None:
    """No search replaces it then."""
    model, plain = Net(), Net()
    optimizer, other = AdamW(model.parameters(), lr=1.0), AdamW(plain.parameters(), lr=0.02)
    LearnedScale(optimizer, held=0.02)
    schedulers = [lr_scheduler.LinearLR(o, 0.01, total_iters=10) for o in (optimizer, other)]
    for step in range(12):
        train(model, optimizer, 1, first=step)
        train(plain, other, 1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(vector(model), vector(plain), rtol=1e-12, atol=1e-14)


def test_tensor_rates() -> None:
    model = Net(torch.float32)
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.01), fused=True)
    given = optimizer.param_groups[0]["lr"]
    scale = LearnedScale(optimizer, settings=SHORT)
    train(model, optimizer, 20)
    assert optimizer.param_groups[0]["lr"] is given
    assert float(given) == pytest.approx(0.01)
    assert scale.value == pytest.approx(search(steps=20, dtype=torch.float32)[2].value, rel=1e-2)


def test_rates_are_floats_for_everybody_else() -> None:
    rate = ScaledRate(0.1, lambda given: 0.5 * given)
    assert isinstance(rate, float)
    assert (rate, f"{rate:.3f}", str(rate), abs(rate), float(torch.tensor(rate))) == (
        *(0.05, "0.050", "0.05", 0.05),
        pytest.approx(0.05),
    )
    assert (float(rate), torch.tensor(rate).item()) == (0.05, pytest.approx(0.05))
    assert [type(x) for x in (rate * 2, 2 * rate, rate + 1, 1 + rate, rate - 1, 1 - rate, rate / 2)] == [ScaledRate] * 7
    assert [given_rate(x) for x in (rate * 2, rate + 1, 1 - rate)] == pytest.approx([0.2, 1.1, 0.9])
    assert [rate * 2, rate + 1, 1 - rate] == pytest.approx([0.1, 1.05, 0.95])
    assert [given_rate(-rate), given_rate(abs(rate)), -rate, abs(rate)] == pytest.approx([-0.1, 0.1, -0.05, 0.05])
    # NumPy's numbers may stand on either side; ratios of rates and powers are what they are for floats.
    others = (round(rate / 3, 2), np.float64(2) * rate, rate * np.float32(2), np.int64(2) * rate, rate**2, rate / rate)
    assert [given_rate(x) for x in others] == pytest.approx([0.03, 0.2, 0.2, 0.2, 0.01, 1.0])
    assert list(others) == pytest.approx([0.02, 0.1, 0.1, 0.1, 0.0025, 1.0])
    assert (round(rate), np.log10(rate), np.multiply(rate, 2)) == (0, pytest.approx(-1.30103), 0.1)
    assert pickle.loads(pickle.dumps(rate)) == 0.1
    assert rate.__mul__("x") is NotImplemented


def test_a_rate_that_somebody_keeps_does_not_keep_the_model() -> None:
    model, optimizer, scale = search(steps=5)
    shown = optimizer.param_groups[0]["lr"]
    found = weakref.ref(scale)
    del model, optimizer, scale
    gc.collect()
    assert found() is None
    assert (float(shown), float(shown * 2)) == (pytest.approx(float(shown)), 0.02)
