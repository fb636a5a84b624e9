"""Small real problems, and the one table of optimizers that the tests run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mada_optim import MADA, OMADA, AVGrad, HypergradientOptimizer, MADAFamily, OMADAFamily, load_optimizer

# MADA's coefficients where they start, which is Adam's point.
ADAM = {coefficient.name: coefficient.default for coefficient in MADAFamily.coefficients}
# Those that are arguments of their own, beside betas.
STARTS = [name for name in ADAM if name not in ("beta1", "beta2")]
# Every coefficient inside its box, none neutral.
INTERIOR = {"beta1": 0.8, "beta2": 0.9, "beta3": 0.3, "rho": 0.4, "c": 0.6, "gamma": 0.7}
# Step sizes with which OMADA learns all that it can.
OMADA_HYPER_LR = {
    **{"beta1": 5e-4, "beta2": 5e-4},
    **{each.name: 0.1 for each in OMADAFamily.coefficients if each.name not in ("beta1", "beta2")},
}


@dataclass(frozen=True)
class Row:
    """One optimizer of the table: how to make it, and the coefficients it starts from."""

    name: str
    make: type[HypergradientOptimizer]
    q: dict[str, float]
    buffers: int
    learns: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **kwargs: Any) -> HypergradientOptimizer:
        return self.make(params, **{**self.kwargs, **kwargs})


def _row(name: str, buffers: int, **q: float) -> Row:
    return Row(name, load_optimizer(name), ADAM | q, buffers)


TABLE = [
    _row("adam", 2),
    _row("adamw", 2),
    _row("yogi", 2, c=0.0),
    _row("adan", 4, beta1=0.98, beta2=0.99, beta3=0.92),
    _row("lion", 1, gamma=0.0),
    Row("avgrad", AVGrad, ADAM | {"rho": 0.0}, 3),
    Row("hyperadam", load_optimizer("hyperadam"), ADAM, 3, learns=True, kwargs={"hyper_warmup": 3}),
    Row("mada", MADA, ADAM, 7, learns=True, kwargs={"hyper_warmup": 3}),
    # It starts in the interior of the family, where nothing is neutral.
    Row(
        "mada-paper",
        load_optimizer("mada-paper"),
        INTERIOR,
        7,
        learns=True,
        kwargs={
            "betas": (INTERIOR["beta1"], INTERIOR["beta2"]),
            **{name: INTERIOR[name] for name in STARTS},
            "hyper_warmup": 0,
            "hyper_momentum": 0.5,
        },
    ),
    Row(
        "omada",
        OMADA,
        ADAM | {"ortho": 0.0, "row_norm": 0.0},
        7,
        learns=True,
        kwargs={"hyper_lr": OMADA_HYPER_LR, "hyper_warmup": 3, "betas": (0.9, 0.999), "ortho": 0.0, "scale": False},
    ),
    Row("mada-every-3", MADA, ADAM, 7, learns=True, kwargs={"hyper_warmup": 2, "hyper_every": 3}),
]
IDS = [row.name for row in TABLE]


class Net(nn.Module):
    """Embedding, LayerNorm and two layers: 2-D, 1-D and sparsely used parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 9)
        self.out = nn.Linear(9, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.norm(self.embedding(x)))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens 0 to 8 and their classes; tokens 9 and 10 never occur."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 9, (16,), generator=generator)
    return x, (x * x + 1) % 3


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


class Deep(nn.Module):
    """Two hidden matrices of one shape, a tall and a wide one, and a convolution, between embedding and output."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.hidden = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 6)])
        self.out = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(self.embedding(x)[..., None])[..., 0]
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)
