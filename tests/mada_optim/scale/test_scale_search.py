"""What the search computes, held against a slow twin, and what it keeps of the parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slow_scale
import torch
from problems import Net, loss_of, train
from searches import OPTIMIZERS, SHORT, matrices, search, vector, way_of
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from mada_optim import load_optimizer
from mada_optim.scale import LearnedScale, SearchSettings


@pytest.mark.parametrize("warm_up", [False, True])
def test_equals_the_slow_twin(warm_up: bool) -> None:
    rates = [0.01 * (min(1.0, (t + 1) / 10) if warm_up else 1.0) * (1 - t / 200) for t in range(60)]
    model = Net()
    start = [p.detach().clone() for p in model.parameters()]

    def gradients(t: int, x: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(model.parameters(), x, strict=True):
                p.copy_(value)
        return list(torch.autograd.grad(loss_of(model, t - 1), list(model.parameters())))

    expected, kappas = slow_scale.train(start, gradients, rates, weight_decay=0.1, hold=40)

    model = Net()
    optimizer = AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    LearnedScale(optimizer, settings=SearchSettings(steps=40))
    used = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, 1, first=step)
        used.append(optimizer.param_groups[0]["lr"] / (rate / max(rates[: step + 1])))
    assert used == pytest.approx(kappas, rel=1e-9)
    for p, x in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-9)


def test_the_hypergradient_is_the_derivative_of_the_loss_by_the_scale() -> None:
    model, _, scale = search(steps=9, settings=SearchSettings(swing=1.0))
    scale._search.collect()
    kappa = scale._search.in_use("all")
    way = {p: (way_of(scale, p).initial - p) / kappa for p in model.parameters()}

    def loss_at(factor: float) -> Tensor:
        other = Net()
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(way_of(scale, q).initial - kappa * factor * way[q])
        return loss_of(other, 9)

    numeric = (loss_at(1 + 1e-5) - loss_at(1 - 1e-5)).detach() / 2e-5
    model.zero_grad()
    loss_of(model, 9).backward()
    _, (along,) = scale._search._follow(scale._members())
    assert -float(along) == pytest.approx(float(numeric), rel=1e-5)


@pytest.mark.parametrize("rate", [2.0**-13, 2.0**-3, 16.0])
def test_the_rate_that_is_given_does_not_matter(rate: float) -> None:
    assert torch.equal(vector(search(lr=rate)[0]), vector(search(lr=2.0**-7)[0]))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_finds_a_rate(name: str, dtype: torch.dtype) -> None:
    model, _, scale = search(OPTIMIZERS[name], steps=80, settings=SearchSettings(steps=60), dtype=dtype)
    assert not scale.searching
    assert 1e-4 < scale.learning_rate < 30.0
    with torch.no_grad():
        before = sum(float(loss_of(Net(dtype), step)) for step in range(20))
        after = sum(float(loss_of(model, step)) for step in range(20))
    assert after < 0.9 * before


def test_low_precision_finds_what_full_precision_finds() -> None:
    settings = SearchSettings(steps=60)
    found = {
        dtype: search(steps=61, settings=settings, dtype=dtype)[2].value for dtype in (torch.float32, torch.bfloat16)
    }
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.25)


def test_low_precision_keeps_what_others_write() -> None:
    model, optimizer, _ = search(steps=5, dtype=torch.bfloat16)
    with torch.no_grad():
        model.out.weight.fill_(3.0)
    train(model, optimizer, 1, first=5)
    assert float(model.out.weight.detach().min()) > 2.5


@pytest.mark.parametrize("start", [1e-6, 1e-2, 1e-1])
def test_a_starting_point_far_away_does_no_harm(start: float) -> None:
    model, _, scale = search(steps=120, settings=SearchSettings(start=start))
    assert not scale.searching or math.isfinite(scale.value)
    usual = search(steps=120, settings=SearchSettings())[0]
    with torch.no_grad():
        losses = [sum(float(loss_of(m, step)) for step in range(20)) for m in (model, usual)]
    assert losses[0] < losses[1] + 0.5
    if start < 1e-4:
        assert scale.value == pytest.approx(search(steps=120, settings=SearchSettings())[2].value, rel=1.0)


def test_maximize() -> None:
    class Ascent(AdamW):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr, maximize=True)

    model, optimizer, _ = search(Ascent, steps=0)
    for step in range(20):
        optimizer.zero_grad()
        (-loss_of(model, step)).backward()
        optimizer.step()
    torch.testing.assert_close(vector(model), vector(search()[0]))


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    model, optimizer, scale = search(steps=6)
    optimizer.zero_grad()
    loss_of(model, 6).backward()
    scale._search.collect()
    before = scale.state_dict_of("all")
    model.norm.bias.grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    scale._search.collect()
    after = scale.state_dict_of("all")
    assert [after[name] for name in ("log_value", "mean", "taken")] == [
        before[name] for name in ("log_value", "mean", "taken")
    ]


def test_of_large_parameters_a_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[Tensor, float]:
        model = nn.Linear(400, 30, dtype=torch.float64)
        torch.manual_seed(0)
        x, target = torch.randn(64, 400, dtype=torch.float64), torch.randn(64, 30, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = AdamW(model.parameters(), lr=1.0)
        scale = LearnedScale(optimizer, settings=SearchSettings(steps=60))
        for _ in range(60):
            optimizer.zero_grad()
            ((model(x) - target) ** 2).mean().backward()
            optimizer.step()
        return (way_of(scale, model.weight).initial - model.weight).detach(), scale.value

    way, value = found()
    monkeypatch.setattr("mada_optim.scale.way.PIECE", 1000)
    part_way, part_value = found()
    assert part_value != value
    assert part_value == pytest.approx(value, rel=0.3)
    # All of it moves, not only what is measured.
    assert bool((part_way != 0).all())
    assert float((part_way - way).norm() / way.norm()) < 0.3


def test_what_the_search_keeps_is_six_bytes_a_number_and_is_freed() -> None:
    model, _, scale = search(steps=5, dtype=torch.float32)
    kept = sum(t.numel() * t.element_size() for p in model.parameters() for t in way_of(scale, p).tensors().values())
    assert kept == 6 * vector(model).numel()
    scale = search(steps=13)[2]
    assert not scale._search.has_ways


def test_groups_keep_the_relation_of_their_rates() -> None:
    model = Net()
    first, *others = model.parameters()
    optimizer = AdamW([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.1}])
    scale = LearnedScale(optimizer, settings=SHORT)
    train(model, optimizer, 20)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.2 * scale.value, scale.value])


def test_groups_may_have_scales_of_their_own() -> None:
    model = Net()
    first, *others = model.parameters()
    optimizer = AdamW([{"params": [first], "matrices": True}, {"params": others, "matrices": False}])
    scale = LearnedScale(optimizer, per=matrices, settings={True: SHORT, False: SearchSettings(start=1e-3, steps=12)})
    train(model, optimizer, 20)
    values = scale.values
    assert set(values) == {True, False}
    assert values[True] != values[False]
    assert scale.value == max(values.values())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "matrices": None})
    assert scale.values == values


def test_a_new_kind_after_the_search() -> None:
    model = Net()
    first, *others = model.parameters()
    optimizer = AdamW([{"params": others, "matrices": False}])
    scale = LearnedScale(optimizer, per=matrices, settings=SHORT)
    train(model, optimizer, 15)
    optimizer.add_param_group({"params": [first], "matrices": True})
    before = first.detach().clone()
    train(model, optimizer, 2, first=15)
    assert not torch.equal(first, before)
    assert scale.values[True] == scale.values[False]


def test_two_optimizers_share_one_scale() -> None:
    def train_both(reverse: bool) -> tuple[Net, LearnedScale]:
        model = Net()
        parts = [
            Muon([model.hidden.weight], lr=0.01, adjust_lr_fn="match_rms_adamw"),
            AdamW([p for name, p in model.named_parameters() if name != "hidden.weight"], lr=0.01),
        ]
        scale = LearnedScale(parts, settings=SHORT)
        for step in range(20):
            model.zero_grad()
            loss_of(model, step).backward()
            for part in reversed(parts) if reverse else parts:
                part.step()
        assert parts[0].param_groups[0]["lr"] == parts[1].param_groups[0]["lr"] == scale.value
        return model, scale

    model, scale = train_both(reverse=False)
    assert scale.steps == 12
    torch.testing.assert_close(vector(model), vector(train_both(reverse=True)[0]))


def test_parameters_that_come_later_or_have_no_gradient() -> None:
    model = Net()
    for p in model.hidden.parameters():
        p.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scale = LearnedScale(optimizer, settings=SHORT)
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    train(model, optimizer, 5)
    before = model.hidden.weight.clone()
    for p in model.hidden.parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.hidden.parameters()), "lr": 0.01})
    train(model, optimizer, 15, first=5)
    assert not torch.equal(model.hidden.weight, before)
    assert torch.equal(unused, torch.ones(3))
    assert not scale.searching
    # A gradient that is missing for a step: the parameter still moves with the scale.
    model, optimizer, scale = search(steps=5)
    weight, kappa = model.out.weight, scale._search.in_use("all")
    way = (way_of(scale, weight).initial - weight.detach()) / kappa
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    weight.grad = None
    optimizer.step()
    expected = way_of(scale, weight).initial - scale._search.in_use("all") * way
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("half", [0, 1])
def test_large_parameters_are_measured_in_all_parts(half: int) -> None:
    """Half of the inputs are always 0, or half of the words never occur."""
    torch.manual_seed(0)
    layers = nn.Linear(4096, 32), nn.Embedding(4096, 32)
    x = torch.zeros(64, 4096)
    x[:, 2048 * half : 2048 * (half + 1)] = torch.randn(64, 2048)
    for layer, inputs in zip(layers, (x, torch.arange(2048 * half, 2048 * (half + 1))), strict=True):
        optimizer = AdamW(layer.parameters(), lr=1.0)
        scale = LearnedScale(optimizer, settings=SearchSettings(steps=40))
        for _ in range(40):
            optimizer.zero_grad()
            ((layer(inputs) - 1.0) ** 2).mean().backward()
            optimizer.step()
        assert scale.state_dict_of("all")["taken"] > 30  # a hypergradient of 0 is not taken


def test_what_is_frozen_in_the_search_stays() -> None:
    model, optimizer, scale = search(steps=5)
    weight = model.out.weight.requires_grad_(False)
    weight.grad = None
    before = weight.clone()
    train(model, optimizer, 3, first=5)
    assert torch.equal(weight, before)
    weight.requires_grad_(True)
    train(model, optimizer, 10, first=8)
    assert not torch.equal(weight, before)
    assert not scale.searching


def test_a_step_without_any_gradient_is_none_of_the_search() -> None:
    _, optimizer, scale = search(steps=5)
    optimizer.zero_grad()
    optimizer.step()
    assert scale.steps == 5


def test_gradients_with_a_pending_conjugation() -> None:
    """As of w^H x. MADA takes them, torch's AdamW does not."""

    def found(pending: bool) -> tuple[float, Tensor]:
        weight = nn.Parameter(torch.tensor([1.0 + 2.0j, -1.0j]))
        optimizer = load_optimizer("mada")([weight], lr=0.1)
        scale = LearnedScale(optimizer, settings=SHORT)
        for _ in range(14):
            conjugate = weight.detach().clone().conj()
            weight.grad = conjugate if pending else conjugate.resolve_conj()
            optimizer.step()
        return scale.value, weight.detach()

    assert found(True)[0] == found(False)[0]
    assert torch.equal(found(True)[1], found(False)[1])
