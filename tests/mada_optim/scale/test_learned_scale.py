"""The learned scale around an optimizer: closures, scalers, checkpoints, errors, and what follows the search."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Net, loss_of, train
from searches import OPTIMIZERS, SHORT, search, vector
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.scale.rate import given_rate


def test_after_the_search_it_is_the_optimizer_at_the_rate_that_was_found() -> None:
    model, optimizer, scale = search(steps=13)
    assert not scale.searching
    plain = Net()
    plain.load_state_dict(model.state_dict())
    other = AdamW(plain.parameters(), lr=scale.learning_rate)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    other.param_groups[0]["lr"] = scale.learning_rate
    train(model, optimizer, 5, first=13)
    train(plain, other, 5, first=13)
    assert torch.equal(vector(model), vector(plain))


def test_held_from_the_start() -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), lr=123.0)
    scale = LearnedScale(optimizer, held=0.25)
    plain = Net()
    train(model, optimizer, 5)
    train(plain, AdamW(plain.parameters(), lr=0.25), 5)
    assert torch.equal(vector(model), vector(plain))
    assert (scale.searching, scale.value) == (False, 0.25)


def test_closure() -> None:
    model, optimizer, _ = search(steps=0)
    losses = []
    for step in range(20):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))  # type: ignore[arg-type]
    assert all(isinstance(loss, Tensor) for loss in losses)
    assert torch.equal(vector(model), vector(search()[0]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    model = Net(torch.float32)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    scale = LearnedScale(optimizer, settings=SHORT)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(20):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 6:
            assert model.out.weight.grad is not None
            model.out.weight.grad[0, 0] = math.inf
            before, steps, learned = vector(model), scale.steps, scale.state_dict_of("all")
        scaler.step(optimizer)
        scaler.update()
        if step == 6:
            assert torch.equal(vector(model), before)
            assert (scale.steps, scale.state_dict_of("all")) == (steps, learned)
    assert not scale.searching
    assert 1e-4 < scale.value < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_is_told_that_parameters_move(dtype: torch.dtype) -> None:
    """The output layer has no gradient, so the search alone moves it."""
    model, optimizer, _ = search(steps=4, dtype=dtype)
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    again = loss_of(model, 5)
    for p in model.parameters():
        p.grad = None if p is model.out.weight else p.grad
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.backward()


def test_a_step_that_fails_leaves_the_rate_that_was_given() -> None:
    class Failing(AdamW):
        fail = False

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model, optimizer, _ = search(Failing, steps=5)
    optimizer.fail = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False  # type: ignore[attr-defined]
    train(model, optimizer, 1, first=5)
    assert given_rate(optimizer.param_groups[0]["lr"]) == 0.01


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "sgd plain", "mada"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [7, 15])
def test_resumes_bit_for_bit(name: str, dtype: torch.dtype, cut: int) -> None:
    def make() -> tuple[Net, torch.optim.Optimizer, LearnedScale, Any]:
        model = Net(dtype)
        optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
        scale = LearnedScale(optimizer, settings=SHORT)
        return model, optimizer, scale, lr_scheduler.CosineAnnealingLR(optimizer, 100)

    def go(model: Net, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        for step in range(first, last):
            train(model, optimizer, 1, first=step)
            scheduler.step()

    model, optimizer, scale, scheduler = make()
    go(model, optimizer, scheduler, 0, cut)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    go(model, optimizer, scheduler, cut, 22)
    file.seek(0)
    saved = torch.load(file)
    model2, optimizer2, scale2, scheduler2 = make()
    model2.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    scheduler2.load_state_dict(saved[2])
    assert scale2.searching == (cut < 12)
    go(model2, optimizer2, scheduler2, cut, 22)
    assert torch.equal(vector(model), vector(model2))
    assert scale2.values == scale.values


def test_checkpoints_of_the_optimizer_alone_and_into_it() -> None:
    model = Net()
    plain = AdamW(model.parameters(), lr=0.01)
    train(model, plain, 5)
    optimizer = AdamW(model.parameters(), lr=0.01)
    scale = LearnedScale(optimizer, settings=SHORT)
    optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, 3, first=5)
    assert scale.steps == 3
    plain.load_state_dict(optimizer.state_dict())
    assert type(plain.param_groups[0]["lr"]) is float
    assert plain.param_groups[0]["lr"] == 0.01
    train(model, plain, 1)


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    _, optimizer, scale = search(steps=5)
    other = AdamW([nn.Parameter(torch.ones(2))])
    before = scale.state_dict_of("all"), scale._search.has_ways
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())
    assert (scale.state_dict_of("all"), scale._search.has_ways) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["param_groups"][0]["learned_scale"].pop("applied"), "no 'applied' in 'learned_scale'"),
        (lambda saved: saved["state"][1].pop("scale_mean"), "scale_mean of shape None of parameter 1"),
        (lambda saved: saved["state"][1].update(scale_initial=torch.ones(3, 7)), r"scale_initial of shape \(3, 7\)"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    _, optimizer, _ = search(steps=5)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(search(steps=7)[1].state_dict())
    change(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0.0, atol=0.0)


def test_the_optimizer_keeps_the_scale_and_not_the_other_way_round() -> None:
    _, optimizer, scale = search(steps=5)
    del optimizer
    gc.collect()
    assert scale._schedule.optimizers == []


def test_errors_name_what_is_wrong() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match=r"optimizers must be torch\.optim\.Optimizers, got int"):
        LearnedScale(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizers must not be empty"):
        LearnedScale([])
    with pytest.raises(TypeError, match="LBFGS"):
        LearnedScale(torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match="differentiable must be False"):
        LearnedScale(AdamW(params, differentiable=True))
    with pytest.raises(ValueError, match=r"held must be a positive number.*-1"):
        LearnedScale(AdamW(params), held=-1)
    with pytest.raises(ValueError, match="start must be above the lower bound and at most 1, got 10"):
        SearchSettings(start=10.0)
    with pytest.raises(ValueError, match="steps must be a positive whole number, got 0"):
        SearchSettings(steps=0)
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SGD(embedding.parameters())
    LearnedScale(optimizer)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SGD: the search for the learning rate does not support sparse"):
        optimizer.step()


def test_an_optimizer_has_one_scale() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    LearnedScale(optimizer)
    with pytest.raises(ValueError, match="one has a learned scale already"):
        LearnedScale(optimizer)
    other = AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="one is listed twice"):
        LearnedScale([other, other])
    with pytest.raises(ValueError, match="held must have a scale for each of 'all', got"):
        LearnedScale(other, held={"matrices": 0.1})
    with pytest.raises(TypeError, match="Rprop are not multiples"):
        LearnedScale(torch.optim.Rprop([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="held must be a positive number.*True"):
        LearnedScale(other, held=True)


def test_optimizers_that_evaluate_twice_get_a_new_evaluation() -> None:
    """As sharpness-aware minimization does."""

    class Twice(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
                loss = closure()
            return super().step(lambda: loss)

    model = Net()
    optimizer = Twice(model.parameters(), lr=0.1)
    LearnedScale(optimizer, settings=SHORT)
    calls = 0
    for step in range(20):

        def closure(step: int = step) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert calls == 40


def test_state_dicts_hold_plain_floats() -> None:
    _, optimizer, _ = search(steps=5, schedule=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0))
    group = optimizer.state_dict()["param_groups"][0]
    assert {type(value) for name, value in group.items() if "lr" in name} == {float}
