"""Opens shards and reads frames from them; whatever is damaged, missing or elsewhere is refused.

Every reader of shards goes through this file and `group_check`: training (pipeline/data), verify,
report, preview and export.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ShardError, UserError
from evspan.data_prep.frames.codec import decode_frames, measure_frames
from evspan.data_prep.hdf5_files import (
    CONTENT_ERRORS,
    is_damage,
    open_hdf5_for_reading,
    plain_member,
    unavailable,
)
from evspan.data_prep.shards.attributes import read_numbers
from evspan.data_prep.shards.checksums import BOX_XXH3, FRAME_XXH3, IGNORE_XXH3, first_changed
from evspan.data_prep.shards.format import (
    BOX,
    FRAME_SHAPE,
    IGNORE_COLUMNS,
    BoxArray,
    RecordingEntry,
)
from evspan.data_prep.shards.group_check import read_columns
from numpy.typing import NDArray

READ_ERRORS = (*CONTENT_ERRORS, MemoryError)


def shard_path(root: str | Path, entry: RecordingEntry) -> Path:
    """The file of a recording.

    Raises:
        ShardError: it lies outside `root` and its split's folder, through a link.
    """
    path = Path(root) / entry.shard
    require_readable_place(root, entry.split, path)
    return path


def require_readable_place(root: str | Path, split: str, path: Path) -> None:
    """Requires that a file that is read, after all links, lies in `root` or in its split's folder.

    The folder of a split may itself be a link, to another disk.

    Raises:
        ShardError: it does not.
    """
    target = Path(os.path.realpath(path))
    if target.is_relative_to(os.path.realpath(root)):
        return
    if not target.is_relative_to(os.path.realpath(Path(root, split))):
        raise ShardError(
            f"{path} leads out of {root} through a link, to {target}. Move the files of the "
            f"dataset into its folder; only the whole folder {split} may be a link"
        )


def require_inside(root: str | Path, path: Path) -> None:
    """Requires that a file or folder that is written, after all links, lies in `root`.

    Raises:
        ShardError: it does not.
    """
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(root)):
        raise ShardError(
            f"{path} leads out of {root} through a link, to {target}. Move the files of the "
            "dataset into its folder"
        )


def open_shard(path: Path, rdcc_nbytes: int | None = None) -> h5py.File:
    """Opens a shard for reading.

    Args:
        rdcc_nbytes: size of the chunk cache; None: h5py's.

    Raises:
        FileNotFoundError: there is no such file, and no link of that name.
        ShardError: the file is damaged.
        UnavailableFileError: the file cannot be read now.
    """
    with damage_reported(path, str(path)):
        return open_regular(path, rdcc_nbytes)


def open_regular(path: Path, rdcc_nbytes: int | None = None) -> h5py.File:
    """Opens a shard as `open_shard` does, with the errors of h5py."""
    try:
        about = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():  # to a disk that is not mounted
            raise unavailable(path, error) from error
        raise
    if not stat.S_ISREG(about.st_mode):  # opening a named pipe would wait for a writer
        raise ShardError(f"{path} is no regular file. Delete it, and run evspan prep again")
    return open_hdf5_for_reading(path, rdcc_nbytes=rdcc_nbytes)


@contextmanager
def damage_reported(path: Path, place: str) -> Iterator[None]:
    """Turns the errors of h5py into a ShardError or an UnavailableFileError.

    Args:
        path: the file that is read.
        place: what is damaged, for the message.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except READ_ERRORS as error:
        raise read_error(path, place, error) from error


def read_error(path: Path, place: str, error: Exception) -> UserError:
    """The error of a shard that h5py cannot read: damaged, or not readable now."""
    return damaged(place, error) if is_damage(error) else unavailable(path, error)


def damaged(place: str, error: Exception | str, verb: str = "is") -> ShardError:
    """The error of damaged content."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ShardError(
        f"{place} {verb} damaged ({reason}). Run evspan prep verify, then the same evspan prep "
        "again: it redoes what is damaged"
    )


def open_group(root: str | Path, entry: RecordingEntry) -> h5py.Group:
    """The recording's HDF5 group, validated and open for reading.

    Close it with `group.file.close()`.

    Raises:
        ShardError: the file is missing, or the recording in it is damaged.
        UnavailableFileError: the file cannot be read now.
    """
    path = shard_path(root, entry)
    try:
        file = open_shard(path)
    except FileNotFoundError as error:
        raise missing(path, entry) from error
    try:
        with damage_reported(path, f"{path}: recording {entry.name!r}"):
            group = find_group(file, entry)
            read_columns(group, entry)
    except BaseException:
        file.close()
        raise
    return group


def find_group(file: h5py.File, entry: RecordingEntry) -> h5py.Group:
    """The recording's group in an open shard.

    Raises:
        ShardError: it is not there.
    """
    group = plain_member(file, entry.group)
    if not isinstance(group, h5py.Group):
        raise missing(Path(file.filename), entry)
    return group


def missing(path: Path, entry: RecordingEntry) -> ShardError:
    """The error of a recording that its shard does not have."""
    return ShardError(
        f"{path} does not contain recording {entry.group!r}, which the manifest names. Run the "
        "same evspan prep again: it prepares what is missing"
    )


class StoredFrames(NamedTuple):
    """n consecutive frames of a recording, as they are stored.

    codes: (K,) uint8, the bytes of the frames.
    start: (n + 1,) int64, index of the first byte of each frame, and the end.
    sums: (n,) uint64 checksum of each frame; None in shards of earlier versions.
    shape: (2 * bins, H, W).
    first: index of the first frame in the recording.
    recording: file and recording, for an error.
    """

    codes: NDArray[np.uint8]
    start: NDArray[np.int64]
    sums: NDArray[np.uint64] | None
    shape: tuple[int, int, int]
    first: int
    recording: str


def read_frames(group: h5py.Group, first: int, last: int) -> NDArray[np.uint8]:
    """Reads, verifies and decodes the frames first, ..., last - 1 of a recording.

    Args:
        group: of `open_group`.

    Returns:
        (last - first, 2 * bins, H, W) uint8.

    Raises:
        ShardError: the stored frames are damaged.
        UnavailableFileError: the file cannot be read now.
    """
    path = Path(group.file.filename)
    recording = f"{path}: recording {group.name.strip('/')!r}"
    with damage_reported(path, f"{recording}, frames {first} to {last - 1}"):
        start = group["frame_start"][first : last + 1]
        stored = StoredFrames(
            codes=group["frames"][start[0] : start[-1]],
            start=start - start[0],
            sums=group[FRAME_XXH3][first:last] if FRAME_XXH3 in group else None,
            shape=tuple(read_numbers(group, FRAME_SHAPE, 3).tolist()),
            first=first,
            recording=recording,
        )
    return decode_stored(stored)


def read_stored_boxes(group: h5py.Group, first: int = 0, last: int | None = None) -> BoxArray:
    """Reads and verifies the boxes of the frames first, ..., last - 1 of a recording.

    Args:
        group: of `open_group`.
        last: None: of all frames from `first` on.

    Returns:
        (m,) BOX.

    Raises:
        ShardError: they are damaged.
        UnavailableFileError: the file cannot be read now.
    """
    return _read_rows(group, "boxes", "box_start", BOX_XXH3, first, last)


def read_stored_regions(group: h5py.Group, first: int = 0, last: int | None = None) -> BoxArray:
    """Reads the ignore regions of frames as `read_stored_boxes` reads boxes; often there are none.

    Returns:
        (m,) BOX.

    Raises:
        ShardError: they are damaged.
        UnavailableFileError: the file cannot be read now.
    """
    rows, start = IGNORE_COLUMNS
    if rows not in group:
        return np.zeros(0, BOX)
    return _read_rows(group, rows, start, IGNORE_XXH3, first, last)


def _read_rows(
    group: h5py.Group, rows: str, starts: str, sums: str, first: int, last: int | None
) -> BoxArray:
    """Reads rows of frames, and compares their checksums. The names are those of datasets."""
    path = Path(group.file.filename)
    recording = f"{path}: recording {group.name.strip('/')!r}"
    with damage_reported(path, f"{recording}, {rows}"):
        end = None if last is None else last + 1
        start = group[starts][first:end]
        boxes: BoxArray = group[rows][start[0] : start[-1]]
        if sums not in group:
            return boxes
        changed = first_changed(boxes, start - start[0], group[sums][first:last])
    if changed >= 0:
        problem = "its boxes do not have their checksum"
        raise damaged(f"{recording}, frame {first + changed}", problem)
    return boxes


def decode_stored(stored: StoredFrames) -> NDArray[np.uint8]:
    """Verifies and decodes stored frames.

    Returns:
        (n, 2 * bins, H, W) uint8.

    Raises:
        ShardError: the stored frames are damaged.
    """
    _require_checksums(stored)
    try:
        return decode_frames(stored.codes, stored.start, stored.shape)
    except ValueError as error:
        raise _damaged_frames(stored, error) from error


def measure_stored(stored: StoredFrames) -> NDArray[np.int64]:
    """Checks stored frames as `decode_stored` does, for codes that are decoded elsewhere.

    Returns:
        (n,) one more than the last cell with an event, in each frame; 0: the frame has none.

    Raises:
        ShardError: the stored frames are damaged.
    """
    _require_checksums(stored)
    try:
        return measure_frames(stored.codes, stored.start, stored.shape)
    except ValueError as error:
        raise _damaged_frames(stored, error) from error


def _require_checksums(stored: StoredFrames) -> None:
    if stored.sums is None:
        return
    changed = first_changed(stored.codes, stored.start, stored.sums)
    if changed >= 0:
        frame = stored.first + changed
        raise damaged(f"{stored.recording}, frame {frame}", "it does not have its checksum")


def _damaged_frames(stored: StoredFrames, error: ValueError) -> ShardError:
    last = stored.first + len(stored.start) - 2
    return damaged(f"{stored.recording}, frames {stored.first} to {last}", error, "are")
