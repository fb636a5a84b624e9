"""How counts, names and losses are written for people."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "seed"), count(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many others there are.

    >>> listed(["a", "b", "c", "d"], most=2), listed(["a"], most=2)
    ('a, b and 2 others', 'a')
    """
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {count(others, 'other')}" if others > 0 else "")


def loss_or_diverged(loss: float | None) -> str:
    """Return a final loss as text; None is that of a diverged run."""
    return "diverged" if loss is None else rounded(loss)


def rounded(value: float, sign: str = "") -> str:
    """Return a loss, in a form that stays short where one blew up.

    >>> rounded(1.70123), rounded(-0.1, "+"), rounded(1534319905996.8)
    ('1.7012', '-0.1000', '1.53e+12')
    """
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
