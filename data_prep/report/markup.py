"""Text as HTML: escaping, control characters, table cells of numbers."""

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from evspan.data_prep.report.number_format import count
from markupsafe import Markup, escape


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
    """A table cell: the formatted number, and its exact value in `data-value`, to sort by.

    None (a ratio of nothing) is shown as a dash.
    """
    if value is None:
        return Markup('<td class="n" data-value="">–</td>')
    exact = value.item() if isinstance(value, np.generic) else value
    return Markup('<td class="n" data-value="{}">{}</td>').format(repr(exact), form(exact))
