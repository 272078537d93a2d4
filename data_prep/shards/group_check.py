"""Validates a recording's group in a shard before its values are used.

`check_structure` compares sizes and types with the manifest, and reads no value. Datasets that
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
    IGNORE_INDEX_COLUMNS,
    IGNORE_XXH3,
    INDEX_COLUMNS,
    INDEX_XXH3,
    index_digest,
)
from evspan.data_prep.shards.format import BOX, FRAME_SHAPE, IGNORE_COLUMNS, RecordingEntry
from numpy.typing import NDArray

CHECKSUM_COLUMNS = (FRAME_XXH3, BOX_XXH3)
MOST_CHUNK_BYTES = 1 << 26
TIMES = np.dtype(np.int64)
SUMS = np.dtype(np.uint64)
FLAGS = np.dtype(bool)


class RecordingColumns(NamedTuple):
    """The small columns of a recording of N frames; the module docstring of `format` defines them.

    frame_xxh3, box_xxh3: None in shards of earlier versions.
    ignore_start, ignore_xxh3: None where there are no ignore regions.
    """

    frame_start: NDArray[np.int64]  # (N + 1,)
    end_us: NDArray[np.int64]  # (N,)
    box_start: NDArray[np.int64]  # (N + 1,)
    labelled: NDArray[np.bool_]  # (N,)
    frame_xxh3: NDArray[np.uint64] | None  # (N,)
    box_xxh3: NDArray[np.uint64] | None  # (N,)
    ignore_start: NDArray[np.int64] | None = None  # (N + 1,)
    ignore_xxh3: NDArray[np.uint64] | None = None  # (N,)


def checksum_columns(group: h5py.Group) -> tuple[str, ...]:
    """The datasets of a sound group that contain checksums of rows."""
    has_regions = IGNORE_COLUMNS[0] in group
    return (*CHECKSUM_COLUMNS, IGNORE_XXH3) if has_regions else CHECKSUM_COLUMNS


def has_checksums(group: h5py.Group) -> bool:
    """Whether the group has any of the checksums that are verified while reading."""
    if has_attribute(group, INDEX_XXH3):
        return True
    return any(name in group for name in CHECKSUM_COLUMNS)


class GroupStructure(NamedTuple):
    """What a group consists of.

    datasets: by name; with CHECKSUM_COLUMNS unless the shard is of an earlier version.
    frame_shape: (channels, H, W).
    problems: members that are missing, or have another type or size than the manifest states.
    """

    datasets: dict[str, h5py.Dataset]
    frame_shape: tuple[int, ...]
    problems: list[str]


def check_structure(
    group: h5py.Group, entry: RecordingEntry, channels: int | None = None
) -> GroupStructure:
    """Opens the datasets of a group that may be damaged, and compares them with the manifest.

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
    sums = has_checksums(group)
    if entry.ignore_regions:
        expected["ignore"] = ((entry.ignore_regions,), BOX)
        expected["ignore_start"] = ((n + 1,), TIMES)
        expected[IGNORE_XXH3] = ((n,), SUMS)
    elif IGNORE_COLUMNS[0] in group:
        return GroupStructure({}, (), ["it has ignore regions, which its entry does not state"])
    if sums:
        expected |= dict.fromkeys(CHECKSUM_COLUMNS, ((n,), SUMS))
        if not has_attribute(group, INDEX_XXH3):
            missing.append(INDEX_XXH3)
    datasets: dict[str, h5py.Dataset] = {}
    for name in expected:
        member = plain_member(group, name)
        if isinstance(member, h5py.Dataset):
            datasets[name] = member
        else:
            missing.append(name)
    if missing:
        return GroupStructure(datasets, (), [f"{', '.join(missing)} missing"])
    problems: list[str] = []
    for name, (shape, kind) in expected.items():
        has_sums = sums and name == "frames"
        problems += _dataset_problems(datasets[name], name, shape, kind, has_checksums=has_sums)
    stored_shape = tuple(read_numbers(group, FRAME_SHAPE, 3).tolist())
    frame_shape = (channels or stored_shape[0], entry.height, entry.width)
    if stored_shape != frame_shape:
        problems.append(f"frames have the shape {stored_shape} instead of {frame_shape}")
    return GroupStructure(datasets, stored_shape, problems)


def _dataset_problems(
    dataset: h5py.Dataset,
    name: str,
    shape: tuple[int, ...] | None,
    kind: np.dtype[Any],
    *,
    has_checksums: bool,
) -> list[str]:
    """Args: shape: None: of one dim, any length. has_checksums: as of `require_plain_dataset`."""
    stored_shape = dataset.shape
    dtype = dataset.dtype
    right_shape = stored_shape == shape
    if shape is None:
        right_shape = stored_shape is not None and len(stored_shape) == 1
    if dtype != kind or not right_shape:
        expected = "one dim" if shape is None else f"shape {shape}"
        return [f"{name} is {dtype} of shape {stored_shape} instead of {kind} of {expected}"]
    chunk_bytes = (dataset.chunks or (0,))[0] * kind.itemsize
    if chunk_bytes > MOST_CHUNK_BYTES:
        return [f"{name} has chunks of {chunk_bytes} bytes, at most {MOST_CHUNK_BYTES} are read"]
    try:
        require_plain_dataset(dataset, has_checksums=has_checksums)
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
    structure = check_structure(group, entry, channels)
    problems = structure.problems
    if not problems:
        columns = stored_columns(structure)
        problems = column_problems(group, structure, columns, entry)
        if not problems:
            return columns
    raise damaged_recording(Path(group.file.filename), entry.name, "; ".join(problems))


def damaged_recording(path: Path, name: str, problem: str) -> ShardError:
    """The error of a recording in a shard, with the remedy."""
    return ShardError(
        f"{path}: recording {name!r} is damaged: {problem}. Run evspan prep verify "
        f"{path.parent.parent}, then the same evspan prep again: it redoes what is damaged"
    )


def stored_columns(structure: GroupStructure) -> RecordingColumns:
    """Reads the small columns of a group whose structure has no problems."""
    datasets = structure.datasets
    sums = FRAME_XXH3 in datasets
    regions = IGNORE_XXH3 in datasets
    return RecordingColumns(
        frame_start=datasets["frame_start"][:],
        end_us=datasets["end_us"][:],
        box_start=datasets["box_start"][:],
        labelled=datasets["labelled"][:],
        frame_xxh3=datasets[FRAME_XXH3][:] if sums else None,
        box_xxh3=datasets[BOX_XXH3][:] if sums else None,
        ignore_start=datasets["ignore_start"][:] if regions else None,
        ignore_xxh3=datasets[IGNORE_XXH3][:] if regions else None,
    )


def column_problems(
    group: h5py.Group,
    structure: GroupStructure,
    columns: RecordingColumns,
    entry: RecordingEntry,
) -> list[str]:
    """Values of the small columns that do not fit together, or do not have their checksum."""
    problems: list[str] = []
    starts = [
        ("frame_start", columns.frame_start, len(structure.datasets["frames"])),
        ("box_start", columns.box_start, entry.boxes),
    ]
    if columns.ignore_start is not None:
        starts.append(("ignore_start", columns.ignore_start, entry.ignore_regions))
    for name, start, size in starts:
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
    channels = structure.frame_shape[0]
    names = INDEX_COLUMNS
    if columns.ignore_start is not None:
        names += IGNORE_INDEX_COLUMNS
    digest = index_digest(entry, channels, {name: by_name[name] for name in names})
    if digest != expected:
        problems.append(
            f"{', '.join(names)} or the recording's entry have the checksum {digest} "
            f"instead of {expected}"
        )
    return problems
