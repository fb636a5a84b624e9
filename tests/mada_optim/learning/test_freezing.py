"""Learning that is stopped and begun again: between any two steps, and across a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import TABLE, Net, Row, loss_of, train

from mada_optim import MADA, HypergradientOptimizer

EVERY_LEARNING_ROW = pytest.mark.parametrize(
    "row", [row for row in TABLE if row.learns], ids=[row.name for row in TABLE if row.learns]
)


def test_groups_that_come_after_a_freeze_do_not_learn():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = MADA([first], hyper_per_group=True)
    optimizer.freeze()
    optimizer.add_param_group({"params": [second]})
    assert not any(optimizer.param_groups[1]["hyper_lr"].values())


@pytest.mark.parametrize("fused", [None, False])
def test_step_sizes_are_told_apart_by_their_names(fused):
    """Whoever sets or stores them may have sorted them."""
    results = []
    for order in (list, sorted):
        model = Net()
        optimizer = MADA(model.parameters(), lr=5e-3, hyper_lr={"rho": 0.1, "gamma": 0.2}, hyper_warmup=0, fused=fused)
        group = optimizer.param_groups[0]
        for key in ("hyper_lr", "bounds"):
            group[key] = {name: group[key][name] for name in order(group[key])}
        train(model, optimizer, 10)
        results.append(optimizer.coefficients())
    assert results[0] == results[1]
    assert results[0]["gamma"] != 1.0


@pytest.mark.parametrize("hyper_lr", [0.1, {"rho": 0.1}], ids=str)
def test_step_sizes_that_are_none(hyper_lr):
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.param_groups[0]["hyper_lr"] = hyper_lr
    with pytest.raises(TypeError, match="hyper_lr of a parameter group must be a mapping with beta1, .*, got"):
        train(model, optimizer, 1)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [None, False])
def test_what_was_left_out_from_the_start_cannot_be_learned_later(fused):
    model = Net()
    optimizer = MADA(model.parameters(), hyper_lr={"beta1": 1e-3}, hyper_warmup=0, fused=fused)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["hyper_lr"]["beta3"] = 0.1
    with pytest.raises(ValueError, match=r"hyper_lr of beta3 must stay 0, got 0.1: frozen at 0 from the start"):
        train(model, optimizer, 1)


def by_hand(optimizer: HypergradientOptimizer) -> None:
    set_hyper_lr(optimizer, dict.fromkeys(optimizer.param_groups[0]["hyper_lr"], 0.0))


def set_hyper_lr(optimizer: HypergradientOptimizer, hyper_lr: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["hyper_lr"] = hyper_lr


def reloaded(row: Row, model: Net, optimizer: HypergradientOptimizer) -> tuple[Net, HypergradientOptimizer]:
    other_model = copy.deepcopy(model)
    other = row(other_model.parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other_model, other


def assert_go_on_alike(one: tuple[Net, HypergradientOptimizer], other: tuple[Net, HypergradientOptimizer]) -> None:
    for model, optimizer in (one, other):
        train(model, optimizer, 5, first=8)
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert one[1].coefficients() == other[1].coefficients()
    torch.testing.assert_close(one[1].state_dict()["state"], other[1].state_dict()["state"], rtol=0, atol=0)


def learning_again(row: Row, steps: int, frozen_steps: int) -> tuple[Net, HypergradientOptimizer, dict[str, float]]:
    """After so many steps, and so many without learning; and the coefficients that it had in these."""
    model = Net()
    optimizer = row(model.parameters(), lr=5e-3)
    hyper_lr = optimizer.param_groups[0]["hyper_lr"]
    train(model, optimizer, steps)
    optimizer.freeze()
    train(model, optimizer, frozen_steps, first=steps)
    frozen = optimizer.coefficients()
    set_hyper_lr(optimizer, hyper_lr)
    return model, optimizer, frozen


@EVERY_LEARNING_ROW
@pytest.mark.parametrize("freeze", [HypergradientOptimizer.freeze, by_hand], ids=["freeze", "by hand"])
def test_a_checkpoint_between_a_freeze_and_the_next_step_loses_nothing(row: Row, freeze):
    """The last step's gradient is still to enter the buffers when learning stops."""
    model = Net()
    optimizer = row(model.parameters(), lr=5e-3)
    train(model, optimizer, 8)
    freeze(optimizer)
    assert_go_on_alike(reloaded(row, model, optimizer), (model, optimizer))


@EVERY_LEARNING_ROW
def test_both_ways_to_freeze_are_the_same(row: Row):
    ends = []
    for freeze in (HypergradientOptimizer.freeze, by_hand):
        model = Net()
        optimizer = row(model.parameters(), lr=5e-3)
        train(model, optimizer, 8)
        freeze(optimizer)
        ends.append((model, optimizer))
    assert_go_on_alike(*ends)


@EVERY_LEARNING_ROW
def test_a_checkpoint_between_learning_again_and_the_next_step(row: Row):
    model, optimizer, _ = learning_again(row, 6, 2)
    assert_go_on_alike(reloaded(row, model, optimizer), (model, optimizer))


@EVERY_LEARNING_ROW
def test_learning_again_while_a_parameter_has_no_gradient(row: Row):
    model, optimizer, frozen = learning_again(row, 5, 1)
    for step in range(6, 12):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step < 9:
            model.norm.weight.grad = None
        optimizer.step()
    assert optimizer.coefficients() != frozen
    assert int(optimizer.state[model.norm.weight]["step"]) == 9
