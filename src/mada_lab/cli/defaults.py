"""Defaults for help texts, read where the project declares them.

Importing the modules that declare them would import torch, for which ``--help`` must not wait. Their source is read
instead: it is the same file, so a help text and a default cannot differ.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = Path(__file__).parents[2]


def declared(reference: str) -> Any:
    """Return the value that a module declares for a name.

    Args:
        reference: ``module:name`` of a constant, ``module:Class.field``, or ``module:function.parameter``. The value
            must be a literal.

    >>> declared("mada_lab.run.config:RunConfig.steps"), declared("mada_lab.tasks.packing:pack.tokenizer")
    (1000, 'gpt2')
    """
    module, _, names = reference.partition(":")
    node: ast.AST = _parsed(module)
    for name in names.split("."):
        node = _values(node)[name]
    return ast.literal_eval(node)


def as_text(value: Any) -> str:
    """Return a default as people would type it.

    >>> as_text(0.003), as_text(0.05), as_text(1e4), as_text((0.9, 0.99))
    ('3e-3', '0.05', '10000', '0.9 0.99')
    """
    if isinstance(value, tuple):
        return " ".join(map(as_text, value))
    if not isinstance(value, float):
        return str(value)
    if 0 < value < 0.01:
        digits, exponent = f"{value:e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:g}"


@cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(_PACKAGES.joinpath(*module.split(".")).with_suffix(".py").read_bytes())


def _values(node: ast.AST) -> dict[str, ast.AST]:
    """Return what a module, a class or a function declares, by name: values, and classes and functions themselves."""
    if isinstance(node, ast.FunctionDef):
        positional = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
        by_keyword = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        return {argument.arg: value for argument, value in (*positional, *by_keyword) if value is not None}
    values: dict[str, ast.AST] = {}
    for statement in getattr(node, "body", ()):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            values[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign | ast.Assign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            values |= {target.id: statement.value for target in targets if isinstance(target, ast.Name)}
    return values
