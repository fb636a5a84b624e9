"""Docstrings are written for ``help()`` and doctest; this makes Markdown of them before the reference is built."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
# A doctest ends at an empty line.
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*\n).+)*", re.MULTILINE)


# Arguments that are described together, with the lines that continue the description.
_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+)(:.*(?:\n\1 +.*)*)", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """Roles become code, doctests and literal blocks become blocks of code, and every argument gets its own line."""
    text = _ROLE.sub(r"`\1`", docstring.replace("``", "`"))
    text = _SEVERAL.sub(lambda m: "\n".join(m[1] + name + m[3] for name in m[2].split(", ")), text)
    return _DOCTEST.sub(r"```pycon\n\g<0>\n```", _LITERAL.sub(":", text))


class Docstrings(griffe.Extension):
    """Applied to every object of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
