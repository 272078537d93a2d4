"""Ranks tell each other through the store that they live, so that one which is gone or stuck is named by those it leaves waiting.

Every rank has a thread that beats: it writes a count into the store of rank 0 and reads the others'. A rank that is killed or
stopped beats no longer. What no launcher watches (SLURM's tasks) ends by itself so, too.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import NamedTuple

import torch.distributed as dist
from evspan.conf.errors import LostRanksError
from evspan.conf.failure_notes import report_lost_ranks

BEAT_S = 1.0
SILENT_BEATS = 4  # once a collective has failed, so many missed ones tell who is gone
RUNNING, LOST = "", "lost"  # of a rank; anything else is why it failed
MARKS = (
    "gloo/",
    "Gloo ",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket Timeout",
    "Broken pipe",
)


class Told(NamedTuple):
    """What a rank wrote last: where it is, how often it has beaten, and how it stands."""

    host: str = "?"
    pid: int = 0
    beats: int = 0
    standing: str = RUNNING


@contextmanager
def named_peers(
    rank: int, size: int, address: str, port: int, *, timeout_s: float
) -> Iterator[None]:
    """While open, inside a process group: a rank that dies or stops ends this one, too.

    Left without an exception, all ranks leave together. timeout_s: a rank that is silent for longer ends the process.

    Raises:
        LostRanksError: in the place of what a collective raises when others are gone or do not come; names them.
    """
    if size == 1:
        yield
        return
    peers = _Peers(rank, size, address, port, timeout_s)
    try:
        yield
        dist.barrier()  # rank 0, whose store it is, must not go before the others are done
    except Exception as error:
        if broken(error):
            raise LostRanksError(peers.explain(error)) from error
        peers.say(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        raise
    finally:
        peers.close()


def broken(error: BaseException) -> bool:
    """Whether it tells that ranks do not reach each other."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
    )


class _Peers:
    def __init__(self, rank: int, size: int, address: str, port: int, timeout_s: float) -> None:
        self.rank, self.size, self.address, self.port, self.timeout_s = (
            rank,
            size,
            address,
            port,
            timeout_s,
        )
        self.told = [Told() for _ in range(size)]
        self.missed = [0] * size  # beats, by those who were to write them
        self.unanswered = 0  # by the store
        self.rounds, self.standing = 0, RUNNING
        self.ended, self.wake = Event(), Event()
        for work in (self._beat, self._watch):
            Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()

    # -- threads -------------------------------------------------------------------------------------------------
    def _beat(self) -> None:
        """Stops where the store is gone, and stands still where it is stuck; `_watch` sees both."""
        try:
            # A connection of its own: the process group's may be waiting.
            store = dist.PrefixStore(
                "evspan/peers",
                dist.TCPStore(
                    self.address,
                    self.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=self.timeout_s),
                ),
            )
            keys, me, beats = (
                [str(rank) for rank in range(self.size)],
                (socket.gethostname(), os.getpid()),
                0,
            )
            while not self.ended.is_set():
                beats += 1
                store.set(keys[self.rank], json.dumps(Told(*me, beats, self.standing)))
                if store.check(keys):
                    self._hear([Told(*json.loads(text)) for text in store.multi_get(keys)])
                self.rounds += 1
                self.wake.wait(BEAT_S)
                self.wake.clear()
        except (RuntimeError, ValueError):
            pass

    def _hear(self, told: list[Told]) -> None:
        for rank, (before, now) in enumerate(zip(self.told, told, strict=True)):
            self.missed[rank] = (
                self.missed[rank] + 1 if now.beats == before.beats and rank != self.rank else 0
            )
        self.told = told

    def _watch(self) -> None:
        """Counts in its own beats, not by the clock: a machine that was suspended has missed nothing."""
        rounds = 0
        while not self.ended.wait(BEAT_S):
            self.unanswered = 0 if self.rounds != rounds else self.unanswered + 1
            rounds = self.rounds
            if (
                max(*self.missed, self.unanswered) * BEAT_S > self.timeout_s
                and not self.ended.is_set()
            ):
                sys.stdout.flush()
                os._exit(
                    report_lost_ranks(self._message(int(self.timeout_s / BEAT_S)))
                )  # the main thread may wait for it in C for ever

    # -- the main thread -----------------------------------------------------------------------------------------
    def say(self, standing: str) -> None:
        """Tell the others how this rank stands, within a moment."""
        self.standing, rounds = standing, self.rounds
        self.wake.set()
        deadline = time.monotonic() + BEAT_S
        while (
            self.rounds < rounds + 2 and time.monotonic() < deadline
        ):  # one may have been under way
            self.wake.set()
            time.sleep(0.01)

    def explain(self, error: Exception) -> str:
        """Whom a collective failed for: asks the others, who will have failed in theirs, or are to blame."""
        self.say(LOST)
        deadline = time.monotonic() + (SILENT_BEATS + 1.5) * BEAT_S
        while time.monotonic() < deadline and not self._failed():
            time.sleep(BEAT_S / 10)
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return self._message(SILENT_BEATS - 1, " ".join(why.split())[-160:])

    def close(self) -> None:
        self.ended.set()
        self.wake.set()

    def _failed(self) -> list[int]:
        return [rank for rank, told in enumerate(self.told) if told.standing not in (RUNNING, LOST)]

    def _message(self, beats: int, torch_says: str = "") -> str:
        """beats: so many missed ones are silence."""
        silent = [rank for rank, missed in enumerate(self.missed) if missed >= beats]
        waiting = [
            rank
            for rank, told in enumerate(self.told)
            if told.standing == RUNNING and rank != self.rank
        ]
        if failed := self._failed():
            what = "; ".join(
                f"{self._name(rank)} failed ({self.told[rank].standing})" for rank in failed
            )
        elif self.unanswered >= beats:
            what = f"{self._name(0)}, whose store at {self.address}:{self.port} all ranks share, is gone or stuck"
        elif silent:
            what = (
                f"{', '.join(map(self._name, silent))} {'is' if len(silent) == 1 else 'are'} gone or stuck: not heard of for "
                f"{max(self.missed) * BEAT_S:.0f} s"
            )
        elif waiting:
            what = (
                f"{', '.join(map(self._name, waiting))} {'lives' if len(waiting) == 1 else 'live'}, but did not come to a "
                f"collective within parallel.timeout_s={self.timeout_s:g}"
            )
        else:
            what = "all ranks live, but lost the connections between them"
        return f"{what}. So rank {self.rank} ends{f' (torch: {torch_says})' if torch_says else ''}"

    def _name(self, rank: int) -> str:
        told = self.told[rank]
        return f"rank {rank}" + (f" (process {told.pid} on {told.host})" if told.pid else "")
