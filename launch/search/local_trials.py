"""Runs of trials on this machine, one at a time. They end with the controller."""

import logging
import os
import subprocess
from pathlib import Path
from threading import Thread

from evspan.conf.compose import CONFIG_FILE, save_config
from evspan.launch.local.child_end import ChildEnd, child_end, pass_on_errors
from evspan.launch.local.ranks import die_with_parent
from evspan.launch.local.sequential import train_command
from evspan.launch.search.study import Trial
from evspan.launch.search.trial_runs import Observation
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import refuse_queued
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append, read

logger = logging.getLogger(__name__)
FINAL = (State.done, State.failed, State.pruned)


class LocalTrials:
    """The run that trains now, in a process of its own."""

    most_active = 1

    def __init__(self) -> None:
        self.processes: dict[Path, _TrialProcess] = {}

    def is_started(self, trial: Trial, run: PlannedRun) -> bool:
        """Whether the run has ended, or is to end. Any other died with its controller."""
        if trial.submitted_at is None:
            return False
        return trial.prune_step is not None or _final_state(run.folder) is not None

    def start(self, trial: Trial, run: PlannedRun) -> None:
        """Starts a process that trains.

        Raises:
            UserError: SLURM has a job of the run, or does not answer.
        """
        refuse_queued([run.folder])
        save_config(run.config, run.folder / CONFIG_FILE)
        logger.info("%s: %s", run.folder, " ".join(run.overrides))
        self.processes[run.folder] = _TrialProcess(run)

    def observe(self, runs: list[PlannedRun]) -> list[Observation] | None:
        """The runs' states."""
        return [self._observe(run) for run in runs]

    def _observe(self, run: PlannedRun) -> Observation:
        process = self.processes.get(run.folder)
        if process is None:
            return Observation(_final_state(run.folder) or State.lost, active=False)
        end = process.end()
        if end is None:
            return Observation(State.running, active=True)
        if end.code == 0:
            return Observation(State.done, active=False)
        if end.was_stopped:
            return Observation(_final_state(run.folder) or State.saved, active=False)
        if _final_state(run.folder) is not State.failed:
            step = newest_step(run.folder, read_files=False)
            append(run.folder, "failed", step=step, message=end.message, code=end.code)
        return Observation(State.failed, active=False, reason=end.message)

    def prune(self, run: PlannedRun, reason: str) -> None:
        """Has the run save and end, and records it."""
        process = self.processes.get(run.folder)
        if process is not None:
            process.stop()
            process.wait()
        step = newest_step(run.folder, read_files=False)
        if _final_state(run.folder) is None:
            append(run.folder, "pruned", step=step, reason=reason)

    def cancel(self, runs: list[PlannedRun], reason: str) -> None:
        """Has the runs save and end."""
        self.leave()

    def leave(self) -> str:
        """Has the run save and end: it would die with this process."""
        for process in self.processes.values():
            process.stop()
        for process in self.processes.values():
            process.wait()
        return "and so has its run, after saving"


class _TrialProcess:
    """A process that trains. It dies with this one.

    Attributes:
        error: the last error that it has printed.
    """

    def __init__(self, run: PlannedRun) -> None:
        self.error = ""
        self.process = subprocess.Popen(
            train_command(run),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            # A group of its own: Ctrl-C reaches it through the controller.
            preexec_fn=die_with_parent(os.getpid(), own_group=True),
        )
        self.reader = Thread(target=self._read_errors, daemon=True)
        self.reader.start()

    def end(self) -> ChildEnd | None:
        """How it has ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        self.reader.join(timeout=1.0)
        return child_end(code, self.error)

    def stop(self) -> None:
        """Sends the stop signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self) -> None:
        """Waits for its end."""
        self.process.wait()

    def _read_errors(self) -> None:
        for error in pass_on_errors(self.process):
            self.error = error


def _final_state(run: Path) -> State | None:
    """How the last attempt of a run has ended; None if it may go on."""
    names = [state.value for state in FINAL]
    for event in reversed(read(run)):
        if event["event"] in names:
            return State(event["event"])
        if event["event"] == "start":
            return None
    return None
