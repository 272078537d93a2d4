"""Writes the report of a sweep: report.html, TensorBoard's HParams, and a table as text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError
from evspan.launch.sweep.registry import (
    Run,
    differing_keys,
    format_duration,
    read_runs,
    short_names,
)
from evspan.launch.sweep.report.hparams import write_sweep_hparams
from evspan.launch.sweep.report.html import write_page
from evspan.launch.sweep.report.results import METRIC_NAMES, RunResult, read_results
from evspan.launch.sweep.state import State, number
from evspan.launch.sweep.status import as_json


@dataclass(frozen=True)
class SweepReport:
    """The report of a sweep.

    Attributes:
        results: by AP, best first.
        keys: the override keys whose values differ between the runs.
        note: why SLURM's queue could not be read; empty if it could.
        page: the HTML file.
    """

    results: list[RunResult]
    keys: list[str]
    note: str
    page: Path


def write_report(path: Path, tensorboard_url: str) -> SweepReport:
    """Writes PATH/report.html and the runs' HParams.

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
    write_sweep_hparams(results, keys)
    page = write_page(path, results, keys, tensorboard_url)
    return SweepReport(results, keys, note, page)


def results_as_json(sweep_report: SweepReport) -> dict[str, Any]:
    """The report as `evspan report --json` prints it."""
    return {
        "page": str(sweep_report.page),
        "note": sweep_report.note,
        "runs": [_result_as_json(result) for result in sweep_report.results],
    }


def _result_as_json(result: RunResult) -> dict[str, Any]:
    best = None if result.best is None else result.best._asdict()
    return {
        **as_json(result.run),
        "problem": result.problem,
        "metrics": result.metrics(),
        "best": best,
        "requeue_cost": asdict(result.cost),
    }


def result_rows(results: Sequence[RunResult], keys: Sequence[str]) -> list[list[str]]:
    """The headings and a row per run. keys: the override keys that get a column."""
    headings = ["run", *short_names(keys), *METRIC_NAMES.values()]
    headings += ["best AP", "loss", "step", "state", "requeues"]
    return [headings, *(_result_row(result, keys) for result in results)]


def _result_row(result: RunResult, keys: Sequence[str]) -> list[str]:
    run = result.run
    best = "" if result.best is None else f"{result.best.ap:.3f} at {result.best.step}"
    return [
        run.name,
        *(run.overrides.get(key, "") for key in keys),
        *(_decimals(number(run.metrics.get(key)), 3) for key in METRIC_NAMES),
        best,
        _decimals(result.last_loss, 4),
        "" if run.step is None else str(run.step),
        run.state.value,
        str(run.requeues),
    ]


def _decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def highlights(results: Sequence[RunResult], keys: Sequence[str]) -> list[str]:
    """A line on the best run, and lines on runs that failed or were requeued.

    Args:
        results: by AP, best first.
        keys: the override keys that identify a run.
    """
    lines = []
    best_run = results[0].run
    if best_run.ap is not None and len(results) > 1:
        overrides = describe_overrides(best_run, keys)
        lines.append(f"best: {best_run.folder} ({overrides}), AP {best_run.ap:.3f}")
    for result in results:
        run = result.run
        if run.state in (State.failed, State.lost):
            lines.append(f"{run.folder}: {run.state.value}: {run.error or run.reason}")
    for result in results:
        if result.problem:
            lines.append(f"{result.run.folder}: {result.problem}")
    for result in results:
        run = result.run
        if run.requeues:
            lines.append(
                f"{run.folder}: requeued {run.requeues} times, which took "
                f"{format_duration(result.cost.seconds)} and {result.cost.steps} steps repeated"
            )
    return lines


def describe_overrides(run: Run, keys: Sequence[str]) -> str:
    """'key=value key=value' of these keys."""
    pairs = [f"{key}={run.overrides[key]}" for key in keys if key in run.overrides]
    return " ".join(pairs) or "no overrides"
