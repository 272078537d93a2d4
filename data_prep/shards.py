"""The shard contract: what a prepared dataset looks like on disk, and how it is read.

    ROOT/manifest.json          what was made, from what, with which config; see `Manifest`
    ROOT/train/00000.h5 ...     several recordings per file, a group each:
        <recording>/frames      (N, 2*bins, H, W) uint8, one chunk per frame
        <recording>/end_us      (N,) int64, end of each window, in the recording's own clock
        <recording>/boxes       (M,) BOX: sorted by frame; pixels of the stored resolution
        <recording>/box_start   (N+1,) int64: boxes of frame i are boxes[box_start[i]:box_start[i+1]]
        <recording>/labelled    (N,) bool: the frame was annotated, possibly with zero boxes
        <recording> attributes  entry, config: JSON, its `RecordingEntry` and the config that it was made with

A shard tells by itself what it holds; the manifest is the summary, and can be written again from the shards.
Checksums are xxh3-64 in hex: `frames_xxh3` of the frames' bytes, `group_xxh3` of frames_xxh3 (16 ASCII characters), then the
bytes of end_us, boxes, box_start and labelled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the blosc filter that frames are stored with
import numpy as np

from data_prep.errors import ShardError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ENTRY, CONFIG = "entry", "config"  # attributes of a recording's group
SPLITS = ("train", "val", "test")
BOX = np.dtype([("t_us", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"),
                ("class_id", "<i4"), ("track_id", "<i4")])  # x, y: top left corner


@dataclass(kw_only=True)
class RecordingEntry:
    """One prepared recording, as the manifest tells it."""

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
    dropped_events: dict[str, int] = field(default_factory=dict)  # reason -> how many were left out, or mended
    dropped_boxes: dict[str, int] = field(default_factory=dict)  # filter -> how many; with `boxes` they are all of the box file
    source: str = ""  # path below the source folder
    source_bytes: int = 0
    source_mtime_ns: int = 0  # with source_bytes: unchanged without reading it
    source_xxh3: str = ""
    boxes_xxh3: str = ""  # of the box file; empty without one
    frames_xxh3: str = ""
    group_xxh3: str = ""


@dataclass(kw_only=True)
class Manifest:
    """manifest.json. `config` is the resolved prep config without paths and processes; `config_hash` its xxh3."""

    software: str
    config: dict[str, Any]
    config_hash: str
    classes: list[str]
    recordings: list[RecordingEntry] = field(default_factory=list)
    schema: int = SCHEMA_VERSION

    def split(self, name: str) -> list[RecordingEntry]:
        return [r for r in self.recordings if r.split == name]

    @property
    def channels(self) -> int:
        return 2 * int(self.config["frames"]["bins"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def load_manifest(root: str | Path) -> Manifest:
    """Raises ShardError when `root` is no prepared dataset, or one of another schema."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise ShardError(f"{root} holds no {MANIFEST}, so it is no prepared dataset. Make one: "
                         f"evspan prep source=RAW output={root}")
    try:
        raw = json.loads(path.read_text())
        schema = raw["schema"]
        if schema == SCHEMA_VERSION:
            raw["recordings"] = [RecordingEntry(**r) for r in raw["recordings"]]
            return Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path} is damaged ({error}). Delete it and run the same evspan prep again") from error
    raise ShardError(f"{path} has schema {schema}, this version reads {SCHEMA_VERSION}. Prepare the dataset again "
                     "into a new folder")


def open_group(root: str | Path, entry: RecordingEntry) -> h5py.Group:
    """The recording's HDF5 group, open for reading; close it with `group.file.close()`."""
    path = Path(root) / entry.shard
    try:
        return h5py.File(path, "r")[entry.group]
    except (OSError, KeyError) as error:
        raise ShardError(f"{path} cannot give recording {entry.group!r} ({error}). Run the same evspan prep again: "
                         "it redoes what is missing") from error
