"""The report of a sweep as one HTML page that needs no network and no other file."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from evspan.data_prep.report.markup import safe
from evspan.data_prep.report.number_format import tick
from evspan.data_prep.report.plots import Axes, round_ticks
from evspan.data_prep.report.templating import Column, KeyFigure, report_environment
from evspan.data_prep.shards.atomic import atomic_write
from evspan.launch.doctor.kept import find_kept
from evspan.launch.search.coordinates import parallel_coordinates
from evspan.launch.search.summary import SearchSummary, has_value_column
from evspan.launch.sweep.registry import Run, describe_all, format_duration, short_names
from evspan.launch.sweep.report.event_files import Point
from evspan.launch.sweep.report.results import METRIC_NAMES, RunResult, highest_ap, total_time
from evspan.launch.sweep.report.run_time import (
    QUEUE,
    TimeCells,
    hours_name,
    part_colour,
    time_bars,
    time_cells,
    time_headings,
    time_sentence,
)
from evspan.launch.sweep.spikes import Spike
from evspan.launch.sweep.state import State, number
from evspan.pipeline.time_use import GROUPS, TimeUse, total_of
from markupsafe import Markup

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
LOG = "logs/rank-00.log"  # in the run folder
CURVE_POINTS = 300  # most points of a curve that are drawn
LOSS_PERCENTILE = 0.98  # the loss axis ends here, so that one bad step does not flatten the curves
GOLDEN_ANGLE = 137.5  # degrees; hues at this distance differ however many there are

INTERRUPTION_COLUMNS = [
    Column("run", numeric=False),
    Column("requeues"),
    Column("time without a step"),
    Column("of which startup"),
    Column("steps repeated"),
]

SPIKE_COLUMNS = [
    Column("run", numeric=False),
    Column("step"),
    Column("loss"),
    Column("sigma above the mean"),
    Column("mean"),
    Column("recordings of the batch", numeric=False),
]
MOST_SPIKES = 50  # of a run that are listed, the last ones


class OverrideCell(NamedTuple):
    """The value of an override in the table of runs."""

    text: str
    numeric: bool


@dataclass(frozen=True)
class TableRow:
    """A row of the table of runs.

    Attributes:
        colour: CSS declaration of the run's colour.
        metrics: in the order of METRIC_NAMES.
        log: link to the log of rank 0; empty if there is none. curves: link to TensorBoard.
        time: the columns on its time.
    """

    run: Run
    colour: str
    overrides: list[OverrideCell]
    metrics: list[float | None]
    best_ap: float | None
    best_step: int | None
    mfu_percent: float | None
    last_loss: float | None
    log: str
    curves: str
    time: TimeCells


@dataclass(frozen=True)
class BestRun:
    """The section on the best run.

    figures: empty if it was not evaluated. value: of a search's metric; may be empty.
    """

    run: Run
    overrides: str
    weights: Path | None
    figures: list[KeyFigure]
    value: str


def write_page(
    path: Path,
    results: Sequence[RunResult],
    keys: Sequence[str],
    tensorboard_url: str,
    search: SearchSummary | None = None,
) -> Path:
    """Writes PATH/report.html and returns its path.

    Args:
        results: best first: by AP, or by the metric of the search.
        keys: the override keys that get a column.
        tensorboard_url: address of the TensorBoard that the page links to.
        search: whose trials the runs are; None for a grid.
    """
    name = path.resolve().name
    uses = [result.time for result in results]
    template = report_environment(TEMPLATES).get_template("sweep_report.html")
    text = template.render(
        title=f"{name}: report",
        name=name,
        states=describe_all([result.run for result in results]),
        doctor=find_kept(path),
        best=_best_run(results[0], keys, search),
        any_evaluated=any(result.run.ap is not None for result in results),
        failures=_failures(results),
        problems=_problems(results),
        columns=_columns(results, keys, search),
        rows=_rows(path, results, keys, tensorboard_url),
        has_values=search is not None and has_value_column(search),
        charts=_charts(results),
        has_times=bool(time_headings(uses)),
        bars=time_bars([result.run.name for result in results], uses),
        time_columns=_time_columns(uses),
        time_sentence=time_sentence(total_time(results), highest_ap(results)),
        part_colours={name: part_colour(name) for name in (QUEUE, *GROUPS)},
        search=search,
        coordinates=_coordinates(search, results),
        interrupted=[result for result in results if result.run.requeues],
        interruption_columns=INTERRUPTION_COLUMNS,
        spikes=_spikes(results),
        spike_columns=SPIKE_COLUMNS,
        logdir=shlex.quote(str(path)),
        tensorboard_url=tensorboard_url,
        duration=format_duration,
    )
    with atomic_write(path / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path / PAGE


def _best_run(result: RunResult, keys: Sequence[str], search: SearchSummary | None) -> BestRun:
    run = result.run
    overrides = [f"{key}={run.overrides[key]}" for key in keys if key in run.overrides]
    weights = run.folder / "checkpoints" / "best"
    figures = []
    if run.ap is not None:
        for key, name in METRIC_NAMES.items():
            figures.append(_key_figure(name, number(run.metrics.get(key))))
        figures.append(_key_figure("loss", result.last_loss))
    value = ""
    if search is not None and run.name in search.values:
        value = f"{search.value_heading} {search.value_text(run)}"
    return BestRun(
        run=run,
        overrides=" ".join(overrides) or "no overrides",
        weights=weights if os.path.exists(weights) else None,
        figures=figures,
        value=value,
    )


def _key_figure(name: str, value: float | None) -> KeyFigure:
    return KeyFigure(name, "–" if value is None else f"{value:.3f}")


def _failures(results: Sequence[RunResult]) -> list[str]:
    """A line per run that failed or was lost."""
    lines = []
    for result in results:
        run = result.run
        if run.state in (State.failed, State.lost):
            lines.append(f"{run.name} {run.state.value}: {run.error or run.reason}")
    return lines


def _problems(results: Sequence[RunResult]) -> list[str]:
    """A line per run of which a file is damaged or cannot be read."""
    return [f"{result.run.name}: {result.problem}" for result in results if result.problem]


def _coordinates(search: SearchSummary | None, results: Sequence[RunResult]) -> Markup | None:
    """The parallel coordinates of a search, in the colours of the table."""
    if search is None:
        return None
    colours = {result.run.name: _colour(index) for index, result in enumerate(results)}
    return parallel_coordinates(search, lambda run: colours[run.name])


class SpikeRow(NamedTuple):
    """A row of the table of loss spikes."""

    run: str
    spike: Spike


def _spikes(results: Sequence[RunResult]) -> list[SpikeRow]:
    rows = []
    for result in results:
        for spike in result.run.spikes[-MOST_SPIKES:]:
            rows.append(SpikeRow(result.run.name, spike))
    return rows


# -- the table of runs -----------------------------------------------------------------------------
def _columns(
    results: Sequence[RunResult], keys: Sequence[str], search: SearchSummary | None
) -> list[Column]:
    columns = [Column("run", numeric=False)]
    for key, name in zip(keys, short_names(keys), strict=True):
        columns.append(Column(name, _is_numeric(results, key)))
    if search is not None and has_value_column(search):
        columns.append(Column(search.value_heading))
    names = [*METRIC_NAMES.values(), "best AP", "at step", "last loss", "step", "of"]
    names += ["frames/s", "MFU, %"]
    names += time_headings([result.time for result in results])
    columns += [Column(name) for name in names]
    columns += [
        Column("state", numeric=False),
        Column("requeues"),
        Column("", numeric=False),
        Column("last error", numeric=False),
    ]
    return columns


def _rows(
    path: Path, results: Sequence[RunResult], keys: Sequence[str], tensorboard_url: str
) -> list[TableRow]:
    numeric = {key: _is_numeric(results, key) for key in keys}
    rows = []
    for index, result in enumerate(results):
        run = result.run
        best = result.best
        log, curves = _links(path, run, tensorboard_url)
        row = TableRow(
            run=run,
            colour=_colour(index),
            overrides=[OverrideCell(run.overrides.get(key, ""), numeric[key]) for key in keys],
            metrics=[number(run.metrics.get(key)) for key in METRIC_NAMES],
            best_ap=None if best is None else best.ap,
            best_step=None if best is None else best.step,
            mfu_percent=None if run.mfu is None else 100 * run.mfu,
            last_loss=result.last_loss,
            log=log,
            curves=curves,
            time=time_cells(result.time, result.best_ap),
        )
        rows.append(row)
    return rows


def _time_columns(uses: Sequence[TimeUse]) -> list[Column]:
    """Of the table below the bars."""
    names = ["allocated", hours_name(total_of(uses)), QUEUE, *GROUPS, "goodput"]
    return [Column("run", numeric=False), *(Column(name) for name in names)]


def _is_numeric(results: Sequence[RunResult], key: str) -> bool:
    """Whether all values of an override are finite numbers."""
    texts = [result.run.overrides[key] for result in results if key in result.run.overrides]
    return all(_is_number(text) for text in texts)


def _is_number(text: str) -> bool:
    try:
        return number(float(text)) is not None
    except ValueError:
        return False


def _links(path: Path, run: Run, tensorboard_url: str) -> tuple[str, str]:
    """The links to the log of rank 0 (empty if there is none) and to the curves in TensorBoard."""
    folder = "" if run.folder == path else f"{run.name}/"
    log = quote(folder + LOG) if os.path.exists(run.folder / LOG) else ""
    query = ""
    if folder:
        query = "?runFilter=" + quote(f"^{re.escape(folder)}", safe="")
    return log, f"{tensorboard_url}/{query}#timeseries"


def _colour(index: int) -> str:
    return f"--run:hsl({index * GOLDEN_ANGLE % 360:.0f} 65% 50%)"


# -- curves ----------------------------------------------------------------------------------------
def _charts(results: Sequence[RunResult]) -> list[Markup]:
    losses = [_thinned_finite(result.loss.points) for result in results]
    aps = [_thinned_finite(result.ap.points) for result in results]
    charts = []
    if any(losses):
        charts.append(_chart(results, losses, "loss", LOSS_PERCENTILE))
    if any(aps):
        charts.append(_chart(results, aps, "AP", 1.0))
    return charts


def _thinned_finite(points: Sequence[Point]) -> list[tuple[float, float]]:
    return thinned([point for point in points if number(point.value) is not None])


def thinned(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(step, value) of at most CURVE_POINTS points: means over groups of neighbours."""
    size = max(1, -(-len(points) // CURVE_POINTS))
    means = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        step = sum(point.step for point in group) / len(group)
        value = sum(point.value for point in group) / len(group)
        means.append((step, value))
    return means


def _chart(
    results: Sequence[RunResult],
    curves: Sequence[Sequence[tuple[float, float]]],
    name: str,
    percentile: float,
) -> Markup:
    """A line per run as SVG.

    Args:
        curves: (step, value) per run, some may be empty.
        percentile: fraction of all values below the end of the value axis.
    """
    points = list(chain.from_iterable(curves))
    values = sorted(value for _, value in points)
    y_ticks = round_ticks(values[int(percentile * (len(values) - 1))])
    x_ticks = round_ticks(max(step for step, _ in points), 5)
    axes = Axes(0, x_ticks[-1], y_ticks[-1], 560, 300)
    lines = []
    for index, (result, curve) in enumerate(zip(results, curves, strict=True)):
        if curve:
            overrides = [f"{key}={value}" for key, value in result.run.overrides.items()]
            label = " ".join([result.run.name, *overrides])
            tip = f"{safe(label)}: {name} {curve[-1][1]:.4g} at the end"
            lines.append(_line(axes, curve, _colour(index), tip))
    svg = axes.svg(
        lines,
        name=f"{name} by step",
        x_label="step",
        y_label=name,
        x_ticks=[(value, tick(value)) for value in x_ticks],
        y_ticks=[(value, f"{value:g}") for value in y_ticks],
    )
    return Markup(svg)  # built of numbers and escaped text


def _line(axes: Axes, curve: Sequence[tuple[float, float]], colour: str, tip: str) -> str:
    """An SVG polyline; a dot for a single point. tip: escaped."""
    vertices = [f"{axes.x(step):.1f},{axes.y(min(value, axes.y1)):.1f}" for step, value in curve]
    style = "run"
    if len(vertices) == 1:
        vertices *= 2  # a line from a point to itself is drawn as a dot
        style = "run few"
    return (
        f'<polyline class="{style}" style="{colour}" points="{" ".join(vertices)}">'
        f"<title>{tip}</title></polyline>"
    )
