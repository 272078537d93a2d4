"""Small SVG charts for an HTML page: axes with units, tooltips, colours from its style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from evspan.data_prep.report.markup import safe
from evspan.data_prep.report.number_format import tick
from markupsafe import Markup
from numpy.typing import NDArray

Ticks = Sequence[tuple[float, str]]  # value, text

# Margins around the plot and sizes of its parts, in SVG units.
LEFT = 46
RIGHT = 10
TOP = 26
BOTTOM = 38
LABEL_STRIP = 7  # height of the strip of labelled frames under a curve

ROW_LABEL_WIDTH = 130
ROW_LABEL_LETTERS = 18
BAR_HEIGHT = 12
ROW_GAP = 12
ROWS_WIDTH = 560


def round_ticks(high: float, count: int = 4) -> list[float]:
    """About `count` round steps from 0 to `high`, or to the next round number above it."""
    if not high > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(high / count))
    candidates = [factor * power for factor in (1, 2, 2.5, 5, 10, 20)]
    step = next(step for step in candidates if step * count >= high * (1 - 1e-9))
    num_steps = math.ceil(high / step - 1e-9)
    return [i * step for i in range(num_steps + 1)]


@dataclass(frozen=True)
class Axes:
    """The plane of a chart: data from (x0, 0) to (x1, y1), drawn `width` x `height`."""

    x0: float
    x1: float
    y1: float
    width: int = 560
    height: int = 240
    below: int = 0  # additional space under the plot

    def x(self, value: float) -> float:
        """Horizontal position of a value."""
        plot_width = self.width - LEFT - RIGHT
        return LEFT + plot_width * (value - self.x0) / ((self.x1 - self.x0) or 1)

    def y(self, value: float) -> float:
        """Vertical position of a value; positions grow downwards."""
        plot_height = self.height - TOP - BOTTOM - self.below
        return TOP + plot_height * (1 - value / self.y1)

    def svg(
        self,
        content: list[str],
        *,
        name: str,
        x_label: str,
        y_label: str,
        x_ticks: Ticks,
        y_ticks: Ticks,
    ) -> Markup:
        """The chart with `content` drawn over the grid. name: for screen readers."""
        base = self.y(0)
        right = self.width - RIGHT
        below = base + self.below + 15
        parts = [self._grid_line(value, text) for value, text in y_ticks]
        parts += content
        for value, text in x_ticks:
            parts.append(_text("tick middle", f"{self.x(value):.1f}", f"{below:.1f}", text))
        parts.append(_text("label", "0", "12", y_label))
        parts.append(_text("label end", f"{right}", f"{self.height - 5}", x_label))
        return _svg(self.width, self.height, name, parts)

    def _grid_line(self, value: float, text: str) -> str:
        kind = "grid" if value else "base"
        right = self.width - RIGHT
        y = self.y(value)
        line = f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return line + _text("tick end", f"{LEFT - 6}", f"{y + 3.5:.1f}", text)


def _svg(width: int, height: int, name: str, content: list[str], kind: str = "chart") -> Markup:
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{safe(name)}">{"".join(content)}</svg>'
    )


def _text(kind: str, x: str, y: str, text: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{safe(text)}</text>'


def _bar(kind: str, x: float, y: float, width: float, height: float, tip: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"><title>{safe(tip)}</title></rect>'
    )


def histogram(
    edges: Sequence[float],
    values: Sequence[float],
    tips: Sequence[str],
    *,
    name: str,
    x_label: str,
    y_label: str,
    x_ticks: Ticks,
    unit: str = "",
    marks: Ticks = (),
    highlight_last: bool = False,
) -> Markup:
    """Bars of `values` (n) between `edges` (n + 1).

    Args:
        tips: (n) tooltips.
        unit: of the values, after the numbers of the vertical axis.
        marks: vertical lines at a value, with text.
        highlight_last: the last bar has another colour.
    """
    y_ticks = round_ticks(max(values, default=0))
    axes = Axes(edges[0], edges[-1], y_ticks[-1])
    base = axes.y(0)
    content = []
    for i, (left, right) in enumerate(pairwise(edges)):
        if not values[i]:
            continue
        kind = "bar apart" if highlight_last and i == len(values) - 1 else "bar"
        width = max(axes.x(right) - axes.x(left) - 1, 0.5)
        top = axes.y(values[i])
        content.append(_bar(kind, axes.x(left) + 0.5, top, width, base - top, tips[i]))
    for value, text in marks:
        x = axes.x(value)
        content.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{base:.1f}"/>'
        )
        content.append(_text("tick", f"{x + 4:.1f}", f"{TOP - 1}", text))
    return axes.svg(
        content,
        name=name,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_ticks,
        y_ticks=[(value, f"{value:g}{unit}" if unit else tick(value)) for value in y_ticks],
    )


def grouped_bars(
    rows: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[Sequence[str]],
    *,
    name: str,
    x_label: str,
) -> Markup:
    """Horizontal bars in per cent: one of each series per row.

    Args:
        series: CSS class of the bars, and the value of each row.
        tips: tooltips by series and row.
    """
    highest = max((max(values, default=0) for _, values in series), default=0)
    ticks = round_ticks(highest)
    scale = (ROWS_WIDTH - ROW_LABEL_WIDTH - RIGHT - 14) / ticks[-1]
    bars_height = BAR_HEIGHT * len(series)
    row_height = bars_height + ROW_GAP
    bottom = 6 + row_height * len(rows)
    content = []
    for value in ticks:
        x = f"{ROW_LABEL_WIDTH + value * scale:.1f}"
        content.append(f'<line class="grid" x1="{x}" x2="{x}" y1="2" y2="{bottom}"/>')
        content.append(_text("tick middle", x, f"{bottom + 14}", f"{value:g} %"))
    for i, row in enumerate(rows):
        top = 6 + i * row_height + ROW_GAP / 2
        middle = f"{top + bars_height / 2 + 4:.1f}"
        content.append(_text("row end", f"{ROW_LABEL_WIDTH - 8}", middle, _shortened(row)))
        for k, (kind, values) in enumerate(series):
            width = max(values[i] * scale, 0.5)
            y = top + k * BAR_HEIGHT
            content.append(_bar(kind, ROW_LABEL_WIDTH, y, width, BAR_HEIGHT - 2, tips[k][i]))
    content.append(_text("label end", f"{ROWS_WIDTH - RIGHT}", f"{bottom + 32}", x_label))
    return _svg(ROWS_WIDTH, int(bottom + 38), name, content)


def _shortened(text: str) -> str:
    if len(text) <= ROW_LABEL_LETTERS:
        return text
    return f"{text[: ROW_LABEL_LETTERS - 1]}…"


def over_time(
    edges_s: NDArray[np.float64],
    rate: NDArray[np.float64],
    labelled: NDArray[np.float64],
    tips: Sequence[str],
    *,
    name: str,
    y_max: float,
    width: int = 420,
) -> Markup:
    """A step curve of a rate, with a strip below it that shows the labelled frames.

    Args:
        edges_s: (n + 1,) seconds.
        rate: (n,) events per second between the edges.
        labelled: (n,) fraction of labelled frames; the strip is as opaque as this is high.
        tips: (n) tooltips.
        y_max: highest rate of the axis, so that several charts share one scale.
    """
    y_ticks = round_ticks(y_max, 3)
    axes = Axes(
        float(edges_s[0]), float(edges_s[-1]), y_ticks[-1], width, height=170, below=LABEL_STRIP + 2
    )
    x = [axes.x(t) for t in edges_s.tolist()]
    base = axes.y(0)
    steps = " ".join(
        f"V{axes.y(value):.1f} H{right:.1f}"
        for value, right in zip(rate.tolist(), x[1:], strict=True)
    )
    content = [f'<path class="area" d="M{x[0]:.1f} {base:.1f} {steps} V{base:.1f} Z"/>']
    content += _label_strip(x, base, labelled)
    for (left, right), tip in zip(pairwise(x), tips, strict=True):
        content.append(_bar("hit", left, TOP, right - left, base + LABEL_STRIP - TOP, tip))
    return axes.svg(
        content,
        name=name,
        x_label="time, s",
        y_label="events per second",
        x_ticks=_second_ticks(axes),
        y_ticks=[(value, tick(value)) for value in y_ticks],
    )


def _label_strip(x: list[float], base: float, labelled: NDArray[np.float64]) -> list[str]:
    """Rectangles under the curve; neighbours of equal opacity are one rectangle, without seams."""
    opacity = (labelled / (labelled.max(initial=0) or 1)).round(2)
    changes = np.flatnonzero(np.diff(opacity)) + 1
    return [
        f'<rect class="rug" x="{x[first]:.1f}" y="{base + 2:.1f}" '
        f'width="{x[last] - x[first]:.1f}" height="{LABEL_STRIP}" opacity="{opacity[first]:g}"/>'
        for first, last in pairwise([0, *changes.tolist(), opacity.size])
        if opacity[first]
    ]


def band_over_time(
    times_s: NDArray[np.float64],
    low: NDArray[np.float64],
    middle: NDArray[np.float64],
    high: NDArray[np.float64],
    tips: Sequence[str],
    *,
    name: str,
) -> Markup:
    """The line `middle` (n,) at `times_s` (n,) and the band from `low` to `high` around it."""
    y_ticks = round_ticks(float(high.max()), 4)
    half = float(times_s[1] - times_s[0]) / 2 if times_s.size > 1 else 0.5
    axes = Axes(0.0, float(times_s[-1]) + half, y_ticks[-1], width=1140, height=230)
    lower = _points(axes, times_s, low)
    upper = _points(axes, times_s[::-1], high[::-1])
    content = [
        f'<polygon class="area" points="{lower} {upper}"/>',
        f'<polyline class="line" points="{_points(axes, times_s, middle)}"/>',
    ]
    for time, tip in zip(times_s.tolist(), tips, strict=True):
        left = axes.x(time - half)
        content.append(_bar("hit", left, TOP, axes.x(time + half) - left, axes.y(0) - TOP, tip))
    return axes.svg(
        content,
        name=name,
        x_label="time since the recording's first event, s",
        y_label="events per second",
        x_ticks=_second_ticks(axes, 10),
        y_ticks=[(value, tick(value)) for value in y_ticks],
    )


def _points(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return " ".join(
        f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)
    )


def _second_ticks(axes: Axes, count: int = 6) -> list[tuple[float, str]]:
    ticks = round_ticks(axes.x1 - axes.x0, count)
    return [
        (axes.x0 + seconds, f"{seconds:g}")
        for seconds in ticks
        if axes.x0 + seconds <= axes.x1 * 1.0001
    ]


def sparkline(values: NDArray[np.float64], name: str) -> Markup:
    """A curve of `values` (n,) without axes, from 0 to its largest value."""
    width = 90
    height = 18
    top = float(values.max(initial=0)) or 1.0
    x = np.linspace(1, width - 1, values.size)
    y = height - 1 - (height - 3) * values / top
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    content = [
        f"<title>{safe(name)}</title>",
        f'<polyline class="line" points="{points}"/>',
    ]
    return _svg(width, height, name, content, kind="spark")
