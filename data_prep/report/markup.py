"""Text as HTML: escaping, control characters, table cells of numbers."""

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from evspan.data_prep.report.number_format import count, decimals, duration, percent, short, tick
from markupsafe import Markup, escape

__all__ = [
    "count",
    "decimals",
    "percent",
    "short",
    "tick",
]  # until all callers import number_format


def printable(text: object) -> str:
    """Replaces what terminals and XML cannot show by U+FFFD.

    That is control characters, line breaks and invalid UTF-8.
    """
    return "".join("\ufffd" if _is_unprintable(char) else char for char in str(text))


def _is_unprintable(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def safe(text: object) -> str:
    """Text for HTML and SVG that is built by hand: escaped and printable."""
    return str(escape(printable(text)))


def number_cell(
    value: float | np.integer[Any] | np.floating[Any] | None,
    form: Callable[[float], str] = count,
) -> Markup:
    """A table cell: the number formatted by `form`, and its exact value for sorting in `data-value`.

    None (a ratio of nothing) is shown as a dash.
    """
    if value is None:
        return Markup('<td class="n" data-value="">–</td>')
    exact = value.item() if isinstance(value, np.generic) else value
    return Markup('<td class="n" data-value="{}">{}</td>').format(repr(exact), form(exact))


cell = number_cell  # the pages that are not templates yet
span = duration


def section(title: str, name: str, content: str, note: str = "") -> str:
    return f'<section id="{name}"><h2>{title}</h2>{f"<p class=note>{note}</p>" if note else ""}{content}</section>\n'


def table(
    name: str,
    heads: list[tuple[str, bool]],
    rows: list[str],
    foot: str = "",
    sortable: bool = False,
) -> str:
    """heads: (words, whether it is a column of numbers)."""
    ths = "".join(
        f'<th scope="col"{" class=n" if numbers else ""}>{f"<button>{words}</button>" if sortable else words}</th>'
        for words, numbers in heads
    )
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr>{ths}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"{f'<tfoot>{foot}</tfoot>' if foot else ''}</table></div>"
    )
