"""One writer per folder, on local, network and parallel file systems.

The lock files are FOLDER/.locks/NUMBER. The one with the largest number counts: it names its
holder, or contains that the lock is free. A process takes the lock by creating the next number,
which succeeds for one process only, and never changes the file of another. So a take-over from a
process that was killed needs no further lock, and a process that was paused while it decided does
no harm.

What it relies on:

- link(2) creates a file with its contents, or fails if the name exists, as on every local file
  system, NFS since version 3, Lustre, GPFS, CephFS and WekaFS. Where there are no hard links,
  O_EXCL has to do the same.
- After a process has created a file in a folder, listing that folder shows all files that others
  have created before.
- Not on flock or fcntl locks, which may be missing (ENOLCK, ENOSYS, EOPNOTSUPP) or local to a node.

A holder is dead, and its lock taken over, when

1. it was on this machine (same host name, boot id and namespace of process ids) and no process has
   its process id and start time;
2. it was in a SLURM job of which this process is a later attempt (if the earlier one is still seen
   on this machine, it gets DYING_S to end), or which SLURM says has ended or waits to run again;
3. else: the file's modification time, which the holder renews every BEAT_S, is older than STALE_S
   by the file system's own clock, and does not change for another WATCH_S.
"""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.failure_notes import report_lost_ranks
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.lock_holder import Holder, Liveness
from evspan.conf.text import printable

logger = logging.getLogger(__name__)

LOCKS = ".locks"  # below the folder
BEAT_S = 15.0
STALE_S = 180.0
WATCH_S = 40.0
DYING_S = 60.0
POLL_S = 0.5
PARTIAL_S = 2.0  # time to write a lock file where there are no hard links
MOST_BYTES = 1 << 14  # of a lock file
LEFTOVER_S = 3600.0  # age of temporary files of processes that were killed
# The file system has no hard links.
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


class FolderInUseError(UserError):
    """Another process holds the lock. The message names it."""


class _Newest(NamedTuple):
    """The lock file with the largest number.

    number: 0 if there is none. holder: None if the lock is free. mtime_ns: of the file.
    """

    number: int
    holder: Holder | None
    mtime_ns: int


class FolderLock:
    """Holds the lock on a folder while it is open as a context.

    A thread renews the lock. If that fails, for instance on a full disk, nothing happens. If
    another process has taken the lock over, which it may when this one was suspended for minutes,
    this process ends at once: both would write.

    Args:
        folder: is created if it does not exist.
        purpose: the command that holds it, for people.
        wait_s: seconds to wait for another holder.
        end: ends this process with an exit code.
    """

    def __init__(
        self,
        folder: str | Path,
        purpose: str,
        *,
        wait_s: float = 0.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder = Path(folder)
        self.holder = Holder.current(purpose)
        self.wait_s = wait_s
        self.number = 0
        self._end = end
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _locks(self) -> Path:
        return self.folder / LOCKS

    def __enter__(self) -> "FolderLock":
        """Takes the lock.

        Raises:
            FolderInUseError: another process has it.
            OSError: the folder cannot be written to.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._remove_old_files()
        self._released.clear()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the lock, in the process that took it."""
        if os.getpid() != self.holder.pid:  # a fork
            return
        self._released.set()
        path = self._path(self.number)
        temporary = self._locks / f".{self.holder.token}"
        try:
            temporary.write_text(json.dumps({"released": round(time.time(), 3)}) + "\n")
            os.replace(temporary, path)
        except OSError:  # a full disk: an empty file is free, too
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            with suppress(OSError):
                os.truncate(path, 0)

    def is_held(self) -> bool:
        """Whether no other process has taken the lock over. True if that cannot be read."""
        try:
            numbers = _numbers(self.folder)
        except OSError:
            return True
        return not numbers or numbers[-1] == self.number

    # -- taking the lock -------------------------------------------------------------------------
    def _acquire(self) -> None:
        deadline = time.monotonic() + self.wait_s
        reported = ""
        while True:
            newest = _newest(self.folder)
            if newest.holder is None or self._is_dead(newest, newest.holder):
                if self._create(newest.number + 1):
                    return
                continue  # another process was faster
            if time.monotonic() >= deadline:
                raise FolderInUseError(self._refusal(newest.holder))
            if reported != newest.holder.token:
                reported = newest.holder.token
                logger.info(
                    "%s: waiting up to %.0f s for %s",
                    self.folder,
                    deadline - time.monotonic(),
                    _described(newest.holder),
                )
            time.sleep(POLL_S)

    def _is_dead(self, newest: _Newest, holder: Holder) -> bool:
        liveness = holder.liveness(self.holder)
        if liveness is Liveness.running and holder.is_earlier_attempt_of(self.holder):
            return self._wait_for_end(holder)
        if liveness is not Liveness.unknown:
            return liveness is Liveness.ended
        age_s = self._age_s(newest.mtime_ns)
        if age_s < STALE_S:
            return False
        logger.warning(
            "%s: %s has not renewed its lock for %.0f s; waiting %.0f s to see whether it does",
            self.folder,
            _described(holder),
            age_s,
            WATCH_S,
        )
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            if _newest(self.folder) != newest:
                return False
            time.sleep(POLL_S)
        return True

    def _wait_for_end(self, holder: Holder) -> bool:
        """Waits until an attempt that SLURM has ended is gone, or cannot be killed."""
        end = time.monotonic() + DYING_S
        while time.monotonic() < end and holder.liveness(self.holder) is Liveness.running:
            time.sleep(POLL_S)
        return True

    def _age_s(self, mtime_ns: int) -> float:
        """Seconds since a lock file was renewed, by the clock of the file system."""
        probe = self._locks / f".{self.holder.token}"
        probe.touch()
        now_ns = probe.stat().st_mtime_ns
        probe.unlink(missing_ok=True)
        return (now_ns - mtime_ns) / 1e9

    def _create(self, number: int) -> bool:
        """Whether this process has made the lock file of that number, and it is the newest."""
        path = self._path(number)
        temporary = self._locks / f".{self.holder.token}"
        text = json.dumps(self.holder.to_json()) + "\n"
        try:
            _write_synced(temporary, text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            created = _link(temporary, path, text)
        finally:
            temporary.unlink(missing_ok=True)
        if not created and not self._is_own(path):
            return False
        if _numbers(self.folder)[-1] != number:  # this process was paused since it read the folder
            path.unlink(missing_ok=True)
            return False
        self.number = number
        return True

    def _is_own(self, path: Path) -> bool:
        """NFS may report that a name exists though this process has just made it."""
        try:
            return _read(path) == self.holder
        except (FileNotFoundError, JsonFileError):
            return False

    # -- lock files ------------------------------------------------------------------------------
    def _path(self, number: int) -> Path:
        return _lock_file(self.folder, number)

    def _remove_old_files(self) -> None:
        """Removes earlier lock files, and temporary files of processes that were killed."""
        with suppress(OSError):
            for number in _numbers(self.folder):
                if number < self.number:
                    self._path(number).unlink(missing_ok=True)
            for path in self._locks.glob(".*"):
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink(missing_ok=True)

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self.folder} is in use by {_described(holder)}. Wait until it has ended, "
            f"{printable(holder.how_to_end())}, or choose another folder. If it was killed, the "
            f"folder is free after about {-(-(STALE_S + WATCH_S) // 60):.0f} minutes"
        )

    # -- holding the lock ------------------------------------------------------------------------
    def _renew(self) -> None:
        path = self._path(self.number)
        while not self._released.wait(BEAT_S):
            with suppress(OSError):
                os.utime(path)
            if not self.is_held() and not self._released.is_set():
                message = (
                    f"{self.folder} was taken over by another process, since this one had not "
                    f"renewed its lock for {STALE_S:.0f} s (was it suspended?). It ends and "
                    "writes nothing more"
                )
                self._end(report_lost_ranks(message))
                return


# -- lock files ------------------------------------------------------------------------------------
def holder_of(folder: str | Path) -> Holder | None:
    """Who holds the lock on a folder, or held it until it was killed; None if nobody does."""
    if not Path(folder, LOCKS).is_dir():
        return None
    return _newest(Path(folder)).holder


def is_in_use(folder: str | Path) -> bool:
    """Whether a process that holds the lock on a folder still runs, as far as can be found out.

    It writes nothing: a holder on another machine counts while its lock file is not stale by the
    clock of this machine.
    """
    if not Path(folder, LOCKS).is_dir():
        return False
    newest = _newest(Path(folder))
    if newest.holder is None:
        return False
    liveness = newest.holder.liveness(Holder.current("a reader"))
    if liveness is Liveness.unknown:
        return time.time() - newest.mtime_ns / 1e9 < STALE_S + WATCH_S
    return liveness is Liveness.running


def _lock_file(folder: Path, number: int) -> Path:
    return folder / LOCKS / f"{number:06d}"


def _numbers(folder: Path) -> list[int]:
    """Numbers of the lock files, in ascending order."""
    return sorted(int(name) for name in os.listdir(folder / LOCKS) if name.isdecimal())


def _newest(folder: Path) -> _Newest:
    """The newest lock file. The lock is free where there is none."""
    started = time.monotonic()
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return _Newest(0, None, 0)
        path = _lock_file(folder, numbers[-1])
        try:
            holder = _read(path)
            # Reading comes first: opening a file on NFS renews its cached attributes.
            return _Newest(numbers[-1], holder, path.stat().st_mtime_ns)
        except FileNotFoundError:  # removed by the holder of a later one
            continue
        except JsonFileError:
            # Being written where there are no hard links, or damaged.
            if time.monotonic() - started < PARTIAL_S:
                time.sleep(POLL_S / 5)
                continue
        with suppress(FileNotFoundError):
            return _unreadable(numbers[-1], path)


def _read(path: Path) -> Holder | None:
    """The holder; None where the lock is free.

    Raises:
        JsonFileError: the file is no lock file.
        FileNotFoundError: there is no file.
    """
    values = read_json_object(path, most_bytes=MOST_BYTES)
    if "released" in values:
        return None
    holder = Holder.from_json(values)
    if holder is None:
        raise JsonFileError(f"{path} is no lock file")
    return holder


def _unreadable(number: int, path: Path) -> _Newest:
    """A damaged lock file. An empty one was released on a full disk."""
    info = path.stat()
    holder = Holder.unreadable(path, info.st_mtime) if info.st_size else None
    return _Newest(number, holder, info.st_mtime_ns)


def _described(holder: Holder) -> str:
    return printable(holder.describe())


def _link(temporary: Path, path: Path, text: str) -> bool:
    """Creates `path` with the contents of `temporary`; False if it exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    else:
        return True
    try:
        _write_synced(path, text, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    return True


def _write_synced(path: Path, text: str, flags: int) -> None:
    handle = os.open(path, flags, 0o644)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
