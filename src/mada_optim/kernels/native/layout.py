"""What Python and ``native.cpp`` hand each other, and in which order: one list for both sides.

``native.cpp`` is compiled below :func:`header`, which gives it the names of all coefficients and buffers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mada_optim.families import Family, MADAFamily, OMADAFamily


def _all_buffers(family: Family) -> tuple[str, ...]:
    """Names of a family's buffers where nothing is left out."""
    anything = dict.fromkeys((coefficient.name for coefficient in family.coefficients), torch.tensor(0.5))
    switched_on = {name: True if value is False else value for name, value in family.constants.items()}
    return family.buffers({**anything, **switched_on})


COEFFICIENTS = tuple(coefficient.name for coefficient in OMADAFamily.coefficients)
"""By which it differentiates. MADA's family has the first of them."""
ADVANCED = _all_buffers(MADAFamily())
"""Buffers that a step changes."""
BUFFERS = ("pending_grad", *_all_buffers(OMADAFamily()))
"""Tensors that are kept for a parameter. Of what else its state holds, native.cpp knows nothing."""


def header() -> str:
    """Return the lines of C++ that stand above ``native.cpp``."""
    return f"#define EACH_COEFFICIENT(X) {_each(COEFFICIENTS)}\n#define EACH_BUFFER(X) {_each(BUFFERS)}\n"


def _each(names: Iterable[str]) -> str:
    return " ".join(f"X({name})" for name in names)
