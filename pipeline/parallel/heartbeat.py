"""Heartbeats between ranks, so that the others can name a rank that is gone or stuck.

Every rank has a thread that writes a count and a status into rank 0's store once per interval and
reads the others'. A rank that is killed or stopped misses its beats, and a rank that fails writes
its error; the others end. This also ends ranks that no launcher supervises (SLURM's tasks).
"""

import atexit
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import NamedTuple

import torch.distributed as dist
from evspan.conf.errors import LostRanksError
from evspan.conf.failure_notes import report_lost_ranks
from evspan.conf.text import printable
from evspan.pipeline.parallel.flight_recorder import describe_progress, recorded
from evspan.pipeline.parallel.hang_files import Peer
from evspan.pipeline.parallel.hang_watch import HangWatch
from evspan.pipeline.parallel.rank_env import RankInfo
from evspan.pipeline.parallel.rank_exit import exit_now, leave_group_open
from evspan.pipeline.parallel.run_secret import RunSecret

BEAT_S = 1.0
SILENT_BEATS = 4  # missed beats after which a rank counts as gone, once a collective has failed
# Beats from a failure of another rank until this one ends, so that an error of its own comes first.
FAILED_BEATS = 3
# Status of a rank; any other text is the error that it failed with.
RUNNING = ""
LOST = "lost"
# Parts of the error messages of a broken connection.
CONNECTION_ERRORS = (
    "gloo/",
    "Gloo ",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket Timeout",
    "Broken pipe",
)


class Beat(NamedTuple):
    """What a rank last wrote into the store.

    beats: count of its heartbeats. doing: its phase and newest collective.
    """

    host: str = "?"
    pid: int = 0
    beats: int = 0
    status: str = RUNNING
    doing: str = ""


@contextmanager
def heartbeat(
    info: RankInfo, secret: RunSecret, *, timeout_s: float, hang: HangWatch | None = None
) -> Iterator[None]:
    """While open, inside a process group: a rank that fails, dies or stops ends this one too.

    If the body ends without an exception, all ranks leave together. If it ends with one, the others
    read that this rank has failed, and its process group stays open (`rank_exit`): NCCL would wait
    for collectives of the others.

    Args:
        info: this rank, and where rank 0's store is.
        secret: of the run. A value in the store that no rank has signed is a missed beat.
        timeout_s: a rank that is silent for longer ends this process.
        hang: of this rank; asks all ranks what they do before this one ends because of others.

    Raises:
        LostRanksError: replaces the error of a collective that failed because other ranks are gone
            or did not reach it; names them.
    """
    if info.size == 1:
        yield
        return
    heartbeats = _Heartbeats(info, secret, timeout_s, hang)
    try:
        yield
        with recorded("end of the run", "barrier"):
            dist.barrier()  # rank 0 hosts the store and must not leave before the others are done
    except SystemExit:  # all ranks agreed to stop
        heartbeats.close()
        raise
    except BaseException as error:
        leave_group_open(heartbeats.wait_for_others)
        if isinstance(error, Exception):
            _report(error, heartbeats)
        raise
    heartbeats.close()


def _report(error: Exception, heartbeats: "_Heartbeats") -> None:
    """Publishes an error of this rank, or finds the ranks that have caused it.

    Raises:
        LostRanksError: other ranks have caused it.
    """
    if is_connection_error(error):
        raise LostRanksError(heartbeats.explain(error)) from error
    heartbeats.publish(" ".join(f"{type(error).__name__}: {error}".split())[:500])


def is_connection_error(error: BaseException) -> bool:
    """Whether the error means that ranks do not reach each other."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in CONNECTION_ERRORS)


def _parsed(text: str | None) -> Beat | None:
    """A beat from its JSON text; None if it is none, as another process may have written it."""
    try:
        host, pid, beats, status, doing = json.loads(text or "")
    except (ValueError, TypeError, RecursionError):
        return None
    texts_fit = all(isinstance(value, str) for value in (host, status, doing))
    if not texts_fit or not isinstance(pid, int) or not isinstance(beats, int):
        return None
    return Beat(printable(host), pid, beats, printable(status), printable(doing))


class _Heartbeats:
    """The heartbeats of all ranks, and the two threads that send and check them."""

    def __init__(
        self, info: RankInfo, secret: RunSecret, timeout_s: float, hang: HangWatch | None
    ) -> None:
        self.rank = info.rank
        self.size = info.size
        self.address = info.address
        self.port = info.port
        self.secret = secret
        self.timeout_s = timeout_s
        self.latest = [Beat() for _ in range(info.size)]
        self.missed = [0] * info.size  # beats, per rank
        self.unanswered = 0  # beats without an answer from the store
        self.rounds = 0
        self.status = RUNNING
        self.hang = hang
        if hang is not None:
            hang.peers = self.peers
        self.closed = Event()
        self.wake = Event()
        self.threads = [
            Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True)
            for target in (self._beat, self._watch)
        ]
        for thread in self.threads:
            thread.start()
        atexit.register(self.close)  # a thread in the store's C++ code would abort the interpreter

    # -- threads -----------------------------------------------------------------------------------
    def _beat(self) -> None:
        """Ends where the store is gone, and blocks where it is stuck; `_watch` notices both."""
        try:
            # A connection of its own: the process group's may be waiting.
            connection = dist.TCPStore(
                self.address,
                self.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.timeout_s),
            )
            # torchrun's store outlives ranks that it starts again.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(
                f"{self.secret.prefix}/evspan/heartbeats/{attempt}", connection
            )
            keys = [str(rank) for rank in range(self.size)]
            host = socket.gethostname()
            beats = 0
            while not self.closed.is_set():
                beats += 1
                beat = Beat(host, os.getpid(), beats, self.status, describe_progress())
                own = keys[self.rank]
                store.set(own, self.secret.sign(own, json.dumps(beat)))
                if store.check(keys):
                    self._receive(store.multi_get(keys))
                self.rounds += 1
                self.wake.wait(BEAT_S)
                self.wake.clear()
        except (RuntimeError, ValueError):
            pass

    def _receive(self, values: list[bytes]) -> None:
        """Takes the ranks' values from the store, by rank. One that is not theirs is no beat."""
        beats = []
        for rank, value in enumerate(values):
            text = self.secret.verified(str(rank), value)
            beats.append(_parsed(text) or self.latest[rank])
        for rank, (before, now) in enumerate(zip(self.latest, beats, strict=True)):
            if now.beats == before.beats and rank != self.rank:
                self.missed[rank] += 1
            else:
                self.missed[rank] = 0
        self.latest = beats

    def _watch(self) -> None:
        """Counts in its own beats, not by the clock: a suspended machine has missed none."""
        rounds = 0
        failed_beats = 0
        while not self.closed.wait(BEAT_S):
            self.unanswered = 0 if self.rounds != rounds else self.unanswered + 1
            rounds = self.rounds
            failed_beats = failed_beats + 1 if self._failed() else 0
            silent_s = max(*self.missed, self.unanswered) * BEAT_S
            must_end = failed_beats > FAILED_BEATS or silent_s > self.timeout_s
            # With another status, the main thread is ending the process.
            if must_end and self.status == RUNNING and not self.closed.is_set():
                message = self._message(int(self.timeout_s / BEAT_S), hang=self._explanation())
                if self.hang is not None:
                    self.hang.free_memory()
                code = report_lost_ranks(message)
                self.publish(LOST)
                exit_now(code)  # the main thread may be waiting in C code forever

    # -- main thread -------------------------------------------------------------------------------
    def publish(self, status: str) -> None:
        """Sends this rank's status to the others; returns when it is written, or after one beat."""
        self.status = status
        rounds = self.rounds
        self.wake.set()
        deadline = time.monotonic() + BEAT_S
        # Two rounds: one may have been under way.
        while self.rounds < rounds + 2 and time.monotonic() < deadline:
            self.wake.set()
            time.sleep(0.01)

    def wait_for_others(self) -> None:
        """Returns when the others have read this rank's status, or a few beats later.

        On NCCL it returns when they have ended: NCCL aborts a process whose peers are gone, which
        would come before the message of its heartbeat.
        """
        if self.status == RUNNING:  # interrupted: there is nothing to read
            return
        has_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        beats = FAILED_BEATS + 3 if has_nccl else 2
        seen = self.latest
        deadline = time.monotonic() + beats * BEAT_S
        while time.monotonic() < deadline:
            if all(self._has_read(rank, seen[rank], ended=has_nccl) for rank in range(self.size)):
                time.sleep(BEAT_S / 5)  # a rank writes its beat before it reads the others'
                return
            self.wake.set()
            time.sleep(BEAT_S / 10)

    def _has_read(self, rank: int, seen: Beat, *, ended: bool) -> bool:
        """Whether a rank has read this one's status. seen: its beat when that was published."""
        latest = self.latest[rank]
        if rank == self.rank or latest.status != RUNNING:
            return True
        return not ended and latest.beats > seen.beats

    def explain(self, error: Exception) -> str:
        """Waits for the others' statuses and returns which ranks made a collective fail."""
        if self.hang is not None:
            self.hang.ask("a collective failed")
        self.publish(LOST)
        deadline = time.monotonic() + (SILENT_BEATS + 1.5) * BEAT_S
        while time.monotonic() < deadline and not self._failed():
            time.sleep(BEAT_S / 10)
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        # Before the reports are read, which takes seconds in which the others end.
        cause = self._cause(SILENT_BEATS - 1)
        torch_error = " ".join(reason.split())[-160:]
        return self._message(0, torch_error, cause=cause, hang=self._explanation())

    def _explanation(self) -> str:
        """What the ranks did, where none has failed with an error of its own. Takes seconds."""
        if self.hang is None or self._failed():
            return ""
        return self.hang.explain("a rank is stuck or gone")

    def peers(self) -> dict[int, Peer]:
        """What the others' heartbeats show."""
        return {
            rank: Peer(beat.host, beat.pid, missed * BEAT_S, beat.doing, "")
            for rank, (beat, missed) in enumerate(zip(self.latest, self.missed, strict=True))
        }

    def close(self) -> None:
        """Ends both threads, unless they are stuck."""
        self.closed.set()
        self.wake.set()
        atexit.unregister(self.close)
        for thread in self.threads:
            thread.join(BEAT_S / 2)

    def _failed(self) -> list[int]:
        """Ranks that ended with an error of their own."""
        statuses = [beat.status for beat in self.latest]
        return [rank for rank, status in enumerate(statuses) if status not in (RUNNING, LOST)]

    def _message(
        self, beats: int, torch_error: str = "", *, cause: str = "", hang: str = ""
    ) -> str:
        """Which ranks caused the failure.

        Args:
            beats: missed ones from which on a rank is silent.
            cause: which ranks, where it is known; then beats is not read.
            hang: what this rank waited for.
        """
        message = cause or self._cause(beats)
        if hang:
            message += f": {hang}"
        message += f". So rank {self.rank} ends"
        if torch_error:
            message += f" (torch: {torch_error})"
        return message

    def _cause(self, beats: int) -> str:
        failed = self._failed()
        if failed:
            return "; ".join(
                f"{self._name(rank)} failed ({self.latest[rank].status})" for rank in failed
            )
        store_gone = self.unanswered >= beats
        # Rank 0 also ends, and its store with it, because of a rank that was silent before.
        needed = min(beats, SILENT_BEATS - 1) if store_gone else beats
        silent = [rank for rank, missed in enumerate(self.missed) if missed >= needed]
        if silent:
            names = ", ".join(map(self._name, silent))
            verb = "is" if len(silent) == 1 else "are"
            seconds = max(self.missed) * BEAT_S
            return f"{names} {verb} gone or stuck: no heartbeat for {seconds:.0f} s"
        if store_gone:
            return (
                f"{self._name(0)}, whose store at {self.address}:{self.port} all ranks share, is "
                "gone or stuck"
            )
        others = [rank for rank in range(self.size) if rank != self.rank]
        waiting = [rank for rank in others if self.latest[rank].status == RUNNING]
        if waiting:
            names = ", ".join(map(self._name, waiting))
            verb = "is" if len(waiting) == 1 else "are"
            return (
                f"{names} {verb} alive, but did not reach a collective within "
                f"parallel.timeout_s={self.timeout_s:g}"
            )
        return "all ranks are alive, but lost the connections between them"

    def _name(self, rank: int) -> str:
        beat = self.latest[rank]
        if not beat.pid:
            return f"rank {rank}"
        return f"rank {rank} (process {beat.pid} on {beat.host})"
