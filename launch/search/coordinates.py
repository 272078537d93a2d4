"""Parallel coordinates of a search's trials as inline SVG: an axis per key, the metric last."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evspan.data_prep.report.markup import safe
from evspan.launch.search.summary import SearchSummary
from evspan.launch.sweep.registry import Run, short_names
from evspan.launch.sweep.state import State, number
from markupsafe import Markup

WIDTH = 860
HEIGHT = 320
SIDE = 60  # left and right of the outer axes
TOP = 34
BOTTOM = 26
MOST_LABELS = 12  # choices of an axis that are written
MOST_LETTERS = 18  # of a label


@dataclass(frozen=True)
class Axis:
    """A vertical axis.

    name: its heading. labels: (position, text); a position is 0 at the bottom and 1 at the top.
    position: of the value of a run, from its text; None if it is outside of the axis.
    """

    name: str
    labels: Sequence[tuple[float, str]]
    position: Callable[[str], float | None]


def parallel_coordinates(summary: SearchSummary, colour_of: Callable[[Run], str]) -> Markup | None:
    """The figure; None with fewer than two trials that have a value.

    Args:
        colour_of: CSS declaration of a run's colour.
    """
    runs = [run for run in summary.runs if run.name in summary.values]
    if len(runs) < 2:
        return None
    keys = list(summary.info.ranges)
    names = short_names(keys)
    axes = [_axis(name, summary.info.ranges[key]) for key, name in zip(keys, names, strict=True)]
    metric_axis = _metric_axis(summary)
    columns = _columns(len(axes) + 1)
    parts = []
    for axis, x in zip([*axes, metric_axis], columns, strict=True):
        parts += _drawn(axis, x)
    for run in runs:
        texts = [run.overrides.get(key, "") for key in keys]
        positions = [axis.position(text) for axis, text in zip(axes, texts, strict=True)]
        positions.append(metric_axis.position(str(summary.values[run.name])))
        parts.append(_line(summary, run, colour_of(run), columns, positions))
    name = f"trials by {safe(summary.info.metric_name)}"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "".join(parts)
    # Built of numbers and escaped text.
    return Markup(f'<svg role="img" aria-label="{name}" {size}>{body}</svg>')


def _columns(count: int) -> list[float]:
    gap = (WIDTH - 2 * SIDE) / max(1, count - 1)
    return [SIDE + gap * number for number in range(count)]


# -- axes ----------------------------------------------------------------------------------------
def _axis(name: str, range_: Mapping[str, Any]) -> Axis:
    if range_.get("kind") == "choice":
        return _choice_axis(name, [str(value) for value in range_.get("values", [])])
    low = number(range_.get("low"))
    high = number(range_.get("high"))
    if low is None or high is None:
        return Axis(name, [], lambda text: None)
    return _number_axis(name, low, high, log=bool(range_.get("log")))


def _metric_axis(summary: SearchSummary) -> Axis:
    values = list(summary.values.values())
    return _number_axis(summary.info.metric_name, min(values), max(values), log=False)


def _number_axis(name: str, low: float, high: float, *, log: bool) -> Axis:
    log = log and low > 0
    scale: Callable[[float], float] = math.log if log else float
    length = scale(high) - scale(low)

    def position(text: str) -> float | None:
        try:
            value = float(text)
        except ValueError:
            return None
        if not math.isfinite(value) or (log and value <= 0):
            return None
        if not length:
            return 0.5
        return min(1.0, max(0.0, (scale(value) - scale(low)) / length))

    middle = math.sqrt(low * high) if log else (low + high) / 2
    labels = [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
    return Axis(name, labels, position)


def _choice_axis(name: str, values: Sequence[str]) -> Axis:
    gap = 1 / max(1, len(values) - 1)
    positions = {value: gap * number for number, value in enumerate(values)}
    if len(values) == 1:
        positions = {values[0]: 0.5}
    labels = [(position, value) for value, position in positions.items()]
    return Axis(name, labels[:MOST_LABELS], positions.get)


# -- drawing -------------------------------------------------------------------------------------
def _y(position: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - position)


def _drawn(axis: Axis, x: float) -> list[str]:
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(1):.1f}" y2="{_y(0):.1f}"/>',
        f'<text class="label middle" x="{x:.1f}" y="14">{safe(_short(axis.name))}</text>',
    ]
    for position, text in axis.labels:
        y = f"{_y(position) + 3:.1f}"
        parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{y}">{safe(_short(text))}</text>')
    return parts


def _line(
    summary: SearchSummary,
    run: Run,
    colour: str,
    columns: Sequence[float],
    positions: Sequence[float | None],
) -> str:
    points = [
        f"{x:.1f},{_y(position):.1f}"
        for x, position in zip(columns, positions, strict=True)
        if position is not None
    ]
    style = "run pruned" if run.state is State.pruned else "run"
    overrides = " ".join(f"{key}={run.overrides.get(key, '')}" for key in summary.info.ranges)
    value = f"{summary.info.metric_name} {summary.values[run.name]:.4g}"
    tip = f"{run.name} ({run.state.value}): {value}; {overrides}"
    return (
        f'<polyline class="{style}" style="{colour}" points="{" ".join(points)}">'
        f"<title>{safe(tip)}</title></polyline>"
    )


def _short(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
