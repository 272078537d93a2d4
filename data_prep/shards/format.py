"""The shard contract: what a prepared dataset looks like on disk, and how it is read.

    ROOT/manifest.json          the recordings, their sources and the config; see `Manifest`
    ROOT/train/00000.h5 ...     several recordings per file, a group each:
        <recording>/frames      (M,) uint8: the codes of the N frames, one after the other;
                                data_prep/frames/codec.py defines the code, in numpy
        <recording>/frame_start (N+1,) int64: frame i is frames[frame_start[i]:frame_start[i+1]]
        <recording>/end_us      (N,) int64: end of each window, in the recording's own clock
        <recording>/boxes       (M,) BOX: sorted by frame; pixels of the stored resolution
        <recording>/box_start   (N+1,) int64: frame i has boxes[box_start[i]:box_start[i+1]]
        <recording>/labelled    (N,) bool: the frame was annotated, possibly with zero boxes
        <recording> attributes  frame_shape: (2*bins, H, W) of a frame, uint8
                                entry, config: JSON of its `RecordingEntry` and its config

A shard is complete without the manifest, which can be written again from the shards.
Checksums are xxh3-64 in hex: `frames_xxh3` of the bytes of frames; `group_xxh3` of frames_xxh3
(16 ASCII characters), then the bytes of frame_start, end_us, boxes, box_start and labelled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import hdf5plugin  # noqa: F401  registers the filter of the codec `small`
import numpy as np
import xxhash
from evspan.conf.errors import ShardError
from evspan.data_prep.frames.codec import decode_frames, measure_frames
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
from numpy.typing import NDArray

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
# Attributes of a recording's group:
ENTRY = "entry"
CONFIG = "config"
FRAME_SHAPE = "frame_shape"
COLUMNS = ("frame_start", "end_us", "boxes", "box_start", "labelled")  # of a group, beside `frames`
BLOCK = 1 << 24  # bytes of frames that are read at once for a checksum
BoxArray: TypeAlias = NDArray[np.void]  # (M,) structured, dtype BOX
SPLITS = ("train", "val", "test")
BOX = np.dtype(
    [
        ("t_us", "<i8"),
        ("x", "<f4"),
        ("y", "<f4"),
        ("w", "<f4"),
        ("h", "<f4"),
        ("class_id", "<i4"),
        ("track_id", "<i4"),
    ]
)  # x, y: top left corner


@dataclass(kw_only=True)
class RecordingEntry:
    """One prepared recording."""

    name: str
    split: str
    shard: str  # path below ROOT, e.g. "train/00000.h5"
    group: str  # HDF5 group in it
    frames: int
    labelled_frames: int
    boxes: int
    height: int  # of the stored frames
    width: int
    sensor_height: int
    sensor_width: int
    first_us: int  # the recording's first and last event
    last_us: int
    events: int  # events in the frames' windows
    boxes_per_class: dict[str, int] = field(default_factory=dict)
    dropped_events: dict[str, int] = field(
        default_factory=dict
    )  # reason -> number of events that were left out or corrected
    dropped_boxes: dict[str, int] = field(
        default_factory=dict
    )  # filter -> number; with `boxes` they are all boxes of the box file
    label_warnings: dict[str, str] = field(
        default_factory=dict
    )  # what is doubtful about the box file, by kind
    source: str = ""  # path below the source folder
    source_bytes: int = 0
    source_mtime_ns: int = 0  # with source_bytes: unchanged without reading it
    source_xxh3: str = ""
    boxes_xxh3: str = ""  # of the box file; empty without one
    frames_xxh3: str = ""
    group_xxh3: str = ""


@dataclass(kw_only=True)
class Manifest:
    """manifest.json.

    Attributes:
        config: the part of the prep config that determines frames and boxes.
        config_hash: its xxh3-64, of the JSON with sorted keys.
    """

    software: str
    config: dict[str, Any]
    config_hash: str
    classes: list[str]
    recordings: list[RecordingEntry] = field(default_factory=list)
    schema: int = SCHEMA_VERSION

    def split(self, name: str) -> list[RecordingEntry]:
        """The recordings of a split."""
        return [r for r in self.recordings if r.split == name]

    @property
    def channels(self) -> int:
        """Channels of a frame."""
        return 2 * int(self.config["frames"]["bins"])

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def load_manifest(root: str | Path) -> Manifest:
    """Reads the manifest of a prepared dataset.

    Raises:
        ShardError: `root` is no prepared dataset, or one of another schema.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise ShardError(
            f"{root} holds no {MANIFEST}, so it is no prepared dataset. Make one: "
            f"evspan prep source=RAW output={root}"
        )
    try:
        raw = json.loads(path.read_text())
        schema = raw["schema"]
        if schema == SCHEMA_VERSION:
            raw["recordings"] = [RecordingEntry(**r) for r in raw["recordings"]]
            return Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(
            f"{path} is damaged ({error}). Delete it and run the same evspan prep again"
        ) from error
    raise ShardError(
        f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}. Prepare the dataset "
        "again into a new folder"
    )


def open_group(root: str | Path, entry: RecordingEntry) -> h5py.Group:
    """The recording's HDF5 group, open for reading; close it with `group.file.close()`."""
    path = Path(root) / entry.shard
    try:
        return open_hdf5_for_reading(path)[entry.group]
    except (OSError, KeyError) as error:
        raise ShardError(
            f"{path} cannot give recording {entry.group!r} ({error}). Run the same evspan prep "
            "again: it prepares what is missing"
        ) from error


def read_frames(group: h5py.Group, first: int, last: int) -> NDArray[np.uint8]:
    """Reads and decodes the frames first, ..., last - 1 of a recording.

    Returns:
        (last - first, 2 * bins, H, W) uint8.

    Raises:
        ShardError: the stored frames are damaged.
    """
    place = f"{group.file.filename}: frames {first} to {last} of {group.name}"
    try:
        frame_start = group["frame_start"][first : last + 1]
        codes = group["frames"][frame_start[0] : frame_start[-1]]
        shape = tuple(group.attrs[FRAME_SHAPE].tolist())
    except (OSError, KeyError, IndexError) as error:
        raise _damaged(place, error) from error
    return decode_stored(codes, frame_start, shape, place)


def decode_stored(
    codes: NDArray[np.uint8],
    frame_start: NDArray[np.int64],
    shape: tuple[int, int, int],
    place: str,
) -> NDArray[np.uint8]:
    """Decodes stored frames. Everything that reads the column `frames` ends here.

    Args:
        codes: (K,) the bytes of n consecutive frames.
        frame_start: (n + 1,) the rows of the column `frame_start` that belong to them.
        shape: (2 * bins, H, W).
        place: file, frames and recording, for the error.

    Returns:
        (n, 2 * bins, H, W) uint8.

    Raises:
        ShardError: the stored frames are damaged.
    """
    try:
        return decode_frames(codes, frame_start - frame_start[0], shape)
    except ValueError as error:
        raise _damaged(place, error) from error


def measure_stored(
    codes: NDArray[np.uint8],
    frame_start: NDArray[np.int64],
    shape: tuple[int, int, int],
    place: str,
) -> NDArray[np.int64]:
    """Checks stored frames as `decode_stored` does, for codes that are decoded elsewhere.

    Returns:
        (n,) one more than the last cell with an event, in each frame; 0: the frame has none.

    Raises:
        ShardError: the stored frames are damaged.
    """
    try:
        return measure_frames(codes, frame_start - frame_start[0], shape)
    except ValueError as error:
        raise _damaged(place, error) from error


def _damaged(place: str, error: Exception) -> ShardError:
    return ShardError(
        f"{place} are damaged ({error}). Run evspan prep verify, then the same evspan prep again"
    )


def group_digests(group: h5py.Group) -> tuple[str, str]:
    """(frames_xxh3, group_xxh3) of the stored data."""
    digest = xxhash.xxh3_64()
    frames = group["frames"]
    for i in range(0, len(frames), BLOCK):
        digest.update(frames[i : i + BLOCK])
    frames_xxh3 = digest.hexdigest()
    return frames_xxh3, columns_digest(frames_xxh3, [group[name][:] for name in COLUMNS])


def columns_digest(frames_xxh3: str, columns: list[NDArray[Any]]) -> str:
    """group_xxh3 of a recording.

    Args:
        columns: the datasets of COLUMNS, in this order.
    """
    digest = xxhash.xxh3_64(frames_xxh3.encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
