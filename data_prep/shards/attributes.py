"""Attributes of a recording's group: texts of a fixed length, and of variable length before."""

import h5py
import numpy as np
from evspan.conf.errors import ShardError
from evspan.data_prep import hdf5_texts
from evspan.data_prep.hdf5_files import UnsafeDatasetError
from evspan.data_prep.hdf5_texts import MOST_BYTES
from numpy.typing import NDArray

# Attributes that are texts:
ENTRY = "entry"
CONFIG = "config"
TEXTS = (ENTRY, CONFIG)


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
        UnavailableFileError: the file cannot be read now.
        UnicodeDecodeError: it is not UTF-8.
    """
    try:
        return hdf5_texts.read_text(group, name, TEXTS)
    except UnsafeDatasetError as error:
        raise ShardError(str(error)) from error


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
