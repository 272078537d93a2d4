"""The figures of the learning study as SVG files: curves, and effects with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.data_prep.report.markup import safe
from evspan.data_prep.report.number_format import tick
from evspan.data_prep.report.plots import Axes, round_ticks

WIDTH = 400
HEIGHT = 270
GAP = 24
LINE_HEIGHT = 20
BAR_SHIFT = 5.0  # pixels between the bars of lines at the same place
MAX_MARKERS = 12  # lines with more points get no circles
COLOURS = ("#2f6fdb", "#d1495b", "#1b7f4b", "#d9822b", "#7b4fb5", "#0f8b8d", "#8a6d00", "#5d6878")
STYLE = """text { font: 11px sans-serif; fill: #3c4654; } .end { text-anchor: end; }
.middle { text-anchor: middle; }
.grid { stroke: #e3e7ed; } .base { stroke: #5d6878; } .title { font-size: 13px; font-weight: bold; }
.mean { fill: none; stroke-width: 2; stroke-linejoin: round; }
.one { fill: none; stroke-width: 1; stroke-opacity: .35; }"""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        mean: the points of the mean over seeds.
        seeds: the curves of single seeds.
        halves: half widths of the intervals of `mean`.
    """

    name: str
    mean: Sequence[Point]
    seeds: Sequence[Sequence[Point]] = ()
    halves: Sequence[float | None] = ()


@dataclass(frozen=True)
class Panel:
    """One plot. log: logarithmic x axis. x_names: of x = 0, 1, ..., instead of numbers."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False
    x_names: Sequence[str] = ()


class Bar(NamedTuple):
    """A value with half of its interval, in points; None: there is none yet."""

    name: str
    value: float | None
    half: float | None


def write_svg(path: Path, rows: Sequence[Sequence[Panel]], caption: str) -> None:
    """Writes rows of panels, each row with its legend below: one colour per line name."""
    parts = []
    y = 0.0
    for panels in rows:
        colours = _colours(panels)
        for i, panel in enumerate(panels):
            parts.append(_titled_panel(panel, colours, i * (WIDTH + GAP), y))
        y += HEIGHT + 40
        parts += _legend(colours, y)
        y += LINE_HEIGHT * math.ceil(len(colours) / 3) + 12
    parts.append(f'<text x="4" y="{y + 8:.0f}">{safe(caption)}</text>')
    columns = [min(3, max(len(panels), len(_colours(panels)))) for panels in rows]
    width = max(columns) * (WIDTH + GAP) - GAP
    height = f"{y + 18:.0f}"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _colours(panels: Sequence[Panel]) -> dict[str, str]:
    """Line name -> colour, in the order of appearance."""
    colours: dict[str, str] = {}
    for panel in panels:
        for line in panel.lines:
            if line.name not in colours:
                colours[line.name] = COLOURS[len(colours) % len(COLOURS)]
    return colours


def _titled_panel(panel: Panel, colours: Mapping[str, str], left: float, top: float) -> str:
    return (
        f'<text class="title" x="{left + 4}" y="{top + 16:.0f}">{safe(panel.title)}</text>'
        f'<svg x="{left}" y="{top + 22:.0f}" width="{WIDTH}" height="{HEIGHT}">'
        f"{_plot(panel, colours)}</svg>"
    )


def _legend(colours: Mapping[str, str], top: float) -> list[str]:
    """Three names in a row."""
    parts = []
    for i, (name, colour) in enumerate(colours.items()):
        x = 12 + (i % 3) * (WIDTH + GAP)
        y = top + LINE_HEIGHT * (i // 3)
        parts.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4:.0f}" y2="{y - 4:.0f}" stroke="{colour}" '
            f'stroke-width="3"/><text x="{x + 28}" y="{y:.0f}">{safe(name)}</text>'
        )
    return parts


def _plot(panel: Panel, colours: Mapping[str, str]) -> str:
    top = _top(panel)
    if top is None:
        return '<text x="60" y="60">nothing yet</text>'
    y_ticks = round_ticks(top if panel.y_label == "loss" else min(top, 1.0))
    x_ticks = _x_ticks(panel)
    margin = 0.3 if panel.log or panel.x_names else 0.0
    axes = Axes(x_ticks[0][0] - margin, x_ticks[-1][0] + margin, y_ticks[-1], WIDTH, HEIGHT)
    shapes = []
    for i, line in enumerate(panel.lines):
        # Beside each other, so that no bar hides another.
        shift = BAR_SHIFT * (i - (len(panel.lines) - 1) / 2) if line.halves else 0.0
        shapes += _line_shapes(line, colours[line.name], axes, panel.log, shift)
    return axes.svg(
        shapes,
        name=panel.title,
        x_label=panel.x_label,
        y_label=panel.y_label,
        x_ticks=x_ticks,
        y_ticks=[(value, f"{value:g}") for value in y_ticks],
    )


def _top(panel: Panel) -> float | None:
    """The upper end of the y axis, or None without points. A few outliers may lie above it."""
    values = []
    bars = []
    for line in panel.lines:
        for points in (line.mean, *line.seeds):
            values += [y for _, y in points]
        for (_, y), half in zip(line.mean, line.halves):
            if half:
                bars.append(y + half)
    if not values:
        return None
    if panel.log or panel.x_names:
        return max(values + bars)
    return 1.15 * sorted(values)[int(0.95 * (len(values) - 1))]


def _x_ticks(panel: Panel) -> list[tuple[float, str]]:
    if panel.x_names:
        return [(float(i), name) for i, name in enumerate(panel.x_names)]
    xs = set()
    for line in panel.lines:
        xs |= {x for x, _ in line.mean}
    if panel.log:
        return [(math.log2(x), f"{x:g}") for x in sorted(xs)]
    return [(value, tick(value)) for value in round_ticks(max(xs), 5)]


def _line_shapes(line: Line, colour: str, axes: Axes, log: bool, shift: float) -> list[str]:
    def place(points: Sequence[Point]) -> str:
        positions = []
        for x, y in points:
            column = axes.x(math.log2(x) if log else x) + shift
            row = axes.y(min(y, axes.y1))
            positions.append(f"{column:.1f},{row:.1f}")
        return " ".join(positions)

    shapes = []
    for points in line.seeds:
        shapes.append(f'<polyline class="one" stroke="{colour}" points="{place(points)}"/>')
    shapes.append(
        f'<polyline class="mean" stroke="{colour}" points="{place(line.mean)}">'
        f"<title>{safe(line.name)}</title></polyline>"
    )
    if len(line.mean) <= MAX_MARKERS:
        for point in line.mean:
            column, row = place([point]).split(",")
            shapes.append(f'<circle cx="{column}" cy="{row}" r="3" fill="{colour}"/>')
    for (x, y), half in zip(line.mean, line.halves):
        if half is not None:
            bar = place([(x, max(y - half, 0.0)), (x, y + half)])
            shapes.append(
                f'<polyline class="mean" stroke="{colour}" stroke-opacity=".5" points="{bar}"/>'
            )
    return shapes


# -- effects with intervals ------------------------------------------------------------------------
NAME_WIDTH = 330
BARS_WIDTH = 260
ROW = 22


def write_effects(path: Path, panels: Mapping[str, Sequence[Bar]], caption: str) -> None:
    """Writes panels side by side, by title, with the same rows: a dot and its interval around 0."""
    names = list(dict.fromkeys(bar.name for bars in panels.values() for bar in bars))
    height = 50 + ROW * len(names) + 40
    width = NAME_WIDTH + (BARS_WIDTH + GAP) * len(panels)
    parts = []
    for i, name in enumerate(names):
        y = 50 + ROW * i + 4
        parts.append(f'<text class="end" x="{NAME_WIDTH - 8}" y="{y}">{safe(name)}</text>')
    for number, (title, bars) in enumerate(panels.items()):
        left = NAME_WIDTH + number * (BARS_WIDTH + GAP)
        parts += _effects_panel(title, {bar.name: bar for bar in bars}, names, left)
    parts.append(f'<text x="4" y="{height - 6}">{safe(caption)}</text>')
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _effects_panel(
    title: str, bars: Mapping[str, Bar], names: Sequence[str], left: float
) -> list[str]:
    ends = [abs(b.value) + (b.half or 0) for b in bars.values() if b.value is not None]
    most = round_ticks(max([*ends, 0.1]), 2)[-1]
    bottom = 50 + ROW * len(names) - 8

    def x(value: float) -> float:
        return left + BARS_WIDTH * (value + most) / (2 * most)

    parts = [f'<text class="title" x="{left}" y="18">{safe(title)}</text>']
    for tick_value in (-most, 0.0, most):
        kind = "grid" if tick_value else "base"
        at = f"{x(tick_value):.1f}"
        parts.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="34" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{at}" y="{bottom + 14}">{tick_value:+g}</text>')
    for i, name in enumerate(names):
        y = 50 + ROW * i
        bar = bars.get(name)
        if bar is None:
            continue
        if bar.value is None:
            parts.append(f'<text class="middle" x="{x(0):.1f}" y="{y + 4}">missing</text>')
            continue
        excludes = bar.half is not None and abs(bar.value) > bar.half
        colour = COLOURS[0] if excludes else COLOURS[-1]
        if bar.half is not None:
            ends_at = (x(bar.value - bar.half), x(bar.value + bar.half))
            parts.append(
                f'<line class="interval" stroke="{colour}" stroke-width="2" x1="{ends_at[0]:.1f}" '
                f'x2="{ends_at[1]:.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle cx="{x(bar.value):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return parts
