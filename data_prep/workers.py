"""Recordings -> part files in several processes, with progress; one bad recording does not stop the others."""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import TypeVar

from evspan.conf.errors import RecordingError, UserError
from evspan.conf.schema.prep import PrepConfig
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import NoSpaceError
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.write import Stored, prepare_recording
from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
Results = Generator[tuple[Task, Callable[[], Result]], None, None]


@dataclass(frozen=True)
class Job:
    """reuse: an older group of the recording whose frames may still be right."""

    source: Source
    part: Path
    reuse: Stored | None = None

    def run(self, config: PrepConfig) -> RecordingEntry:
        return prepare_recording(self.source, self.part, config, self.reuse)


Elsewhere = Callable[..., Results[Job, RecordingEntry]]


def run_jobs(
    jobs: list[Job], config: PrepConfig, elsewhere: Elsewhere | None = None
) -> dict[str, RecordingEntry]:
    """Entries by split/recording; a bar on a terminal, a line per recording otherwise.

    elsewhere: gives the results of jobs that it has other machines do, as `results_of` does here. It is called with the jobs,
        what to do with each, the config of the cluster, and `results_of`, for those machines to use.
    Raises:
        RecordingError: which recordings cannot be prepared, and why, when all others are done.
        UserError: the disk is full, or a process was killed.
    """
    entries: dict[str, RecordingEntry] = {}
    failed: dict[str, str] = {}
    run = partial(Job.run, config=config)
    jobs = sorted(
        jobs, key=lambda j: (-j.source.path.stat().st_size, j.source.key)
    )  # the longest first: no lone straggler
    results = (
        elsewhere(jobs, run, config.cluster, results_of)
        if elsewhere
        else results_of(jobs, run, config.processes)
    )
    with (
        closing(results),
        tqdm(total=len(jobs), desc="preparing", unit="recording", disable=None) as bar,
    ):  # None: only on a terminal
        for number, (job, result) in enumerate(results, 1):
            key = job.source.key
            try:
                entries[key] = result()
            except NoSpaceError:
                raise
            except (UserError, OSError) as error:
                failed[key] = str(error)
            line = f"[{number}/{len(jobs)}] {key}: {_told(entries[key]) if key in entries else f'failed: {failed[key]}'}"
            if bar.disable:
                print(line, flush=True)
            elif key in failed:
                bar.write(line)
            bar.update()
    if failed:
        told = " | ".join(f"{key}: {why}" for key, why in sorted(failed.items()))
        raise RecordingError(
            f"{len(failed)} of {len(jobs)} recordings cannot be prepared; {len(entries)} are done and kept for "
            f"the next run. {told}"
        )
    return entries


def _told(entry: RecordingEntry) -> str:
    odd = [f"{n} {reason.replace('_', ' ')}" for reason, n in entry.dropped_events.items() if n]
    return ", ".join(
        [
            f"{entry.frames} frames",
            f"{entry.boxes} boxes",
            f"{entry.events / 1e6:.1f} M events",
            *odd,
        ]
    )


def results_of(
    tasks: list[Task], run: Callable[[Task], Result], processes: int
) -> Results[Task, Result]:
    """Each task with a function that gives or raises what became of it, in the order in which they end.

    Args:
        tasks: begun in this order. processes: 0: one per core.
    Raises:
        UserError: a process was killed.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    if processes <= 1:
        yield from ((task, partial(run, task)) for task in tasks)
        return
    # spawn: a forked child would inherit HDF5's and numba's locks in whatever state they are.
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    others = active_children()
    with _interrupts_ignored():
        futures = {pool.submit(run, task): task for task in tasks}
    helpers = [child for child in active_children() if child not in others]
    try:
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                raise UserError(
                    f"one of {processes} processes was killed, perhaps since memory ran out. Run the same again, "
                    "with fewer at once: processes=1; what is done is kept"
                ) from future.exception()
            yield futures[future], future.result
    except BaseException:  # a recording may take minutes yet
        for helper in helpers:
            helper.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start now leave Ctrl-C, which reaches all of a terminal's, to this one: it ends them."""
    if current_thread() is not main_thread():  # where Python lets nobody set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """Even when the parent is killed: a pool's processes would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
