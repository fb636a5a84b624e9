"""The way that a parameter has gone, and its scalar product with the gradient.

With x_1 where the search began, a parameter lies at x = x_1 - κ W. For parameters in float32 and float64, x_1 is kept
and W follows from it. In bfloat16 and float16 a small step is lost to rounding, and with it the way. There the
optimizer takes a step of a visible length, W is kept in float32, and the parameter is put at x_1 - κ W afterwards.

Work is done in pieces that fit the cache, so that no temporary has the size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mada_optim.sharding import fill, local

PIECE = 1 << 16
LOW_PRECISION = (torch.bfloat16, torch.float16)
VISIBLE = 2.0**-4
"""Scale of the steps that an optimizer takes on low-precision parameters during the search."""

TENSORS = ("scale_initial", "scale_mean", "scale_gone")
"""Names in a state_dict of what is kept of a parameter."""


@dataclass
class Way:
    """What the search keeps of a parameter: DTensors where it is one, pairs of reals where it is complex.

    Args:
        initial: x_1, in the parameter's dtype.
        mean: W̄, the running mean of W, in bfloat16.
        gone: W in float32, where the parameter's group has low precision; else None.
    """

    initial: Tensor
    mean: Tensor
    gone: Tensor | None

    @classmethod
    def begin(cls, param: Tensor, visible: bool) -> Way:
        """A way that begins where the parameter is; ``visible``: whether W is kept."""
        here = _real(param)
        return cls(
            initial=here.clone(),
            mean=torch.zeros_like(here, dtype=torch.bfloat16),
            gone=torch.zeros_like(here, dtype=torch.float32) if visible else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a state_dict."""
        kept = dict(zip(TENSORS, (self.initial, self.mean, self.gone), strict=True))
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    @classmethod
    def load(cls, param: Tensor, tensors: Mapping[str, Tensor]) -> Way:
        """A way from what :meth:`tensors` returned, without aliasing it."""
        way = cls.begin(param, visible="scale_gone" in tensors)
        for name, target in way.tensors().items():
            fill(target, tensors[name])
        return way

    def follow(
        self, param: Tensor, grad: Tensor | None, scale: float, new_scale: float, swing: float, window: float
    ) -> Tensor | None:
        """Measure the way by the gradient, and move the parameter from x_1 - κ W to x_1 - κ' W. Changes W̄.

        Args:
            param: the parameter. Changed.
            grad: its gradient at x_1 - κ W, if it has one.
            scale: κ.
            new_scale: κ'.
            swing: share σ with which swings of W about W̄ count.
            window: decay of W̄.

        Returns:
            ⟨g, σ W + (1-σ) W̄⟩ over the elements of this process, 0-dimensional; None without a gradient.
        """
        tensors = [param, self.initial, self.mean]
        tensors += [tensor for tensor in (self.gone, grad) if tensor is not None]
        total: Tensor | None = None
        for x, initial, mean, *others in _pieces(tensors):
            gradient = None if grad is None else others.pop()
            way = others.pop() if others else torch.sub(initial, x).mul_(1 / scale)
            average = mean.to(way.dtype).lerp_(way, 1 - window)
            mean.copy_(average)
            if gradient is not None:
                part = torch.dot(gradient.to(way.dtype).reshape(-1), average.lerp_(way, swing).reshape(-1))
                total = part if total is None else total + part
            if self.gone is not None:
                x.copy_(initial - new_scale * way)
            elif new_scale != scale:
                x.add_(way, alpha=scale - new_scale)
        return total

    def collect_visible_step(self, param: Tensor, scale: float) -> None:
        """After a step from x_1 - κ W that was VISIBLE times as long as in W: add it to W, put it at x_1 - κ W."""
        if self.gone is None:
            return
        for x, initial, gone in _pieces([param, self.initial, self.gone]):
            before = (initial - scale * gone).to(x.dtype)
            gone.add_(before.to(gone.dtype) - x, alpha=1 / VISIBLE)
            x.copy_(initial - scale * gone)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _pieces(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The parts of tensors on this process, cut alike; uncut where their memory does not lie in one order."""
    here = [local(_real(tensor)) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in here):
        return [tuple(here)]
    return list(zip(*(torch.split(tensor.view(-1), PIECE) for tensor in here), strict=True))
