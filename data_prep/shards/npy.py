"""Reads .npy and .npz files that may be damaged or made by others, within limits, never unpickling.

Sizes are compared before anything is allocated; what is left over or missing is an error.
"""

import io
import math
import os
import stat
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.text import one_line
from numpy.typing import NDArray

MOST_BYTES = 256 << 20  # of an array: 6 million boxes
MOST_ITEM_BYTES = 1 << 12
MAGIC_LENGTH = 8
LONGEST_REASON = 200  # characters of numpy's message, which may repeat the header
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What numpy raises for a damaged header, and zipfile for a damaged archive.
DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
    RecursionError,
    OverflowError,
    EOFError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayFileError(UserError):
    """The contents of a .npy or .npz file are damaged; the message lacks the file."""


def read_npy(path: Path) -> NDArray[Any]:
    """Reads a file with one array of one dim.

    Raises:
        ArrayFileError: the contents are something else, or exceed a limit.
        OSError: the file cannot be read.
    """
    return _parse_npy(_read_file(path))


def read_npz(path: Path, names: tuple[str, ...]) -> list[NDArray[Any]]:
    """Reads arrays of one dim from an archive; each has a CRC, which is compared.

    Args:
        names: of the arrays.

    Raises:
        ArrayFileError: one is missing, is something else, or exceeds a limit.
        OSError: the file cannot be read.
    """
    data = _read_file(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [_member(archive, name) for name in names]
    except DAMAGE as error:
        raise ArrayFileError(one_line(error)[:LONGEST_REASON]) from error


def _read_file(path: Path) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for a writer
        raise ArrayFileError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ArrayFileError(f"it has more than {MOST_BYTES} bytes")
    return data


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    members = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if len(members) != 1:
        raise ArrayFileError(f"it has {len(members)} arrays {name!r}, not one")
    info = members[0]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArrayFileError(f"{name} has the compression {info.compress_type}")
    if info.file_size > MOST_BYTES:
        raise ArrayFileError(
            f"{name} would expand to {info.file_size} bytes, at most {MOST_BYTES} are read"
        )
    with archive.open(info) as file:
        data = file.read(info.file_size + 1)
        if len(data) != info.file_size or file.read(1):
            raise ArrayFileError(
                f"{name} does not have the {info.file_size} bytes that it declares"
            )
    try:
        return _parse_npy(data)
    except ArrayFileError as error:
        raise ArrayFileError(f"{name}: {error}") from error


def _parse_npy(data: bytes) -> NDArray[Any]:
    """The array of one dim in the bytes of a .npy file."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in READ_HEADER:
            raise ArrayFileError(f"it has version {version} of the format")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, _, dtype = READ_HEADER[version](stream)
    except DAMAGE as error:
        raise ArrayFileError(one_line(error)[:LONGEST_REASON]) from error
    if dtype.hasobject:
        raise ArrayFileError("it contains Python objects, which are never unpickled")
    if len(shape) != 1 or shape[0] < 0 or not 0 < dtype.itemsize <= MOST_ITEM_BYTES:
        raise ArrayFileError(f"it has shape {shape} and items of {dtype.itemsize} bytes")
    size = math.prod(shape) * dtype.itemsize
    if size != len(data) - stream.tell():
        raise ArrayFileError(f"it declares {size} bytes and has {len(data) - stream.tell()}")
    values: NDArray[Any] = np.frombuffer(data, dtype, offset=stream.tell())
    return values
