"""A policy that learns from rewards alone: which digit is shown, when one only hears whether the guess was right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mada_lab.tasks.base import Batch, TaskConfig
from mada_lab.tasks.vision import VisionConfig


@dataclass(frozen=True)
class BanditConfig(TaskConfig):
    """Contexts, network and batch.

    Args:
        data: contexts and right actions, images and labels as :class:`VisionConfig` takes them; None: digits.
        width: of the network's first convolution.
        batch: guesses in a batch.
    """

    kind: ClassVar[str] = "bandit"
    unit: ClassVar[str] = "shares of wrong guesses"
    width: int = 16
    batch: int = 128

    def __post_init__(self) -> None:
        self._images()

    def build(self) -> BanditTask:
        return BanditTask(self, self._images())

    def _images(self) -> VisionConfig:
        return VisionConfig(self.data, width=self.width, batch=self.batch, augment=False)


class BanditTask:
    """A contextual bandit: see an image, draw a class from the policy, get 1 where it is right and else 0.

    The gradient is REINFORCE's with the batch's mean reward as its baseline (Williams, "Simple statistical
    gradient-following algorithms", Machine Learning 8, 1992). Its loss is no measure of anything: it is about 0
    whatever the policy. That is why nothing can be searched along it.
    """

    def __init__(self, config: BanditConfig, images: VisionConfig) -> None:
        self.config = config
        self._task = images.build()

    def model(self, seed: int) -> nn.Module:
        return self._task.model(seed)

    def batch(self, seed: int, step: int) -> Batch:
        """Images, labels, and numbers from [0, 1) by which actions are drawn."""
        images, labels = self._task.batch(seed, step)
        drawn = np.random.default_rng((seed, 2, step)).random(len(labels))
        return images, labels, torch.from_numpy(drawn)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the mean of (reward - mean reward) log p(action)."""
        images, labels, drawn = batch
        logits, labels = self._task.logits(model, (images, labels))
        log_p = logits.log_softmax(1)
        with torch.no_grad():
            cumulated = log_p.exp().cumsum(1)
            threshold = drawn.to(cumulated.device, cumulated.dtype)[:, None] * cumulated[:, -1:]
            actions = torch.searchsorted(cumulated, threshold, right=True).clamp_(max=log_p.shape[1] - 1)
            reward = (actions[:, 0] == labels).to(log_p.dtype)
        return -((reward - reward.mean()) * log_p.gather(1, actions)[:, 0]).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """The share of wrong guesses that the policy is expected to make."""
        right, count = 0.0, 0
        for batch in self._task.validation_batches():
            logits, labels = self._task.logits(model, batch)
            right += logits.softmax(1).gather(1, labels[:, None]).sum().item()
            count += len(labels)
        return {"loss": 1.0 - right / count}

    def describe(self) -> dict[str, Any]:
        return {**self._task.describe(), "task": "bandit"}
