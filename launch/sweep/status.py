"""The runs of a sweep as a table and as JSON, once or until all have ended."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evspan.launch.sweep.registry import (
    Run,
    RunList,
    differing_keys,
    format_duration,
    read_runs,
    short_names,
)

NUMBERS = ("step", "AP", "ETA", "requeues")  # columns of numbers


def watch_runs(path: Path, interval_s: float) -> Iterator[RunList]:
    """Reads the runs at or below `path` every `interval_s` seconds until none is active.

    Raises:
        UserError: there is no run.
    """
    while True:
        run_list = read_runs(path)
        yield run_list
        if not any(run.active for run in run_list.runs):
            return
        time.sleep(interval_s)


def status_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The headings and a row per run, without the columns that are empty for all runs."""
    keys = differing_keys(runs)
    headings = [
        "run",
        *short_names(keys),
        "state",
        "step",
        "AP",
        "ETA",
        "node",
        "requeues",
        "last error",
    ]
    rows = [_status_row(run, keys) for run in runs]
    columns = list(zip(headings, *rows, strict=True))
    filled = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*filled, strict=True)]


def _status_row(run: Run, keys: Sequence[str]) -> list[str]:
    state = run.state.value
    if run.reason:
        state += f" ({run.reason})"
    step = "" if run.step is None else str(run.step)
    if step and run.max_steps:
        step += f"/{run.max_steps}"
    return [
        run.name,
        *(run.overrides.get(key, "") for key in keys),
        state,
        step,
        "" if run.ap is None else f"{run.ap:.3f}",
        "" if run.eta_s is None else format_duration(run.eta_s),
        run.node,
        str(run.requeues),
        "; ".join(text for text in (run.error, run.problem) if text),
    ]


def as_json(run: Run) -> dict[str, Any]:
    """The run as `evspan status --json` prints it."""
    return {
        "folder": str(run.folder),
        "overrides": run.overrides,
        "state": run.state.value,
        "reason": run.reason,
        "error": run.error,
        "problem": run.problem,
        "job": run.job,
        "step": run.step,
        "of": run.max_steps,
        "ap": run.ap,
        "loss": run.loss,
        "eta_s": None if run.eta_s is None else round(run.eta_s),
        "node": run.node,
        "requeues": run.requeues,
    }
