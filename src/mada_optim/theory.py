"""Deprecated: the functions of theory are in ``mada_lab.theory`` now."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Warn, and return what ``mada_lab.theory`` has under that name: a function, or a module."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("mada_optim.theory is deprecated; use mada_lab.theory", DeprecationWarning, stacklevel=2)
    # By its name: the library does not depend on the laboratory.
    theory = import_module("mada_lab.theory")
    return getattr(theory, name) if hasattr(theory, name) else import_module(f"mada_lab.theory.{name}")
