"""What the search needs of the optimizers around it: checks, hooks and closures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer, Rprop


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
                raise RuntimeError(
                    f"{type(optimizer).__name__}: the search for the learning rate does not support sparse gradients, "
                    f"got layout {param.grad.layout}"
                )


def step_hooks(optimizer: Optimizer) -> Iterable[Any]:
    """Return the hooks that torch calls before a step."""
    return optimizer._optimizer_step_pre_hooks.values()


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
