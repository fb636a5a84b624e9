"""Lines over steps, drawn in a terminal with braille characters, which have two by four dots each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

# The bit of each dot of a braille character, by column and row.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


@dataclass(frozen=True)
class ChartLine:
    """A line: what stands at its end, its colour, and its points."""

    label: str
    colour: str
    points: Sequence[tuple[int, float]]


def chart(lines: Sequence[ChartLine], last_step: int, width: int, height: int) -> Text:
    """Return the lines in a frame of ``width`` by ``height`` characters, their axes included.

    The height of the first steep fall is left out, beside which differences would not be seen.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Text("\n" * (height - 1))
    ends = [(line.points[-1][1], f" {line.label} {line.points[-1][1]:.2f}", line.colour) for line in drawn]
    low = min(value for line in drawn for _, value in line.points)
    latest = min(line.points[-1][0] for line in drawn)
    begin = min(0.05 * last_step, 0.3 * latest)
    high = max(value for line in drawn for step, value in line.points if step >= begin)
    high = high if high > low else low + 1.0
    axis = [f"{high:.1f} ", f"{low:.1f} "]
    left = max(map(cell_len, axis))
    columns, rows = max(8, width - left - max(cell_len(text) for _, text, _ in ends)), max(2, height - 1)
    cells = [[_BLANK] * columns for _ in range(rows)]
    colours = [[""] * columns for _ in range(rows)]
    for line in drawn:
        for x, y in _dots(line.points, last_step, low, high, 2 * columns, 4 * rows):
            cells[y // 4][x // 2] |= _BITS[x % 2][y % 4]
            colours[y // 4][x // 2] = line.colour
    labels: dict[int, tuple[str, str]] = {}
    row = -1
    for number, (value, label, colour) in enumerate(sorted(ends, reverse=True)):
        wanted = round((high - min(value, high)) / (high - low) * (rows - 1))
        row = min(max(wanted, row + 1), rows - len(ends) + number)  # each has a row of its own
        labels[row] = label, colour
    text = Text(no_wrap=True)
    for row in range(rows):
        text.append((axis[0] if row == 0 else axis[1] if row == rows - 1 else "").rjust(left), style="dim")
        for cell, colour in zip(cells[row], colours[row], strict=True):
            text.append(chr(cell), style=colour)
        text.append(*labels.get(row, ("", "")))
        text.append("\n")
    text.append(f"{' ' * left}step 0".ljust(left + columns - len(str(last_step))) + str(last_step), style="dim")
    return text


def _dots(
    points: Sequence[tuple[int, float]], last_step: int, low: float, high: float, width: int, height: int
) -> list[tuple[int, int]]:
    """Dots of a line, without gaps from one column to the next."""
    by_column: dict[int, list[float]] = {}
    for step, value in points:
        by_column.setdefault(min(width - 1, step * width // (last_step + 1)), []).append(value)
    dots: list[tuple[int, int]] = []
    before: int | None = None
    for column, values in sorted(by_column.items()):
        value = sum(values) / len(values)
        if value > high:
            continue
        y = round((high - value) / (high - low) * (height - 1))
        nearest = y if before is None else before + (y > before) - (y < before)
        dots += [(column, at) for at in range(min(y, nearest), max(y, nearest) + 1)]
        before = y
    return dots
