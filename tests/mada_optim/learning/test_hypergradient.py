"""The hypergradient against finite differences of the true loss, closed formulas, and torch's differentiable Adam."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import ADAM, INTERIOR, STARTS, Net, loss_of, train
from torch.func import functional_call
from twin import Twin, closed_form_alignment

from mada_optim import MADA, MADAFamily

LOW, HIGH = ({each.name: each.box[end] for each in MADAFamily.coefficients} for end in (0, 1))
POINTS = {"adam": ADAM, "interior": INTERIOR, "low": LOW, "high": HIGH}
LR, WD = 0.01, 0.1
# Learned, and therefore differentiated, but never moved by an amount that could be seen.
STILL = 1e-300


def make(model: Net, q: dict[str, float]) -> MADA:
    start = {name: q[name] for name in STARTS}
    return MADA(model.parameters(), LR, (q["beta1"], q["beta2"]), 1e-8, WD, hyper_lr=STILL, hyper_warmup=0, **start)


class _Loss(torch.nn.Module):
    def __init__(self, model: Net) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: int) -> torch.Tensor:
        return loss_of(self.model, step)


def loss_at(model: Net, tensors: list[torch.Tensor], step: int) -> torch.Tensor:
    names = [name for name, _ in model.named_parameters()]
    return functional_call(_Loss(model), {f"model.{n}": t for n, t in zip(names, tensors, strict=True)}, (step,))


def gradients(model: Net, step: int) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss_of(model, step), list(model.parameters())))


@pytest.mark.parametrize("last", [1, 2, 10, 100])
@pytest.mark.parametrize("point", POINTS)
def test_equals_finite_differences_of_the_loss_and_the_closed_formulas(point, last):
    """∂f(x_{t+1})/∂q_t at t = ``last``, by fourth-order central differences through the twin."""
    q = POINTS[point]
    model, slow = Net(), Net()
    optimizer = make(model, q)
    twin = Twin([p.data for p in slow.parameters()], LR, q, wd=WD)
    for step in range(1, last):
        twin.step(gradients(slow, step))
    before, before_gradients = copy.deepcopy(twin), gradients(slow, last)
    train(model, optimizer, last + 1, first=1)
    found = optimizer.hypergradients()

    def loss_with(name: str, value: float) -> float:
        return loss_at(slow, before.peek(before_gradients, q | {name: value}), last + 1).item()

    twin.step(before_gradients)
    closed = closed_form_alignment(before, before_gradients, gradients(slow, last + 1))
    for name, value in q.items():
        # 1/(1-β) is the scale on which a beta bends the loss.
        d = min(1e-4, (1 - value) / 40) if name.startswith("beta") else 1e-4
        near, far = (loss_with(name, value + s * d) - loss_with(name, value - s * d) for s in (1, 2))
        difference = (8 * near - far) / (12 * d)
        # Below 1e-11 rounding of the loss hides the derivative.
        assert found[name] == pytest.approx(difference, rel=1e-5, abs=1e-11), name
        assert found[name] == pytest.approx(-LR * closed[name], rel=1e-9, abs=1e-15), name


@pytest.mark.parametrize("last", [1, 2, 10, 100])
def test_equals_torch_differentiable_adam(last):
    """At Adam's point, β1 and β2: torch's own step with betas that require a gradient."""
    model = Net()
    optimizer = MADA(
        model.parameters(), LR, weight_decay=0.0, hyper_lr={"beta1": STILL, "beta2": STILL}, hyper_warmup=0
    )
    reference = Net()
    adam = torch.optim.Adam(reference.parameters(), lr=LR)
    train(reference, adam, last - 1, first=1)
    train(model, optimizer, last + 1, first=1)

    betas = tuple(torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (0.9, 0.999))
    copies = [p.detach().clone().requires_grad_() for p in reference.parameters()]
    moved = [c.clone() for c in copies]
    differentiable = torch.optim.Adam(moved, lr=LR, betas=betas, differentiable=True, foreach=False)
    for own, p in zip(moved, reference.parameters(), strict=True):
        if last > 1:
            differentiable.state[own] = {k: v.clone() for k, v in adam.state[p].items()}
    for own, gradient in zip(moved, gradients(reference, last), strict=True):
        # A row that was never used has second moment 0, where torch's square root yields NaN.
        own.grad = torch.where(gradient == 0, 1e-30, gradient)
    for state in differentiable.state.values():
        state["exp_avg_sq"] = torch.where(state["exp_avg_sq"] == 0, 1e-60, state["exp_avg_sq"])
    differentiable.step()
    loss_at(reference, moved, last + 1).backward()
    found = optimizer.hypergradients()
    assert found["beta1"] == pytest.approx(betas[0].grad.item(), rel=1e-6, abs=1e-14)
    assert found["beta2"] == pytest.approx(betas[1].grad.item(), rel=1e-6, abs=1e-14)


def test_one_hypergradient_over_all_groups_with_the_learning_rate_of_the_step_it_belongs_to():
    """Groups with different lr; a scheduler has changed it by the time the next gradient is there."""
    model, reference = Net(), Net()

    def groups(net: Net) -> list[dict]:
        params = list(net.parameters())
        return [{"params": params[:3], "lr": 0.02}, {"params": params[3:], "lr": 0.005, "eps": 1e-3}]

    optimizer = MADA(groups(model), hyper_lr=STILL, hyper_warmup=0)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    train(model, optimizer, 1, first=1)

    gradients_0 = gradients(reference, 0)
    expected = dict.fromkeys(ADAM, 0.0)
    parts = [(slice(0, 3), 0.02, 1e-8), (slice(3, None), 0.005, 1e-3)]
    twins = [Twin([p.data for p in list(reference.parameters())[part]], lr, ADAM, eps, 1e-2) for part, lr, eps in parts]
    befores = copy.deepcopy(twins)
    for twin, (part, _, _) in zip(twins, parts, strict=True):
        twin.step(gradients_0[part])
    gradients_1 = gradients(reference, 1)
    for before, (part, lr, _) in zip(befores, parts, strict=True):
        for name, value in closed_form_alignment(before, gradients_0[part], gradients_1[part]).items():
            expected[name] -= lr * value
    assert optimizer.hypergradients() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_one_set_of_coefficients_for_each_group_on_request():
    model = Net()
    params = list(model.parameters())
    optimizer = MADA(
        [
            {"params": params[:3], "betas": (0.5, 0.9)},
            {"params": params[3:], "start": {"rho": 0.5}, "hyper_lr": {"rho": 0.3}},
        ],
        hyper_warmup=0,
        hyper_per_group=True,
    )
    train(model, optimizer, 20)
    first, second = optimizer.coefficients(0), optimizer.coefficients(1)
    assert (second["beta1"], second["beta2"], second["gamma"]) == (0.9, 0.999, 1.0)
    assert second["rho"] != 0.5
    assert first["beta1"] != 0.5
    assert optimizer.hypergradients(0) != optimizer.hypergradients(1)


def test_stays_in_the_box_and_moves_by_no_more_than_the_clip_allows():
    model = Net()
    optimizer = MADA(
        model.parameters(),
        0.1,
        hyper_lr=1e3,
        hyper_warmup=0,
        hyper_clip=1e-5,
        bounds={"beta1": (0.85, 0.95), "c": (0.3, 1.0)},
    )
    last = optimizer.coefficients()
    seen_at_a_bound = False
    for step in range(60):
        train(model, optimizer, 1, first=step)
        now = optimizer.coefficients()
        for name, (low, high) in optimizer.param_groups[0]["bounds"].items():
            assert low <= now[name] <= high
            assert abs(now[name] - last[name]) <= 1e3 * 1e-5 * (1 + 1e-12)
            seen_at_a_bound |= name == "beta1" and now[name] in (0.85, 0.95)
        last = now
    assert seen_at_a_bound


@pytest.mark.parametrize(
    ("every", "warmup", "expected"), [(1, 0, range(1, 12)), (1, 5, range(5, 12)), (4, 2, (2, 6, 10))]
)
def test_is_taken_when_due(every, warmup, expected):
    model = Net()
    options = {"hyper_warmup": warmup, "hyper_every": every, "hyper_delay": 0}
    optimizer = MADA(model.parameters(), 0.01, hyper_lr=1e-2, beta3=0.5, rho=0.5, **options)
    moved = []
    for step in range(12):
        last = optimizer.coefficients()
        train(model, optimizer, 1, first=step)
        if optimizer.coefficients() != last:
            moved.append(step)
    assert moved == list(expected)
