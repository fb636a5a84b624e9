"""Whether ``native.cpp``, a second copy of the update, still is what :mod:`mada_optim.families` says."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mada_optim.families import Family, MADAFamily, OMADAFamily
from mada_optim.kernels.native.library import implemented
from mada_optim.warn import warn

# The methods that native.cpp and executor.py repeat.
_REPEATED = ("update", "buffers")
_CHECKOUT = Path(__file__).parents[4]


def is_written_out(family: Family) -> bool:
    """Whether ``native.cpp`` means to compute a family's update: MADA's and OMADA's, not what is derived from them."""
    return type(family) in (MADAFamily, OMADAFamily)


@lru_cache(maxsize=8)
def why_outdated(family: Family) -> str | None:
    """Why ``native.cpp`` does not compute a family's update, or None if it does. Warns in a checkout of the project.

    Args:
        family: one that is written out in ``native.cpp``. A library must be available.
    """
    if definition() in (None, implemented()):
        return None
    reason = f"what it repeats has changed: {' or '.join(_REPEATED)}, what they call, or names of theirs"
    if (_CHECKOUT / "pyproject.toml").is_file():
        warn(
            f"native.cpp does not implement {type(family).__name__} as families/ defines it: {reason}. The general "
            "kernels are used, which are slower. Change native.cpp as well; CONTRIBUTING.md says how."
        )
    return reason


def definition() -> str | None:
    """Checksum of what ``native.cpp`` repeats, or None where there is no source.

    That is the names of coefficients and constants, the values at which a frozen coefficient leaves out a part of the
    update, and the methods with all that they call. Comments, docstrings, annotations and the layout of the source do
    not count, nor does the version of Python.
    """
    shapes: dict[str, Any] = {}
    for kind in (MADAFamily, OMADAFamily):
        shapes[kind.__name__] = [(each.name, repr(each.frozen_at)) for each in kind.coefficients], list(kind.constants)
    waiting = [method for name in _REPEATED for method in _methods(name)]
    while waiting:
        function = waiting.pop()
        if function.__qualname__ in shapes:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except OSError:
            return None
        shapes[function.__qualname__] = _shape(tree)
        for name in {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(tree)}:
            value = function.__globals__.get(name)
            if inspect.isfunction(value) and value.__module__.startswith("mada_optim."):
                waiting.append(value)
            elif isinstance(value, (int, float, tuple)):
                shapes[name] = repr(value)
            waiting += _methods(name)
    return hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16]


def _methods(name: str) -> list[Callable[..., Any]]:
    """The methods of that name of the families that are written out, and of those that they are derived from."""
    kinds = dict.fromkeys((*OMADAFamily.__mro__, *MADAFamily.__mro__))
    values = (getattr(vars(kind).get(name), "__func__", vars(kind).get(name)) for kind in kinds)
    return [value for value in values if inspect.isfunction(value)]


def _shape(node: Any) -> Any:
    """A syntax tree as nested lists, without what says nothing or is not the same in all versions of Python."""
    if isinstance(node, list):
        return [_shape(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields: Mapping[str, Any] = dict(ast.iter_fields(node))
    kept = {name: value for name, value in fields.items() if name not in ("annotation", "returns")}
    return [type(node).__name__, *([name, _shape(value)] for name, value in kept.items() if value not in (None, []))]


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
