"""What the search needs of the optimizers: their closures, rates and checks; hypergradients that are under way."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, Rprop

from mada_optim.scale.way import LOW_PRECISION

if TYPE_CHECKING:
    import weakref

    from mada_optim.scale.learned import LearnedScale

Group = dict[str, Any]


class Pending:
    """Hypergradients on their way from the device to the host, for which the program does not wait."""

    def __init__(self, keys: list[Hashable], along: Tensor) -> None:
        self.keys = keys
        self.event: torch.cuda.Event | None = None
        if along.device.type == "cuda":
            self.along = torch.empty(along.shape, dtype=along.dtype, pin_memory=True)
            self.along.copy_(along, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()
        else:
            self.along = along.cpu()

    def read(self) -> list[tuple[Hashable, float]]:
        if self.event is not None:
            self.event.synchronize()
        return list(zip(self.keys, self.along.tolist(), strict=True))


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError or ValueError where an optimizer's steps cannot be scaled."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizers must be torch.optim.Optimizers, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizers: {kind} is a wrapper without torch's hooks; give the optimizer inside")
    if isinstance(optimizer, (LBFGS, Rprop)):
        raise TypeError(f"optimizers: the steps of {type(optimizer).__name__} are not multiples of its learning rate")
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise ValueError("optimizers: a learned scale changes parameters in place; differentiable must be False")


def check_searchable(optimizer: Optimizer) -> None:
    """Raise RuntimeError, before anything is changed, where a step of the search is not possible."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("LearnedScale: capture a CUDA graph after the search, when scale.searching is False")
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(f"LearnedScale does not support sparse gradients, got layout {param.grad.layout}")


def step_hooks(optimizer: Optimizer) -> Iterable[Any]:
    """Return the hooks that torch calls before a step."""
    return optimizer._optimizer_step_pre_hooks.values()


def use_now(scale: weakref.ref[LearnedScale], key: Hashable, given: float) -> float:
    """What a scale makes of a rate. A rate that somebody keeps does not keep the scale, and with it the model."""
    alive = scale()
    return given if alive is None else alive._use(key, given)


def evaluate_closure(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Evaluate the closure of a step before it, since the search needs the gradients; the step gets the loss.

    ``args`` begins with the optimizer.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    evaluated = [loss]

    def once() -> Any:
        """Return the loss that is known, then evaluate anew, as optimizers want that call a closure again (SAM)."""
        return evaluated.pop() if evaluated else closure()

    rest = {name: value for name, value in kwargs.items() if name != "closure"}
    return (args[0], once, *args[2:]), rest


def is_low(group: Group) -> bool:
    """Whether small steps of a parameter in the group would be lost to rounding."""
    return any(param.dtype in LOW_PRECISION for param in group["params"])


def highest(peak: float | Tensor, rate: Any, on_host: bool) -> float | Tensor:
    """The higher of two rates; a tensor, changed in place, where one is on a device for which not to wait."""
    if isinstance(rate, Tensor) and (on_host or rate.device.type == "cpu"):
        rate = float(rate)
    if not isinstance(rate, Tensor) and not math.isfinite(rate):
        return peak
    if isinstance(peak, Tensor):
        candidate = torch.as_tensor(rate, dtype=peak.dtype, device=peak.device).reshape(())
        return peak.copy_(torch.maximum(peak, candidate))
    if isinstance(rate, Tensor):
        return rate.detach().reshape(()).clamp(min=peak)
    return max(peak, float(rate))


def positive(value: Any) -> float:
    """Return a held scale as a float. Raises ValueError where it is not a positive number."""
    number = math.nan if isinstance(value, bool) else float(value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"held must be a positive number, or a mapping to positive numbers, got {value!r}")
    return number
