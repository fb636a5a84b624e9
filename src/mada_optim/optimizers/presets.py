"""Presets: optimizers that are MADA with other defaults, each known by a name.

A new one is a class statement here, and a row in the table of tests/problems.py. Its docstring says what it is.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from mada_optim.optimizers.mada import MADA
from mada_optim.optimizers.named import BY_NAME
from mada_optim.optimizers.omada import OMADA

# The step sizes of Ozkara et al. for language models.
_PAPER_HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}


class Adam(MADA, name="adam", weight_decay=0.0, hyper_lr=0.0):
    """Adam: AdamW without weight decay."""


class AdamW(MADA, name="adamw", hyper_lr=0.0):
    """AdamW, the point at which MADA begins; it learns nothing."""


class Adan(MADA, name="adan", betas=(0.98, 0.99), beta3=0.92, hyper_lr=0.0):
    """Adan, without the debiasing of its average of gradient differences."""


class HyperAdam(MADA, name="hyperadam", hyper_lr={"beta1": 5e-4, "beta2": 5e-4}):
    """Adam that learns β1 and β2."""


class Lion(MADA, name="lion", lr=1e-4, gamma=0.0, hyper_lr=0.0):
    """Lion, with decoupled weight decay; its betas are ``lion_betas``."""


class MADAPaper(MADA, name="mada-paper", hyper_lr=_PAPER_HYPER_LR, hyper_delay=0):
    """MADA as in the paper, which learns all six coefficients with the authors' step sizes, and without delay."""


class Yogi(MADA, name="yogi", c=0.0, hyper_lr=0.0):
    """Yogi, with decoupled weight decay and buffers that start at zero."""


def available_optimizers() -> tuple[str, ...]:
    """Return the names that :func:`load_optimizer` knows, in alphabetical order.

    >>> {"adamw", "mada", "omada"} <= set(available_optimizers())
    True
    """
    return tuple(sorted(BY_NAME))


@overload
def load_optimizer(name: Literal["omada"]) -> type[OMADA]: ...


@overload
def load_optimizer(name: str) -> type[MADA] | type[OMADA]: ...


def load_optimizer(name: str) -> Any:
    """Return the class of an optimizer by name: MADA, OMADA, or a preset.

    A preset is :class:`MADA` with other defaults, and takes its arguments (``"avgrad"`` those of :class:`AVGrad`).
    ``help(load_optimizer("yogi"))`` says what one is.

    Args:
        name: one of :func:`available_optimizers`.

    Raises:
        ValueError: there is no optimizer of that name.

    >>> import torch
    >>> load_optimizer("yogi")([torch.nn.Parameter(torch.zeros(2))], lr=1e-2).coefficients()["c"]
    0.0
    """
    if name not in BY_NAME:
        raise ValueError(f"name must be one of {', '.join(available_optimizers())}, got {name!r}")
    return BY_NAME[name]
