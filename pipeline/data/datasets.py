"""One split of a prepared dataset: our shards, or RVT's tree, as one interface."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.schema.prep import (
    DatasetConfig,
    DatasetKind,
    FrameConfig,
    FrameMode,
    frame_config,
)
from evspan.data_prep.frames.codec import FrameEncoder, measure_frames
from evspan.data_prep.hdf5_files import is_damage, unavailable
from evspan.data_prep.shards.checksums import first_changed
from evspan.data_prep.shards.format import (
    BOX,
    IGNORE_CLASS,
    BoxArray,
    Manifest,
    RecordingEntry,
    load_manifest,
)
from evspan.data_prep.shards.group_check import RecordingColumns, read_columns
from evspan.data_prep.shards.reading import (
    READ_ERRORS,
    StoredFrames,
    damage_reported,
    damaged,
    decode_stored,
    find_group,
    measure_stored,
    missing,
    open_shard,
    shard_path,
)
from evspan.data_prep.shards.rvt_tree import (
    RvtRecording,
    open_recording,
    recording_folders,
    require_one_config,
)
from numpy.typing import NDArray

ALL_ROWS = slice(None)
OPEN_FILES = 128  # at a time; RVT's tree has a file per recording
OPEN_DATASETS = 128  # at a time
BOXES_IN_MEMORY = 4_000_000  # of a split, 128 MB; more are read from their file when needed
CHUNK_CACHE = 1 << 18  # bytes per open dataset


class _OpenFiles:
    """HDF5 files and their datasets, the last used ones kept open: finding a dataset takes 0.1 ms.

    HDF5 admits one thread at a time in any case, so one lock covers look-up and read.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.files: OrderedDict[Path, h5py.File] = OrderedDict()
        self.datasets: OrderedDict[tuple[Path, str], h5py.Dataset] = OrderedDict()

    def read(self, path: Path, dataset: str, rows: slice) -> NDArray[Any]:
        """Rows of a dataset of a file.

        Raises:
            ShardError: the file is damaged.
            UnavailableFileError: it is gone, or cannot be read now.
        """
        with self.lock:
            try:
                values: NDArray[Any] = self._dataset(path, dataset)[rows]
            except READ_ERRORS as error:
                if not is_damage(error):
                    raise unavailable(path, error) from error
                raise ShardError(
                    f"{path} cannot give {dataset}[{rows.start}:{rows.stop}] ({error}). The file "
                    "is damaged: prepare it again (evspan prep redoes what evspan prep verify "
                    "found damaged), or copy it again"
                ) from error
        return values

    def open(self, path: Path) -> h5py.File:
        """The file, open; the caller holds the lock while it reads.

        Raises:
            FileNotFoundError: it is not there.
            ShardError: it is damaged.
            UnavailableFileError: it cannot be read now.
        """
        file = self.files.pop(path, None) or open_shard(path, CHUNK_CACHE)
        self.files[path] = file
        if len(self.files) > OPEN_FILES:
            _, oldest = self.files.popitem(last=False)
            oldest.close()
        return file

    def _dataset(self, path: Path, name: str) -> h5py.Dataset:
        file = self.open(path)
        dataset = self.datasets.pop((path, name), None)
        if not dataset:  # an h5py object is false once its file is closed
            dataset = file[name]
        self.datasets[path, name] = dataset
        if len(self.datasets) > OPEN_DATASETS:
            self.datasets.popitem(last=False)
        return dataset


class FrameCodes(NamedTuple):
    """n consecutive frames, as data_prep/frames/codec.py encodes them; checked.

    code: (K,) uint8, the codes one after the other.
    start: (n + 1,) int64, index of the first byte of each frame, and the end.
    advance: (n,) int64, one more than the last cell with an event; 0: the frame has none.
    """

    code: NDArray[np.uint8]
    start: NDArray[np.int64]
    advance: NDArray[np.int64]


@dataclass(frozen=True)
class BoxChecks:
    """Verifies the boxes of a recording in a shard.

    Attributes:
        sums: (N,) checksum of the boxes of each frame; None in shards of earlier versions.
        num_classes: of the dataset.
        place: file and recording, for an error.
    """

    sums: NDArray[np.uint64] | None
    num_classes: int
    place: str

    def require(self, boxes: BoxArray, start: NDArray[np.int64], first: int) -> None:
        """Requires that boxes are what was stored.

        Args:
            boxes: (m,) boxes of n frames.
            start: (n + 1,) frame i has boxes[start[i]:start[i + 1]].
            first: index of the first frame in the recording.

        Raises:
            ShardError: they are damaged.
        """
        if self.sums is not None:
            changed = first_changed(boxes, start, self.sums[first : first + len(start) - 1])
            if changed >= 0:
                problem = "its boxes do not have their checksum"
                raise damaged(f"{self.place}, frame {first + changed}", problem)
            return
        class_id = boxes["class_id"]
        if class_id.size and (class_id.min() < 0 or class_id.max() >= self.num_classes):
            problem = (
                f"boxes of class {class_id.min()} to {class_id.max()}, the dataset has "
                f"{self.num_classes} classes"
            )
            raise damaged(f"{self.place}, frames {first} to {first + len(start) - 2}", problem)


@dataclass(frozen=True)
class StoredRegions:
    """The ignore regions of a recording of N frames.

    Attributes:
        rows: (R,) structured (`shards.format.BOX`), of class -1, in the order of the frames.
        start: (N + 1,) int64, regions of frame i are rows start[i] to start[i + 1].
    """

    rows: BoxArray
    start: NDArray[np.int64]

    def added_to(
        self, boxes: NDArray[Any], counts: NDArray[np.int64], first: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Appends the regions of each frame to its boxes.

        Args:
            boxes: (m,) structured boxes of n frames.
            counts: (n,) how many each frame has.
            first: index of the first frame in the recording.

        Returns:
            (m + r,) rows in the order of the frames, and (n,) how many each has.
        """
        start = self.start[first : first + len(counts) + 1]
        if start[-1] == start[0]:
            return boxes, counts
        num_regions = np.diff(start)
        frames = np.arange(len(counts))
        frame = np.concatenate((np.repeat(frames, counts), np.repeat(frames, num_regions)))
        rows = np.concatenate((boxes, self.rows[start[0] : start[-1]]))
        return rows[np.argsort(frame, kind="stable")], counts + num_regions


@dataclass(frozen=True)
class RecordingData:
    """One recording of N frames.

    Attributes:
        name: of the recording.
        clock_us: the sensor's clock at time 0.
        end_us: (N,) int64 end of each frame's window, since the recording's first event.
        labelled: (N,) bool.
        box_start: (N + 1,) int64, boxes of frame i are rows box_start[i] to box_start[i + 1].
        read_frames: rows -> (n, 2 * bins, H, W) uint8.
        read_boxes: rows -> (m,) structured boxes (`shards.format.BOX`).
        read_codes: rows -> the frames as they are stored; None: they are stored otherwise.
        box_checks: verifies boxes when they are read; None: they have been verified.
        regions: ignore regions; None: there are none.
    """

    name: str
    clock_us: int
    end_us: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    box_start: NDArray[np.int64]
    read_frames: Callable[[slice], NDArray[np.uint8]]
    read_boxes: Callable[[slice], NDArray[Any]]
    read_codes: Callable[[slice], FrameCodes] | None = None
    box_checks: BoxChecks | None = None
    regions: StoredRegions | None = None

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.labelled)

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """(last - first, 2 * bins, H, W) frames from `first` to before `last`."""
        return self.read_frames(slice(first, last))

    def codes(self, first: int, last: int) -> FrameCodes:
        """The frames from `first` to before `last`, encoded.

        Raises:
            ShardError: the stored frames are damaged.
        """
        if self.read_codes is not None:
            return self.read_codes(slice(first, last))
        return encode_frames(self.read(first, last))

    def boxes(self, frame: int) -> NDArray[Any]:
        """(n,) structured boxes of one frame, in pixels of the stored frames. No ignore regions."""
        rows = self.boxes_of(frame, frame + 1)[0]
        boxes: NDArray[Any] = rows[rows["class_id"] != IGNORE_CLASS]
        return boxes

    def boxes_of(self, first: int, last: int) -> list[NDArray[Any]]:
        """Boxes of each frame from `first` to before `last`, then its ignore regions (class -1)."""
        rows, counts = self.box_rows(first, last)
        return np.split(rows, np.cumsum(counts)[:-1])

    def box_rows(self, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The boxes and ignore regions of the frames from `first` to before `last`, in one read.

        Returns:
            (m,) structured rows in the order of the frames, of each frame its boxes and then its
            ignore regions, which are of class -1; and (last - first,) how many each has.

        Raises:
            ShardError: the stored boxes are damaged.
        """
        start = self.box_start[first : last + 1]
        rows: NDArray[Any] = np.zeros(0, BOX)
        if start[-1] > start[0]:
            rows = self.read_boxes(slice(int(start[0]), int(start[-1])))
            if self.box_checks is not None:
                self.box_checks.require(rows, start - start[0], first)
        counts = np.diff(start)
        if self.regions is None:
            return rows, counts
        return self.regions.added_to(rows, counts, first)


def encode_frames(frames: NDArray[np.uint8]) -> FrameCodes:
    """Encodes frames (n, C, H, W)."""
    encode = FrameEncoder()
    codes = [encode(frame).copy() for frame in np.ascontiguousarray(frames)]
    start = np.cumsum([0, *map(len, codes)])
    code = np.concatenate([*codes, np.zeros(0, np.uint8)])
    return FrameCodes(code, start, measure_frames(code, start, frames.shape[1:]))


@dataclass(frozen=True)
class Dataset:
    """All recordings of a split.

    Attributes:
        recordings: in the order of the manifest, or by name.
        frames: how the frames were made.
        height, width: of a frame, in pixels.
        classes: names of class 0, 1, ...
        name: that it was prepared with.
        min_side, min_diagonal: smaller boxes were left out; in pixels of the sensor.
    """

    recordings: list[RecordingData]
    frames: FrameConfig
    height: int
    width: int
    classes: list[str]
    name: str = ""
    min_side: float = 0.0
    min_diagonal: float = 0.0

    @property
    def channels(self) -> int:
        """Channels of a frame, 2 * bins."""
        return self.frames.channels


def open_dataset(config: DatasetConfig, split: str) -> Dataset:
    """Opens a split.

    Raises:
        ConfigError: no root, or other classes than the dataset's.
        ShardError: no dataset there, or a damaged one.
    """
    if not config.root:
        raise ConfigError(
            "dataset.root is empty. Name the folder that evspan prep wrote: dataset.root=SHARDS"
        )
    root = Path(config.root)
    if not root.is_dir():
        raise ShardError(
            f"dataset.root={root} is no folder. Make one: evspan prep source=RAW output={root}"
        )
    open_kind = _open_shards if config.kind is DatasetKind.shards else _open_rvt_tree
    dataset = open_kind(root, config, split)
    if not dataset.recordings:
        raise ShardError(
            f"{root} has no recordings in split {split!r}. Choose another split, or prepare "
            f"recordings into {split}/"
        )
    return dataset


# -- our shards ------------------------------------------------------------------------------------
def _open_shards(root: Path, config: DatasetConfig, split: str) -> Dataset:
    manifest = load_manifest(root)
    if config.classes and config.classes != manifest.classes:
        raise ConfigError(
            f"{root} was prepared with the classes {manifest.classes}, dataset.classes are "
            f"{config.classes} (dataset={config.name}). Leave dataset= out, or choose the one that "
            "it was prepared with"
        )
    entries = manifest.split(split)
    sizes = {(entry.height, entry.width) for entry in entries}
    if len(sizes) > 1:
        raise ShardError(
            f"{root}, split {split}: frames of several sizes {sorted(sizes)}. Prepare recordings "
            "of one sensor size into a folder of their own"
        )
    height, width = sizes.pop() if sizes else (0, 0)
    frames = frame_config(manifest.config["frames"])
    files = _OpenFiles()
    keep_boxes = sum(entry.boxes for entry in entries) <= BOXES_IN_MEMORY
    recordings = [_shard_recording(root, entry, manifest, files, keep_boxes) for entry in entries]
    prepared = manifest.config.get("dataset", {})
    labels = prepared.get("labels", {})
    return Dataset(
        recordings,
        frames,
        height,
        width,
        manifest.classes,
        name=prepared.get("name", config.name),
        min_side=labels.get("min_side", 0.0),
        min_diagonal=labels.get("min_diagonal", 0.0),
    )


def _shard_recording(
    root: Path, entry: RecordingEntry, manifest: Manifest, files: _OpenFiles, keep_boxes: bool
) -> RecordingData:
    path = shard_path(root, entry)
    place = f"{path}: recording {entry.name!r}"
    columns = _shard_columns(path, entry, manifest, files)
    shape = (manifest.channels, entry.height, entry.width)

    def stored(rows: slice) -> StoredFrames:
        start = columns.frame_start[rows.start : rows.stop + 1]
        bytes_ = slice(int(start[0]), int(start[-1]))
        return StoredFrames(
            codes=files.read(path, f"{entry.group}/frames", bytes_),
            start=start - start[0],
            sums=None if columns.frame_xxh3 is None else columns.frame_xxh3[rows],
            shape=shape,
            first=rows.start,
            recording=place,
        )

    # Without the files' lock: threads decode and check concurrently.
    def read_frames(rows: slice) -> NDArray[np.uint8]:
        return decode_stored(stored(rows))

    def read_codes(rows: slice) -> FrameCodes:
        frames = stored(rows)
        return FrameCodes(frames.codes, frames.start, measure_stored(frames))

    def read_boxes(rows: slice) -> NDArray[Any]:
        return files.read(path, f"{entry.group}/boxes", rows)

    checks = BoxChecks(columns.box_xxh3, len(manifest.classes), place)
    boxes: BoxArray | None = None
    if keep_boxes:
        boxes = read_boxes(ALL_ROWS)
        checks.require(boxes, columns.box_start, 0)
    return RecordingData(
        name=entry.name,
        clock_us=entry.first_us,
        end_us=columns.end_us - entry.first_us,
        labelled=columns.labelled,
        box_start=columns.box_start,
        read_frames=read_frames,
        read_boxes=read_boxes if boxes is None else boxes.__getitem__,
        read_codes=read_codes,
        box_checks=checks if boxes is None else None,
        regions=_stored_regions(path, entry, columns, files),
    )


def _stored_regions(
    path: Path, entry: RecordingEntry, columns: RecordingColumns, files: _OpenFiles
) -> StoredRegions | None:
    """Reads and verifies all ignore regions of a recording."""
    if columns.ignore_start is None:
        return None
    rows = files.read(path, f"{entry.group}/ignore", ALL_ROWS)
    changed = -1
    if columns.ignore_xxh3 is not None:
        changed = first_changed(rows, columns.ignore_start, columns.ignore_xxh3)
    if changed >= 0 or (rows["class_id"] != IGNORE_CLASS).any():
        place = f"{path}: recording {entry.name!r}, frame {max(changed, 0)}"
        raise damaged(place, "its ignore regions do not have their checksum")
    return StoredRegions(rows, columns.ignore_start)


def _shard_columns(
    path: Path, entry: RecordingEntry, manifest: Manifest, files: _OpenFiles
) -> RecordingColumns:
    with files.lock:
        try:
            file = files.open(path)
        except FileNotFoundError as error:
            raise missing(path, entry) from error
        with damage_reported(path, f"{path}: recording {entry.name!r}"):
            return read_columns(find_group(file, entry), entry, manifest.channels)


# -- RVT's tree ------------------------------------------------------------------------------------
def _open_rvt_tree(root: Path, config: DatasetConfig, split: str) -> Dataset:
    """Opens what RVT's preprocess_dataset.py writes.

    `<split>/<recording>/{labels_v2, event_representations_v2/<name>}`.
    """
    if not config.classes:
        raise ConfigError(
            "dataset.classes is empty; RVT's tree does not contain class names: "
            "dataset.classes=[pedestrian,...]"
        )
    opened = [
        open_recording(root, folder, len(config.classes))
        for folder in recording_folders(root, split)
    ]
    require_one_config(opened)
    frames = FrameConfig(mode=FrameMode.rvt)
    height, width = (0, 0)
    if opened:
        frames = opened[0].config
        _, height, width = opened[0].shape
    files = _OpenFiles()
    recordings = [_rvt_recording(recording, files) for recording in opened]
    return Dataset(recordings, frames, height, width, list(config.classes), name=config.name)


def _rvt_recording(opened: RvtRecording, files: _OpenFiles) -> RecordingData:
    num_frames = len(opened.end_us)
    labels = opened.labels
    labelled = np.zeros(num_frames, bool)
    labelled[opened.labelled_frames] = True
    boxes_per_frame = np.zeros(num_frames, np.int64)
    boxes_per_frame[opened.labelled_frames] = np.diff(np.append(opened.first_label, len(labels)))
    boxes = np.zeros(len(labels), BOX)
    boxes["t_us"] = labels["t"]
    boxes["class_id"] = labels["class_id"]
    boxes["track_id"] = labels["track_id"]
    for side in "xywh":
        # RVT stores labels in pixels of the sensor.
        boxes[side] = labels[side] / opened.config.downsample

    def read_frames(rows: slice) -> NDArray[np.uint8]:
        return files.read(opened.frames_file, "data", rows)

    return RecordingData(
        name=opened.name,
        clock_us=0,
        end_us=opened.end_us,
        labelled=labelled,
        box_start=np.concatenate(([0], np.cumsum(boxes_per_frame))),
        read_frames=read_frames,
        read_boxes=lambda rows: boxes[rows],
    )
