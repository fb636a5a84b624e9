"""What a run's optimizer learns: its coefficients and its learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch.optim import Optimizer

from mada_optim.history.notation import SCALE

T = TypeVar("T")


def coefficients_of(optimizer: Optimizer) -> dict[str, float]:
    """Return the coefficients by name, and the learned scales of kinds of parameters as ``scale_KIND``."""
    read = getattr(optimizer, "coefficients", None)
    scale = getattr(optimizer, "scale", None)
    scales = {} if scale is None else {f"{SCALE}{kind}": value for kind, value in scale.values.items()}
    return {**(read() if callable(read) else {}), **scales}


def scales_of(values: Mapping[str, T]) -> dict[str, T]:
    """Return what is known of the learned scales, by the kind of parameters.

    >>> scales_of({"rho": 0.5, "scale_matrices": 1e-3})
    {'matrices': 0.001}
    """
    return {name.removeprefix(SCALE): value for name, value in values.items() if name.startswith(SCALE)}


def learned_among(optimizer: Optimizer, coefficients: Mapping[str, float]) -> dict[str, float]:
    """Return those of the coefficients that the optimizer moves."""
    step_sizes = [group["hyper_lr"] for group in optimizer.param_groups if "hyper_lr" in group]
    return {
        name: value
        for name, value in coefficients.items()
        if name.startswith(SCALE) or any(sizes.get(name, 0) > 0 for sizes in step_sizes)
    }


def is_searching(optimizer: Optimizer) -> bool:
    """Return whether the optimizer still searches for its learning rate."""
    scale = getattr(optimizer, "scale", None)
    return scale is not None and scale.searching
