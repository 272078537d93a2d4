"""Formats tables for the terminal."""

from collections.abc import Collection, Sequence

from evspan.conf.text import printable

CELL_WIDTH = 36  # characters; wider cells are cut, except in the last column


def format_table(
    rows: Sequence[Sequence[str]],
    *,
    right_aligned: Collection[int] = (),
    width: int | None = None,
) -> list[str]:
    """Lines with aligned columns.

    Args:
        rows: cells; the first row is the heading. Control characters are escaped.
        right_aligned: indices of the columns of numbers.
        width: longer lines are cut to this number of characters.
    """
    *columns, last_column = zip(*(map(printable, row) for row in rows), strict=True)
    padded = []
    for i, column in enumerate(columns):
        cells = [cut(cell, CELL_WIDTH) for cell in column]
        padded.append(_pad(cells, i in right_aligned))
    padded.append(_pad(last_column, len(columns) in right_aligned))
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    return [cut(line, width) for line in lines] if width else lines


def _pad(column: Sequence[str], right_aligned: bool) -> list[str]:
    """The cells of a column, filled with spaces to the width of the widest."""
    width = max(len(cell) for cell in column)
    if right_aligned:
        return [cell.rjust(width) for cell in column]
    return [cell.ljust(width) for cell in column]


def cut(text: str, width: int) -> str:
    """`text`, or its beginning and an ellipsis if it is longer than `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
