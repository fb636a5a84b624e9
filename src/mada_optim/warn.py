"""Warnings that point at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch

# torch wraps the methods of optimizers.
_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of the stack that belongs neither to this package nor to torch."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
