"""Waits for the tasks of a prep array: reads outcome files, detects tasks that left none."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from evspan.conf.errors import RecordingError, UserError
from evspan.data_prep.workers import Outcome, PrepJob, PrepOutcomes
from evspan.launch.slurm.client import Queued, queue
from evspan.launch.slurm.outcome_files import finished_jobs, read_outcome

logger = logging.getLogger(__name__)
POLL_S = 1.0  # between looks at the outcome files
QUEUE_S = 10.0  # between queries to SLURM's controller, which all users share
GRACE_S = 10.0  # a shared file system may show a task's last files this late
REMEDIES = {  # of the states in which SLURM ends a task
    "OUT_OF_MEMORY": " (raise cluster.mem_gb, or lower cluster.cpus_per_task)",
    "TIMEOUT": " (raise cluster.timeout_min)",
}


@dataclass(frozen=True)
class ArrayTask:
    """A submitted task of the array.

    Attributes:
        id: SLURM's id, JOB_INDEX.
        jobs: numbers of the jobs that it has.
        log: its standard error.
        result: the file that Submitit writes at its end.
    """

    id: str
    jobs: list[int]
    log: Path
    result: Path


@dataclass
class ArrayWatch:
    """Yields the outcomes of an array's jobs.

    It does not use `sacct`: many clusters have no accounting, and without it Submitit waits for
    killed tasks forever.

    Attributes:
        name: of the SLURM job.
        outcomes: folder of the outcome files.
        missing: jobs without an outcome so far, by number.
        ended: task id -> monotonic time since which SLURM reports it as ended.
    """

    name: str
    outcomes: Path
    missing: dict[int, PrepJob]
    tasks: list[ArrayTask]
    ended: dict[str, float] = field(default_factory=dict)
    last_status: str = ""

    def results(self) -> PrepOutcomes:
        """Yields each job when it has ended, or its task is lost."""
        last_query = -math.inf
        while True:
            yield from self._finished()
            if not self.missing:
                return
            if time.monotonic() - last_query >= QUEUE_S:
                yield from self._lost()
                last_query = time.monotonic()
            time.sleep(POLL_S)

    def _finished(self) -> PrepOutcomes:
        """Jobs that have an outcome file."""
        for number in sorted(finished_jobs(self.outcomes) & self.missing.keys()):
            yield read_outcome(self.outcomes, number, self.missing.pop(number))

    def _lost(self) -> PrepOutcomes:
        """Jobs of tasks that ended without writing their outcomes."""
        try:
            known = {task.id: task for task in queue(self.name)}
        except UserError as error:  # the controller may answer again
            self._log_status(f"{error}; still waiting")
            return
        self._log_status(_summary([known[task.id] for task in self.tasks if task.id in known]))
        for task in self._ended_tasks(known):
            os.utime(self.outcomes)  # makes NFS read the folder again
            yield from self._finished()
            state = "is no longer known to SLURM"
            remedy = ""
            if task.id in known:
                state = f"ended as {known[task.id].state}"
                remedy = REMEDIES.get(known[task.id].state, "")
            for number in task.jobs:
                if number in self.missing:
                    message = (
                        f"SLURM task {task.id} {state} before it was done{remedy}; its log is "
                        f"{task.log}{_last_line(task.log)}"
                    )
                    yield Outcome(self.missing.pop(number), error=RecordingError(message))

    def _ended_tasks(self, known: dict[str, Queued]) -> Iterator[ArrayTask]:
        """Tasks with missing jobs that ended at least GRACE_S ago."""
        now = time.monotonic()
        for task in self.tasks:
            alive = task.id in known and known[task.id].alive
            if alive or not self.missing.keys() & set(task.jobs):
                self.ended.pop(task.id, None)
            elif now - self.ended.setdefault(task.id, now) >= GRACE_S:
                yield task

    def _log_status(self, line: str) -> None:
        """Logs a line that differs from the last one."""
        if line and line != self.last_status:
            logger.info("%s", line)
        self.last_status = line


def _summary(tasks: list[Queued]) -> str:
    """'SLURM: 2 running, 3 pending (Priority)'; empty when all have ended."""
    counts: Counter[str] = Counter()
    for task in tasks:
        if task.alive:
            state = task.state.lower()
            if task.state == "PENDING" and task.reason != "(None)":
                state += f" {task.reason}"
            counts[state] += 1
    if not counts:
        return ""
    return "SLURM: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def _last_line(log: Path) -> str:
    """' and ends with: LINE'; empty without a log."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:  # the task never started
        return ""
    for line in reversed(lines):
        if line.strip():
            return f" and ends with: {line.strip()}"
    return ""
