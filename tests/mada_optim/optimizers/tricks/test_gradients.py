"""Gradients before they reach an optimizer: mixed precision, accumulation, clipping, zeroing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pairs import EVERY_LEARNING_ROW, EVERY_ROW, assert_same, everything, pair
from problems import Net, Row, batch, loss_of, train
from torch import Tensor, nn

from mada_optim import MADA, HypergradientOptimizer

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


def test_a_factor_for_a_step_that_the_scaler_skips_is_used_up():
    model = Net(torch.float32)
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.hyper_grad_scale = 3.0
    scaled_step(model, optimizer, scaler, loss_of(model, 0) * float("inf"), clip=False)
    assert optimizer.hyper_grad_scale == 1.0


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


def test_gradients_of_one_dtype_are_unscaled_at_once(monkeypatch):
    """As by multiplying one after the other, to the last bit; a launch for each would take longer than the step."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    params = [nn.Parameter(torch.ones(3 if index else (), dtype=dtype)) for index, dtype in enumerate(dtypes)]
    for param in params:
        param.grad = torch.randn_like(param)
    expected = [param.grad * torch.tensor(3.0).double().reciprocal().float() for param in params]
    calls: list[int] = []
    multiply = torch._foreach_mul_

    def counted(tensors: list[Tensor], factor: Tensor) -> None:
        calls.append(len(tensors))
        multiply(tensors, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", counted)
    optimizer = MADA(params, hyper_lr=0.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([3.0]), torch.zeros(())
    optimizer.step()
    assert calls == [3, 2]
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, expected, strict=True))


def test_gradients_with_a_sign_or_conjugation_to_be_done_are_unscaled_too():
    """torch's foreach functions would not see it."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)] + [
        nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(3)
    ]
    grads = [torch.randn(3), torch.randn(3), torch.randn(3, dtype=torch.complex64).conj().imag]
    grads += [torch.randn(3, dtype=torch.complex64) for _ in range(2)]
    grads.append(torch.randn(3, dtype=torch.complex64).conj())
    assert grads[2].is_neg()
    assert grads[5].is_conj()
    expected = [grad.resolve_neg().resolve_conj() / 4 for grad in grads]
    optimizer = MADA(params, hyper_lr=0.0)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0]), torch.zeros(())
    optimizer.step()
    for param, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.resolve_neg().resolve_conj(), grad)


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
        hypergradients, expected = optimizer.hypergradients(), whole.hypergradients()
        assert hypergradients == (expected and pytest.approx(expected, rel=1e-9, abs=1e-16))
    assert (hypergradients is not None) == row.learns
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
    hypergradients = optimizer.hypergradients()
    assert hypergradients != before
    assert clipped.hypergradients() == pytest.approx({name: scale * h for name, h in hypergradients.items()}, rel=1e-9)


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
