"""Several ranks on this machine: starts them, hands signals on, and ends all of them when one dies."""

import ctypes
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

from evspan.conf.errors import (
    INTERRUPTED_EXIT_CODE,
    LOST_EXIT_CODE,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
)
from evspan.conf.failure_notes import FAILURE_FILE, read_failure_note

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0  # for the other ranks to fail by themselves once one has died; a collective may never tell them
POLL_S = 0.05
TAIL_LINES = 200  # of what a rank other than the first said, told when it fails
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(eq=False)
class Rank:
    number: int
    process: subprocess.Popen
    failure: Path  # written by `run_command` when the rank fails: when that was, and which ranks it was left by
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    reader: Thread | None = None
    ended_by_us: bool = False

    @property
    def code(self) -> int:
        if (
            self.ended_by_us
            and self.process.returncode == -signal.SIGKILL
            and self.failure.exists()
        ):
            return 1  # it had failed and was slow to go
        return self.process.returncode

    @property
    def failed(self) -> bool:
        return not self.orderly and not (self.ended_by_us and self.code == -signal.SIGKILL)

    @property
    def orderly(self) -> bool:
        return self.code in (0, STOPPED_EXIT_CODE)

    def how(self) -> str:
        return (
            f"was killed by {signal.Signals(-self.code).name}"
            if self.code < 0
            else f"ended with exit code {self.code}"
        )


def run_ranks(
    command: Sequence[str],
    ranks: int,
    *,
    threads: int = 0,
    after: str = "",
    grace_s: float = GRACE_S,
) -> int:
    """Run `command` as `ranks` processes with torchrun's variables, and return their exit code.

    Rank 0 keeps this process's output; what others say is told when they fail. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are
    handed on to all. When a rank dies, the others have `grace_s` to follow, then they are killed: SIGTERM asks a rank to save
    at its next step, which one that waits for a dead rank never reaches. Call it from the main thread.

    Args:
        threads: OMP_NUM_THREADS of a rank, unless that is set; 0: the cores divided by the ranks.
        after: what to do when a rank has died; ends the message.
    Returns:
        0, or 75 when all saved on a stop signal; 2 when a rank told a user's error, which is told once; 130 after SIGINT; 69 when
        a rank was stuck; else that of the rank that died first (128 + n for signal n).
    """
    with (
        _listening() as received,
        _held_port() as port,
        TemporaryDirectory(prefix="evspan-") as notes,
    ):
        started: list[Rank] = []
        try:
            for number in range(ranks):
                failure = Path(notes) / f"rank-{number}"
                environment = {
                    **rank_environment(number, ranks, port, threads),
                    FAILURE_FILE: str(failure),
                }
                started.append(
                    Rank(number, _spawn(command, environment, quiet=number > 0), failure)
                )
            for rank in started[
                1:
            ]:  # after the last fork: a thread could hold a lock that the child then waits for
                rank.reader = Thread(target=_read, args=(rank,), daemon=True)
                rank.reader.start()
            ended, stops = _watch(started, received, grace_s)
        finally:
            for rank in started:
                if rank.process.poll() is None:
                    rank.process.kill()
                    rank.process.wait()
        for rank in started[1:]:
            if rank.reader:
                rank.reader.join(
                    timeout=1
                )  # a process that the rank left behind may hold its output open
        return _conclude(ended, stops, after)


def rank_environment(number: int, ranks: int, port: int, threads: int = 0) -> dict[str, str]:
    """This process's variables and those of rank `number`."""
    per_rank = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(per_rank),
        **os.environ,
        "RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",  # what a killed rank said last must not be lost
        "PYTHONSAFEPATH": "1",  # `python -m` must not find modules in the working directory
    }


# -- starting ----------------------------------------------------------------------------------------------------
@contextmanager
def _listening() -> Iterator[list[int]]:
    """The signals that came, oldest first; the watching loop takes them out."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, handler) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def _held_port() -> Iterator[int]:
    """A free port that stays ours: bound here but never listened on, so that no other program is given it, while rank 0,
    which like us binds with SO_REUSEADDR (torch does), can listen."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], *, quiet: bool
) -> subprocess.Popen:
    output = (
        dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if quiet
        else {}
    )
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=_tied_to(os.getpid()),
        **output,
    )  # type: ignore[call-overload]


def _tied_to(parent: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None)

    def tie() -> None:
        """In the child: dies with its parent, even when that is killed; Ctrl-C reaches it through the parent alone."""
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return tie


def _read(rank: Rank) -> None:
    assert rank.process.stdout is not None
    for line in rank.process.stdout:
        rank.tail.append(line.rstrip("\n"))


# -- watching ----------------------------------------------------------------------------------------------------
def _watch(
    ranks: Sequence[Rank], received: list[int], grace_s: float
) -> tuple[list[Rank], list[int]]:
    """Until all have ended: the ranks in the order they did, and the signals handed on."""
    ended: list[Rank] = []
    stops: list[int] = []
    deadline = float("inf")
    while len(ended) < len(ranks):
        while received:
            stops.append(number := received.pop(0))
            for rank in ranks:
                rank.process.send_signal(number)
            if number == signal.SIGINT:  # a second one does not wait
                deadline = min(
                    deadline, time.monotonic() + (grace_s if stops.count(signal.SIGINT) == 1 else 0)
                )
        for rank in ranks:
            if rank not in ended and rank.process.poll() is not None:
                ended.append(rank)
                if not rank.orderly:
                    deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank not in ended and rank.process.poll() is None:
                    rank.ended_by_us = True
                    rank.process.kill()
        time.sleep(POLL_S)
    return ended, stops


def _conclude(ended: Sequence[Rank], stops: Sequence[int], after: str) -> int:
    """The exit code; tells what went wrong."""
    if all(rank.orderly for rank in ended):
        return max(rank.code for rank in ended)
    if signal.SIGINT in stops:
        return INTERRUPTED_EXIT_CODE
    failed = [rank for rank in ended if rank.failed]
    if stops and all(
        rank.code == -stops[0] for rank in failed
    ):  # they had not begun, or had nothing to save
        _tell(f"error: ended by {signal.Signals(stops[0]).name}; nothing was saved. {after}")
        return 128 + stops[0]
    culprit = min(failed, key=_precedence)
    first = next((rank for rank in failed if rank.number == 0), None)
    if culprit.code == USER_ERROR_EXIT_CODE:
        if first is None or first.code != USER_ERROR_EXIT_CODE:  # else rank 0 has told it
            errors = [line for line in culprit.tail if line.startswith("error: ")]
            _tell("\n".join(errors or culprit.tail))
        return USER_ERROR_EXIT_CODE
    if culprit.code == LOST_EXIT_CODE:
        stuck = [f"rank {rank.number}" for rank in ended if rank.ended_by_us]
        killed = f"; {', '.join(stuck)} had to be killed" if stuck else ""
        _tell(f"error: {read_failure_note(culprit.failure).message}{killed}. {after}")
        return LOST_EXIT_CODE
    if culprit.number and culprit.tail:
        _tell("\n".join(f"[rank {culprit.number}] {line}" for line in culprit.tail))
    memory = "Linux does that when memory runs out: see dmesg, and lower training.batch_size or parallel.ranks. "
    _tell(
        f"error: rank {culprit.number} of {len(ended)} {culprit.how()}, so the others were ended"
        f"{'; what it said is above' if culprit.code > 0 else ''}. {memory if culprit.code == -signal.SIGKILL else ''}{after}"
    )
    return culprit.code if culprit.code > 0 else 128 - culprit.code


def _precedence(rank: Rank) -> tuple[bool, bool, bool, float]:
    """Lowest for the rank that failed first. One that fails takes the others down through their collectives, and may take
    longer to exit than they do. Those it takes down are neither killed (other than by NCCL, which aborts) nor know a mistake."""
    killed = rank.code < 0 and rank.code != -signal.SIGABRT
    return (
        not killed,
        rank.code == LOST_EXIT_CODE,
        rank.code != USER_ERROR_EXIT_CODE,
        read_failure_note(rank.failure).monotonic_ns,
    )


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
