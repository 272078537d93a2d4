"""Validates a recording's group in a shard before its values are used.

`structure_problems` compares sizes and types with the manifest, and reads no value. Datasets that
are outside the file, unwritten or larger than it are refused. `read_columns` then reads the small
columns, checks that they fit together, and compares them with their checksum.
"""

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ShardError, UserError
from evspan.data_prep.hdf5_files import plain_member, require_plain_dataset
from evspan.data_prep.shards.attributes import has_attribute, read_numbers, read_text
from evspan.data_prep.shards.checksums import (
    BOX_XXH3,
    FRAME_XXH3,
    INDEX_COLUMNS,
    INDEX_XXH3,
    index_digest,
)
from evspan.data_prep.shards.format import BOX, FRAME_SHAPE, RecordingEntry
from numpy.typing import NDArray

CHECKSUM_COLUMNS = (FRAME_XXH3, BOX_XXH3)
MOST_CHUNK_BYTES = 1 << 26
TIMES = np.dtype(np.int64)
SUMS = np.dtype(np.uint64)
FLAGS = np.dtype(bool)


class RecordingColumns(NamedTuple):
    """The small columns of a recording of N frames; the module docstring of `format` defines them.

    frame_xxh3, box_xxh3: None in shards of earlier versions.
    """

    frame_start: NDArray[np.int64]  # (N + 1,)
    end_us: NDArray[np.int64]  # (N,)
    box_start: NDArray[np.int64]  # (N + 1,)
    labelled: NDArray[np.bool_]  # (N,)
    frame_xxh3: NDArray[np.uint64] | None  # (N,)
    box_xxh3: NDArray[np.uint64] | None  # (N,)


def has_checksums(group: h5py.Group) -> bool:
    """Whether the group has any of the checksums that are verified while reading."""
    if has_attribute(group, INDEX_XXH3):
        return True
    return any(name in group for name in CHECKSUM_COLUMNS)


def structure_problems(
    group: h5py.Group, entry: RecordingEntry, channels: int | None = None
) -> list[str]:
    """Datasets that are missing, or have another type or size than the manifest states.

    Args:
        channels: of a frame; None: any.
    """
    n = entry.frames
    expected: dict[str, tuple[tuple[int, ...] | None, np.dtype[Any]]] = {
        "frames": (None, np.dtype(np.uint8)),
        "frame_start": ((n + 1,), TIMES),
        "end_us": ((n,), TIMES),
        "boxes": ((entry.boxes,), BOX),
        "box_start": ((n + 1,), TIMES),
        "labelled": ((n,), FLAGS),
    }
    missing: list[str] = []
    if has_checksums(group):
        expected |= dict.fromkeys(CHECKSUM_COLUMNS, ((n,), SUMS))
        if not has_attribute(group, INDEX_XXH3):
            missing.append(INDEX_XXH3)
    members = {name: _dataset(group, name) for name in expected}
    missing += [name for name, dataset in members.items() if dataset is None]
    if missing:
        return [f"{', '.join(missing)} missing"]
    problems: list[str] = []
    for name, (shape, kind) in expected.items():
        problems += _dataset_problems(members[name], name, shape, kind)
    stored_shape = tuple(read_numbers(group, FRAME_SHAPE, 3).tolist())
    frame_shape = (channels or stored_shape[0], entry.height, entry.width)
    if stored_shape != frame_shape:
        problems.append(f"frames have the shape {stored_shape} instead of {frame_shape}")
    return problems


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset | None:
    member = plain_member(group, name)
    return member if isinstance(member, h5py.Dataset) else None


def _dataset_problems(
    dataset: h5py.Dataset, name: str, shape: tuple[int, ...] | None, kind: np.dtype[Any]
) -> list[str]:
    """Args: shape: None: of one dim, any length."""
    right_shape = dataset.ndim == 1 if shape is None else dataset.shape == shape
    if dataset.dtype != kind or not right_shape:
        expected = "one dim" if shape is None else f"shape {shape}"
        return [
            f"{name} is {dataset.dtype} of shape {dataset.shape} instead of {kind} of {expected}"
        ]
    chunk_bytes = (dataset.chunks or (0,))[0] * kind.itemsize
    if chunk_bytes > MOST_CHUNK_BYTES:
        return [f"{name} has chunks of {chunk_bytes} bytes, at most {MOST_CHUNK_BYTES} are read"]
    try:
        require_plain_dataset(dataset)
    except UserError as error:
        return [str(error)]
    return []


def read_columns(
    group: h5py.Group, entry: RecordingEntry, channels: int | None = None
) -> RecordingColumns:
    """Reads the small columns of a group that may be damaged.

    Args:
        channels: of a frame; None: any.

    Raises:
        ShardError: the group does not fit the manifest, its columns do not fit together, or they
            do not have their checksum. The message names the file and the recording.
        OSError, RuntimeError, KeyError, ...: h5py cannot read it.
    """
    problems = structure_problems(group, entry, channels)
    if not problems:
        columns = stored_columns(group)
        problems = column_problems(group, columns, entry)
        if not problems:
            return columns
    raise damaged_recording(Path(group.file.filename), entry.name, "; ".join(problems))


def damaged_recording(path: Path, name: str, problem: str) -> ShardError:
    """The error of a recording in a shard, with the remedy."""
    return ShardError(
        f"{path}: recording {name!r} is damaged: {problem}. Run evspan prep verify "
        f"{path.parent.parent}, then the same evspan prep again: it redoes what is damaged"
    )


def stored_columns(group: h5py.Group) -> RecordingColumns:
    """Reads the small columns of a group without `structure_problems`."""
    sums = has_checksums(group)
    return RecordingColumns(
        frame_start=group["frame_start"][:],
        end_us=group["end_us"][:],
        box_start=group["box_start"][:],
        labelled=group["labelled"][:],
        frame_xxh3=group[FRAME_XXH3][:] if sums else None,
        box_xxh3=group[BOX_XXH3][:] if sums else None,
    )


def column_problems(
    group: h5py.Group, columns: RecordingColumns, entry: RecordingEntry
) -> list[str]:
    """Values of the small columns that do not fit together, or do not have their checksum."""
    problems: list[str] = []
    for name, start, size in (
        ("frame_start", columns.frame_start, len(group["frames"])),
        ("box_start", columns.box_start, entry.boxes),
    ):
        # Compared, not subtracted: differences of damaged values overflow.
        if start[0] != 0 or start[-1] != size or (start[1:] < start[:-1]).any():
            problems.append(f"{name} does not lead from 0 up to {size}")
    if (columns.end_us[1:] <= columns.end_us[:-1]).any():
        problems.append("end_us does not increase")
    labelled = int(np.count_nonzero(columns.labelled))
    if labelled != entry.labelled_frames:
        problems.append(f"{labelled} frames are labelled instead of {entry.labelled_frames}")
    if problems or columns.frame_xxh3 is None:
        return problems
    by_name = columns._asdict()
    expected = read_text(group, INDEX_XXH3)
    channels = int(read_numbers(group, FRAME_SHAPE, 3)[0])
    digest = index_digest(entry, channels, {name: by_name[name] for name in INDEX_COLUMNS})
    if digest != expected:
        problems.append(
            f"{', '.join(INDEX_COLUMNS)} or the recording's entry have the checksum {digest} "
            f"instead of {expected}"
        )
    return problems
