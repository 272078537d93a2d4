"""How recordings are dealt to the tasks of a SLURM array, and what a task does with its group of them."""

import heapq
import logging
import math
import os
import pickle
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]  # as the pools carry them
from pathlib import Path
from threading import Thread
from typing import Any

from evspan.conf.schema.cluster import PrepClusterConfig
from evspan.launch.logging_config import configure_logging

logger = logging.getLogger(__name__)
BYTES_PER_TASK, MOST_TASKS = 16 << 30, 64
SENT = (
    signal.SIGTERM,
    signal.SIGCONT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # by SLURM, to all processes of a task

Run = Callable[[Any], Any]
Results = Generator[tuple[Any, Callable[[], Any]], None, None]


def number_of_tasks(sizes: Sequence[int], cluster: PrepClusterConfig) -> int:
    return min(
        len(sizes),
        cluster.array_size or min(MOST_TASKS, max(1, math.ceil(sum(sizes) / BYTES_PER_TASK))),
    )


def balanced(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """Deal the indices of `sizes` into groups of about the same sum: the largest first, each to the group that has least.

    The heaviest group is at most 4/3 as heavy as in the best deal (Graham 1969). No group is empty.
    """
    dealt: list[list[int]] = [[] for _ in range(min(groups, len(sizes)))]
    heap = [(0, 0, group) for group in range(len(dealt))]  # sum, how many (sizes may be 0), group
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, number, group = heapq.heappop(heap)
        dealt[group].append(index)
        heapq.heappush(heap, (total + sizes[index], number + 1, group))
    return dealt


@dataclass
class Group:
    """A task. Run again after a requeue, it does what it has not told of yet.

    jobs: recordings, by the number under which the task tells what became of each: a file in the folder `told`.
    run: what to do with a job. here: does it with several, `processes` side by side (evspan.data_prep.workers.results_of).
    """

    jobs: dict[int, Any]
    run: Run
    here: Callable[[list[Any], Run, int], Results]
    processes: int
    told: Path

    def __call__(self) -> None:
        # Not in the main thread, which Submitit's handler of signals leaves by an exception: HDF5 would take that for an error
        # of its own, and the recording for a bad one.
        failed: list[BaseException] = []

        def work() -> None:
            signal.pthread_sigmask(
                signal.SIG_BLOCK, SENT
            )  # processes that this thread starts inherit it; they have no handlers
            try:
                self._prepare()
            except BaseException as error:
                failed.append(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def checkpoint(self) -> Any:
        """What Submitit requeues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _prepare(self) -> None:
        configure_logging(log_file=True)
        numbers = {job.source.key: number for number, job in self.jobs.items()}
        missing = [
            job for number, job in self.jobs.items() if not told_by(self.told, number).exists()
        ]
        for job, result in self.here(missing, self.run, self.processes):
            entry, failure = None, None
            try:
                entry = result()
            except Exception as error:
                failure = error
            _tell(self.told, numbers[job.source.key], entry, failure)
            if failure is None:
                logger.info("%s: done", job.source.key)
            else:
                logger.error("%s: failed: %s", job.source.key, failure)


def told_by(folder: Path, number: int) -> Path:
    return folder / f"{number}.pkl"


def _tell(folder: Path, number: int, entry: Any, failure: Exception | None) -> None:
    """Whole or not at all."""
    carried = ExceptionWithTraceback(failure, failure.__traceback__) if failure else None
    beside = folder / f".{number}.{socket.gethostname()}.{os.getpid()}"
    beside.write_bytes(pickle.dumps((entry, carried)))
    os.replace(beside, told_by(folder, number))


def arrived(folder: Path) -> set[int]:
    """Numbers of the jobs that tasks have told of."""
    return {int(path.stem) for path in folder.glob("[0-9]*.pkl")}


def read_told(folder: Path, number: int) -> tuple[Any, Exception | None]:
    """(result, None) or (None, what went wrong)."""
    return pickle.loads(told_by(folder, number).read_bytes())
