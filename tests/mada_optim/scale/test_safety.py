"""The learned scale where a search could go wrong: games, rewards, problems with a solution in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from mada_optim.scale import LearnedScale, SearchSettings

HIGHEST = SearchSettings().margin * SearchSettings().bounds[1]
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "sgd": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
}


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(param).all()) for param in model.parameters())


# ---- Losses that fight, gradients whose meaning changes: nothing but safety is asked for.


def mlp(inputs: int, outputs: int, width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_generative_adversarial_network(name: str) -> None:
    """Eight Gaussians; generator and discriminator have a scale each."""
    angles = torch.arange(8) * math.tau / 8
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    generator, discriminator = mlp(4, 2), mlp(2, 1)
    optimizers = [MAKERS[name](model.parameters(), lr=1.0) for model in (generator, discriminator)]
    scales = [LearnedScale(optimizer) for optimizer in optimizers]
    highest = 0.0
    for _ in range(300):
        real = centres[torch.randint(8, (64,))] + 0.02 * torch.randn(64, 2)
        fake = generator(torch.randn(64, 4))
        optimizers[1].zero_grad()
        game = nn.functional.softplus(-discriminator(real)) + nn.functional.softplus(discriminator(fake.detach()))
        game.mean().backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        nn.functional.softplus(-discriminator(fake)).mean().backward()
        optimizers[0].step()
        highest = max(highest, *(scale.value for scale in scales))
    assert is_finite(generator)
    assert is_finite(discriminator)
    assert not any(scale.searching for scale in scales)
    assert highest < 1.0
    assert generator(torch.randn(500, 4)).abs().max().item() < 100.0


@pytest.mark.parametrize("make", [AdamW, lambda params, lr: AdamW(params, lr=lr, weight_decay=0.1), MAKERS["sgd"]])
@pytest.mark.parametrize("seed", [1, 4])
def test_a_bandit(make: Callable[..., Optimizer], seed: int) -> None:
    """REINFORCE. The best policy lies at infinity, so the scale is hardly ever asked to fall."""
    torch.manual_seed(seed)
    means = torch.linspace(0, 1, 10)[torch.randperm(10)]
    logits = nn.Parameter(torch.zeros(10))
    optimizer = make([logits], lr=1.0)
    scale = LearnedScale(optimizer)
    baseline, highest = 0.0, 0.0
    for _ in range(400):
        log_policy = logits.log_softmax(0)
        arms = torch.multinomial(log_policy.detach().exp(), 16, replacement=True)
        rewards = means[arms] + torch.randn(16)
        optimizer.zero_grad()
        (-(rewards - baseline) * log_policy[arms]).mean().backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * float(rewards.mean())
        highest = max(highest, scale.value)
    assert torch.isfinite(logits).all()
    assert highest <= HIGHEST * (1 + 1e-12)  # a logarithm and its exponential
    assert float((logits.detach().softmax(0) * means).sum()) > 0.5


# ---- A loss with one minimum: beside the best of seven rates.

FEATURES, CLASSES, ROWS = 20, 5, 512


def least_squares() -> tuple[Callable[[nn.Module, Tensor], Tensor], int]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, FEATURES, generator=generator) * torch.logspace(0, -0.75, FEATURES)
    targets = inputs @ torch.randn(FEATURES, 1, generator=generator) + 0.1 * torch.randn(ROWS, 1, generator=generator)
    return lambda model, rows: nn.functional.mse_loss(model(inputs[rows]), targets[rows]), 1


def linear_probe() -> tuple[Callable[[nn.Module, Tensor], Tensor], int]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    centres = 0.5 * torch.randn(CLASSES, FEATURES, generator=generator)
    inputs = centres[labels] + torch.randn(ROWS, FEATURES, generator=generator)
    return lambda model, rows: nn.functional.cross_entropy(model(inputs[rows]), labels[rows]), CLASSES


def final_loss(problem: str, name: str, lr: float | None, settings: SearchSettings | None = None) -> float:
    """After 400 steps with a cosine; ``lr``: None for a search."""
    torch.manual_seed(0)
    loss, outputs = {"least squares": least_squares, "linear probe": linear_probe}[problem]()
    model = nn.Linear(FEATURES, outputs)
    optimizer = MAKERS[name](model.parameters(), lr=1.0 if lr is None else lr)
    scale = LearnedScale(optimizer, settings=settings) if lr is None else None
    schedule = CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        loss(model, torch.randint(ROWS, (32,))).backward()
        optimizer.step()
        schedule.step()
    assert scale is None or 1e-4 < scale.value < HIGHEST
    with torch.no_grad():
        return float(loss(model, torch.arange(ROWS)))


@pytest.mark.parametrize("problem", ["least squares", "linear probe"])
@pytest.mark.parametrize("name", MAKERS)
def test_beside_the_best_of_seven_rates(problem: str, name: str) -> None:
    grid = [10 ** (exponent / 2) for exponent in range(-8, -1)]
    best = min(final_loss(problem, name, lr) for lr in grid)
    # W keeps the gradients of a climb from far below, the more so with SGD, whose steps shrink as it gets on.
    settings = SearchSettings(start=1e-2) if name == "sgd" else SearchSettings()
    assert final_loss(problem, name, None, settings) < 1.03 * best


def test_sgd_from_far_below_is_too_slow_but_safe() -> None:
    assert final_loss("least squares", "sgd", None) < 0.05 * final_loss("least squares", "sgd", 1e-8)
