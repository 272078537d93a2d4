"""Files that appear whole or not at all, folders with one writer, checksums of files."""

import fcntl
import io
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import xxhash
from evspan.conf.errors import NO_SPACE_ERRNOS, UserError
from evspan.conf.folder_lock import LOCKS, FolderLock

logger = logging.getLogger(__name__)
LOCK = ".lock"
# Of one machine. On others flock may be local to a machine, as on Lustre and NFS by mount option.
LOCAL_FILE_SYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs"})
UNFINISHED = ".*.writing*"  # temporary files; a killed process leaves them
BLOCK = 1 << 24  # bytes that are read at once for a checksum


class FolderPermissionError(UserError):
    """This user may not write to the folder."""


class NoSpaceError(UserError):
    """The disk is full, or the user's quota is used up."""


def file_xxh3(path: Path) -> str:
    """xxh3-64 of a file's bytes, in hex."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(
    path: Path, before_replacing: Callable[[], object] | None = None
) -> Iterator[Path]:
    """Yields a temporary path to write to.

    On success the file is synced and replaces `path`; on failure it is deleted.

    Args:
        before_replacing: is called when the file is complete and synced.

    Raises:
        NoSpaceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.writing{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        if before_replacing:
            before_replacing()
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise NoSpaceError(
                f"{path}: no space left, or the quota is used up. Free some, or choose another "
                "place, and run the same again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Disk(io.FileIO):
    """A file for HDF5 to write to.

    HDF5 crashes on a full disk. From the first failing write on, this file drops what is written
    to it, and `check` raises the error.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of the buffer; returns its size in bytes."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Changes the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0

    def check(self) -> None:
        """Raises the error of the first write that failed."""
        if self.error is not None:
            raise self.error


@contextmanager
def atomic_hdf5(
    path: Path, before_replacing: Callable[[], object] | None = None
) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Yields an HDF5 file that replaces `path` when it is complete, and `Disk.check`.

    Call the latter from time to time, so that a full disk ends the work early.

    Args:
        before_replacing: is called when the file is complete and synced.
    """
    with atomic_write(path, before_replacing) as temporary, Disk(temporary, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk.check
        finally:
            disk.check()  # first: other errors on such a disk follow from this one


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, doing: str = "") -> Iterator[None]:
    """Holds the lock on `folder`, so that one process at a time writes to it.

    The lock is released when the process ends, even by SIGKILL. The lock file names the process
    that has the lock, or one that was killed; otherwise it is empty. On file systems that several
    machines may share, the lock of `evspan.conf.folder_lock` is held, too.

    Args:
        doing: what the process does, for others to read.

    Raises:
        FolderPermissionError: this user may not write to the folder.
        UserError: another process has the lock.
    """
    has_flock = True
    with _open_lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            raise UserError(
                f"{folder} is being written to by {holder}. Wait until it is done, or stop it"
            ) from error
        except OSError as error:
            has_flock = False
            logger.debug("%s lies on a file system without flock (%s)", folder, error)
        # A process that the shared lock refuses must not change the name of the other one.
        with (
            _shared_lock(folder, doing or "evspan prep", has_flock=has_flock),
            _named_in(file, doing),
        ):
            yield


def _open_lock_file(folder: Path) -> io.FileIO:
    """The lock file, which another user may have made in a folder that several write to.

    Raises:
        FolderPermissionError: this user may not write to the folder, or not read the file.
    """
    path = folder / LOCK
    try:
        return io.FileIO(path, "a+")
    except PermissionError as error:
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise FolderPermissionError(_not_writable(folder, error)) from error
    except OSError as error:
        raise UserError(_not_writable(folder, error)) from error
    try:
        return io.FileIO(path, "r")  # flock needs no more
    except OSError as error:
        raise FolderPermissionError(
            f"{path} cannot be opened ({error.strerror}). Ask its owner to run chmod a+r {path}, "
            "or to delete it while no evspan prep is at work there"
        ) from error


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f"{folder} cannot be written to ({error.strerror}). Choose a folder that you may write to"
    )


@contextmanager
def _named_in(file: io.FileIO, doing: str) -> Iterator[None]:
    """Names this process in the lock file, unless that is another user's."""
    if not file.writable():
        yield
        return
    name = f"process {os.getpid()} on {socket.gethostname()}"
    if doing:
        name += f" ({doing})"
    with suppress(OSError):  # on a full disk, the lock holds without the name in its file
        file.truncate(0)
        file.write(f"{name}\n".encode())
    try:
        yield
    finally:
        file.truncate(0)


@contextmanager
def _shared_lock(folder: Path, doing: str, *, has_flock: bool) -> Iterator[None]:
    """A lock that all machines see, where flock is missing or may be local to a machine."""
    if has_flock and _file_system(folder) in LOCAL_FILE_SYSTEMS:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(FolderLock(folder, doing))
        except PermissionError as error:
            raise FolderPermissionError(_not_writable(folder / LOCKS, error)) from error
        yield


def _file_system(folder: Path) -> str:
    """The type of the file system as in mount(8); empty if it is not known."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            words = line.split()
            if words[2] == number:
                return words[words.index("-") + 1]
    return ""
