"""Runs tasks in processes of this machine; prepares recordings with a runner and shows progress."""

import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import TracebackType
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

from evspan.conf.errors import RecordingError, UserError
from evspan.conf.progress import ProgressBar
from evspan.conf.schema.prep import PrepConfig
from evspan.data_prep.hdf5_files import unavailable
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import NoSpaceError
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.write import Stored, prepare_recording

logger = logging.getLogger(__name__)
Task = TypeVar("Task")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Task, Value]):
    """A task that has ended, with its value or the error that it raised."""

    task: Task
    value: Value | None = None
    error: Exception | None = None

    def get(self) -> Value:
        """Returns the value, or raises the error."""
        if self.error is not None:
            raise self.error
        return cast(Value, self.value)


@dataclass(frozen=True)
class PrepJob:
    """A recording to prepare into the file `part`.

    Attributes:
        reuse: an older group of the recording, whose frames may still be right.
    """

    source: Source
    part: Path
    reuse: Stored | None = None

    @property
    def key(self) -> str:
        """split/recording."""
        return self.source.key

    def run(self, config: PrepConfig) -> RecordingEntry:
        """Prepares the recording; see `prepare_recording`."""
        return prepare_recording(self.source, self.part, config, self.reuse)


PrepOutcomes: TypeAlias = Generator[Outcome[PrepJob, RecordingEntry], None, None]


class Runner(Protocol):
    """Prepares recordings somewhere: in processes of this machine, or in a SLURM job array."""

    def run(self, jobs: Sequence[PrepJob], config: PrepConfig) -> PrepOutcomes:
        """Yields each job when it has ended. Closing the generator ends the jobs that run."""
        ...


class DryRun(BaseException):  # no error: `except Exception` must not catch it
    """Raised by a runner that only shows what it would do; its message is the description."""


class LocalRunner:
    """Prepares recordings in `config.processes` processes of this machine."""

    def run(self, jobs: Sequence[PrepJob], config: PrepConfig) -> PrepOutcomes:
        """See `map_unordered`."""
        return map_unordered(partial(PrepJob.run, config=config), jobs, config.processes)


def run_jobs(
    jobs: Sequence[PrepJob], config: PrepConfig, runner: Runner
) -> dict[str, RecordingEntry]:
    """Runs the jobs, the largest recordings first, and shows progress.

    Returns:
        Entries of the recordings, by split/recording.

    Raises:
        RecordingError: some recordings cannot be prepared; raised when all others are done.
        UserError: the disk is full, or a process was killed.
    """
    entries: dict[str, RecordingEntry] = {}
    failed: dict[str, str] = {}
    jobs = sorted(jobs, key=lambda job: (-job.source.path.stat().st_size, job.key))
    with (
        closing(runner.run(jobs, config)) as outcomes,
        Progress("preparing", len(jobs)) as progress,
    ):
        for outcome in outcomes:
            key = outcome.task.key
            try:
                entries[key] = outcome.get()
            except NoSpaceError:
                raise
            except (UserError, OSError) as error:
                failed[key] = _reason(error)
                progress.advance(f"{key}: failed: {failed[key]}", important=True)
            else:
                progress.advance(f"{key}: {_summary(entries[key])}")
    if failed:
        reasons = " | ".join(f"{key}: {reason}" for key, reason in sorted(failed.items()))
        raise RecordingError(
            f"{len(failed)} of {len(jobs)} recordings cannot be prepared; {len(entries)} are done "
            f"and kept for the next run. {reasons}"
        )
    return entries


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):  # no damage: EACCES, EMFILE, EIO, ESTALE, ...
        return str(unavailable(error.filename or "a file", error))
    return str(error)


def _summary(entry: RecordingEntry) -> str:
    parts = [
        f"{entry.frames} frames",
        f"{entry.boxes} boxes",
        f"{entry.events / 1e6:.1f} M events",
    ]
    for reason, count in entry.dropped_events.items():
        if count:
            parts.append(f"{count} {reason.replace('_', ' ')}")
    return ", ".join(parts)


class Progress:
    """A bar on a terminal; elsewhere a log record for each recording. A context manager."""

    def __init__(self, description: str, total: int) -> None:
        self.total = total
        self.done = 0
        self.bar = ProgressBar(description, total, unit="recording")

    def advance(self, line: str, *, important: bool = False) -> None:
        """Counts one more recording.

        Args:
            line: what became of it.
            important: show the line above the bar, too.
        """
        self.done += 1
        if important or not self.bar.is_drawn:
            logger.info("[%d/%d] %s", self.done, self.total, line)
        self.bar.advance()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()


def map_unordered(
    function: Callable[[Task], Value], tasks: Sequence[Task], processes: int
) -> Generator[Outcome[Task, Value], None, None]:
    """Calls the function with each task in a pool of processes.

    Args:
        tasks: begun in this order.
        processes: 0: one per core; 1: in this process.

    Yields:
        The tasks in the order in which they end.

    Raises:
        UserError: a process was killed.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    if processes <= 1:
        for task in tasks:
            yield _called(function, task)
        return
    # spawn: a forked child would inherit the locks of HDF5 and numba in an unknown state.
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    others = active_children()
    with _interrupts_ignored():
        futures = {pool.submit(function, task): task for task in tasks}
    workers = [child for child in active_children() if child not in others]
    try:
        for future in as_completed(futures):
            yield _outcome(futures[future], future, processes)
    except BaseException:
        _kill(workers)  # a recording may take minutes
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _called(function: Callable[[Task], Value], task: Task) -> Outcome[Task, Value]:
    try:
        return Outcome(task, value=function(task))
    except Exception as error:
        return Outcome(task, error=error)


def _outcome(task: Task, future: "Future[Value]", processes: int) -> Outcome[Task, Value]:
    error = future.exception()
    if error is None:
        return Outcome(task, value=future.result())
    if isinstance(error, BrokenProcessPool):
        raise UserError(
            f"one of {processes} processes was killed, perhaps because memory ran out. Run the "
            "same again with fewer processes: processes=1 (on SLURM: a lower cluster.cpus_per_task "
            "or a higher cluster.mem_gb); what is done is kept"
        ) from error
    if not isinstance(error, Exception):
        raise error
    return Outcome(task, error=error)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start inside ignore Ctrl-C, which a terminal sends to all of them.

    Their parent ends them.
    """
    if current_thread() is not main_thread():  # Python sets handlers in the main thread only
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """Ends this process when its parent ends, even by SIGKILL.

    The processes of a pool would wait for work forever.
    """
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
