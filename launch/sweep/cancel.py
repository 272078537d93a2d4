"""Cancels the SLURM jobs of a run, or of all runs of a sweep."""

import os
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.search.cancel import stop_controller
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.slurm.smoke_run import FOLDER as SMOKE
from evspan.launch.sweep.registry import (
    SUBMITTED,
    Run,
    RunEntry,
    describe,
    describe_all,
    read_chain,
    read_entries,
)
from evspan.launch.sweep.state import State, last_start
from evspan.pipeline.history import append


@dataclass(frozen=True)
class Cancellation:
    """The result of `cancel_runs`.

    Attributes:
        runs: all runs at or below the folder, with their states before the cancellation.
        cancelled: those whose jobs were cancelled.
        local: unfinished runs that are not SLURM jobs; they were left alone.
        controller: a line on the controller of a search; empty without one.
    """

    runs: list[Run]
    cancelled: list[Run]
    local: list[Run]
    controller: str = ""


def cancel_runs(path: Path) -> Cancellation:
    """Cancels the jobs of the runs at or below `path` and records it in their histories.

    The controller of a search ends first, so that it starts no further runs.

    Raises:
        UserError: there is no run, or SLURM does not answer.
    """
    controller = stop_controller(path)
    runs, note = read_chain(path)
    if note:
        raise UserError(f"{note}; run it where SLURM's commands reach the cluster")
    alive = [run for run in [*runs, *_smoke_runs(runs)] if run.alive]
    if alive:
        from evspan.launch.slurm.client import cancel_tasks

        # First the jobs that would continue the runs of the others.
        successors = [run.successor for run in alive if run.successor]
        if successors:
            cancel_tasks(successors)
        cancel_tasks([run.job for run in alive])
        for run in alive:
            append(run.folder, "cancelled", step=newest_step(run.folder, read_files=False))
    local = [run for run in runs if not run.job and run.state.unfinished]
    if controller:  # it ends its runs on this machine
        local = []
    return Cancellation(runs, alive, local, controller)


def _smoke_runs(runs: list[Run]) -> list[Run]:
    """The smoke runs that these runs wait for."""
    entries = []
    for run in runs:
        folder = run.folder / SMOKE
        if os.path.isfile(folder / SUBMITTED):
            entries.append(RunEntry(folder, f"{run.name}/{SMOKE}"))
    return read_entries(entries).runs


def describe_cancellation(result: Cancellation) -> list[str]:
    """A line per run that was cancelled or has to be ended by hand."""
    lines = [result.controller] if result.controller else []
    for run in result.cancelled:
        jobs = f"job {run.job}"
        if run.successor:
            jobs += f" and its successor {run.successor}"
        lines.append(f"{run.folder}: cancelled SLURM {jobs}, which was {describe(run)}")
    for run in result.local:
        lines.append(f"{run.folder}: {_how_to_end(run)}")
    if lines:
        return lines
    if not result.runs:
        return ["nothing to cancel: the search has started no trial, and no controller runs"]
    if len(result.runs) == 1:
        run = result.runs[0]
        return [f"nothing to cancel: {run.folder} is {describe(run)}"]
    return [f"nothing to cancel: {describe_all(result.runs)}"]


def _how_to_end(run: Run) -> str:
    """How a user ends a run that is not a SLURM job."""
    start = last_start(run.events)
    if run.state is not State.running or not start:
        return (
            "is not a SLURM job and has not started; end the command that would start it with "
            "Ctrl-C in its terminal"
        )
    host = start.get("host", "its machine")
    pid = start.get("pid", "PID")
    return (
        f"runs on {host} without SLURM; on that machine, kill -TERM {pid} saves and ends it, "
        "Ctrl-C ends it at once"
    )
