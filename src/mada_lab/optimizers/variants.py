"""MADA with one thing changed, to see what that thing is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.families import Buffers, MADAFamily
from mada_optim.optimizers.mada import MADA


@dataclass(frozen=True)
class MaximumFamily(MADAFamily):
    """AMSGrad's maximum over past second moments in the place of AVGrad's average."""

    name: str = field(default="MADA with AMSGrad's maximum", init=False)

    def _long_term(self, mean: Tensor, v: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return torch.maximum(mean, v)


@dataclass(frozen=True)
class ZeroedGradientFamily(MADAFamily):
    """The authors' public code, where zeroing the gradients in place zeroes the kept one too: d_t = g_t for t > 1."""

    name: str = field(default="MADA with a zeroed previous gradient", init=False)

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        if "previous_grad" in state:
            state = {**state, "previous_grad": torch.zeros_like(grad)}
        return super().update(state, grad, q, step)


class MaximumMADA(MADA):
    """MADA on :class:`MaximumFamily`."""

    family_type: ClassVar[type[MADAFamily]] = MaximumFamily


class ZeroedGradientMADA(MADA):
    """MADA on :class:`ZeroedGradientFamily`."""

    family_type: ClassVar[type[MADAFamily]] = ZeroedGradientFamily
