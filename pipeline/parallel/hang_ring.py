"""The newest collectives of a rank in shared memory, which outlives its process. No torch.

A rank whose process is killed, stopped or aborted (gloo aborts it if sizes differ) reports nothing.
The ranks on its node read its newest collectives from a file in /dev/shm. It is used with gloo
only: there a collective takes far longer than the write. Where the folder is missing or full, there
is no such file, and only the heartbeats show what such a rank has done last.

The first slot holds the phase, each other one the JSON of a collective after a letter for its
state. Only files of the reader's own user are read.
"""

import fcntl
import json
import mmap
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from evspan.conf.text import printable
from evspan.pipeline.parallel.hang_files import Collective, CollectiveState

FOLDER = Path("/dev/shm")
NAME = re.compile("evspan-[0-9a-f]{16}")
SLOT = 256  # bytes
SLOTS = 65  # the phase, and 64 collectives
SIZE = SLOT * SLOTS
NANOSECONDS = 1e9
OLD_S = 86_400.0
STATES = {
    ord("w"): CollectiveState.waiting,
    ord("e"): CollectiveState.ended,
    ord("f"): CollectiveState.failed,
}
ENDED = ord("e")
FAILED = ord("f")


class RingFile:
    """The file of this rank. name: below FOLDER.

    Raises:
        OSError: there is no shared memory, or no space in it.
    """

    def __init__(self) -> None:
        self.name = f"evspan-{secrets.token_hex(8)}"
        self.next = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(FOLDER / self.name, flags, 0o600)
        try:
            # For `remove_old_rings`: held by the memory, until this process has ended.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.posix_fallocate(file, 0, SIZE)  # a write to a page without memory ends a process
            self.memory = mmap.mmap(file, SIZE)
        except OSError:
            remove_ring(self.name)
            raise
        finally:
            os.close(file)

    def set_phase(self, phase: str) -> None:
        """Writes what the run does."""
        self.memory[:SLOT] = phase.encode()[:SLOT].ljust(SLOT, b"\0")

    def begin(self, values: str) -> int:
        """Writes a collective that is called now. Returns its place.

        Args:
            values: a JSON list of group, number, name, kind, phase, shape, dtype, time in ns, peer.
        """
        place = SLOT * (1 + self.next % (SLOTS - 1))
        self.next += 1
        data = f"w{values}".encode()
        self.memory[place : place + SLOT] = data[:SLOT].ljust(SLOT, b"\0")
        return place

    def end(self, place: int, *, failed: bool) -> None:
        """Writes that the call of the collective at `place` has ended."""
        self.memory[place] = FAILED if failed else ENDED


class Ring(NamedTuple):
    """What a rank has done last. collectives: oldest first, without the ranks of their groups."""

    phase: str = ""
    collectives: tuple[Collective, ...] = ()


def remove_ring(name: str) -> None:
    """Removes the file of an earlier attempt, if it is there."""
    if NAME.fullmatch(name):
        with suppress(OSError):
            (FOLDER / name).unlink()


def remove_old_rings() -> None:
    """Removes files that this user's processes left here when they were killed, a day ago or more.

    Later attempts of a run remove its files only where they run on the same node.
    """
    for path in FOLDER.glob("evspan-*"):
        with suppress(OSError):
            status = path.lstat()
            is_old = time.time() - status.st_mtime > OLD_S
            if NAME.fullmatch(path.name) and status.st_uid == os.getuid() and is_old:
                _remove_unused(path)


def _remove_unused(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(file)


def read_ring(name: str) -> Ring:
    """The contents of a file of this user; empty if there is none.

    Args:
        name: from `RankProcess`, which others may have written.
    """
    if not NAME.fullmatch(name):
        return Ring()
    try:
        file = os.open(FOLDER / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                return Ring()
            data = os.read(file, SIZE)
        finally:
            os.close(file)
    except OSError:
        return Ring()
    collectives = []
    for place in range(SLOT, SLOTS * SLOT, SLOT):
        collective = _collective(data[place : place + SLOT])
        if collective is not None:
            collectives.append(collective)
    collectives.sort(key=lambda collective: collective.started)
    phase = data[:SLOT].rstrip(b"\0").decode(errors="replace")
    return Ring(printable(phase), tuple(collectives))


def _collective(slot: bytes) -> Collective | None:
    """The collective in a slot; None if it has none, or was just being written."""
    if not slot or slot[0] not in STATES:
        return None
    try:
        group, number, name, kind, phase, shape, dtype, time_ns, peer = json.loads(
            slot[1:].rstrip(b"\0")
        )
        return Collective(
            group=printable(group),
            ranks=(),
            number=int(number),
            name=printable(name),
            kind=printable(kind),
            phase=printable(phase),
            shape=tuple(int(size) for size in shape),
            dtype=printable(dtype),
            state=STATES[slot[0]],
            started=float(time_ns) / NANOSECONDS,
            peer=int(peer),
            is_message=int(peer) >= 0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
