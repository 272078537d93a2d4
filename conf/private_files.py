"""Files and folders that only their owner may change: what is read from them may be trusted."""

import os
import stat
import tempfile
from pathlib import Path

from evspan.conf.errors import UserError

PRIVATE = 0o700
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class ForeignFileError(UserError):
    """A file or folder belongs to another user, or others may change it."""


def make_private_folder(folder: Path) -> None:
    """Creates the folder, or takes one of this user; only this user can enter it afterwards.

    Raises:
        ForeignFileError: it belongs to another user, or is no folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=PRIVATE)
    except FileExistsError:
        pass
    info = os.lstat(folder)
    _require_own(folder, info, is_folder=True)
    if stat.S_IMODE(info.st_mode) != PRIVATE:  # of an older version
        folder.chmod(PRIVATE)


def require_private_folder(folder: Path) -> None:
    """Checks a folder before what it contains is trusted.

    Raises:
        ForeignFileError: it belongs to another user, others may write it, or it is no folder.
    """
    info = os.lstat(folder)
    _require_own(folder, info, is_folder=True)
    _require_unwritable(folder, info)


def read_private_file(path: Path, *, most_bytes: int) -> bytes:
    """The content of a file of this user that no one else may write.

    Raises:
        ForeignFileError: it belongs to another user, others may write it, or it is a link, no plain
            file, or larger than most_bytes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise ForeignFileError(f"{path} is a link; {_REMEDY}") from error
        raise
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        _require_own(path, info, is_folder=False)
        _require_unwritable(path, info)
        if info.st_size > most_bytes:
            raise ForeignFileError(
                f"{path} has {info.st_size} bytes, and {most_bytes} is the most; {_REMEDY}"
            )
        return file.read(most_bytes)


def create_private_file(path: Path, content: str) -> None:
    """Creates a file that only this user can read.

    Raises:
        FileExistsError: there is one already.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)  # other machines read it


_REMEDY = "delete it, and run the same command again in a folder that only you can write"
_REMEDY_FOREIGN = "name a folder of your own: run_dir=NEW, or output=NEW of evspan prep"


def _require_own(path: Path, info: os.stat_result, *, is_folder: bool) -> None:
    expected = stat.S_ISDIR if is_folder else stat.S_ISREG
    if not expected(info.st_mode):
        kind = "folder" if is_folder else "file"
        raise ForeignFileError(f"{path} is no plain {kind}; {_REMEDY}")
    if info.st_uid not in (os.geteuid(), _uid_on_disk(path.parent)):
        raise ForeignFileError(
            f"{path} belongs to the user with id {info.st_uid}, not to this one ({os.geteuid()}), "
            f"and is not trusted; {_REMEDY_FOREIGN}"
        )


def _require_unwritable(path: Path, info: os.stat_result) -> None:
    if info.st_mode & WRITABLE_BY_OTHERS:
        raise ForeignFileError(
            f"{path} can be changed by other users (mode {stat.S_IMODE(info.st_mode):04o}), and is "
            f"not trusted; {_REMEDY}"
        )


def _uid_on_disk(folder: Path) -> int:
    """The owner of what this process creates in a folder: not root's own id on many NFS servers."""
    if os.geteuid() != 0:
        return os.geteuid()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:  # not writable: nothing of ours is in it
        return os.geteuid()
