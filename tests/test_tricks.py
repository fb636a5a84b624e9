"""What loops do around an optimizer: mixed precision, accumulation, clipping, freezing, averaging, schedules."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import IDS, TABLE, Net, Row, batch, loss_of, train
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from mada_optim import MADA, HypergradientOptimizer, load_optimizer

EVERY_ROW = pytest.mark.parametrize("row", TABLE, ids=IDS)
LEARNING = [row for row in TABLE if row.learns]
EVERY_LEARNING_ROW = pytest.mark.parametrize("row", LEARNING, ids=[row.name for row in LEARNING])


def everything(optimizer: HypergradientOptimizer) -> Any:
    """A copy of the parameters and of all numbers that the optimizer keeps."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if isinstance(v, (int, float, Tensor))} for g in saved["param_groups"]]
    return copy.deepcopy((params, saved["state"], groups))


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def pair(row: Row, dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[tuple[Net, HypergradientOptimizer]]:
    models = [Net(dtype), Net(dtype)]
    return [(model, row(model.parameters(), lr=1e-2, **kwargs)) for model in models]


# Mixed precision.


@EVERY_ROW
def test_autocast(row: Row):
    """Parameters and buffers stay float32; a step inside the context is the same as one outside."""
    (model, inside), (other, outside) = pair(row, torch.float32)
    losses = []
    for step in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            inside.zero_grad()
            hidden = model.hidden(torch.zeros(1, 6))
            loss = loss_of(model, step)
            loss.backward()
            inside.step()
        with torch.autocast("cpu", torch.bfloat16):
            other_loss = loss_of(other, step)
        outside.zero_grad()
        other_loss.backward()
        outside.step()
        losses.append(loss.item())
    assert hidden.dtype == torch.bfloat16
    assert_same(everything(inside), everything(outside))
    assert all(t.dtype == torch.float32 for state in inside.state.values() for t in state.values() if t.dim())
    assert sum(losses[-5:]) < sum(losses[:5])


def scaled_step(
    model: Net, optimizer: HypergradientOptimizer, scaler: torch.amp.GradScaler, loss: Tensor, clip: bool
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True])
@EVERY_ROW
def test_grad_scaler(row: Row, clip: bool):
    """A scale that is a power of two is exact: the training is that without a scaler. A skipped step changes nothing,
    and the training goes on as if the bad batch had not been there."""
    (model, optimizer), (plain_model, plain) = pair(row)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(12):
        scaled_step(model, optimizer, scaler, loss_of(model, step), clip)
        plain.zero_grad()
        loss_of(plain_model, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain_model.parameters(), 0.1)
        plain.step()
        if step in (2, 6, 7):
            before, scale = everything(optimizer), scaler.get_scale()
            scaled_step(model, optimizer, scaler, loss_of(model, step) * float("inf"), clip)
            assert scaler.get_scale() == scale / 2
            assert_same(everything(optimizer), before)
    assert_same(everything(optimizer), everything(plain))


@EVERY_ROW
@pytest.mark.parametrize("scale", [None, 8.0])
def test_found_inf_and_grad_scale_are_obeyed(row: Row, scale: float | None):
    """What torch.amp.GradScaler sets for optimizers that unscale and skip by themselves."""
    (model, optimizer), (plain_model, plain) = pair(row)
    for step in range(8):
        for m, o, factor in ((model, optimizer, scale or 1.0), (plain_model, plain, 1.0)):
            o.zero_grad()
            (factor * loss_of(m, step)).backward()
        optimizer.grad_scale = None if scale is None else torch.tensor([scale])
        if step in (0, 3, 7):
            before, weights = everything(optimizer), copy.deepcopy(model.state_dict())
            optimizer.found_inf = torch.tensor([1.0])
            optimizer.step()
            if step:
                assert_same(everything(optimizer), before)
            assert_same(model.state_dict(), weights)
        optimizer.found_inf = torch.zeros(1)
        optimizer.step()
        plain.step()
    assert_same(everything(optimizer), everything(plain))
    assert_same(model.state_dict(), plain_model.state_dict())


# Gradients.


@EVERY_ROW
def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(row: Row):
    """The hypergradient included: it sees what the step sees."""
    (model, optimizer), (whole_model, whole) = pair(row)
    for step in range(12):
        optimizer.zero_grad()
        x, y = batch(step)
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            (nn.functional.cross_entropy(model(x[rows]), y[rows]) / 4).backward()
        optimizer.step()
        train(whole_model, whole, 1, first=step)
        found, expected = optimizer.hypergradients(), whole.hypergradients()
        assert found == (expected and pytest.approx(expected, rel=1e-9, abs=1e-16))
    assert (found is not None) == row.learns
    torch.testing.assert_close(everything(optimizer), everything(whole), rtol=1e-10, atol=1e-13)


@EVERY_LEARNING_ROW
def test_hyper_grad_scale_undoes_clipping_for_the_hypergradient_alone(row: Row):
    """One step that is clipped to a tenth: its hypergradient is that of the whole gradient, its update is not."""
    found = []
    for clip, told in ((False, False), (True, True), (True, False)):
        model = Net()
        optimizer = row(model.parameters(), lr=1e-2, hyper_clip=float("inf"))
        last = 8 if row.name == "mada-every-3" else 7
        train(model, optimizer, last)
        optimizer.zero_grad()
        loss_of(model, last).backward()
        norm = torch.linalg.vector_norm(torch.stack([param.grad.norm() for param in model.parameters()]))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1 * norm.item())
        if told:
            optimizer.hyper_grad_scale = torch.tensor(10.0)
        optimizer.step()
        assert optimizer.hyper_grad_scale == 1.0
        found.append((optimizer.hypergradients(), [param.detach().clone() for param in model.parameters()]))
    (whole, _), (unclipped, _), (clipped, _) = found
    assert unclipped == pytest.approx(whole, rel=1e-4)
    assert clipped == pytest.approx({name: value / 10 for name, value in whole.items()}, rel=1e-4)


def test_hyper_grad_scale_does_not_outlive_a_step_that_is_skipped():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    optimizer.hyper_grad_scale, optimizer.found_inf = torch.tensor(math.inf), torch.ones(1)
    optimizer.step()
    optimizer.found_inf = None
    train(model, optimizer, 3, first=3)
    assert optimizer.skipped_hypergradients == 0


@EVERY_ROW
def test_gradients_in_float16_are_not_unscaled(row: Row):
    """What they are scaled for would be lost; torch's AdamW refuses, too."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer, scaler = row([weight], lr=1e-2), torch.amp.GradScaler("cpu")
    scaler.scale((2e-8 * weight.float()).sum()).backward()
    with pytest.raises(ValueError, match="gradients in float16 cannot be unscaled"):
        scaler.step(optimizer)
    assert torch.equal(weight, torch.ones_like(weight))
    assert not optimizer.state
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()  # a step without the scaler would obey them


@EVERY_LEARNING_ROW
def test_clipping_scales_the_hypergradient_as_it_scales_the_gradient(row: Row):
    """h is linear in the gradient that arrives: cut to a tenth of its norm, it makes a tenth of the hypergradient."""
    (model, optimizer), (clipped_model, clipped) = pair(row)
    last = 8 if row.name == "mada-every-3" else 7
    for m, o in ((model, optimizer), (clipped_model, clipped)):
        train(m, o, last)
        o.zero_grad()
        loss_of(m, last).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    nn.utils.clip_grad_norm_(clipped_model.parameters(), norm / 10)
    scale = norm / 10 / (norm + 1e-6)  # clip_grad_norm_ divides by a little more than the norm
    before = optimizer.hypergradients()
    optimizer.step()
    clipped.step()
    found = optimizer.hypergradients()
    assert found != before
    assert clipped.hypergradients() == pytest.approx({name: scale * h for name, h in found.items()}, rel=1e-9)


@EVERY_ROW
def test_gradients_set_to_none_or_to_zero(row: Row):
    results = []
    for set_to_none in (True, False):
        model = Net()
        optimizer = row(model.parameters(), lr=1e-2)
        for step in range(12):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.step()
        results.append(everything(optimizer))
    assert_same(*results)


@EVERY_ROW
def test_gradients_that_are_views_of_one_buffer(row: Row):
    """As of DDP with gradient_as_bucket_view. The buffer is overwritten in place; nothing old is read."""
    (model, optimizer), (plain_model, plain) = pair(row)
    params = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for param, view in zip(params, bucket.split([p.numel() for p in params]), strict=True):
        param.grad = view.view_as(param)
    for step in range(12):
        bucket.zero_()
        loss_of(model, step).backward()
        optimizer.step()
        bucket.fill_(float("nan"))
    train(plain_model, plain, 12)
    assert_same(everything(optimizer), everything(plain))


# Models.


class Checkpointed(Net):
    """The same network, which forgets its activations and computes them again."""

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.norm(self.embedding(x))
        hidden = checkpoint(lambda e: torch.tanh(self.hidden(e)), embedded, use_reentrant=False)
        return self.out(hidden)


@EVERY_ROW
def test_gradient_checkpointing(row: Row):
    (plain_model, plain), _ = pair(row)
    model = Checkpointed()
    optimizer = row(model.parameters(), lr=1e-2)
    train(model, optimizer, 12)
    train(plain_model, plain, 12)
    assert_same(everything(optimizer), everything(plain))


class Tied(nn.Module):
    """A language model's ends: what embeds a token also recognizes it."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 11, bias=False, dtype=torch.float64)
        if share:
            self.head.weight = self.embedding.weight
        else:
            del self.head

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(x))
        head = getattr(self, "head", None)
        return head(hidden) if head is not None else hidden @ self.embedding.weight.T


@EVERY_ROW
def test_tied_weights(row: Row):
    """As if the module had one matrix that it uses twice; they stay tied, also in a copy."""
    results = []
    for share in (True, False):
        torch.manual_seed(0)
        model = Tied(share)
        optimizer = row(model.parameters(), lr=1e-2)
        train(model, optimizer, 6)
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, 6, first=6)
        assert not share or model.head.weight is model.embedding.weight
        results.append(everything(optimizer))
    assert_same(*results)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_and_later_unfrozen_as_in_torch(set_to_none: bool):
    """Without a gradient a parameter rests; with a gradient of zeros it still drifts. Both are AdamW's behaviour."""
    models, results = [Net(), Net()], []
    for model, make in zip(models, (load_optimizer("adamw"), torch.optim.AdamW), strict=True):
        model.embedding.requires_grad_(False)
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
        frozen = []
        for step in range(16):
            if step in (4, 8, 12):
                model.embedding.requires_grad_(step != 8)
            before = model.embedding.weight.detach().clone()
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.step()
            frozen.append(torch.equal(before, model.embedding.weight))
        results.append(frozen)
    rests = [True] * 4 + [False] * 4 + [set_to_none] * 4 + [False] * 4
    assert results[0] == results[1] == rests
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@EVERY_LEARNING_ROW
def test_the_hypergradient_is_of_the_parameters_that_were_and_are_trained(row: Row):
    """Freezing a layer leaves the hypergradient of the others; a layer that has just been unfrozen adds nothing yet."""
    last = 8 if row.name == "mada-every-3" else 7
    model, part_model = Net(), Net()
    optimizer = row(model.parameters(), lr=1e-2, hyper_lr=_still(row))
    part = row([*part_model.hidden.parameters(), *part_model.out.parameters()], lr=1e-2, hyper_lr=_still(row))
    model.embedding.requires_grad_(False)
    model.norm.requires_grad_(False)
    train(model, optimizer, last)
    train(part_model, part, last)
    for layer in (model.embedding, model.norm):
        layer.requires_grad_(True)
    train(model, optimizer, 1, first=last)
    train(part_model, part, 1, first=last)
    assert optimizer.hypergradients() == pytest.approx(part.hypergradients(), rel=1e-12)
    assert any(part.hypergradients().values())


def _still(row: Row) -> dict[str, float]:
    """Learned, but never moved by an amount that could be seen."""
    probe = row([nn.Parameter(torch.zeros(1))])
    return {name: 1e-300 for name, alpha in probe.param_groups[0]["hyper_lr"].items() if alpha > 0.0}


@EVERY_ROW
def test_averaged_weights(row: Row):
    """The average is that of the weights after each step, and averaging does not touch the training."""
    (model, optimizer), (plain_model, plain) = pair(row)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    expected: list[Tensor] = []
    for step in range(12):
        train(model, optimizer, 1, first=step)
        averaged.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = [0.8 * e + 0.2 * p for e, p in zip(expected or now, now, strict=True)]
    train(plain_model, plain, 12)
    assert_same(everything(optimizer), everything(plain))
    torch.testing.assert_close([p.detach() for p in averaged.module.parameters()], expected, rtol=0, atol=1e-14)


def test_a_compiled_model():
    """The optimizer may be made before or after the model is compiled: the parameters are the same objects."""
    plain = Net()
    reference = MADA(plain.parameters(), lr=1e-2, hyper_warmup=2)
    train(plain, reference, 8)
    for before in (True, False):
        model = Net()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = MADA((model if before else compiled).parameters(), lr=1e-2, hyper_warmup=2)
        train(compiled, optimizer, 8)
        torch.testing.assert_close(everything(optimizer), everything(reference), rtol=1e-10, atol=1e-12)


# Schedules of the learning rate.

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
    found = {
        c.__name__
        for c in classes
        if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler) and not c.__name__.startswith(("_", "LRSch"))
    }
    assert found == set(SCHEDULES)


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
