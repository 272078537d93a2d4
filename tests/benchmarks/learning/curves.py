"""The curves of `evspan bench learn` as one picture: an SVG that needs no page around it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.data_prep.report.markup import safe
from evspan.data_prep.report.plots import Axes, round_ticks, tick

WIDTH, HEIGHT, GAP, LINE = 400, 270, 24, 20
FEW = 12  # points of a line, to be shown one by one
COLOURS = ("#2f6fdb", "#d1495b", "#1b7f4b", "#d9822b", "#7b4fb5", "#0f8b8d", "#8a6d00", "#5d6878")
STYLE = """text { font: 11px sans-serif; fill: #3c4654; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: #e3e7ed; } .base { stroke: #5d6878; } .title { font-size: 13px; font-weight: bold; }
.mean { fill: none; stroke-width: 2; stroke-linejoin: round; } .one { fill: none; stroke-width: 1; stroke-opacity: .35; }"""


@dataclass(frozen=True)
class Line:
    """mean: (x, y) of it, with half widths of its interval where there are some. each: the curves of single seeds."""

    name: str
    mean: Sequence[tuple[float, float]]
    each: Sequence[Sequence[tuple[float, float]]] = ()
    halves: Sequence[float | None] = ()


@dataclass(frozen=True)
class Panel:
    """log: x by its logarithm."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False


def write_picture(path: Path, rows: Sequence[Sequence[Panel]], foot: str) -> None:
    """Rows of panels, each row with its legend under it: a colour for each name."""
    out, y = [], 0.0
    for panels in rows:
        names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        for i, panel in enumerate(panels):
            left = i * (WIDTH + GAP)
            out.append(
                f'<text class="title" x="{left + 4}" y="{y + 16:.0f}">{safe(panel.title)}</text>'
                f'<svg x="{left}" y="{y + 22:.0f}" width="{WIDTH}" height="{HEIGHT}">{_panel(panel, colours)}</svg>'
            )
        y += HEIGHT + 40
        for i, name in enumerate(names):
            at, height = 12 + (i % 3) * (WIDTH + GAP), y + LINE * (i // 3)
            out.append(
                f'<line x1="{at}" x2="{at + 22}" y1="{height - 4:.0f}" y2="{height - 4:.0f}" stroke="{colours[name]}" '
                f'stroke-width="3"/><text x="{at + 28}" y="{height:.0f}">{safe(name)}</text>'
            )
        y += LINE * math.ceil(len(names) / 3) + 12
    out.append(f'<text x="4" y="{y + 8:.0f}">{safe(foot)}</text>')
    width = max(len(panels) for panels in rows) * (WIDTH + GAP) - GAP
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 18:.0f}" '
        f'viewBox="0 0 {width} {y + 18:.0f}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>\n'
    )


def _panel(panel: Panel, colours: Mapping[str, str]) -> str:
    place = math.log2 if panel.log else float
    xs = sorted({x for line in panel.lines for x, _ in line.mean})
    values = sorted(
        y for line in panel.lines for points in (line.mean, *line.each) for _, y in points
    )
    values += [
        y + half for line in panel.lines for (_, y), half in zip(line.mean, line.halves) if half
    ]
    if not values:
        return '<text x="60" y="60">nothing yet</text>'
    top = (
        values[-1] if panel.log else 1.15 * values[int(0.95 * (len(values) - 1))]
    )  # a bad step hides no curve
    y_ticks = round_ticks(top if panel.y_label == "loss" else min(top, 1.0))
    x_ticks = (
        [(place(x), f"{x:g}") for x in xs]
        if panel.log
        else [(t, tick(t)) for t in round_ticks(xs[-1], 5)]
    )
    axes = Axes(
        x_ticks[0][0] - 0.3 * panel.log,
        x_ticks[-1][0] + 0.3 * panel.log,
        y_ticks[-1],
        WIDTH,
        HEIGHT,
    )

    def at(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{axes.x(place(x)):.1f},{axes.y(min(y, axes.y1)):.1f}" for x, y in points)

    drawn = []
    for line in panel.lines:
        colour = colours[line.name]
        drawn += [
            f'<polyline class="one" stroke="{colour}" points="{at(points)}"/>'
            for points in line.each
        ]
        drawn.append(
            f'<polyline class="mean" stroke="{colour}" points="{at(line.mean)}"><title>{safe(line.name)}</title>'
            "</polyline>"
        )
        drawn += [
            f'<circle cx="{axes.x(place(x)):.1f}" cy="{axes.y(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in line.mean
            if len(line.mean) <= FEW
        ]
        for (x, y), half in zip(line.mean, line.halves):
            if half is not None:
                places = at([(x, max(y - half, 0.0)), (x, y + half)])
                drawn.append(
                    f'<polyline class="mean" stroke="{colour}" stroke-opacity=".5" points="{places}"/>'
                )
    return axes.svg(
        drawn,
        name=panel.title,
        x_label=panel.x_label,
        y_label=panel.y_label,
        x_ticks=x_ticks,
        y_ticks=[(t, f"{t:g}") for t in y_ticks],
    )
