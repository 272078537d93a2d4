"""A task of the job array of `evspan prep`: assigns recordings to tasks, and prepares those of one.

Tasks write the outcome of each recording to a file in a folder that all nodes see
(`evspan.launch.slurm.outcome_files`).
`evspan.launch.slurm.prep_wait` reads these files.
"""

import heapq
import logging
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

from evspan.conf.schema.cluster import PrepClusterConfig
from evspan.conf.schema.prep import PrepConfig
from evspan.data_prep.workers import PrepJob, map_unordered
from evspan.launch.logging_config import configure_logging
from evspan.launch.slurm.outcome_files import outcome_file, write_outcome
from submitit.helpers import DelayedSubmission

logger = logging.getLogger(__name__)
BYTES_PER_TASK = 16 << 30
MOST_TASKS = 64
# SLURM sends these to all processes of a task.
SLURM_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)


def number_of_tasks(sizes: Sequence[int], cluster: PrepClusterConfig) -> int:
    """Tasks in the array: `cluster.array_size`, or one per 16 GiB of recordings, at most 64.

    Args:
        sizes: of the recordings, in bytes. There are never more tasks than recordings.
    """
    tasks = cluster.array_size
    if not tasks:
        tasks = min(MOST_TASKS, max(1, math.ceil(sum(sizes) / BYTES_PER_TASK)))
    return min(len(sizes), tasks)


def balanced(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """Divides the indices of `sizes` into groups of about the same sum.

    The largest comes first, each to the group with the smallest sum. The largest sum is at most
    4/3 of that of the best division (Graham 1969). No group is empty.
    """
    members: list[list[int]] = [[] for _ in range(min(groups, len(sizes)))]
    heap = [(0, 0, group) for group in range(len(members))]  # (sum, count as sizes may be 0, group)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, count, group = heapq.heappop(heap)
        members[group].append(index)
        heapq.heappush(heap, (total + sizes[index], count + 1, group))
    return members


@dataclass
class PrepTask:
    """Prepares a group of recordings. After a requeue it skips those that have an outcome file.

    Attributes:
        jobs: the recordings, by the number of their outcome file.
        outcomes: folder of the outcome files.
    """

    jobs: dict[int, PrepJob]
    config: PrepConfig
    outcomes: Path

    def __call__(self) -> None:
        """Called by Submitit on the node."""
        run_in_thread(self._prepare)

    def checkpoint(self) -> DelayedSubmission:
        """What Submitit requeues at the time limit."""
        return DelayedSubmission(self)

    def _prepare(self) -> None:
        configure_logging(log_file=True)
        numbers = {job.key: number for number, job in self.jobs.items()}
        missing = [
            job
            for number, job in self.jobs.items()
            if not outcome_file(self.outcomes, number).exists()
        ]
        function = partial(PrepJob.run, config=self.config)
        for outcome in map_unordered(function, missing, self.config.cluster.cpus_per_task):
            key = outcome.task.key
            write_outcome(self.outcomes, numbers[key], outcome)
            if outcome.error is None:
                logger.info("%s: done", key)
            else:
                logger.error("%s: failed: %s", key, outcome.error)


def run_in_thread(function: Callable[[], None]) -> None:
    """Runs the function in a thread that receives no signals, and raises what it raises.

    Submitit's signal handlers leave the main thread by an exception. Inside a call of HDF5, that
    exception would look like an error of the file, and the recording like a bad one.
    """
    errors: list[BaseException] = []

    def work() -> None:
        # Processes that this thread starts inherit the mask; they have no handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, SLURM_SIGNALS)
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
