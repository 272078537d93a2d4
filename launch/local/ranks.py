"""Runs several ranks on this machine: starts them, forwards signals, ends all if one fails."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import FrameType
from typing import NamedTuple

from evspan.conf.errors import (
    INTERRUPTED_EXIT_CODE,
    IO_EXIT_CODE,
    LOST_EXIT_CODE,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
)
from evspan.conf.failure_notes import FAILURE_FILE, read_failure_note
from evspan.conf.secret_values import RUN_SECRET, new_secret
from evspan.launch.logging_config import ensure_logging

logger = logging.getLogger(__name__)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
REPORTED_CODES = (USER_ERROR_EXIT_CODE, IO_EXIT_CODE)  # of ranks that have printed their error
# Time for the other ranks to fail by themselves once one has died; a collective may wait for ever.
GRACE_S = 5.0
POLL_S = 0.05
JOIN_S = 1.0  # for a rank's output to end; a process that the rank left behind may hold it open
TAIL_LINES = 200  # of the output of a rank other than rank 0, printed when the rank fails
LOOPBACK = "lo"  # the interface, on Linux
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
OUT_OF_MEMORY_HINT = (
    "Linux does that when memory runs out: see dmesg, and lower training.batch_size or "
    "parallel.ranks. "
)


@dataclass(eq=False)
class Rank:
    """A rank's process.

    failure: file of the rank's failure note. tail: end of its output, except for rank 0.
    """

    number: int
    process: "subprocess.Popen[str]"
    failure: Path
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    reader: Thread | None = None
    ended_by_us: bool = False

    @property
    def code(self) -> int:
        """The exit code; -n for signal n. Of an ended process only."""
        code = self.process.returncode
        if self.ended_by_us and code == -signal.SIGKILL and self.failure.exists():
            return 1  # it had failed, and was slow to exit
        return code

    @property
    def orderly(self) -> bool:
        """Whether the rank completed, or saved on a stop signal."""
        return self.code in (0, STOPPED_EXIT_CODE)

    @property
    def failed(self) -> bool:
        """Whether the rank failed by itself, and was not killed because another one failed."""
        killed_by_us = self.ended_by_us and self.code == -signal.SIGKILL
        return not self.orderly and not killed_by_us

    def describe_end(self) -> str:
        """'was killed by SIGKILL' or 'ended with exit code 1'."""
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class _End(NamedTuple):
    """ranks: in the order in which they ended. stops: signals that were forwarded to them."""

    ranks: list[Rank]
    stops: list[int]


def run_ranks(
    command: Sequence[str],
    ranks: int,
    *,
    threads: int = 0,
    remedy: str = "",
    grace_s: float = GRACE_S,
    variables: Mapping[str, str] | None = None,
    saves_on_interrupt: bool = False,
) -> int:
    """Run `command` as `ranks` processes with torchrun's variables, until all have ended.

    Rank 0 writes to this process's output; the output of another rank is printed if it fails.
    SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are forwarded to all. When a rank dies, the others have
    `grace_s` seconds to end, and are killed then: SIGTERM makes a rank save at its next step, which
    one that waits for a dead rank never reaches. Call this from the main thread.

    Args:
        threads: OMP_NUM_THREADS of a rank, unless that is set. 0: the cores divided by the ranks.
        remedy: what to do when a rank has died; the last sentence of the message.
        variables: environment variables that replace this process's.
        saves_on_interrupt: ranks save on SIGINT, as on SIGTERM, which may take long: they are
            killed at the second one. False: they are killed `grace_s` after the first.

    Returns:
        The exit code: 0; 75 when all saved on a stop signal or SIGINT; 2 for a user's error in a
        rank; 130 after SIGINT; 69 when a rank was stuck; else that of the rank that failed first,
        128 + n for signal n.
    """
    ensure_logging()
    with (
        _signals_received() as received,
        _reserved_port() as port,
        TemporaryDirectory(prefix="evspan-") as notes,
    ):
        started: list[Rank] = []
        secret = new_secret()
        try:
            for number in range(ranks):
                failure = Path(notes, f"rank-{number}")
                environment = rank_environment(number, ranks, port, threads)
                environment.update(variables or {})
                environment[RUN_SECRET] = secret
                environment[FAILURE_FILE] = str(failure)
                process = _start_process(command, environment, quiet=number > 0)
                started.append(Rank(number, process, failure))
            # After the last fork: a thread could hold a lock that a child then waits for.
            for rank in started[1:]:
                rank.reader = Thread(target=_read_output, args=(rank,), daemon=True)
                rank.reader.start()
            end = _wait_for_all(started, received, grace_s, saves_on_interrupt)
        finally:
            _kill_all(started)
        for rank in started[1:]:
            if rank.reader:
                rank.reader.join(timeout=JOIN_S)
        return _report_end(end, remedy)


def rank_environment(number: int, ranks: int, port: int, threads: int = 0) -> dict[str, str]:
    """The environment of rank `number`: this process's, and torchrun's variables."""
    threads_per_rank = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads_per_rank),
        **_loopback(),
        **os.environ,
        "RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",  # the last output of a killed rank must not be lost
        "PYTHONSAFEPATH": "1",  # `python -m` must not find modules in the working directory
    }


def _loopback() -> dict[str, str]:
    """Makes gloo listen where only this machine reaches it."""
    names = [name for _, name in socket.if_nameindex()]
    return {"GLOO_SOCKET_IFNAME": LOOPBACK} if LOOPBACK in names else {}


# -- starting ------------------------------------------------------------------------------------
@contextmanager
def _signals_received() -> Iterator[list[int]]:
    """Collects signals, oldest first. The loop that waits for the ranks takes them out."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, handler) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port that no other program gets meanwhile.

    It is bound here but never listened on. Rank 0 can still listen on it, because torch binds with
    SO_REUSEADDR, as this does.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        yield port


def _start_process(
    command: Sequence[str], environment: Mapping[str, str], *, quiet: bool
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent(os.getpid(), own_group=True),
    )


def die_with_parent(parent: int, *, own_group: bool = False) -> Callable[[], None]:
    """A function for the child to call first: SIGKILL ends it when its parent has ended.

    Args:
        own_group: the child gets a process group of its own, so that Ctrl-C reaches it only through
            its parent.
    """
    libc = ctypes.CDLL(None)

    def tie() -> None:
        if own_group:
            os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return tie


def _read_output(rank: Rank) -> None:
    assert rank.process.stdout is not None
    for line in rank.process.stdout:
        rank.tail.append(line.rstrip("\n"))


# -- waiting -------------------------------------------------------------------------------------
def _wait_for_all(
    ranks: Sequence[Rank], received: list[int], grace_s: float, saves_on_interrupt: bool
) -> _End:
    """Forward signals until all ranks have ended; kill them `grace_s` after the first failure."""
    end = _End([], [])
    deadline = float("inf")
    while len(end.ranks) < len(ranks):
        while received:
            number = received.pop(0)
            end.stops.append(number)
            for rank in ranks:
                rank.process.send_signal(number)
            if number == signal.SIGINT:
                if end.stops.count(signal.SIGINT) > 1:
                    deadline = time.monotonic()
                elif saves_on_interrupt:
                    _report_interrupt()
                else:
                    deadline = min(deadline, time.monotonic() + grace_s)
        for rank in _newly_ended(ranks, end.ranks):
            end.ranks.append(rank)
            if not rank.orderly:
                deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            _kill_remaining(ranks, end.ranks)
        time.sleep(POLL_S)
    return end


def _report_interrupt() -> None:
    """The ranks cannot: one may wait for another."""
    if sys.stdout.isatty():
        print()  # below rank 0's progress bar
    logger.info("Ctrl-C: saves at the end of this step and ends; again: ends at once")


def _newly_ended(ranks: Sequence[Rank], ended: Sequence[Rank]) -> list[Rank]:
    return [rank for rank in ranks if rank not in ended and rank.process.poll() is not None]


def _kill_remaining(ranks: Sequence[Rank], ended: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank not in ended and rank.process.poll() is None:
            rank.ended_by_us = True
            rank.process.kill()


def _kill_all(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
            rank.process.wait()


# -- reporting -----------------------------------------------------------------------------------
def _report_end(end: _End, remedy: str) -> int:
    """Report a failure once, and return the exit code for all ranks."""
    if all(rank.orderly for rank in end.ranks):
        return max(rank.code for rank in end.ranks)
    if signal.SIGINT in end.stops:
        return INTERRUPTED_EXIT_CODE
    failed = [rank for rank in end.ranks if rank.failed]
    if end.stops and all(rank.code == -end.stops[0] for rank in failed):
        # The ranks had not started to train, or had nothing to save.
        name = signal.Signals(end.stops[0]).name
        logger.error("ended by %s; nothing was saved. %s", name, remedy)
        return 128 + end.stops[0]
    first = min(failed, key=_precedence)
    if first.code in REPORTED_CODES:
        return _report_user_error(first, failed)
    if first.code == LOST_EXIT_CODE:
        return _report_lost(first, end.ranks, remedy)
    return _report_failure(first, len(end.ranks), remedy)


def _precedence(rank: Rank) -> tuple[bool, bool, bool, float]:
    """Sort key: lowest for the rank that failed first.

    A rank that fails makes the others fail through their collectives, and may take longer to exit
    than they do. Those others are not killed (except by NCCL, which aborts), and report no user's
    error.
    """
    killed = rank.code < 0 and rank.code != -signal.SIGABRT
    return (
        not killed,
        rank.code == LOST_EXIT_CODE,
        rank.code not in REPORTED_CODES,
        read_failure_note(rank.failure).monotonic_ns,
    )


def _report_user_error(first: Rank, failed: Sequence[Rank]) -> int:
    """Print a user's error of another rank, unless rank 0 has printed one itself."""
    reported = any(rank.number == 0 and rank.code == first.code for rank in failed)
    if not reported:
        errors = [line for line in first.tail if line.startswith("error: ")]
        _print_output(errors or first.tail)
    return first.code


def _report_lost(first: Rank, ranks: Sequence[Rank], remedy: str) -> int:
    """Report ranks that a rank has lost, and those that were stuck and had to be killed."""
    message = read_failure_note(first.failure).message
    stuck = [f"rank {rank.number}" for rank in ranks if rank.ended_by_us]
    if stuck:
        message += f"; {', '.join(stuck)} had to be killed"
    logger.error("%s. %s", message, remedy)
    return LOST_EXIT_CODE


def _report_failure(first: Rank, ranks: int, remedy: str) -> int:
    """Print the output of the rank that failed first, and name it."""
    if first.number:
        _print_output([f"[rank {first.number}] {line}" for line in first.tail])
    message = f"rank {first.number} of {ranks} {first.describe_end()}, so the others were ended"
    if first.code > 0:
        message += "; its output is above"
    hint = OUT_OF_MEMORY_HINT if first.code == -signal.SIGKILL else ""
    logger.error("%s. %s%s", message, hint, remedy)
    return first.code if first.code > 0 else 128 - first.code


def _print_output(lines: Sequence[str] | deque[str]) -> None:
    """Copy output of a rank to standard error as it is."""
    if lines:
        print("\n".join(lines), file=sys.stderr, flush=True)
