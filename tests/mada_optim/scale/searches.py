"""Searches that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Net, train
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW

from mada_optim import AVGrad, load_optimizer
from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.scale.way import Way

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


def way_of(scale: LearnedScale, param: Tensor) -> Way:
    way = scale._search.way_of(param)
    assert way is not None
    return way


def matrices(group: dict[str, Any]) -> bool:
    return bool(group["matrices"])
