"""The curves of the learning study as one SVG file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.data_prep.report.markup import safe
from evspan.data_prep.report.number_format import tick
from evspan.data_prep.report.plots import Axes, round_ticks

WIDTH = 400
HEIGHT = 270
GAP = 24
LINE_HEIGHT = 20
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
    """One plot. log: logarithmic x axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False


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
    width = max(len(panels) for panels in rows) * (WIDTH + GAP) - GAP
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
    margin = 0.3 if panel.log else 0.0
    axes = Axes(x_ticks[0][0] - margin, x_ticks[-1][0] + margin, y_ticks[-1], WIDTH, HEIGHT)
    shapes = []
    for line in panel.lines:
        shapes += _line_shapes(line, colours[line.name], axes, panel.log)
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
    if panel.log:
        return max(values + bars)
    return 1.15 * sorted(values)[int(0.95 * (len(values) - 1))]


def _x_ticks(panel: Panel) -> list[tuple[float, str]]:
    xs = set()
    for line in panel.lines:
        xs |= {x for x, _ in line.mean}
    if panel.log:
        return [(math.log2(x), f"{x:g}") for x in sorted(xs)]
    return [(value, tick(value)) for value in round_ticks(max(xs), 5)]


def _line_shapes(line: Line, colour: str, axes: Axes, log: bool) -> list[str]:
    def place(points: Sequence[Point]) -> str:
        positions = []
        for x, y in points:
            column = axes.x(math.log2(x) if log else x)
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
