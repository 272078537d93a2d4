"""Trains planned runs sequentially on this machine, each as `evspan train` does."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from evspan.conf.compose import CONFIG_FILE, save_config
from evspan.conf.errors import INTERRUPTED_EXIT_CODE, STOP_SIGNALS, UserError
from evspan.launch.local.child_end import ChildEnd, child_end, last_error
from evspan.launch.local.ranks import die_with_parent
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.sweep.fail_fast import error_of_sweep
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import refuse_queued
from evspan.pipeline.history import append
from evspan.pipeline.run_lock import training_lock

logger = logging.getLogger(__name__)


def run_sequentially(runs: Sequence[PlannedRun], *, dry_run: bool = False) -> int:
    """Train the runs that are not done. A run that fails does not stop the others.

    Returns:
        0 when all are done; 75, 130 or 128 + n when one was stopped (by signal n), which ends the
        sequence; else 1.

    Raises:
        UserError: cluster.fail_fast is set, and the first runs have failed with the same error.
    """
    failed = False
    for run in runs:
        if run.is_done():
            logger.info("%s: done already", run.folder)
            continue
        logger.info("%s: %s", run.folder, " ".join(run.overrides))
        if dry_run:
            continue
        try:
            with training_lock(run.folder) as lock:
                refuse_queued([run.folder])
                end = _train(run, lock.environment())
        except UserError as error:  # another process trains it: its history is not ours
            failed = True
            logger.error("%s: %s", run.folder, error)
            continue
        if end.was_stopped:
            logger.info("%s: stopped; the same command continues", run.folder)
            return end.code
        if end.code:
            failed = True
            logger.error("%s: %s", run.folder, end.message)
            step = newest_step(run.folder, read_files=False)
            append(run.folder, "failed", step=step, message=end.message, code=end.code)
            if run.config.cluster.fail_fast:
                _end_if_same_error(runs)
    return int(failed)


def _end_if_same_error(runs: Sequence[PlannedRun]) -> None:
    """Ends the sequence if the first runs have failed with the same error.

    Raises:
        UserError: they have.
    """
    message = error_of_sweep([run.folder for run in runs])
    if message:
        raise UserError(message)


def train_command(run: PlannedRun) -> list[str]:
    """The command that trains `run`, whose config is in its folder."""
    path = run.folder / CONFIG_FILE
    return [sys.executable, "-m", "evspan.launch.local.run", str(path)]


def _train(run: PlannedRun, variables: Mapping[str, str]) -> ChildEnd:
    """Train in a process of its own: DeepSpeed starts only once in a process.

    Its output is passed on as it comes, and signals reach it. It dies with this process, which
    holds the lock on the run.

    Args:
        variables: further environment variables of the process.
    """
    save_config(run.config, run.folder / CONFIG_FILE)
    child = subprocess.Popen(
        train_command(run),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
        preexec_fn=die_with_parent(os.getpid()),
    )
    previous = {
        number: signal.signal(number, lambda received, _: child.send_signal(received))
        for number in STOP_SIGNALS
    }
    error = ""
    try:
        error = last_error(child)
        return child_end(child.wait(), error)
    except KeyboardInterrupt:  # the terminal sends it to the child too
        child.wait()
        return ChildEnd(INTERRUPTED_EXIT_CODE, error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
