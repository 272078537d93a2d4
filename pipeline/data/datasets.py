"""One split of prepared datasets: our shards, or RVT's trees, one or several, as one interface."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.schema.prep import (
    DatasetConfig,
    DatasetKind,
    DatasetRoot,
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
    MANIFEST,
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
from evspan.pipeline.data.plan import Part
from numpy.typing import NDArray

ALL_ROWS = slice(None)
OPEN_FILES = 128  # at a time; RVT's tree has a file per recording
OPEN_DATASETS = 128  # at a time
BOXES_IN_MEMORY = 4_000_000  # of a split, 128 MB; more are read from their file when needed
CHUNK_CACHE = 1 << 18  # bytes per open dataset
IGNORED = -1  # class of an ignore region
DROPPED = -2  # in a class table: boxes that are left out
IGNORE = "ignore"  # in a class map: the boxes of a class become ignore regions
WITHOUT_SPLIT = (  # what else helps where a split to score has no recordings
    ", choose another split (evaluation.split=NAME), or train without one: "
    "training.evaluate_every=0 evaluation.at_end=false training.log_images_every=0"
)


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
        file: path of the file that has its frames; empty if they are in memory.
        class_table: (C,) int32 the dataset's class for each of the files' C classes, IGNORED or
            DROPPED; None: they are the same. `box_start` and `read_boxes` are those of the files.
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
    class_table: NDArray[np.int32] | None = None
    file: str = ""

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

    def all_boxes(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The boxes of all frames, in one read. No ignore regions.

        Returns:
            (m,) structured rows in the order of the frames; and (m,) index of each one's frame.

        Raises:
            ShardError: the stored boxes are damaged.
        """
        rows, counts = self.box_rows(0, self.frames)
        frame = np.repeat(np.arange(self.frames), counts)
        is_box = rows["class_id"] != IGNORE_CLASS
        return rows[is_box], frame[is_box]

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
        if self.regions is not None:
            rows, counts = self.regions.added_to(rows, counts, first)
        if self.class_table is None:
            return rows, counts
        return _with_classes(rows, counts, self.class_table)


def _with_classes(
    rows: NDArray[Any], counts: NDArray[np.int64], class_table: NDArray[np.int32]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """`box_rows` with other classes."""
    class_id = rows["class_id"]
    mapped = np.where(class_id < 0, class_id, class_table[class_id])
    kept = mapped != DROPPED
    frame = np.repeat(np.arange(len(counts)), counts)
    rows = rows[kept]  # a copy
    rows["class_id"] = mapped[kept]
    return rows, np.bincount(frame[kept], minlength=len(counts))


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
        recordings: in the order of the manifest, or by name; of several roots one after the other,
            with names `label/name`.
        frames: how the frames were made.
        height, width: of a frame, in pixels.
        classes: names of class 0, 1, ...
        name: that it was prepared with.
        min_side, min_diagonal: smaller boxes were left out; in pixels of the sensor.
        parts: the recordings of each of several roots; empty: there is one.
    """

    recordings: list[RecordingData]
    frames: FrameConfig
    height: int
    width: int
    classes: list[str]
    name: str = ""
    min_side: float = 0.0
    min_diagonal: float = 0.0
    parts: list[Part] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """Channels of a frame, 2 * bins."""
        return self.frames.channels


def open_dataset(config: DatasetConfig, split: str) -> Dataset:
    """Opens a split of all roots.

    A root of several may lack recordings of another split than train.

    Raises:
        ConfigError: no root, other classes than the dataset's, or roots with different frames.
        ShardError: no dataset there, or a damaged one.
    """
    sources = config.sources
    if not sources:
        raise ConfigError(
            "dataset.root is empty. Name the folder that evspan prep wrote: dataset.root=SHARDS"
        )
    opened = [_open_root(source, config, split) for source in sources]
    for source, data in zip(sources, opened, strict=True):
        is_needed = split == "train" or not any(other.recordings for other in opened)
        if is_needed and not data.recordings:
            remedy = f"Prepare recordings into {split}/"
            if split != "train":
                remedy += WITHOUT_SPLIT
            raise ShardError(f"{source.root} has no recordings in split {split!r}. {remedy}")
    if not config.roots:
        return opened[0]
    return _combine(sources, opened, config.classes)


def _open_root(source: DatasetRoot, config: DatasetConfig, split: str) -> Dataset:
    """A split of one root, with the classes of its files. It may have no recordings."""
    root = Path(source.root)
    if not root.is_dir():
        key = "dataset.roots: the root " if config.roots else "dataset.root="
        raise ShardError(
            f"{key}{root} is no folder. Make one: evspan prep source=RAW output={root}"
        )
    if (source.kind or config.kind) is DatasetKind.rvt_tree:
        data = _open_rvt_tree(root, source.classes or config.classes, split)
        return replace(data, name=config.name)
    manifest = load_manifest(root)
    if config.roots and source.classes not in ([], manifest.classes):
        raise ConfigError(
            f"{root} was prepared with the classes {manifest.classes}, dataset.roots gives it "
            f"{source.classes}. Leave its classes out, and rename them with its class_map"
        )
    if not config.roots and config.classes not in ([], manifest.classes):
        raise ConfigError(
            f"{root} was prepared with the classes {manifest.classes}, dataset.classes are "
            f"{config.classes} (dataset={config.name}). Leave dataset= out, or choose the one that "
            "it was prepared with"
        )
    place = f"{root}, split {split}"
    return _open_shards(root, manifest, manifest.split(split), place, config.name)


def open_shard_recording(root: Path, split: str, name: str) -> Dataset:
    """Opens one recording of prepared shards, as a dataset of its own.

    Only its shard is opened, so damage of other recordings does not matter.

    Raises:
        ShardError: no dataset there, without such a recording, or a damaged one.
        UnavailableFileError: a file cannot be read now.
    """
    manifest = load_manifest(root)
    entries = [entry for entry in manifest.split(split) if entry.name == name]
    if not entries:
        raise ShardError(
            f"{root} has no recording {name!r} in split {split!r}. {root / MANIFEST} lists those "
            "that it has"
        )
    return _open_shards(root, manifest, entries[:1], str(root), DatasetConfig.name)


# -- several roots ---------------------------------------------------------------------------------
def _combine(
    sources: Sequence[DatasetRoot], opened: Sequence[Dataset], classes: list[str]
) -> Dataset:
    """One dataset of several.

    Args:
        opened: of each source, with the classes of its files.
        classes: of the run; empty: the union.
    """
    classes = classes or _union_of_classes(sources, opened)
    with_frames = [i for i, data in enumerate(opened) if data.recordings]
    first = with_frames[0]
    for i in with_frames[1:]:
        _require_same_frames(sources[first].root, opened[first], sources[i].root, opened[i])
    labels = root_labels([source.root for source in sources])
    recordings: list[RecordingData] = []
    parts: list[Part] = []
    for source, data, label in zip(sources, opened, labels, strict=True):
        table = _class_table(source, data.classes, classes)
        start = len(recordings)
        for recording in data.recordings:
            name = f"{label}/{recording.name}" if label else recording.name
            recordings.append(replace(recording, name=name, class_table=table))
        parts.append(Part(label, source.weight, range(start, len(recordings))))
    parts = [part for part in parts if part.recordings] if len(sources) > 1 else []
    names = dict.fromkeys(data.name for data in opened)
    return replace(
        opened[first],
        recordings=recordings,
        classes=classes,
        parts=parts,
        name="+".join(names),
        # Of the boxes, only the sizes that all roots contain are scored.
        min_side=max(data.min_side for data in opened),
        min_diagonal=max(data.min_diagonal for data in opened),
    )


def _union_of_classes(sources: Sequence[DatasetRoot], opened: Sequence[Dataset]) -> list[str]:
    """The mapped classes of all roots: in the order of the roots, then of their own classes."""
    union: list[str] = []
    for source, data in zip(sources, opened, strict=True):
        for name in data.classes:
            target = source.class_map.get(name, name)
            if target and target != IGNORE and target not in union:
                union.append(target)
    if not union:
        raise ConfigError("dataset.roots: the class maps leave no class at all; map one to a name")
    return union


def _class_table(
    source: DatasetRoot, names: Sequence[str], classes: Sequence[str]
) -> NDArray[np.int32] | None:
    """RecordingData.class_table of a root.

    Args:
        names: the classes of its files. classes: of the run.
    """
    unknown = [name for name in source.class_map if name not in names]
    if unknown:
        raise ConfigError(
            f"dataset.roots: the class_map of {source.root} names {unknown}, but its classes are "
            f"{list(names)}"
        )
    table = np.zeros(len(names), np.int32)
    for i, name in enumerate(names):
        target = source.class_map.get(name, name)
        if not target:
            table[i] = DROPPED
        elif target == IGNORE:
            table[i] = IGNORED
        elif target in classes:
            table[i] = classes.index(target)
        else:
            raise ConfigError(
                f"dataset.roots: the class {name!r} of {source.root} is {target!r}, which is none "
                f"of the run's classes {list(classes)} (dataset.classes). Map it to one of them, "
                f"to null (its objects are background) or to ignore: class_map: {{{name}: null}}"
            )
    return None if np.array_equal(table, np.arange(len(names))) else table


def frame_differences(frames: FrameConfig, others: FrameConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that make frames differ: key -> the values of both.

    The method of downsampling counts only where frames are downsampled.
    """
    values = asdict(frames)
    other_values = asdict(others)
    if frames.downsample == others.downsample == 1:
        del values["downsample_by"]
    differences = {}
    for key, value in values.items():
        if other_values[key] != value:
            differences[key] = (value, other_values[key])
    return differences


def _require_same_frames(root: str, data: Dataset, other_root: str, other: Dataset) -> None:
    differences = []
    for key, (value, other_value) in frame_differences(data.frames, other.frames).items():
        differences.append(f"frames.{key} {_setting(value)} and {_setting(other_value)}")
    size = f"{data.height} x {data.width}"
    other_size = f"{other.height} x {other.width}"
    if size != other_size:
        differences.append(f"frames of {size} and of {other_size} pixels")
    if differences:
        raise ConfigError(
            f"{root} and {other_root} have different frames: {'; '.join(differences)}. Prepare one "
            "of them again with the settings of the other"
        )


def _setting(value: Any) -> str:
    """A value as it is given on the command line."""
    return value.name if isinstance(value, Enum) else str(value)


def root_labels(roots: Sequence[str]) -> list[str]:
    """A short name for each of several folders; an empty one for a single folder.

    The last part of their paths that tells them apart: night and day for a/night/shards and
    a/day/shards. Without one, 1, 2, ...
    """
    if len(roots) == 1:
        return [""]
    paths = [Path(os.path.abspath(root)).parts[1:] for root in roots]
    for place in range(1, 1 + min(map(len, paths))):
        labels = [path[-place] for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(number) for number in range(1, len(roots) + 1)]


# -- our shards ------------------------------------------------------------------------------------
def _open_shards(
    root: Path,
    manifest: Manifest,
    entries: Sequence[RecordingEntry],
    place: str,
    default_name: str,
) -> Dataset:
    """Some recordings of shards.

    Args:
        place: of the recordings, for an error.
        default_name: of the dataset where the manifest has none.
    """
    sizes = {(entry.height, entry.width) for entry in entries}
    if len(sizes) > 1:
        raise ShardError(
            f"{place}: frames of several sizes {sorted(sizes)}. Prepare recordings of one sensor "
            "size into a folder of their own"
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
        name=prepared.get("name", default_name),
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
        file=str(path),
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
def _open_rvt_tree(root: Path, classes: Sequence[str], split: str) -> Dataset:
    """Opens what RVT's preprocess_dataset.py writes.

    `<split>/<recording>/{labels_v2, event_representations_v2/<name>}`.
    """
    if not classes:
        raise ConfigError(
            f"dataset.classes is empty; RVT's tree {root} does not contain class names: "
            "dataset.classes=[pedestrian,...]"
        )
    opened = [
        open_recording(root, folder, len(classes)) for folder in recording_folders(root, split)
    ]
    require_one_config(opened)
    frames = FrameConfig(mode=FrameMode.rvt)
    height, width = (0, 0)
    if opened:
        frames = opened[0].config
        _, height, width = opened[0].shape
    files = _OpenFiles()
    recordings = [_rvt_recording(recording, files) for recording in opened]
    return Dataset(recordings, frames, height, width, list(classes))


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
        file=str(opened.frames_file),
    )
