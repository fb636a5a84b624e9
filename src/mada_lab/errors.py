"""Errors in what the user gave, and the checks that raise them."""

from __future__ import annotations

import math
from typing import Any


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, which value, and what is allowed."""


def require(condition: bool, argument: str, value: object, allowed: str) -> None:
    """Raise :class:`InputError` unless ``condition``.

    >>> require(0 > 1, "steps", 0, "a positive integer")
    Traceback (most recent call last):
    mada_lab.errors.InputError: steps must be a positive integer, got 0
    """
    if not condition:
        raise InputError(f"{argument} must be {allowed}, got {value!r}")


def require_pair(name: str, value: Any) -> tuple[float, float]:
    """Return two numbers as a tuple. Raise :class:`InputError`, naming the argument, where they are not two numbers."""
    numbers = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    require(numbers and len(value) == 2, name, value, "two numbers")
    return value[0], value[1]


def require_device(name: str, argument: str = "device") -> None:
    """Raise :class:`InputError` unless torch can put a tensor there."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{argument} must be one that torch can use here, got {name!r}: {reason}") from None


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and no truth value.

    >>> is_number(0.5), is_number(True), is_number(float("nan"))
    (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
