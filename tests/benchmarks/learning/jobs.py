"""Runs commands in order, some at a time, to a deadline; what is done already is left out."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.launch.local.ranks import die_with_parent

POLL_S = 0.1
SAVING_S = 60.0  # that a stopped command may take to save, then it is killed


@dataclass
class Job:
    """A command and how to know that it is done.

    Attributes:
        prepare: called before the command starts; it may take long.
        needs: jobs that come first.
        cores: that it keeps busy.
    """

    name: str
    command: list[str]
    is_done: Callable[[], bool]
    log: Path
    needs: tuple["Job", ...] = ()
    cores: int = 1
    prepare: Callable[[], object] = lambda: None


@dataclass
class Outcome:
    """What `run_jobs` did."""

    failed: list[str] = field(default_factory=list)
    stopped: bool = False  # at the deadline


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float


def run_jobs(
    jobs: Sequence[Job],
    cores: int,
    *,
    hours: float = 0.0,
    after: Callable[[str, float], object] = lambda name, seconds: None,
) -> Outcome:
    """Runs jobs in their order, as many at once as there are cores for.

    A job that needs more cores than are free waits, and what comes after it, too. One that fails
    leaves out those that need it. At the deadline, or on Ctrl-C or SIGTERM, running commands get
    SIGTERM, on which training saves. When this process is killed, they are, too.

    Args:
        cores: a job that needs more runs alone.
        hours: until the deadline; 0: none.
        after: called with name and seconds of each command that ended, was stopped or failed, too.

    Raises:
        KeyboardInterrupt: after the running commands have ended.
    """
    deadline = time.monotonic() + 3600 * hours if hours else float("inf")
    outcome = Outcome()
    waiting = [job for job in jobs if not job.is_done()]
    running: list[_Running] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            if time.monotonic() >= deadline:
                outcome.stopped = True
                break
            _reap(running, outcome, after)
            waiting = [job for job in waiting if not _is_lost(job, outcome)]
            free = cores - sum(one.job.cores for one in running)
            ready = next((job for job in waiting if all(n.is_done() for n in job.needs)), None)
            if ready is None and not running:
                break
            if ready is None or (running and ready.cores > free):
                time.sleep(POLL_S)
                continue
            waiting.remove(ready)
            ready.prepare()
            running.append(_start(ready))
    finally:
        _stop(running)
        signal.signal(signal.SIGTERM, previous)
    _reap(running, outcome, after)
    return outcome


def _is_lost(job: Job, outcome: Outcome) -> bool:
    """Whether something that it needs has failed; then it has, too."""
    if all(need.name not in outcome.failed for need in job.needs):
        return False
    outcome.failed.append(job.name)
    return True


def _start(job: Job) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
    output = job.log.open("ab")
    process = subprocess.Popen(
        job.command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent(os.getpid(), own_group=True),
        env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ},
    )
    return _Running(job, process, output, time.monotonic())


def _reap(running: list[_Running], outcome: Outcome, after: Callable[[str, float], object]) -> None:
    """Removes the commands that have ended."""
    for one in list(running):
        code = one.process.poll()
        if code is None:
            continue
        running.remove(one)
        one.output.close()
        after(one.job.name, time.monotonic() - one.began)
        if code == 0 and one.job.is_done():
            continue
        if code not in (STOPPED_EXIT_CODE, -signal.SIGTERM, 128 + signal.SIGTERM):
            outcome.failed.append(one.job.name)
            tail = one.job.log.read_text(errors="replace").splitlines()[-5:]
            print("\n".join([f"{one.job.name}: exit code {code}; {one.job.log}", *tail]))


def _stop(running: Sequence[_Running]) -> None:
    """Ends commands, with time to save."""
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
    end = time.monotonic() + SAVING_S
    for one in running:
        try:
            one.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
