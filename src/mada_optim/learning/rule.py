"""How coefficients move: projected gradient descent on their hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import overload

import torch
from torch import Tensor

from mada_optim.arguments import is_number
from mada_optim.families import Coefficient
from mada_optim.scale.rule import MEAN_DECAY, SQUARE_DECAY
from mada_optim.tensors.devices import constant


def call(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function, as it is."""
    function(*tensors)


@dataclass(frozen=True)
class LearnedTensors:
    """What learning changes.

    Args:
        values: coefficients, shape (K,), float64 (float32 where the device has no float64).
        momentum: b, or the running mean of h; ``square``: the running mean of h²; both of the same shape and dtype.
        taken: how many hypergradients were used, 0-dimensional int64 tensor.
    """

    values: Tensor
    momentum: Tensor
    square: Tensor
    taken: Tensor


@dataclass(frozen=True)
class LearningRule:
    """Projected gradient descent with momentum and clipping: b ← μ b + clip(h), then q ← Π(q - α b).

    Args:
        momentum: μ, in [0, 1).
        clip: each |h| is cut to this before it is used; may be infinite.
        warmup: number of optimizer steps that use the initial coefficients.
        every: a hypergradient is taken before each ``every``-th optimizer step.
        delay: for how many steps it waits before it is used, 0 or 1.
    """

    momentum: float
    clip: float
    warmup: int
    every: int
    delay: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"hyper_momentum must be a number in [0, 1), got {self.momentum!r}")
        if not isinstance(self.clip, Real) or not self.clip > 0.0:
            raise ValueError(f"hyper_clip must be a number > 0, got {self.clip!r}")
        for name, value, low in (("hyper_warmup", self.warmup, 0), ("hyper_every", self.every, 1)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if not isinstance(self.delay, Integral) or isinstance(self.delay, bool) or self.delay not in (0, 1):
            raise ValueError(f"hyper_delay must be 0 or 1, got {self.delay!r}")

    @overload
    def due(self, steps: int) -> bool: ...

    @overload
    def due(self, steps: Tensor) -> Tensor: ...

    def due(self, steps: int | Tensor) -> bool | Tensor:
        """Return whether the next step takes a hypergradient. With a delay, the step after it uses it.

        Args:
            steps: completed so far.

        >>> rule = LearningRule(momentum=0.0, clip=10.0, warmup=50, every=10)
        >>> [t for t in range(80) if rule.due(t)]
        [50, 60, 70]
        """
        return (steps >= max(self.warmup, 1)) & ((steps - self.warmup) % self.every == 0)

    def learn(
        self,
        learned: LearnedTensors,
        skipped: Tensor,
        hypergradient: Tensor,
        coefficients: Sequence[Coefficient],
        step_sizes: Sequence[float],
        boxes: Sequence[tuple[float, float]],
        due: bool | Tensor = True,
        run: Callable[..., None] | None = None,
    ) -> None:
        """Move the coefficients in place, without waiting for the device.

        A hypergradient with a NaN or an infinity changes nothing but ``skipped``, which counts it. Coefficients that
        are ``normalized`` are not clipped: they move by α times the running mean of h over its root mean square.

        Args:
            learned: changed in place.
            skipped: 0-dimensional int64 tensor.
            hypergradient: shape (K,), in the precision and on the device of the coefficients.
            coefficients: what is known of each.
            step_sizes: α for each coefficient, 0 where it is frozen.
            boxes: (low, high) for each coefficient.
            due: False: nothing changes.
            run: what calls a function of tensors that changes some of them, such as in one launch on a GPU. None: it is
                called as it is.
        """
        if due is False:
            return
        count = len(coefficients)
        rows = (tuple(step_sizes), *zip(*boxes, strict=True), (self.momentum,) * count, (self.clip,) * count)
        tensors = [getattr(learned, item.name) for item in fields(LearnedTensors)]
        tensors += [skipped, hypergradient, *_rows(learned.values, rows, hypergradient.dtype)[:, :count]]
        tensors.append(due if isinstance(due, Tensor) else _truth(learned.values, due))
        if any(coefficient.normalized for coefficient in coefficients):
            tensors.append(_are_normalized(learned.values, tuple(coefficients)))
        (run or call)(_descend, *tensors)


def _descend(
    values: Tensor,
    momentum: Tensor,
    square: Tensor,
    taken: Tensor,
    skipped: Tensor,
    h: Tensor,
    alpha: Tensor,
    low: Tensor,
    high: Tensor,
    mu: Tensor,
    clip: Tensor,
    due: Tensor,
    normalized: Tensor | None = None,
) -> None:
    """Do what :meth:`LearningRule.learn` says, with tensors alone. ``normalized``: which coefficients are."""
    finite = torch.isfinite(h).all()
    descent = mu * momentum + torch.minimum(torch.maximum(h, -clip), clip)
    before = LearnedTensors(values, momentum, square, taken)
    new = LearnedTensors(values - alpha * descent, descent, square, taken + 1)
    if normalized is not None:
        new = _normalize(before, new, h, alpha, normalized)
    moved = torch.minimum(torch.maximum(new.values, low), high)
    new = replace(new, values=torch.where(alpha > 0, moved, values))
    for item in fields(LearnedTensors):
        tensor = getattr(before, item.name)
        tensor.copy_(torch.where(finite & due, getattr(new, item.name), tensor))
    skipped.copy_(torch.where(~finite & due, skipped + 1, skipped))


def _normalize(
    before: LearnedTensors, plain: LearnedTensors, h: Tensor, alpha: Tensor, normalized: Tensor
) -> LearnedTensors:
    """Return what ``plain`` gradient descent makes of ``before``, except for coefficients that are normalized."""
    taken = plain.taken.to(h.dtype)
    mean = MEAN_DECAY * before.momentum + (1 - MEAN_DECAY) * h
    square = SQUARE_DECAY * before.square + (1 - SQUARE_DECAY) * h * h
    size = (square / (1 - SQUARE_DECAY**taken)).sqrt()
    ratio = torch.where(size > 0, mean / (1 - MEAN_DECAY**taken) / size, 0.0)
    values = torch.where(normalized, before.values - alpha * ratio, plain.values)
    return LearnedTensors(values, torch.where(normalized, mean, plain.momentum), square, plain.taken)


@constant
def _rows(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> Tensor:
    """Rows of numbers, padded so that each is aligned to 16 bytes on a device."""
    count = len(rows[0])
    return torch.tensor([[*row, *[0.0] * (count % 2)] for row in rows], dtype=dtype, device="cpu")


@constant
def _truth(value: bool) -> Tensor:
    return torch.tensor(value, device="cpu")


@constant
def _are_normalized(coefficients: tuple[Coefficient, ...]) -> Tensor:
    return torch.tensor([coefficient.normalized for coefficient in coefficients], device="cpu")
