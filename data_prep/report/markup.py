"""Text, numbers and tables as HTML."""

import unicodedata
from collections.abc import Callable
from html import escape

import numpy as np


def printable(text: object) -> str:
    """Without what neither terminals nor XML can hold: control characters, line breaks, broken UTF-8."""
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") else c
        for c in str(text)
    )


def safe(text: object) -> str:
    """Text for HTML and SVG."""
    return escape(printable(text))


def short(value: float) -> str:
    """Three digits and a prefix: 12.3 k."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def tick(value: float) -> str:
    """The same for round numbers: 12 k."""
    number, _, prefix = short(value).partition(" ")
    return f"{float(number):g} {prefix}".rstrip()


def percent(share: float) -> str:
    """Two digits: 0.031 %, 4.2 %, 97 %."""
    if 0 < share < 1e-5:
        return "under 0.001 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """1 234 567, with narrow spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")


def cell(value: float | int | None, form: Callable[[float], str] = count) -> str:
    """A cell with a number: rounded to read, exact in `data-value`."""
    if value is None:
        return '<td class="n" data-value="">–</td>'
    exact = value.item() if isinstance(value, np.generic) else value
    return f'<td class="n" data-value="{exact!r}">{form(exact)}</td>'


def decimals(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}".replace(",", "\u202f")


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
