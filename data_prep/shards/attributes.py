"""Attributes of a recording's group: texts of a fixed length, read within limits.

HDF5 reads a variable-length string, as earlier versions stored it, from a heap in the file; where
that is damaged it may never return. Such a text is therefore read by a process of its own.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
from evspan.conf.errors import ShardError
from evspan.data_prep.hdf5_files import unavailable
from numpy.typing import NDArray

MOST_BYTES = 60_000  # HDF5 stores at most 64 KiB in an attribute
# Attributes that are texts:
ENTRY = "entry"
CONFIG = "config"
TEXTS = (ENTRY, CONFIG)
# Processor seconds to read the texts of all groups of a file, and of one group, in another process.
FILE_SECONDS = 3
GROUP_SECONDS = 1
WAIT_SECONDS = 120  # longer than that, the file system does not answer, which is no damage
READER_BYTES = 2 << 30  # address space of the reading process
READER = Path(__file__).with_name("attribute_reader.py")
_Texts: TypeAlias = dict[str, dict[str, str]]  # of each group: name -> text


def write_text(group: h5py.Group, name: str, text: str) -> None:
    """Stores an attribute as a string of fixed length, in UTF-8.

    Raises:
        ShardError: the text is too long.
    """
    data = text.encode()
    if len(data) > MOST_BYTES:
        raise ShardError(
            f"{group.file.filename}: attribute {name} of {group.name} takes {len(data)} bytes, at "
            f"most {MOST_BYTES} fit. Shorten the names of classes"
        )
    group.attrs[name] = np.bytes_(data)


def has_attribute(group: h5py.Group, name: str) -> bool:
    """Whether the group has such an attribute."""
    return bool(h5py.h5a.exists(group.id, name.encode()))


def read_text(group: h5py.Group, name: str) -> str:
    """Reads an attribute that is a string.

    Raises:
        KeyError, OSError, RuntimeError: h5py cannot read it.
        ShardError: it is no string, too long, or damaged.
        UnavailableFileError: the file system does not answer.
        UnicodeDecodeError: it is not UTF-8.
    """
    attribute = h5py.h5a.open(group.id, name.encode())
    kind = attribute.get_type()
    place = f"attribute {name} of {group.name}"
    if not isinstance(kind, h5py.h5t.TypeStringID) or attribute.shape != ():
        raise ShardError(f"{place} is no string")
    if kind.is_variable_str():
        return _read_apart(Path(group.file.filename), group.name, name)
    if kind.get_size() > MOST_BYTES:
        raise ShardError(f"{place} takes {kind.get_size()} bytes, at most {MOST_BYTES} are read")
    value = np.empty((), f"S{kind.get_size()}")
    attribute.read(value)
    return bytes(value[()]).decode()


def read_numbers(group: h5py.Group, name: str, count: int) -> NDArray[np.int64]:
    """Reads an attribute of `count` integers; returns (count,) int64.

    Raises:
        KeyError, OSError, RuntimeError: h5py cannot read it.
        ShardError: it is something else.
    """
    attribute = h5py.h5a.open(group.id, name.encode())
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeIntegerID) or attribute.shape != (count,):
        raise ShardError(f"attribute {name} of {group.name} is not of {count} integers")
    values = np.empty(count, np.int64)
    attribute.read(values)
    return values


def _read_apart(path: Path, group: str, name: str) -> str:
    """Reads a variable-length string in another process, which is killed where it takes long."""
    about = path.stat()
    texts = _texts_of_file(path, about.st_mtime_ns, about.st_size)
    member = group.strip("/")
    if texts is None:  # one damaged group must not hide the others
        texts = _run_reader(path, member, GROUP_SECONDS)
    if name not in texts.get(member, {}):
        raise ShardError(f"attribute {name} of {group} is no text")
    return texts[member][name]


@lru_cache(maxsize=4)
def _texts_of_file(path: Path, mtime_ns: int, size: int) -> _Texts | None:
    """All texts of a file, which is identified by its time and size; None: they are damaged."""
    try:
        return _run_reader(path, "", FILE_SECONDS)
    except ShardError:
        return None


def _run_reader(path: Path, group: str, seconds: int) -> _Texts:
    limits = [str(READER_BYTES), str(seconds)]
    command = [sys.executable, "-I", str(READER), str(path), group, *limits, *TEXTS]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        late = TimeoutError(f"no answer within {WAIT_SECONDS} s")
        raise unavailable(path, late) from error
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"the reading process ended with {result.returncode}"
        raise ShardError(f"its attributes cannot be read: {reason}")
    texts: _Texts = json.loads(result.stdout)
    return texts
