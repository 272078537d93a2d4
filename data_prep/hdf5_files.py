"""Opens HDF5 files for reading, separates damage from failures of the file system.

All of Evspan opens HDF5 files for reading here: without a file lock, which parallel and network
file systems often do not support and which a file that is only read does not need.

A file that cannot be opened *now* (permissions, too many open files, a server that does not
answer) is not damaged. `is_damage` is the one table that separates the two:

| error | damage |
|---|---|
| contains an errno, in `errno` or in the text of libhdf5 ("errno = 5") | no; but see NO_FAILURE |
| MemoryError | no |
| libhdf5 cannot allocate memory, under a limit of memory (`ulimit -v`) | no |
| any other OSError, RuntimeError, KeyError, ValueError, ... of h5py | yes |
| `UnsafeDatasetError` | yes |
"""

import errno
import math
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers its filters: one that is missing then is damage
from evspan.conf.errors import TRANSIENT_ERRNOS, UserError

# libhdf5 reads this variable where it is too old for the argument `locking`.
_HDF5_VERSION = h5py.version.hdf5_version_tuple
_HAS_LOCKING = _HDF5_VERSION >= (1, 12, 1) or (1, 10, 7) <= _HDF5_VERSION < (1, 11)
if not _HAS_LOCKING:
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")

# The errno of a system call stands last in the text; names of files may precede it.
_ERRNO_TEXT = re.compile(r"errno = (\d+), error message = '")
# What a system call answers to a wrong offset or size, which damaged content contains.
NO_FAILURE = frozenset({0, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG})
# This process has the file open with a lock already: libhdf5 refuses to open it in two ways.
_OPEN_WITH_A_LOCK = "file locking flag values don't match"
_ALLOCATION_TEXT = re.compile("memory allocation failed|allocate|No space available for allocation")
# What h5py raises for damaged content.
CONTENT_ERRORS = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
)
MOST_SOFT_LINKS = 8
# Datasets that belong together expand at most to this multiple of their stored bytes. Recordings
# expand to less than a tenth of it; one column alone, such as a constant polarity, may exceed it.
MOST_EXPANSION = 1000
SMALL_BYTES = 1 << 26  # up to this size in memory they may expand further


class UnsafeDatasetError(UserError):
    """A dataset whose values are outside its file, were never written, or exceed its file."""


class UnavailableFileError(UserError):
    """A file that cannot be read now, for a reason that is not its content."""


def open_hdf5_for_reading(path: str | Path, **options: Any) -> h5py.File:
    """Opens an HDF5 file for reading, without a file lock.

    Args:
        options: of `h5py.File`, such as `rdcc_nbytes`.

    Raises:
        OSError, RuntimeError, ...: as h5py.File; `is_damage` separates the reasons.
    """
    if not _HAS_LOCKING:
        return h5py.File(path, "r", **options)
    try:
        return h5py.File(path, "r", locking=False, **options)
    except OSError as error:
        if _OPEN_WITH_A_LOCK not in str(error):
            raise
    return h5py.File(path, "r", **options)


def error_number(error: BaseException) -> int:
    """The errno of the system call that failed; 0 where none did.

    h5py passes it on as `errno` where a file is opened, and in the text of the message, under
    other exception types, where a file is read.
    """
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number:
        return number
    numbers = _ERRNO_TEXT.findall(str(error))
    return int(numbers[-1]) if numbers else 0


def is_damage(error: BaseException) -> bool:
    """Whether an error of reading means that the content of the file is damaged.

    Every other error means that the file could not be read now. The caller then stops, reports
    `unavailable(path, error)`, and changes nothing.
    """
    if isinstance(error, UnsafeDatasetError):
        return True
    if not isinstance(error, CONTENT_ERRORS):
        return False
    if error_number(error) not in NO_FAILURE:
        return False
    return not (is_failed_allocation(error) and _memory_is_limited())


def is_failed_allocation(error: BaseException) -> bool:
    """Whether h5py, numpy or libhdf5 could not allocate memory."""
    return isinstance(error, MemoryError) or bool(_ALLOCATION_TEXT.search(str(error)))


def _memory_is_limited() -> bool:
    """Whether an allocation can fail for another reason than an absurd size."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft != resource.RLIM_INFINITY


def unavailable(path: str | Path, error: BaseException) -> UnavailableFileError:
    """The error of a file that cannot be read now, in one line, with the remedy."""
    number = error_number(error)
    reason = os.strerror(number) if number else " ".join(str(error).split())
    remedy = "Check the file system, and run the same again; nothing was changed"
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        reason = "not enough memory"
        remedy = "Run the same again with fewer processes, or with more memory"
    elif number in (errno.EMFILE, errno.ENFILE):
        remedy = "Raise the limit of open files (ulimit -n), and run the same again"
    elif number in (errno.EACCES, errno.EPERM):
        remedy = "Ask its owner for permission to read it"
    elif number == errno.ENOENT:
        remedy = "It may lie on a disk that is not mounted: mount it, and run the same again"
    unavailable_file = UnavailableFileError(f"{path} cannot be read now: {reason}. {remedy}")
    unavailable_file.is_transient = number in TRANSIENT_ERRNOS
    return unavailable_file


def plain_member(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """The object at `path` below `group`, without opening another file.

    Soft links are followed; external links are refused before HDF5 opens what they name.

    Args:
        path: names separated by /.

    Returns:
        None where there is nothing.

    Raises:
        UnsafeDatasetError: an external link, or soft links that lead nowhere or in a circle.
    """
    parts = [part for part in path.split("/") if part and part != "."]
    member: h5py.Group | h5py.Dataset = group.file["/"] if path.startswith("/") else group
    soft_links = 0
    while parts:
        if not isinstance(member, h5py.Group):
            return None
        part = parts.pop(0)
        # The low-level calls take a third of the time: each recording of a shard has 8 datasets.
        name = part.encode("utf-8", "surrogateescape")
        if not member.id.links.exists(name):
            return None
        if member.id.links.get_info(name).type == h5py.h5l.TYPE_HARD:
            member = _object(h5py.h5o.open(member.id, name))
            continue
        link = member.get(part, getlink=True)
        place = f"{group.file.filename}: {member.name.rstrip('/')}/{part}"
        if isinstance(link, h5py.ExternalLink):
            raise UnsafeDatasetError(
                f"{place} is a link to another file, {link.filename!r}, which is not followed. "
                "Copy the values into one file"
            )
        soft_links += 1
        if not isinstance(link, h5py.SoftLink) or soft_links > MOST_SOFT_LINKS:
            raise UnsafeDatasetError(
                f"{place} is a link that leads to no dataset. Copy the file again"
            )
        target = link.path
        if target.startswith("/"):
            member = group.file["/"]
        parts = [p for p in target.split("/") if p and p != "."] + parts
    return member


def _object(identifier: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> h5py.Group | h5py.Dataset | None:
    if isinstance(identifier, h5py.h5d.DatasetID):
        return h5py.Dataset(identifier, readonly=True)
    if isinstance(identifier, h5py.h5g.GroupID):
        return h5py.Group(identifier)
    return None  # a named type


def require_plain_dataset(dataset: h5py.Dataset, *, has_checksums: bool = False) -> None:
    """Requires that all values of a dataset were written, and that they lie in its own file.

    HDF5 otherwise returns zeros without an error, or the bytes of any file that the process may
    read. Only sizes are compared; no value is read.

    Args:
        dataset: of a file that is open for reading. Take it with `plain_member`, which refuses
            external links.
        has_checksums: its values are verified when they are read, so that chunks that are missing
            are noticed. They are not counted then: that would read the whole index of the chunks.

    Raises:
        UnsafeDatasetError: names the file, the dataset and the remedy.
    """
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if properties.get_external_count():
        names = ", ".join(repr(name) for name, _, _ in dataset.external[:3])
        raise UnsafeDatasetError(
            f"{_place(dataset)} keeps its values in another file ({names}), which is not read. "
            "Copy the values into one file"
        )
    if layout == h5py.h5d.VIRTUAL:
        names = ", ".join(sorted({repr(source.file_name) for source in dataset.virtual_sources()}))
        raise UnsafeDatasetError(
            f"{_place(dataset)} is a virtual dataset, whose values are in other files "
            f"({names[:200]}). HDF5 returns zeros where these are missing. Copy the values into "
            "one file, where the others are"
        )
    shape = dataset.shape
    dtype = dataset.dtype
    if shape is None or dtype.hasobject:
        raise UnsafeDatasetError(
            f"{_place(dataset)} holds no numbers but {dtype}. Copy the file again"
        )
    size = math.prod(shape)
    if not size:
        return
    if layout != h5py.h5d.CHUNKED:
        _require_allocated(dataset, layout, size * dtype.itemsize)
    elif not has_checksums:
        _require_all_chunks(dataset)


def _place(dataset: h5py.Dataset) -> str:
    return f"{dataset.file.filename}: {dataset.name}"


def require_bounded_expansion(datasets: Sequence[h5py.Dataset]) -> None:
    """Requires that datasets do not expand from a few bytes to hours of reading.

    Args:
        datasets: one or more of one file, which are read together.

    Raises:
        UnsafeDatasetError: they expand to more than MOST_EXPANSION times what is stored.
    """
    path = datasets[0].file.filename
    # Chunks may share their bytes in a forged file, so its size is a bound, too.
    stored = sum(dataset.id.get_storage_size() for dataset in datasets)
    stored = min(stored, os.path.getsize(path))
    expanded = sum(dataset.size * dataset.dtype.itemsize for dataset in datasets)
    if expanded > max(SMALL_BYTES, MOST_EXPANSION * stored):
        place = datasets[0].name if len(datasets) == 1 else datasets[0].parent.name
        raise UnsafeDatasetError(
            f"{path}: {place} would expand from {stored} bytes to {expanded}, "
            f"over {MOST_EXPANSION} times as many. The file is damaged: copy it again"
        )


def _require_all_chunks(dataset: h5py.Dataset) -> None:
    expected = 1
    for length, chunk in zip(dataset.shape, dataset.chunks, strict=True):
        expected *= -(-length // chunk)  # rounded up
    missing = expected - dataset.id.get_num_chunks()
    if missing > 0:
        raise UnsafeDatasetError(
            f"{_place(dataset)} lacks {missing} of its {expected} chunks. Its writer was stopped "
            "early, or the file is damaged: copy it again"
        )


def _require_allocated(dataset: h5py.Dataset, layout: int, declared: int) -> None:
    """Args: layout: of HDF5. declared: bytes of all values."""
    written = dataset.id.get_storage_size()
    if layout != h5py.h5d.COMPACT and dataset.id.get_offset() is None:
        written = 0
    if written < declared:
        raise UnsafeDatasetError(
            f"{_place(dataset)} should hold {declared} bytes, but only {written} were "
            "written. Its writer was stopped early, or the file is damaged: copy it again"
        )
