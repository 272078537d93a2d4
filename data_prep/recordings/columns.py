"""Columns of events in text and NPZ files: their names, their order and the unit of their times."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import TimeUnit
from evspan.data_prep.recordings.rates import time_unit_warning
from numpy.typing import NDArray

COLUMNS = ("t", "x", "y", "p")
ALIASES = {"x": ("x",), "y": ("y",), "p": ("p", "pol", "polarity", "polarities")}
TIME_NAME = re.compile(
    r"(?:t|ts|time|times|timestamp|timestamps)"
    r"(?:[_ ]*[_ (\[](?P<unit>s|sec|seconds|ms|us|usec|µs|ns|nsec)[)\]]?)?"
)
UNIT_NAMES = {"sec": "s", "seconds": "s", "usec": "us", "µs": "us", "nsec": "ns"}
# Powers of ten: microseconds per unit.
EXPONENTS = {TimeUnit.s: 6, TimeUnit.ms: 3, TimeUnit.us: 0, TimeUnit.ns: -3}
# Unix times of 2001 to 2039 in whole microseconds and nanoseconds. In another unit they would be
# longer than any recording; those of seconds and milliseconds may be a camera's own clock.
UNIX_TIMES = {TimeUnit.us: (1e15, 2.2e15), TimeUnit.ns: (1e18, 2.2e18)}
LATEST_US = 1 << 53  # 285 years: times beyond are not in microseconds
DECIMALS_OF_SECONDS = 6  # digits after the point, which only seconds need
SET_UNIT = (
    "Name the column t_s, t_ms, t_us or t_ns (in the first line: t_ms,x,y,p), or set "
    "dataset.time_unit=s, ms, us or ns of evspan prep, or --time-unit of evspan infer"
)


@dataclass(frozen=True)
class NamedColumn:
    """What a column's name says: one of COLUMNS, and of t perhaps the unit."""

    name: str
    unit: TimeUnit | None = None


def named_column(name: str) -> NamedColumn | None:
    """The column of this name, in any case; None where it is none of a recording's."""
    name = name.strip().lower()
    match = TIME_NAME.fullmatch(name)
    if match:
        unit = match["unit"]
        return NamedColumn("t", TimeUnit(UNIT_NAMES.get(unit, unit)) if unit else None)
    for column, aliases in ALIASES.items():
        if name in aliases:
            return NamedColumn(column)
    return None


@dataclass(frozen=True)
class TimeSample:
    """What shows in which unit times are.

    Attributes:
        first, last: times of the recording's first and last event.
        decimals: the most digits after the point; 0: whole numbers.
        events: their number, roughly.
    """

    first: float
    last: float
    decimals: int
    events: int


def certain_unit(path: Path, times: TimeSample, pixels: int) -> TimeUnit:
    """The unit of times that a file does not name.

    Whole numbers are microseconds, numbers with 6 or more digits after the point seconds, as far
    as duration and event rate are plausible then. Fewer digits are seconds or milliseconds: what
    the rate leaves.

    Args:
        pixels: of the sensor.

    Raises:
        RecordingError: more than one unit, or none, is plausible.
    """
    if times.events < 2 and not times.decimals:
        return TimeUnit.us
    if not times.decimals:
        for unit, (least, most) in UNIX_TIMES.items():
            if least <= times.first <= most:
                return unit
    candidates = [TimeUnit.us]
    if times.decimals >= DECIMALS_OF_SECONDS:
        candidates = [TimeUnit.s]
    elif times.decimals:
        candidates = [TimeUnit.s, TimeUnit.ms]
    plausible = [unit for unit in candidates if not _doubt(times, unit, pixels)]
    if len(plausible) == 1:
        return plausible[0]
    spans = ", ".join(
        f"{unit.value} {(times.last - times.first) * unit.in_us / 1e6:.3g} s"
        for unit in (TimeUnit.s, TimeUnit.ms, TimeUnit.us, TimeUnit.ns)
    )
    raise RecordingError(
        f"{path}: the unit of the times is not certain. They go from {times.first:.15g} to "
        f"{times.last:.15g}, with about {times.events} events; as {spans}. {SET_UNIT}"
    )


def _doubt(times: TimeSample, unit: TimeUnit, pixels: int) -> str:
    span_us = (times.last - times.first) * unit.in_us
    return time_unit_warning(times.events, max(0, round(min(span_us, 1e18))), pixels)


def require_usual_order(path: Path, columns: Sequence[NDArray[Any]], remedy: str) -> None:
    """Refuses columns without names that are evidently not in the order t, x, y, p.

    Args:
        columns: four of (n,) numbers: the first events.
        remedy: how to name them; the order that is likely is filled in for {}.

    Raises:
        RecordingError: they are in another order.
    """
    polarity = [i for i in range(4) if _is_polarity(columns[i])]
    times = [i for i in range(4) if i not in polarity and _is_time(columns[i])]
    if len(columns[0]) < 2 or len(polarity) != 1 or len(times) != 1:
        return
    if (times[0], polarity[0]) == (0, 3):
        return
    pixels = iter("xy")
    order = []
    for i in range(4):
        if i in times:
            order.append("t")
        else:
            order.append("p" if i in polarity else next(pixels))
    raise RecordingError(
        f"{path}: the columns have no names and are not in the order t, x, y, p: they look like "
        f"{', '.join(order)}. {remedy.format(','.join(order))}"
    )


def _is_polarity(column: NDArray[Any]) -> bool:
    values = np.unique(column)
    return len(values) == 2 and values[1] == 1 and values[0] in (-1, 0)


def _is_time(column: NDArray[Any]) -> bool:
    """Whether it rises and never falls."""
    return bool((np.diff(column) >= 0).all() and column[-1] > column[0])


def pixel(column: NDArray[Any]) -> NDArray[np.uint16]:
    """Coordinates as uint16.

    What no uint16 can hold becomes the largest one, which lies outside every sensor: it must not
    wrap into one.
    """
    if column.dtype == np.uint16:
        return column
    return np.where((column < 0) | (column > 65535), 65535, column).astype(np.uint16)
