"""Writes the report of a sweep: report.html, TensorBoard's HParams, and a table as text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError, is_user_error, one_line
from evspan.conf.text import plural
from evspan.launch.search.summary import (
    SearchSummary,
    has_value_column,
    search_as_json,
    summarise,
)
from evspan.launch.sweep.registry import (
    Run,
    differing_keys,
    format_duration,
    read_runs,
    short_names,
)
from evspan.launch.sweep.report.hparams import write_sweep_hparams
from evspan.launch.sweep.report.html import write_page
from evspan.launch.sweep.report.results import (
    METRIC_NAMES,
    RunResult,
    highest_ap,
    read_results,
    total_time,
)
from evspan.launch.sweep.report.run_time import (
    time_as_json,
    time_cells,
    time_headings,
    time_sentence,
    time_texts,
)
from evspan.launch.sweep.state import State, number
from evspan.launch.sweep.status import as_json, speed_texts

SPEED_HEADINGS = ("frames/s", "MFU")


@dataclass(frozen=True)
class SweepReport:
    """The report of a sweep.

    Attributes:
        results: best first: by AP, or by the metric of the search.
        keys: the override keys whose values differ between the runs.
        note: why SLURM's queue could not be read; empty if it could.
        page: the HTML file; None where it could not be written.
        not_written: a line on the page and a line on the HParams that could not be written.
        search: whose trials the runs are; None for a grid.
    """

    results: list[RunResult]
    keys: list[str]
    note: str
    page: Path | None
    not_written: list[str]
    search: SearchSummary | None = None


def write_report(path: Path, tensorboard_url: str) -> SweepReport:
    """Writes PATH/report.html and the runs' HParams, where this user may write them.

    Args:
        path: folder of a run or of a sweep.
        tensorboard_url: address of the TensorBoard that the page links to.

    Raises:
        UserError: there is no run, or the address is not one of http or https.
    """
    if not tensorboard_url.startswith(("http://", "https://")):
        raise UserError(
            f"--tensorboard is {tensorboard_url!r}; give an address such as http://login1:6006"
        )
    runs, note = read_runs(path)
    results = read_results(runs)
    keys = differing_keys(runs)
    search = summarise(path, runs, with_importance=True)
    if search is not None:
        results.sort(key=lambda result: search.order(result.run))
    not_written = []
    page = None
    try:
        page = write_page(path, results, keys, tensorboard_url, search)
    except Exception as error:
        if not is_user_error(error):
            raise
        not_written.append(f"the page is not written: {one_line(error)}")
    problems = write_sweep_hparams(results, keys, search)
    if problems:
        runs_text = plural(len(problems), "run")
        not_written.append(f"HParams of {runs_text} are not written; the first: {problems[0]}")
    return SweepReport(results, keys, note, page, not_written, search)


def results_as_json(sweep_report: SweepReport) -> dict[str, Any]:
    """The report as `evspan report --json` prints it."""
    results = sweep_report.results
    values: dict[str, Any] = {
        "page": None if sweep_report.page is None else str(sweep_report.page),
        "not_written": sweep_report.not_written,
        "note": sweep_report.note,
        "time": time_as_json(total_time(results), highest_ap(results)),
        "runs": [_result_as_json(result) for result in results],
    }
    if sweep_report.search is not None:
        values["search"] = search_as_json(sweep_report.search)
    return values


def _result_as_json(result: RunResult) -> dict[str, Any]:
    best = None if result.best is None else result.best._asdict()
    return {
        **as_json(result.run),
        "problem": result.problem,
        "metrics": result.metrics(),
        "best": best,
        "requeue_cost": asdict(result.cost),
        "time": time_as_json(result.time, result.best_ap),
    }


def result_rows(
    results: Sequence[RunResult], keys: Sequence[str], search: SearchSummary | None = None
) -> list[list[str]]:
    """The headings and a row per run. Columns on speed and time that no run has are left out.

    Args:
        keys: the override keys that get a column.
        search: whose trials the runs are. Their values get a column, unless they are `best AP`.
    """
    if search is not None and not has_value_column(search):
        search = None
    value_heading = "" if search is None else search.value_heading
    headings = ["run", *short_names(keys), value_heading, *METRIC_NAMES.values()]
    headings += ["best AP", "loss", "step", *SPEED_HEADINGS]
    times = time_headings([result.time for result in results])
    headings += [*times, "state", "requeues"]
    rows = [headings]
    for result in results:
        value = "" if search is None else search.value_text(result.run)
        rows.append(_result_row(result, keys, value, bool(times)))
    optional = (value_heading, *SPEED_HEADINGS, *times)
    columns = [c for c in zip(*rows, strict=True) if c[0] not in optional or any(c[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def _result_row(result: RunResult, keys: Sequence[str], value: str, has_times: bool) -> list[str]:
    run = result.run
    best = "" if result.best is None else f"{result.best.ap:.3f} at {result.best.step}"
    times = time_texts(time_cells(result.time, result.best_ap)) if has_times else []
    return [
        run.name,
        *(run.overrides.get(key, "") for key in keys),
        value,
        *(_decimals(number(run.metrics.get(key)), 3) for key in METRIC_NAMES),
        best,
        _decimals(result.last_loss, 4),
        "" if run.step is None else str(run.step),
        *speed_texts(run),
        *times,
        run.state.value,
        str(run.requeues),
    ]


def _decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spike_lines(results: Sequence[RunResult]) -> list[str]:
    """A line per run with loss spikes."""
    lines = []
    for result in results:
        spikes = result.run.spikes
        if spikes:
            lines.append(
                f"{result.run.folder}: {plural(len(spikes), 'loss spike')}, the last: "
                f"{spikes[-1].describe()}"
            )
    return lines


def highlights(
    results: Sequence[RunResult], keys: Sequence[str], search: SearchSummary | None = None
) -> list[str]:
    """Lines on the best run, on runs that failed or were requeued, and on the time of all runs.

    Args:
        results: by AP, best first.
        keys: the override keys that identify a run.
        search: whose trials the runs are; it has a line on the best one.
    """
    lines = []
    best_run = results[0].run
    if best_run.ap is not None and len(results) > 1 and search is None:
        overrides = describe_overrides(best_run, keys)
        lines.append(f"best: {best_run.folder} ({overrides}), AP {best_run.ap:.3f}")
    for result in results:
        run = result.run
        if run.state in (State.failed, State.lost):
            lines.append(f"{run.folder}: {run.state.value}: {run.error or run.reason}")
    for result in results:
        if result.problem:
            lines.append(f"{result.run.folder}: {result.problem}")
    lines += _spike_lines(results)
    for result in results:
        run = result.run
        if run.requeues:
            lines.append(
                f"{run.folder}: requeued {plural(run.requeues, 'time')}, which took "
                f"{format_duration(result.cost.seconds)} and {result.cost.steps} steps repeated"
            )
    sentence = time_sentence(total_time(results), highest_ap(results))
    if sentence:
        lines.append(sentence)
    return lines


def describe_overrides(run: Run, keys: Sequence[str]) -> str:
    """'key=value key=value' of these keys."""
    pairs = [f"{key}={run.overrides[key]}" for key in keys if key in run.overrides]
    return " ".join(pairs) or "no overrides"
