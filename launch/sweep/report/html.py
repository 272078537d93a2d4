"""The report of a sweep as one page of HTML: no network, no other file."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from evspan.data_prep.report.look import CSS, SCRIPT
from evspan.data_prep.report.markup import cell, decimals, safe, section, table
from evspan.data_prep.report.plots import Axes, round_ticks, tick
from evspan.data_prep.shards.atomic import written_whole
from evspan.launch.sweep.registry import short_names, span
from evspan.launch.sweep.report.curves import Point
from evspan.launch.sweep.state import State, number

if TYPE_CHECKING:
    from evspan.launch.sweep.report.summary import Row

PAGE = "report.html"
MOST = 300  # points of a curve
LOOK = """\
a { color: var(--train); }
svg .run { fill: none; stroke: var(--run); stroke-width: 1.5; stroke-linejoin: round; }
svg .run.few { stroke-width: 4; stroke-linecap: round; }
svg .run:hover { stroke-width: 3.5; }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 50%; background: var(--run); }
td.error { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
"""


def write_page(path: Path, rows: Sequence["Row"], keys: Sequence[str], tensorboard: str) -> None:
    """PATH/report.html. rows: best first. keys: of the overrides that differ."""
    title = f"{path.resolve().name}: report"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{safe(title)}</title>\n<style>\n{CSS}{LOOK}</style></head>\n'
        f"<body><header><h1>{safe(path.resolve().name)}</h1>"
        f"<p>{len(rows)} run{'s' if len(rows) != 1 else ''}: {_states(rows)}</p></header>\n",
        _best(rows, keys),
        _errors(rows),
        _table(path, rows, keys, tensorboard),
        _charts(rows),
        _interruptions(rows),
        _tensorboard(path, tensorboard),
        f"<script>\n{SCRIPT}</script>\n</body></html>\n",
    ]
    with written_whole(path / PAGE) as beside:
        beside.write_text("".join(parts), encoding="utf-8")


def _states(rows: Sequence["Row"]) -> str:
    counts = {state: sum(row.run.state is state for row in rows) for state in State}
    return ", ".join(f"{n} {state.value}" for state, n in counts.items() if n)


def _best(rows: Sequence["Row"], keys: Sequence[str]) -> str:
    row = rows[0]
    if row.run.ap is None:
        return section("Best", "best", "<p>No run has been evaluated yet.</p>")
    overrides = " ".join(
        f"{key}={row.run.overrides[key]}" for key in keys if key in row.run.overrides
    )
    measured = [
        ("AP", row.run.ap),
        ("AP50", number(row.run.metrics.get("ap50"))),
        ("AP small", number(row.run.metrics.get("ap_small"))),
        ("loss", row.last_loss),
    ]
    figures = "".join(
        f"<div><dt>{name}</dt><dd>{'–' if value is None else f'{value:.3f}'}</dd></div>"
        for name, value in measured
    )
    weights = row.run.folder / "checkpoints" / "best"
    told = (
        f" Its best weights: <code>checkpoint={safe(weights)}</code>." if weights.exists() else ""
    )
    return section(
        "Best",
        "best",
        f"<p><code>{safe(overrides or 'no overrides')}</code></p><p class=note>Run "
        f'{safe(row.run.name)}, {row.run.state.value}.{told}</p><dl class="figures">{figures}</dl>',
    )


def _errors(rows: Sequence["Row"]) -> str:
    told = [row.run for row in rows if row.run.state in (State.failed, State.lost)]
    if not told:
        return ""
    items = "".join(
        f"<li>{safe(run.name)} {run.state.value}: {safe(run.error or run.reason)}</li>"
        for run in told
    )
    return f'<section id="warnings"><h2>{len(told)} failed or lost</h2><ul>{items}</ul></section>\n'


def _colour(index: int) -> str:
    """By the golden angle: neighbours differ, however many there are."""
    return f"--run:hsl({index * 137.5 % 360:.0f} 65% 50%)"


def _table(path: Path, rows: Sequence["Row"], keys: Sequence[str], tensorboard: str) -> str:
    heads = [
        ("run", False),
        *((safe(name), _numeric(rows, key)) for name, key in zip(short_names(keys), keys)),
        ("AP", True),
        ("AP50", True),
        ("AP small", True),
        ("best AP", True),
        ("at step", True),
        ("last loss", True),
        ("step", True),
        ("of", True),
        ("state", False),
        ("requeues", True),
        ("", False),
        ("last error", False),
    ]
    lines = []
    for index, row in enumerate(rows):
        run, best = row.run, row.best
        numbers = [
            cell(number(run.metrics.get(key)), decimals(3)) for key in ("ap", "ap50", "ap_small")
        ]
        numbers += [
            cell(best and best[0], decimals(3)),
            cell(best and best[1]),
            cell(row.last_loss, decimals(4)),
            cell(run.step),
            cell(run.max_steps),
        ]
        overrides = [_override(run.overrides.get(key, ""), _numeric(rows, key)) for key in keys]
        lines.append(
            f'<tr><th scope=row><span class="dot" style="{_colour(index)}"></span>{safe(run.name)}</th>'
            f"{''.join(overrides)}{''.join(numbers)}<td>{run.state.value}</td>{cell(run.requeues)}"
            f'<td>{_links(path, row, tensorboard)}</td><td class="error">{safe(run.error)}</td></tr>\n'
        )
    return section(
        "Runs",
        "runs",
        table("run-table", heads, lines, sortable=True),
        "AP, AP50 and AP small are of the newest evaluation. A click on a column's head sorts by it.",
    )


def _numeric(rows: Sequence["Row"], key: str) -> bool:
    return all(
        _as_number(row.run.overrides.get(key, "")) is not None
        for row in rows
        if key in row.run.overrides
    )


def _as_number(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def _override(text: str, numeric: bool) -> str:
    return (
        f'<td class="n" data-value="{safe(text)}">{safe(text)}</td>'
        if numeric
        else f"<td>{safe(text)}</td>"
    )


def _links(path: Path, row: "Row", tensorboard: str) -> str:
    folder, log = "" if row.run.folder == path else f"{row.run.name}/", "logs/rank-00.log"
    links = (
        [f'<a href="{safe(quote(folder + log))}">log</a>']
        if (row.run.folder / log).exists()
        else []
    )
    only = f"?runFilter={quote(f'^{re.escape(folder)}', safe='')}" if folder else ""
    return " ".join(
        [*links, f'<a href="{safe(tensorboard)}/{safe(only)}#timeseries">tensorboard</a>']
    )


def _charts(rows: Sequence["Row"]) -> str:
    charts = [
        _chart(rows, [row.loss.points for row in rows], "loss"),
        _chart(rows, [row.ap.points for row in rows], "AP"),
    ]
    return (
        section(
            "Curves",
            "curves",
            f'<div class="two">{"".join(charts)}</div>',
            "A colour for each run, as in the table. Losses are means over neighbouring steps.",
        )
        if any(charts)
        else ""
    )


def _chart(rows: Sequence["Row"], curves: Sequence[Sequence[Point]], name: str) -> str:
    drawn = [thinned([p for p in points if number(p.value) is not None]) for points in curves]
    values = sorted(value for points in drawn for _, value in points)
    if not values:
        return ""
    y_ticks = round_ticks(
        values[int(0.98 * (len(values) - 1))] if name == "loss" else values[-1]
    )  # a bad step hides no curve
    x_ticks = round_ticks(max(step for points in drawn for step, _ in points), 5)
    axes, lines = Axes(0, x_ticks[-1], y_ticks[-1], 560, 300), []
    for index, (row, points) in enumerate(zip(rows, drawn, strict=True)):
        places = " ".join(
            f"{axes.x(step):.1f},{axes.y(min(value, axes.y1)):.1f}" for step, value in points
        )
        tip = " ".join(
            [row.run.name, *(f"{key}={value}" for key, value in row.run.overrides.items())]
        )
        if points:
            alone = f" {places}" if len(points) == 1 else ""  # a line to itself is a dot
            lines.append(
                f'<polyline class="run{" few" if alone else ""}" style="{_colour(index)}" points="{places}{alone}">'
                f"<title>{safe(tip)}: {name} {points[-1][1]:.4g} at the end</title></polyline>"
            )
    svg = axes.svg(
        lines,
        name=f"{name} by step",
        x_label="step",
        y_label=name,
        x_ticks=[(t, tick(t)) for t in x_ticks],
        y_ticks=[(t, f"{t:g}") for t in y_ticks],
    )
    return f"<figure>{svg}</figure>"


def thinned(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(step, value), at most MOST: means of neighbours."""
    size = -(-len(points) // MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(sum(p.step for p in g) / len(g), sum(p.value for p in g) / len(g)) for g in groups]


def _interruptions(rows: Sequence["Row"]) -> str:
    told = [row for row in rows if row.run.requeues]
    if not told:
        return ""
    heads = [
        ("run", False),
        ("requeues", True),
        ("without a step", True),
        ("of it to start again", True),
        ("steps done twice", True),
    ]
    lines = [
        f"<tr><th scope=row>{safe(row.run.name)}</th>{cell(row.run.requeues)}{cell(row.cost.seconds, span)}"
        f"{cell(row.cost.starting, span)}{cell(row.cost.steps)}</tr>"
        for row in told
    ]
    total = [sum(row.run.requeues for row in told), sum(row.cost.steps for row in told)]
    foot = (
        f"<tr><th scope=row>total</th>{cell(total[0])}{cell(sum(row.cost.seconds for row in told), span)}"
        f"{cell(sum(row.cost.starting for row in told), span)}{cell(total[1])}</tr>"
    )
    return section(
        "Interruptions",
        "interruptions",
        table("interruption-table", heads, lines, foot),
        "From the last that was heard of a run to its next step, summed over its requeues.",
    )


def _tensorboard(path: Path, tensorboard: str) -> str:
    return section(
        "TensorBoard",
        "tensorboard",
        f"<p><code>tensorboard --logdir {safe(shlex.quote(str(path)))}</code>, then "
        f'<a href="{safe(tensorboard)}/#timeseries">all curves</a> and '
        f'<a href="{safe(tensorboard)}/#hparams">hyper-parameters</a>.</p>',
    )
