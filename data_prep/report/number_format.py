"""Numbers as text for the report pages: counts, rounded numbers, fractions, durations."""

from collections.abc import Callable

NARROW_SPACE = "\u202f"  # between groups of three digits


def count(value: float) -> str:
    """All digits of a whole number: 1 234 567."""
    return f"{value:,.0f}".replace(",", NARROW_SPACE)


def decimals(digits: int) -> Callable[[float], str]:
    """A format with a fixed number of digits after the point."""
    return lambda value: f"{value:,.{digits}f}".replace(",", NARROW_SPACE)


def short(value: float) -> str:
    """Three significant digits and an SI prefix: 12.3 k."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def tick(value: float) -> str:
    """A round number with an SI prefix, without trailing zeros: 12 k."""
    number, _, prefix = short(value).partition(" ")
    return f"{float(number):g} {prefix}".rstrip()


def percent(fraction: float) -> str:
    """Two significant digits: 0.031 %, 4.2 %, 97 %."""
    if 0 < fraction < 1e-5:
        return "under 0.001 %"
    if fraction < 0.0995:
        return f"{100 * fraction:.2g} %"
    return f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, with one decimal."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
