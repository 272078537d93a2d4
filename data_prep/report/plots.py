"""Small charts as SVG text for a page of HTML: axes with units, a tooltip on what is drawn, colours from the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from evspan.data_prep.report.markup import safe, tick
from numpy.typing import NDArray

LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 38  # room around the plot
RUG = 7  # height of the strip of labels under a curve


def round_ticks(high: float, count: int = 4) -> list[float]:
    """Round numbers, evenly spaced from 0 to `high` or the next one past it."""
    if not high > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(high / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power * count >= high * (1 - 1e-9))
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Axes:
    """The plane of a chart: data from (x0, 0) to (x1, y1), drawn `width` x `height`."""

    x0: float
    x1: float
    y1: float
    width: int = 560
    height: int = 240
    below: int = 0  # more room under the plot

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (value - self.x0) / ((self.x1 - self.x0) or 1)

    def y(self, value: float) -> float:
        return TOP + (self.height - TOP - BOTTOM - self.below) * (1 - value / self.y1)

    def svg(
        self,
        content: list[str],
        *,
        name: str,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
    ) -> str:
        """The chart around `content`, which is drawn over the grid. name: what a reader who does not see it is told."""
        base, right = self.y(0), self.width - RIGHT
        grid = [
            f'<line class="{"grid" if value else "base"}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{safe(text)}</text>'
            for value, y, text in ((value, self.y(value), text) for value, text in y_ticks)
        ]
        below = [
            f'<text class="tick middle" x="{self.x(value):.1f}" y="{base + self.below + 15:.1f}">{safe(text)}</text>'
            for value, text in x_ticks
        ]
        labels = [
            f'<text class="label" x="0" y="12">{safe(y_label)}</text>',
            f'<text class="label end" x="{right}" y="{self.height - 5}">{safe(x_label)}</text>',
        ]
        return _svg(self.width, self.height, name, [*grid, *content, *below, *labels])


def _svg(width: int, height: int, name: str, content: list[str], kind: str = "chart") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{safe(name)}">{"".join(content)}</svg>'
    )


def _bar(kind: str, x: float, y: float, width: float, height: float, tip: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{safe(tip)}</title></rect>"
    )


def histogram(
    edges: Sequence[float],
    values: Sequence[float],
    tips: Sequence[str],
    *,
    name: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    unit: str = "",
    marks: Sequence[tuple[float, str]] = (),
    last: bool = False,
) -> str:
    """Bars between `edges` (n + 1), with `values` (n). marks: lines across, with words. last: the last bar stands out."""
    y_ticks = round_ticks(max(values, default=0))
    axes = Axes(edges[0], edges[-1], y_ticks[-1])
    drawn = [
        _bar(
            "bar apart" if last and i == len(values) - 1 else "bar",
            axes.x(a) + 0.5,
            axes.y(v),
            max(axes.x(b) - axes.x(a) - 1, 0.5),
            axes.y(0) - axes.y(v),
            tip,
        )
        for i, ((a, b), v, tip) in enumerate(zip(pairwise(edges), values, tips, strict=True))
        if v
    ]
    for at, words in marks:
        drawn.append(
            f'<line class="mark" x1="{axes.x(at):.1f}" x2="{axes.x(at):.1f}" y1="{TOP - 8}" y2="{axes.y(0):.1f}"/>'
            f'<text class="tick" x="{axes.x(at) + 4:.1f}" y="{TOP - 1}">{safe(words)}</text>'
        )
    return axes.svg(
        drawn,
        name=name,
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_ticks,
        y_ticks=[(t, f"{t:g}{unit}" if unit else tick(t)) for t in y_ticks],
    )


def grouped_bars(
    rows: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    tips: Sequence[Sequence[str]],
    *,
    name: str,
    x_label: str,
) -> str:
    """Per row a bar of each series, from left to right, in per cent. series: (CSS class, value of each row); tips: of each."""
    left, thick, gap, width = 130, 12, 12, 560
    ticks = round_ticks(max((v for _, values in series for v in values), default=0))
    scale = (width - left - RIGHT - 14) / ticks[-1]
    step = thick * len(series) + gap
    bottom = 6 + step * len(rows)
    drawn = [
        f'<line class="grid" x1="{left + t * scale:.1f}" x2="{left + t * scale:.1f}" y1="2" y2="{bottom}"/>'
        f'<text class="tick middle" x="{left + t * scale:.1f}" y="{bottom + 14}">{t:g} %</text>'
        for t in ticks
    ]
    for i, row in enumerate(rows):
        y = 6 + i * step + gap / 2
        told = row if len(row) <= 18 else f"{row[:17]}…"
        drawn.append(
            f'<text class="row end" x="{left - 8}" y="{y + thick * len(series) / 2 + 4:.1f}">{safe(told)}</text>'
        )
        drawn += [
            _bar(kind, left, y + k * thick, max(values[i] * scale, 0.5), thick - 2, tips[k][i])
            for k, (kind, values) in enumerate(series)
        ]
    drawn.append(
        f'<text class="label end" x="{width - RIGHT}" y="{bottom + 32}">{safe(x_label)}</text>'
    )
    return _svg(width, int(bottom + 38), name, drawn)


def over_time(
    edges_s: NDArray[np.float64],
    rate: NDArray[np.float64],
    labelled: NDArray[np.float64],
    tips: Sequence[str],
    *,
    name: str,
    y_max: float,
    width: int = 420,
) -> str:
    """A rate (n,) between edges_s (n + 1), seconds, as an area of steps; under it a strip that is as dark as the share
    `labelled` (n,) of frames."""
    y_ticks = round_ticks(y_max, 3)
    axes = Axes(float(edges_s[0]), float(edges_s[-1]), y_ticks[-1], width, 170, RUG + 2)
    x, base = [axes.x(float(t)) for t in edges_s], axes.y(0)
    top = " ".join(f"V{axes.y(r):.1f} H{b:.1f}" for r, b in zip(rate.tolist(), x[1:], strict=True))
    drawn = [f'<path class="area" d="M{x[0]:.1f} {base:.1f} {top} V{base:.1f} Z"/>']
    shares = (labelled / (labelled.max(initial=0) or 1)).round(2)
    runs = [
        0,
        *(np.flatnonzero(np.diff(shares)) + 1).tolist(),
        shares.size,
    ]  # one bar for all that are alike: no seams
    drawn += [
        f'<rect class="rug" x="{x[a]:.1f}" y="{base + 2:.1f}" width="{x[b] - x[a]:.1f}" height="{RUG}" '
        f'opacity="{shares[a]:g}"/>'
        for a, b in pairwise(runs)
        if shares[a]
    ]
    drawn += [
        _bar("hit", a, TOP, b - a, base + RUG - TOP, tip)
        for (a, b), tip in zip(pairwise(x), tips, strict=True)
    ]
    return axes.svg(
        drawn,
        name=name,
        x_label="time, s",
        y_label="events per second",
        x_ticks=_seconds(axes),
        y_ticks=[(t, tick(t)) for t in y_ticks],
    )


def band_over_time(
    times_s: NDArray[np.float64],
    low: NDArray[np.float64],
    middle: NDArray[np.float64],
    high: NDArray[np.float64],
    tips: Sequence[str],
    *,
    name: str,
) -> str:
    """A line (n,) at times_s (n,) and the band from low to high around it."""
    y_ticks = round_ticks(float(high.max()), 4)
    half = float(times_s[1] - times_s[0]) / 2 if times_s.size > 1 else 0.5
    axes = Axes(0.0, float(times_s[-1]) + half, y_ticks[-1], 1140, 230)

    def points(values: NDArray[np.float64], order: int = 1) -> str:
        return " ".join(
            f"{axes.x(t):.1f},{axes.y(v):.1f}"
            for t, v in zip(times_s[::order].tolist(), values[::order].tolist(), strict=True)
        )

    drawn = [
        f'<polygon class="area" points="{points(low)} {points(high, -1)}"/>',
        f'<polyline class="line" points="{points(middle)}"/>',
    ]
    drawn += [
        _bar(
            "hit", axes.x(t - half), TOP, axes.x(t + half) - axes.x(t - half), axes.y(0) - TOP, tip
        )
        for t, tip in zip(times_s.tolist(), tips, strict=True)
    ]
    return axes.svg(
        drawn,
        name=name,
        x_label="time since the recording's first event, s",
        y_label="events per second",
        x_ticks=_seconds(axes, 10),
        y_ticks=[(t, tick(t)) for t in y_ticks],
    )


def _seconds(axes: Axes, count: int = 6) -> list[tuple[float, str]]:
    return [
        (axes.x0 + t, f"{t:g}")
        for t in round_ticks(axes.x1 - axes.x0, count)
        if axes.x0 + t <= axes.x1 * 1.0001
    ]


def sparkline(values: NDArray[np.float64], name: str) -> str:
    """A curve without axes, from 0 to its largest value."""
    width, height, top = 90, 18, float(values.max(initial=0)) or 1.0
    x = np.linspace(1, width - 1, values.size)
    y = height - 1 - (height - 3) * values / top
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return _svg(
        width,
        height,
        name,
        [f"<title>{safe(name)}</title>", f'<polyline class="line" points="{points}"/>'],
        "spark",
    )
