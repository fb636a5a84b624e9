"""Arguments as users write them: numbers of Python and numpy, and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from mada_optim.scale.rate import ScaledRate


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number, numpy's included (bool does not count)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def to_python(value: Any) -> Any:
    """Numbers of any kind as Python's own, also in sequences and mappings; anything else as it is.

    Every argument that is a number goes through this, but for ``lr``, which may stay a tensor. Integers stay integers.
    A tensor that requires a gradient stays as it is, since no gradient would reach it.

    >>> import torch
    >>> to_python(torch.tensor([0.5, 0.75])), to_python({"rho": torch.tensor(3)}), to_python("fast")
    ((0.5, 0.75), {'rho': 3}, 'fast')
    """
    if value is None or isinstance(value, (bool, str, bytes)) or (isinstance(value, Tensor) and value.requires_grad):
        return value
    if isinstance(value, Mapping):
        return {key: to_python(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return tuple(to_python(item) for item in value)
    if hasattr(value, "tolist"):  # arrays and numbers of numpy and torch
        return to_python(value.tolist())
    if isinstance(value, ScaledRate):
        return value.given
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def as_list(params: Any) -> list[Any]:
    """The parameters of a group, which may be one tensor or an iterable of them, named or not."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must have an order that is the same in every run, got a set")
    return [params] if isinstance(params, Tensor) else list(params)


def tensor_of(param: Any) -> Any:
    """The parameter of a named one, ``(name, parameter)``."""
    return param[1] if isinstance(param, tuple) else param
