"""Runs of trials as SLURM jobs, which outlive the controller.

A job is named after its trial. A controller that was killed between the submission of a job and its
record finds the job in SLURM's queue by that name, or by the job id in the run's history.
"""

import logging
import time
from pathlib import Path

from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.search.study import Trial
from evspan.launch.search.trial_runs import Observation
from evspan.launch.slurm.client import cancel_tasks, queue, signal_tasks
from evspan.launch.slurm.requeue import newest_step
from evspan.launch.slurm.sbatch import job_name
from evspan.launch.slurm.submit_runs import record_trial, submit_trial
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import submitted_job
from evspan.launch.sweep.registry import Run, RunEntry, read_entries
from evspan.launch.sweep.state import State, last_start
from evspan.pipeline.history import append, read

logger = logging.getLogger(__name__)
# An sbatch whose controller was killed may still reach SLURM this long after.
SUBMISSION_S = 20.0
SIGNAL_AGAIN_S = 30.0  # a run that starts may not handle signals yet
CANCEL_S = 900.0  # a pruned run that has not ended by itself is cancelled after this


class SlurmTrials:
    """The runs of a sweep's trials.

    Args:
        sweep: the folder. search_id: in the names of the jobs.
    """

    def __init__(self, sweep: Path, search_id: str, cluster: ClusterConfig) -> None:
        self.sweep = sweep
        self.cluster = cluster
        self.most_active = cluster.array_parallelism
        self.prefix = f"{job_name(sweep)}-{search_id}"
        self.runs: dict[Path, Run] = {}  # as observed last
        self.stopping: dict[Path, tuple[float, float]] = {}  # run -> first and last signal

    # -- starting ------------------------------------------------------------------------------
    def is_started(self, trial: Trial, run: PlannedRun) -> bool:
        """Whether the run's last submission has reached SLURM. Records it where no one has.

        Raises:
            UserError: SLURM does not answer.
        """
        if trial.submitted_at is None:
            return False
        if submitted_job(run.folder) not in ("", trial.previous_job):
            return True
        waited_s = time.time() - trial.submitted_at
        time.sleep(min(SUBMISSION_S, max(0.0, SUBMISSION_S - waited_s)))
        job = self._job_in_queue(run) or self._job_in_history(trial, run)
        if not job:
            return False
        record_trial(run, self.cluster, self.sweep, job)
        logger.info("%s: found as SLURM job %s", run.folder, job)
        return True

    def start(self, trial: Trial, run: PlannedRun) -> None:
        """Submits the run.

        Raises:
            UserError: SLURM refuses it or does not answer, or another process uses its folder.
        """
        self.stopping.pop(run.folder, None)
        submit_trial(run, self.cluster, self.sweep, self._name(run))

    def _name(self, run: PlannedRun) -> str:
        return f"{self.prefix}-{run.folder.name}"

    def _job_in_queue(self, run: PlannedRun) -> str:
        """The job of the run that waits or runs; else one that has ended; else empty."""
        tasks = sorted(queue(self._name(run)), key=lambda task: task.alive)
        earlier = submitted_job(run.folder)
        tasks = [task for task in tasks if task.id != earlier]
        return tasks[-1].id if tasks else ""

    def _job_in_history(self, trial: Trial, run: PlannedRun) -> str:
        """The job of the run's last start, unless the run had it before its last submission."""
        job = str(last_start(read(run.folder)).get("job") or "")
        return "" if job == trial.previous_job else job

    # -- observing -----------------------------------------------------------------------------
    def observe(self, runs: list[PlannedRun]) -> list[Observation] | None:
        """The runs' states; None where SLURM's queue cannot be read."""
        entries = [RunEntry(run.folder, run.folder.name, ()) for run in runs]
        found, note = read_entries(entries)
        if note:
            logger.warning("%s; the search waits", note)
            return None
        self.runs = {run.folder: run for run in found}
        return [Observation(run.state, run.alive, run.reason or run.error) for run in found]

    # -- stopping ------------------------------------------------------------------------------
    def prune(self, run: PlannedRun, reason: str) -> None:
        """Records `pruned` for the run's present attempt, and sends its stop signal.

        Its batch script then does not requeue it. A job that waits is cancelled: it has saved.

        Raises:
            UserError: SLURM does not answer.
        """
        observed = self.runs[run.folder]
        if not _ends_with(run.folder, "pruned", "done"):
            step = newest_step(run.folder, read_files=False)
            append(run.folder, "pruned", step=step, reason=reason)
        if not observed.alive:
            return
        now = time.monotonic()
        first, last = self.stopping.get(run.folder, (now, -SIGNAL_AGAIN_S))
        if observed.state in (State.waiting, State.requeued) or now - first > CANCEL_S:
            cancel_tasks(_jobs(observed))
        elif now - last >= SIGNAL_AGAIN_S:
            signal_tasks([observed.job])
            self.stopping[run.folder] = (first, now)

    def cancel(self, runs: list[PlannedRun], reason: str) -> None:
        """Cancels the jobs of the runs that are in the queue.

        Raises:
            UserError: SLURM does not answer.
        """
        self.observe(runs)
        alive = [run for run in self.runs.values() if run.alive]
        for run in alive:
            # First of all: a successor that starts meanwhile reads it, and ends.
            if not _ends_with(run.folder, "cancelled"):
                step = newest_step(run.folder, read_files=False)
                append(run.folder, "cancelled", step=step, reason=reason)
        jobs: list[str] = []
        for run in alive:
            jobs += _jobs(run)
        if jobs:
            cancel_tasks(jobs)

    def leave(self) -> str:
        """The jobs go on."""
        return f"and its jobs go on (evspan cancel {self.sweep} ends them)"


def _jobs(run: Run) -> list[str]:
    """The jobs of a run, first the one that would continue it."""
    return [job for job in (run.successor, run.job) if job]


def _ends_with(run: Path, *names: str) -> bool:
    """Whether the present attempt has one of these events."""
    for event in reversed(read(run)):
        if event["event"] in names:
            return True
        if event["event"] in ("start", "submitted"):
            return False
    return False
