"""The runs of a sweep as a table and as JSON, once or until all have ended."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evspan.launch.search.summary import SearchSummary
from evspan.launch.sweep.registry import (
    Run,
    RunList,
    differing_keys,
    format_duration,
    read_chain,
    short_names,
    starts_runs,
)
from evspan.launch.sweep.spikes import Spike

NUMBERS = ("step", "AP", "ETA", "frames/s", "MFU", "requeues", "spikes")  # columns of numbers


def watch_runs(path: Path, interval_s: float) -> Iterator[RunList]:
    """Reads the runs and commands of `path` every `interval_s` seconds until none is active.

    It goes on while a command or the controller of a search may start further runs.

    Raises:
        UserError: there is no run.
    """
    while True:
        run_list = read_chain(path)
        yield run_list
        if not any(run.active for run in run_list.runs) and not starts_runs(path):
            return
        time.sleep(interval_s)


def status_rows(runs: Sequence[Run], search: SearchSummary | None = None) -> list[list[str]]:
    """The headings and a row per run, without the columns that are empty for all runs.

    Args:
        search: whose trials the runs are: their values get a column.
    """
    keys = differing_keys(runs)
    headings = [
        "run",
        *short_names(keys),
        "" if search is None else search.value_heading,
        "state",
        "step",
        "AP",
        "ETA",
        "frames/s",
        "MFU",
        "node",
        "requeues",
        "successor",
        "spikes",
        "last error",
    ]
    rows = [_status_row(run, keys, search) for run in runs]
    columns = list(zip(headings, *rows, strict=True))
    filled = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*filled, strict=True)]


def _status_row(run: Run, keys: Sequence[str], search: SearchSummary | None) -> list[str]:
    state = run.state.value
    if run.reason:
        state += f" ({run.reason})"
    step = "" if run.step is None else str(run.step)
    if step and run.max_steps:
        step += f"/{run.max_steps}"
    return [
        run.name,
        *(run.overrides.get(key, "") for key in keys),
        "" if search is None else search.value_text(run),
        state,
        step,
        "" if run.ap is None else f"{run.ap:.3f}",
        "" if run.eta_s is None else format_duration(run.eta_s),
        *speed_texts(run),
        run.node,
        str(run.requeues),
        run.successor if run.active else "",
        str(len(run.spikes) or ""),
        "; ".join(text for text in (run.error, run.problem) if text),
    ]


def speed_texts(run: Run) -> tuple[str, str]:
    """Frames per second and MFU of the last logged steps; empty where they are not known."""
    frames = "" if run.frames_per_s is None else f"{run.frames_per_s:.1f}"
    mfu = "" if run.mfu is None else f"{100 * run.mfu:.3g} %"
    return frames, mfu


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
        "successor": run.successor,
        "after": list(run.after),
        "step": run.step,
        "of": run.max_steps,
        "ap": run.ap,
        "loss": run.loss,
        "eta_s": None if run.eta_s is None else round(run.eta_s),
        "frames_per_s": run.frames_per_s,
        "mfu": run.mfu,
        "spikes": [_spike_as_json(spike) for spike in run.spikes],
        "node": run.node,
        "requeues": run.requeues,
    }


def _spike_as_json(spike: Spike) -> dict[str, Any]:
    return {**spike._asdict(), "batch": [lane._asdict() for lane in spike.batch]}
