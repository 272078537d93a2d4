"""Reads attributes of HDF5 files that are texts, within limits of time and memory.

HDF5 reads a string of variable length from a heap in the file; where that is damaged it may never
return. Such a text is therefore read by a process of its own, `hdf5_text_reader`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
from evspan.data_prep.hdf5_files import UnsafeDatasetError, unavailable
from evspan.data_prep.hdf5_text_reader import DAMAGED, READING

MOST_BYTES = 60_000  # HDF5 stores at most 64 KiB in an attribute
# Processor seconds to read the texts of all groups of a file, and of one group, in another process.
FILE_SECONDS = 3
GROUP_SECONDS = 1
WAIT_SECONDS = 120  # longer than that, the file system does not answer, which is no damage
READER_BYTES = 2 << 30  # address space of the reading process
READER = Path(__file__).with_name("hdf5_text_reader.py")
# How damaged content ends the reading process. SIGKILL is not among them: it comes from outside.
CRASHES = (signal.SIGXCPU, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE)
ALL_GROUPS = ""
_Texts: TypeAlias = dict[str, dict[str, str]]  # of each group: name -> text


def read_text(group: h5py.Group, name: str, together: Sequence[str]) -> str:
    """Reads an attribute that is a string.

    Args:
        together: names of the attributes of this and other groups that are read, too; those of
            variable length are read from the file in one process.

    Raises:
        KeyError, OSError, RuntimeError: h5py cannot read it.
        UnsafeDatasetError: it is no string, too long, or damaged.
        UnavailableFileError: the file cannot be read now.
        UnicodeDecodeError: it is not UTF-8.
    """
    attribute = h5py.h5a.open(group.id, name.encode())
    kind = attribute.get_type()
    place = f"attribute {name} of {group.name}"
    if not isinstance(kind, h5py.h5t.TypeStringID) or attribute.shape != ():
        raise UnsafeDatasetError(f"{place} is no string")
    if kind.is_variable_str():
        return _read_apart(group, name, tuple(together))
    if kind.get_size() > MOST_BYTES:
        raise UnsafeDatasetError(
            f"{place} takes {kind.get_size()} bytes, at most {MOST_BYTES} are read"
        )
    value = np.empty((), f"S{kind.get_size()}")
    attribute.read(value)
    return bytes(value[()]).decode()


def _read_apart(group: h5py.Group, name: str, together: tuple[str, ...]) -> str:
    path = Path(group.file.filename)
    about = path.stat()
    member = group.name.strip("/") or "/"
    texts = None
    if member != "/":
        texts = _texts(path, ALL_GROUPS, together, FILE_SECONDS, about.st_mtime_ns, about.st_size)
    if texts is None or member not in texts:  # one damaged group must not hide the others
        texts = _texts(path, member, together, GROUP_SECONDS, about.st_mtime_ns, about.st_size)
    if texts is None or name not in texts.get(member, {}):
        raise UnsafeDatasetError(f"attribute {name} of {group.name} is no text, or is damaged")
    return texts[member][name]


@lru_cache(maxsize=8)
def _texts(
    path: Path, group: str, names: tuple[str, ...], seconds: int, mtime_ns: int, size: int
) -> _Texts | None:
    """Texts of a file, which is identified by its time and size; None: they are damaged.

    Raises:
        UnavailableFileError: the file cannot be read now, or the process cannot be started.
    """
    folders = json.dumps([folder for folder in sys.path if folder])
    limits = [str(READER_BYTES), str(seconds)]
    command = [sys.executable, "-I", str(READER), folders, str(path), group, *limits, *names]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        late = TimeoutError(f"no answer within {WAIT_SECONDS} s")
        raise unavailable(path, late) from error
    except OSError as error:
        raise unavailable(path, error) from error
    began, _, output = result.stdout.decode(errors="replace").partition("\n")
    if result.returncode == 0:
        texts: _Texts = json.loads(output)
        return texts
    has_crashed = began == READING and -result.returncode in CRASHES
    if has_crashed or result.returncode == DAMAGED:
        return None
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"the reading process ended with {result.returncode}"
    raise unavailable(path, RuntimeError(reason))
