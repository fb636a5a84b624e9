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

import torch

from mada_optim.families import Family, OMADAFamily
from mada_optim.kernels.native.library import implemented
from mada_optim.warn import warn

# The methods that native.cpp and native.py repeat.
_REPEATED = ("update", "buffers")
_CHECKOUT = Path(__file__).parents[4]


@lru_cache(maxsize=8)
def why_outdated(family: Family) -> str | None:
    """Why ``native.cpp`` does not compute a family's update, or None if it does. Warns in a checkout of the project.

    Args:
        family: one that is written out in ``native.cpp``. A library must be available.
    """
    names = implemented()
    lacking = [
        f"it does not know the {kind[:-1]} {name!r}"
        for kind, wanted in _names(family).items()
        for name in wanted
        if name not in names[kind]
    ]
    if not lacking and definition() not in (None, *names["definition"]):
        lacking = [f"a method that it repeats has changed: {' or '.join(_REPEATED)}, or what they call"]
    if not lacking:
        return None
    if (_CHECKOUT / "pyproject.toml").is_file():
        warn(
            f"native.cpp does not implement {type(family).__name__} as families/ defines it: {lacking[0]}. The general "
            "kernels are used, which are slower. Change native.cpp as well; CONTRIBUTING.md says how."
        )
    return lacking[0]


def _names(family: Family) -> dict[str, tuple[str, ...]]:
    """What a family has, by the kinds that native.cpp declares. Buffers: where nothing is left out."""
    coefficients = tuple(coefficient.name for coefficient in family.coefficients)
    switched_on = {name: True if value is False else value for name, value in family.constants.items()}
    buffers = family.buffers({**dict.fromkeys(coefficients, torch.tensor(0.5)), **switched_on})
    return {"coefficients": coefficients, "buffers": buffers, "constants": tuple(family.constants)}


def definition(family: type[Family] = OMADAFamily) -> str | None:
    """Checksum of the methods that ``native.cpp`` repeats and of what they call, or None where there is no source.

    Comments, docstrings, annotations and the layout of the source do not count, nor does the version of Python.
    """
    # At which values a coefficient leaves out a part of the update is known to native.py, too.
    shapes: dict[str, Any] = {f"special {one.name}": repr(one.special) for one in family.coefficients}
    waiting = [method for name in _REPEATED for method in _methods(family, name)]
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
            waiting += _methods(family, name)
    return hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16]


def _methods(family: type[Family], name: str) -> list[Callable[..., Any]]:
    """The methods of that name of a family and of those that it is derived from."""
    values = (getattr(vars(kind).get(name), "__func__", vars(kind).get(name)) for kind in family.__mro__)
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
