"""Whether tensors are what others were, in all but their values and where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def compare_at_once(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that quickly finds as many tensors to be like these, or does not know. It keeps none of them.

    Those that are alike agree in type, dtype, device, sizes, strides, and in signs and conjugations that are pending.
    torch.compile has a function that compares them at once, where Python takes ten times as long. It is not public, so
    it is tried before it is trusted.
    """
    if not tensors:
        return none
    return _guards(tensors).check if _is_reliable() else never


def none(*tensors: Tensor) -> bool:
    """Know that there are no tensors."""
    return not tensors


def never(*_: Tensor) -> bool:
    """Know of no tensors."""
    return False


def _guards(tensors: Sequence[Tensor]) -> Any:
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [list(tensor.size()) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


@lru_cache(maxsize=1)
def _is_reliable() -> bool:
    """Whether torch's function is there, and sees all that makes a difference."""
    square = torch.zeros(2, 2, device="cpu")
    others = (
        torch.nn.Parameter(square),
        square.to("meta"),
        square.view(torch.int32),
        square.view(4),
        square[:1],
        square.t(),
        torch._neg_view(square),
    )
    try:
        check = _guards([square]).check
        return check(torch.ones(2, 2, device="cpu")) is True and not any(map(check, others))
    except (ImportError, TypeError, RuntimeError):
        return False
