"""Files that appear whole or not at all, folders that one process at a time writes to, checksums."""

import errno
import fcntl
import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import xxhash
from evspan.conf.errors import UserError

LOCK = ".lock"
UNFINISHED = ".*.writing*"  # what a killed process leaves
BLOCK = 1 << 24


class NoSpaceError(UserError):
    """The disk, or the user's share of it, is full."""


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; on success the file is synced and takes `path`'s place, on failure it goes.

    Raises:
        NoSpaceError: there was no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.writing{path.suffix}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{path}: no space left, or the quota is used up. Free some, or choose another place, and run the "
                "same again"
            ) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


class Disk(io.FileIO):
    """A file for HDF5 to write to. HDF5 crashes on a full disk; here its writes go nowhere from then on, and `check` tells."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = error
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextmanager
def hdf5_written_whole(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """An HDF5 file that takes `path`'s place when it is complete, and a function to call now and then, which raises what went
    wrong with the disk."""
    with written_whole(path) as beside, Disk(beside, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk.check
        finally:
            disk.check()  # it comes first: what else goes wrong on such a disk follows from it


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, doing: str = "") -> Iterator[None]:
    """The one process that writes to `folder`. The lock goes with the process, however that ends; its file is empty unless a
    process has it, or was killed.

    Args:
        doing: what, for others to read.
    Raises:
        UserError: another process has it, or the folder cannot be written to.
    """
    try:
        file = (folder / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}). Choose a folder that you may write to"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is being written to by {file.read().decode().strip() or 'another process'}. Wait until it "
                "is done, or stop it"
            ) from error
        except OSError as error:
            print(
                f"{folder} lies on a file system without locks ({error}): see to it that only one process writes to it",
                flush=True,
            )
        with suppress(
            OSError
        ):  # a full disk has room for the lock, if not for the name of who has it
            file.truncate(0)
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}{f' ({doing})' if doing else ''}\n".encode()
            )
        try:
            yield
        finally:
            file.truncate(0)
