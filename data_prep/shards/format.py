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
        <recording>/ignore      (R,) BOX of class -1: the ignore regions, as `boxes`; only where
                                there are any, with
        <recording>/ignore_start (N+1,) int64: as `box_start`
        <recording>/frame_xxh3  (N,) uint64: checksum of the code of each frame
        <recording>/box_xxh3    (N,) uint64: checksum of the boxes of each frame
        <recording> attributes  frame_shape: (2*bins, H, W) of a frame, uint8
                                entry, config: JSON of its `RecordingEntry` and its config, strings
                                of a fixed length
                                index_xxh3: checksum of the small columns

A shard is complete without the manifest, which can be written again from the shards.
Checksums are xxh3-64, in attributes and manifest in hex. Of the manifest: `frames_xxh3` of the
bytes of frames; `group_xxh3` of frames_xxh3 (16 ASCII characters), then the bytes of frame_start,
end_us, boxes, box_start and labelled, and of ignore and ignore_start where there are ignore
regions; evspan prep verify compares them. frame_xxh3, box_xxh3, ignore_xxh3 and index_xxh3
(checksums.py) are compared whenever frames or boxes are read. Shards of earlier versions have none
of these four, and strings of variable length; they are read without.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import xxhash
from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.json_files import JsonFileError, parse_json_object, read_json_object
from evspan.conf.schema.prep import FrameConfig, frame_config
from evspan.data_prep.hdf5_files import unavailable
from evspan.data_prep.shards.manifest_check import (
    classes_problem,
    config_problem,
    entry_problem,
    fields_problem,
    recordings_problem,
)
from numpy.typing import NDArray

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
FRAME_SHAPE = "frame_shape"  # attribute of a recording's group
COLUMNS = ("frame_start", "end_us", "boxes", "box_start", "labelled")  # of a group, beside `frames`
IGNORE_COLUMNS = ("ignore", "ignore_start")  # after COLUMNS, of a group with ignore regions
IGNORE_CLASS = -1  # class_id of an ignore region
BLOCK = 1 << 24  # bytes of frames that are read at once for a checksum
BoxArray: TypeAlias = NDArray[np.void]  # (M,) structured, dtype BOX
SPLITS = ("train", "val", "test")
MOST_WINDOW_MS = 3_600_000
MOST_MANIFEST_BYTES = 256 << 20  # a recording takes about 1 kB
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
    ignore_regions: int = 0
    dropped_events: dict[str, int] = field(
        default_factory=dict
    )  # reason -> number of events that were left out or corrected
    dropped_boxes: dict[str, int] = field(
        default_factory=dict
    )  # filter -> number; with `boxes` and `ignore_regions` they are all rows of the box file
    event_warnings: dict[str, str] = field(
        default_factory=dict
    )  # what is doubtful about the recording, by kind
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
        split_fractions: of train, val and test, as `evspan prep split=` assigned the recordings;
            empty where the source has splits of its own.
    """

    software: str
    config: dict[str, Any]
    config_hash: str
    classes: list[str]
    recordings: list[RecordingEntry] = field(default_factory=list)
    schema: int = SCHEMA_VERSION
    split_fractions: str = ""

    def split(self, name: str) -> list[RecordingEntry]:
        """The recordings of a split."""
        return [r for r in self.recordings if r.split == name]

    @property
    def channels(self) -> int:
        """Channels of a frame."""
        return 2 * int(self.config["frames"]["bins"])

    def to_json(self) -> str:
        """The text of manifest.json."""
        raw = asdict(self)
        if not self.split_fractions:  # as in older manifests
            del raw["split_fractions"]
        return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def load_manifest(root: str | Path) -> Manifest:
    """Reads and validates the manifest of a prepared dataset.

    Raises:
        ShardError: `root` is no prepared dataset, or one of another schema, or the manifest is
            damaged.
        UnavailableFileError: the manifest cannot be read now.
    """
    path = Path(root) / MANIFEST
    try:
        raw = read_json_object(path, most_bytes=MOST_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():  # to a disk that is not mounted
            raise unavailable(path, error) from error
        raise ShardError(
            f"{root} holds no {MANIFEST}, so it is no prepared dataset. Make one: "
            f"evspan prep source=RAW output={root}"
        ) from error
    except JsonFileError as error:
        raise _damaged_manifest(path, str(error)) from error
    except OSError as error:
        raise unavailable(path, error) from error
    schema = raw.get("schema")
    if isinstance(schema, int) and schema != SCHEMA_VERSION:
        raise ShardError(
            f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}. Prepare the dataset "
            "again into a new folder"
        )
    problem = _manifest_problem(raw)
    if problem:
        raise _damaged_manifest(path, problem)
    recordings = [RecordingEntry(**entry) for entry in raw.pop("recordings")]
    return Manifest(**raw, recordings=recordings)


def _damaged_manifest(path: Path, problem: str) -> ShardError:
    return ShardError(
        f"{path} is damaged ({problem}). Delete it and run the same evspan prep again, which "
        "writes it from the shards"
    )


def manifest_problem(text: str) -> str:
    """Why `load_manifest` would refuse this text of a manifest; empty: it would not."""
    if len(text) > MOST_MANIFEST_BYTES:
        return f"has {len(text)} bytes, at most {MOST_MANIFEST_BYTES} are read"
    try:
        return _manifest_problem(parse_json_object(text, MANIFEST))
    except JsonFileError as error:
        return str(error)


def _manifest_problem(raw: dict[str, Any]) -> str:
    """What is wrong with a parsed manifest; empty: nothing."""
    for name in ("schema", "recordings"):
        if name not in raw:
            return f"lacks {name}"
    without_recordings = {name: value for name, value in raw.items() if name != "recordings"}
    problem = fields_problem(without_recordings, Manifest)
    if problem:
        return problem
    if not isinstance(raw["recordings"], list):
        return "recordings is not an array"
    for entry in raw["recordings"]:
        problem = entry_problem(entry, RecordingEntry)
        if problem:
            return problem
    problem = config_problem(raw["config"], raw["config_hash"])
    problem = problem or classes_problem(raw["classes"], raw["config"])
    problem = problem or recordings_problem(raw["recordings"], raw["classes"])
    return problem or _frames_problem(raw["config"])


def _frames_problem(config: dict[str, Any]) -> str:
    """What is wrong with the frame config of a manifest or a group; empty: nothing."""
    problem = fields_problem(config["frames"], FrameConfig)
    if problem:
        return f"config.frames {problem}"
    try:
        window_ms = frame_config(config["frames"]).window_ms
    except (ConfigError, TypeError, KeyError) as error:
        return f"config.frames: {' '.join(str(error).split())}"
    if window_ms > MOST_WINDOW_MS:
        return f"config.frames.window_ms is {window_ms}, at most {MOST_WINDOW_MS}"
    return ""


def parse_entry(text: str, place: str, *, in_part: bool = False) -> RecordingEntry:
    """The entry in the attribute of a group.

    Args:
        place: file and group, for the message.
        in_part: of a part file, which names no shard.

    Raises:
        JsonFileError, ShardError: it is damaged.
    """
    raw = parse_json_object(text, place)
    problem = entry_problem(raw, RecordingEntry, in_part=in_part)
    if problem:
        raise ShardError(f"{place}: {problem}")
    return RecordingEntry(**raw)


def parse_config(text: str, place: str) -> dict[str, Any]:
    """The config in the attribute of a group.

    Raises:
        JsonFileError, ShardError: it is damaged.
    """
    raw = parse_json_object(text, place)
    problem = config_problem(raw, "") or _frames_problem(raw)
    if problem or "dataset" not in raw:
        raise ShardError(f"{place}: {problem or 'config has no dataset'}")
    return raw


def group_digests(group: h5py.Group) -> tuple[str, str]:
    """(frames_xxh3, group_xxh3) of the stored data."""
    digest = xxhash.xxh3_64()
    frames = group["frames"]
    for i in range(0, len(frames), BLOCK):
        digest.update(frames[i : i + BLOCK])
    frames_xxh3 = digest.hexdigest()
    columns = [group[name][:] for name in columns_of(group)]
    return frames_xxh3, columns_digest(frames_xxh3, columns)


def columns_of(group: h5py.Group) -> tuple[str, ...]:
    """The datasets that `group_xxh3` covers: COLUMNS, and IGNORE_COLUMNS where they are."""
    return COLUMNS + IGNORE_COLUMNS if IGNORE_COLUMNS[0] in group else COLUMNS


def columns_digest(frames_xxh3: str, columns: list[NDArray[Any]]) -> str:
    """group_xxh3 of a recording.

    Args:
        columns: the datasets of `columns_of`, in this order.
    """
    digest = xxhash.xxh3_64(frames_xxh3.encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
