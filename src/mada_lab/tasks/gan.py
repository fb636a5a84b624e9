"""A generative adversarial network on eight Gaussians in a ring: two losses that fight, which are no common loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mada_lab.errors import require
from mada_lab.tasks.base import Batch, TaskConfig

MODES = 8
RADIUS, SPREAD = 2.0, 0.05
NOISE = 16  # dimensions that the generator is fed with
VALIDATION_SAMPLES = 1000


@dataclass(frozen=True)
class GanConfig(TaskConfig):
    """Networks and batch.

    Args:
        data: must be None; the points are drawn.
        width: of the two hidden layers of generator and discriminator.
        batch: points of each kind in a batch.
    """

    kind: ClassVar[str] = "gan"
    unit: ClassVar[str] = "energy distance"
    width: int = 64
    batch: int = 128

    def __post_init__(self) -> None:
        require(self.data is None, "data", self.data, "left out: the points are drawn")
        self._require_positive("width", "batch")

    def build(self) -> GanTask:
        return GanTask(self)


class GanTask:
    """Draw points as the ring has them (Metz et al., "Unrolled Generative Adversarial Networks", ICLR 2017).

    Generator and discriminator step at the same time, each along the gradient of its own loss (Goodfellow et al., 2014,
    non-saturating), in one optimizer, as a user would pass both.
    """

    def __init__(self, config: GanConfig) -> None:
        self.config = config
        self._val_noise, self._val_points = self._draw(np.random.default_rng(0), VALIDATION_SAMPLES)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = self.config.width
            return nn.ModuleDict({"generator": _mlp(NOISE, width, 2), "discriminator": _mlp(2, width, 1)})

    def batch(self, seed: int, step: int) -> Batch:
        """Noise of shape (batch, 16), and points of the ring, (batch, 2)."""
        return self._draw(np.random.default_rng((seed, step)), self.config.batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of both losses, each with a gradient for its own network alone."""
        assert isinstance(model, nn.ModuleDict)
        example = next(model.parameters())
        noise, points = (tensor.to(example.device, example.dtype) for tensor in batch)
        generator, discriminator = model["generator"], model["discriminator"]
        drawn = generator(noise)
        real, fake = discriminator(points), discriminator(drawn.detach())
        still = {name: param.detach() for name, param in discriminator.named_parameters()}
        fooled = functional_call(discriminator, still, drawn)
        # softplus(-x) is the cross entropy of the logit x to "real", softplus(x) that to "fake".
        return F.softplus(-real).mean() + F.softplus(fake).mean() + F.softplus(-fooled).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """``loss``: the energy distance to the ring; ``modes``: how many of the eight get half of their share or more.

        The energy distance of two distributions is 2 E|x-y| - E|x-x'| - E|y-y'| (Szekely and Rizzo, 2013).
        """
        assert isinstance(model, nn.ModuleDict)
        example = next(model.parameters())
        drawn = model["generator"](self._val_noise.to(example.device, example.dtype)).double().cpu()
        points = self._val_points.double()
        pairs = ((drawn, points), (drawn, drawn), (points, points))
        between, among_drawn, among_points = (torch.cdist(*pair).mean().item() for pair in pairs)
        near = torch.cdist(drawn, _centres().double()) < 4 * SPREAD
        modes = int((near.float().mean(0) >= 0.5 / MODES).sum())
        return {"loss": 2 * between - among_drawn - among_points, "modes": float(modes)}

    def describe(self) -> dict[str, Any]:
        return {"task": "gan", "source": f"{MODES} Gaussians in a ring", "radius": RADIUS, "spread": SPREAD}

    @staticmethod
    def _draw(random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        noise = torch.from_numpy(random.standard_normal((count, NOISE), np.float32))
        centres = _centres()[torch.from_numpy(random.integers(MODES, size=count))]
        return noise, centres + SPREAD * torch.from_numpy(random.standard_normal((count, 2), np.float32))


def _centres() -> Tensor:
    angles = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )
