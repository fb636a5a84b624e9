"""Tables for notebooks: what an optimizer, a scale or a history shows, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header, and rows of as many cells."""


def as_html(heading: str, tables: Sequence[Table]) -> str:
    """Return a heading and tables as HTML, which looks the same in light and dark notebooks.

    >>> as_html("a < b", [(("x",), [("1",)])])
    '<div><b>a &lt; b</b><table><tr><th>x</th></tr><tr><td>1</td></tr></table></div>'
    """
    parts = [f"<b>{html.escape(heading)}</b>"]
    for header, rows in tables:
        lines = [_line("th", header), *(_line("td", row) for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
    return f"<div>{''.join(parts)}</div>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
