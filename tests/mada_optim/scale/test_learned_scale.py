"""The scale that is learned: what it computes, held against a slow twin, and how it behaves inside any optimizer."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import slow_scale
import torch
from problems import Net, loss_of, train
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, lr_scheduler

from mada_optim import AVGrad, load_optimizer
from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.scale.rate import ScaledRate, given_rate

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": AdamW,
    "adamw foreach": lambda params, **kwargs: AdamW(params, foreach=True, **kwargs),
    "adamw fused": lambda params, **kwargs: AdamW(params, fused=True, **kwargs),
    "sgd": lambda params, **kwargs: SGD(params, momentum=0.9, **kwargs),
    "sgd plain": SGD,
    "adafactor": Adafactor,
    "avgrad": AVGrad,
    "lion": load_optimizer("lion"),
    "mada": load_optimizer("mada"),
}
SHORT = SearchSettings(steps=12)


def search(
    make: Callable[..., torch.optim.Optimizer] = AdamW,
    steps: int = 20,
    lr: float = 0.01,
    settings: SearchSettings = SHORT,
    dtype: torch.dtype = torch.float64,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> tuple[Net, torch.optim.Optimizer, LearnedScale]:
    model = Net(dtype)
    optimizer = make(model.parameters(), lr=lr)
    scale = LearnedScale(optimizer, settings=settings)
    scheduler = None if schedule is None else schedule(optimizer)
    for step in range(steps):
        train(model, optimizer, 1, first=step)
        if scheduler is not None:
            scheduler.step()
    return model, optimizer, scale


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---- What it computes.


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
    scale._collect()
    kappa = scale._applied["all"]
    way = {p: (scale._ways[p].initial - p) / kappa for p in model.parameters()}

    def loss_at(factor: float) -> Tensor:
        other = Net()
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(scale._ways[q].initial - kappa * factor * way[q])
        return loss_of(other, 9)

    numeric = (loss_at(1 + 1e-5) - loss_at(1 - 1e-5)).detach() / 2e-5
    model.zero_grad()
    loss_of(model, 9).backward()
    scale._follow()
    ((_, along),) = scale._pending.read()  # type: ignore[union-attr]
    assert -along == pytest.approx(float(numeric), rel=1e-5)


@pytest.mark.parametrize("rate", [2.0**-13, 2.0**-3, 16.0])
def test_the_rate_that_is_given_does_not_matter(rate: float) -> None:
    assert torch.equal(vector(search(lr=rate)[0]), vector(search(lr=2.0**-7)[0]))


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


# ---- Several groups and optimizers.


def test_groups_keep_the_relation_of_their_rates() -> None:
    model = Net()
    first, *others = model.parameters()
    optimizer = AdamW([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.1}])
    scale = LearnedScale(optimizer, settings=SHORT)
    train(model, optimizer, 20)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.2 * scale.value, scale.value])


def matrices(group: dict[str, Any]) -> bool:
    return bool(group["matrices"])


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
    weight, kappa = model.out.weight, scale._applied["all"]
    way = (scale._ways[weight].initial - weight.detach()) / kappa
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    weight.grad = None
    optimizer.step()
    expected = scale._ways[weight].initial - scale._applied["all"] * way
    torch.testing.assert_close(weight.detach(), expected)


# ---- Schedules.

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


def test_plateau() -> None:
    model, optimizer, scale = search(steps=13)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * scale.value)


def test_held_early_where_the_schedule_falls() -> None:
    cosine = lambda o: lr_scheduler.CosineAnnealingLR(o, 60)  # noqa: E731
    scale = search(steps=60, settings=SearchSettings(), schedule=cosine)[2]
    assert not scale.searching
    assert 28 <= scale.steps <= 32


def test_tensor_rates() -> None:
    model = Net(torch.float32)
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.01), fused=True)
    given = optimizer.param_groups[0]["lr"]
    scale = LearnedScale(optimizer, settings=SHORT)
    train(model, optimizer, 20)
    assert optimizer.param_groups[0]["lr"] is given
    assert float(given) == pytest.approx(0.01)
    assert scale.value == pytest.approx(search(steps=20, dtype=torch.float32)[2].value, rel=1e-2)


# ---- What happens in trainings.


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


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    model, optimizer, scale = search(steps=6)
    optimizer.zero_grad()
    loss_of(model, 6).backward()
    scale._collect()
    before = scale.state_dict_of("all")
    model.norm.bias.grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    scale._collect()
    after = scale.state_dict_of("all")
    assert [after[name] for name in ("log_value", "mean", "taken")] == [
        before[name] for name in ("log_value", "mean", "taken")
    ]


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
    before = scale.state_dict_of("all"), len(scale._ways)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())
    assert (scale.state_dict_of("all"), len(scale._ways)) == before


def test_what_the_search_keeps_is_six_bytes_a_number_and_is_freed() -> None:
    model, _, scale = search(steps=5, dtype=torch.float32)
    kept = sum(t.numel() * t.element_size() for way in scale._ways.values() for t in way.tensors().values())
    assert kept == 6 * vector(model).numel()
    scale = search(steps=13)[2]
    assert not scale._ways


def test_the_optimizer_keeps_the_scale_and_not_the_other_way_round() -> None:
    _, optimizer, scale = search(steps=5)
    del optimizer
    gc.collect()
    assert scale._all_optimizers() == []


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
    assert pickle.loads(pickle.dumps(rate)) == 0.1
    assert rate.__mul__("x") is NotImplemented


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
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


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
        return (scale._ways[model.weight].initial - model.weight).detach(), scale.value

    way, value = found()
    monkeypatch.setattr("mada_optim.scale.way.PIECE", 1000)
    part_way, part_value = found()
    assert part_value != value
    assert part_value == pytest.approx(value, rel=0.3)
    # All of it moves, not only what is measured.
    assert bool((part_way != 0).all())
    assert float((part_way - way).norm() / way.norm()) < 0.3


# ---- What a review found.


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


def test_low_precision_keeps_what_others_write() -> None:
    model, optimizer, _ = search(steps=5, dtype=torch.bfloat16)
    with torch.no_grad():
        model.out.weight.fill_(3.0)
    train(model, optimizer, 1, first=5)
    assert float(model.out.weight.detach().min()) > 2.5


def test_state_dicts_hold_plain_floats() -> None:
    _, optimizer, _ = search(steps=5, schedule=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0))
    group = optimizer.state_dict()["param_groups"][0]
    assert {type(value) for name, value in group.items() if "lr" in name} == {float}


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


def test_a_rate_that_somebody_keeps_does_not_keep_the_model() -> None:
    model, optimizer, scale = search(steps=5)
    shown = optimizer.param_groups[0]["lr"]
    found = weakref.ref(scale)
    del model, optimizer, scale
    gc.collect()
    assert found() is None
    assert (float(shown), float(shown * 2)) == (pytest.approx(float(shown)), 0.02)
