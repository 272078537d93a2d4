"""One split of a prepared dataset: our shards, or RVT's tree, as one interface."""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import h5py
import hdf5plugin  # noqa: F401  registers the filters that frames are stored with
import numpy as np
from evspan.conf.errors import ConfigError, ShardError
from evspan.conf.schema.prep import (
    DatasetConfig,
    DatasetKind,
    DownsampleBy,
    FrameConfig,
    FrameMode,
    frame_config,
)
from evspan.data_prep.frames.codec import FrameEncoder, measure_frames
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
from evspan.data_prep.shards.format import (
    BOX,
    RecordingEntry,
    decode_stored,
    load_manifest,
    measure_stored,
)
from numpy.typing import NDArray

ALL_ROWS = slice(None)
OPEN_FILES = 128  # at a time; RVT's tree has a file per recording
OPEN_DATASETS = 128  # at a time
CHUNK_CACHE = 1 << 18  # bytes per open dataset
RVT_NAME = re.compile(r"stacked_histogram_dt=(\d+)_nbins=(\d+)")


class _OpenFiles:
    """HDF5 files and their datasets, the last used ones kept open: finding a dataset takes 0.1 ms.

    HDF5 admits one thread at a time in any case, so one lock covers look-up and read.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.files: OrderedDict[Path, h5py.File] = OrderedDict()
        self.datasets: OrderedDict[tuple[Path, str], h5py.Dataset] = OrderedDict()

    def read(self, path: Path, dataset: str, rows: slice) -> NDArray[Any]:
        """Rows of a dataset of a file."""
        with self.lock:
            try:
                values: NDArray[Any] = self._dataset(path, dataset)[rows]
            except (OSError, KeyError) as error:
                raise ShardError(
                    f"{path} cannot give {dataset}[{rows.start}:{rows.stop}] ({error}). The file "
                    "is damaged or gone: prepare it again (evspan prep redoes what is missing)"
                ) from error
        return values

    def _dataset(self, path: Path, name: str) -> h5py.Dataset:
        file = self._file(path)
        dataset = self.datasets.pop((path, name), None)
        if not dataset:  # an h5py object is false once its file is closed
            dataset = file[name]
        self.datasets[path, name] = dataset
        if len(self.datasets) > OPEN_DATASETS:
            self.datasets.popitem(last=False)
        return dataset

    def _file(self, path: Path) -> h5py.File:
        file = self.files.pop(path, None) or open_hdf5_for_reading(path, rdcc_nbytes=CHUNK_CACHE)
        self.files[path] = file
        if len(self.files) > OPEN_FILES:
            _, oldest = self.files.popitem(last=False)
            oldest.close()
        return file


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
    """

    name: str
    clock_us: int
    end_us: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    box_start: NDArray[np.int64]
    read_frames: Callable[[slice], NDArray[np.uint8]]
    read_boxes: Callable[[slice], NDArray[Any]]
    read_codes: Callable[[slice], FrameCodes] | None = None

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
        """(n,) structured boxes of one frame, in pixels of the stored frames."""
        return self.boxes_of(frame, frame + 1)[0]

    def boxes_of(self, first: int, last: int) -> list[NDArray[Any]]:
        """`boxes` of each frame from `first` to before `last`."""
        rows, counts = self.box_rows(first, last)
        return np.split(rows, np.cumsum(counts)[:-1])

    def box_rows(self, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The boxes of the frames from `first` to before `last`, in one read.

        Returns:
            (m,) structured boxes in the order of the frames, and (last - first,) how many each has.
        """
        start = self.box_start[first : last + 1]
        rows: NDArray[Any] = np.zeros(0, BOX)
        if start[-1] > start[0]:
            rows = self.read_boxes(slice(int(start[0]), int(start[-1])))
        return rows, np.diff(start)


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
    """

    recordings: list[RecordingData]
    frames: FrameConfig
    height: int
    width: int
    classes: list[str]

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
    recordings = [_shard_recording(root, entry, frames.bins, files) for entry in entries]
    return Dataset(recordings, frames, height, width, manifest.classes)


def _shard_recording(
    root: Path, entry: RecordingEntry, bins: int, files: _OpenFiles
) -> RecordingData:
    path = root / entry.shard

    def column(name: str, rows: slice = ALL_ROWS) -> NDArray[Any]:
        return files.read(path, f"{entry.group}/{name}", rows)

    frame_start = column("frame_start")
    shape = (2 * bins, entry.height, entry.width)

    def stored(rows: slice) -> tuple[NDArray[np.uint8], NDArray[np.int64], str]:
        """The bytes of frames, their rows of `frame_start`, and their place for an error."""
        start = frame_start[rows.start : rows.stop + 1]
        code = column("frames", slice(int(start[0]), int(start[-1])))
        return code, start, f"{path}: frames {rows.start} to {rows.stop} of {entry.group}"

    # Without the files' lock: threads decode and check concurrently.
    def read_frames(rows: slice) -> NDArray[np.uint8]:
        code, start, place = stored(rows)
        return decode_stored(code, start, shape, place)

    def read_codes(rows: slice) -> FrameCodes:
        code, start, place = stored(rows)
        advance = measure_stored(code, start, shape, place)
        return FrameCodes(code, start - start[0], advance)

    return RecordingData(
        name=entry.name,
        clock_us=entry.first_us,
        end_us=column("end_us") - entry.first_us,
        labelled=column("labelled"),
        box_start=column("box_start"),
        read_frames=read_frames,
        read_boxes=lambda rows: column("boxes", rows),
        read_codes=read_codes,
    )


# -- RVT's tree ------------------------------------------------------------------------------------
def _open_rvt_tree(root: Path, config: DatasetConfig, split: str) -> Dataset:
    """Opens what RVT's preprocess_dataset.py writes.

    `<split>/<recording>/{labels_v2, event_representations_v2/<name>}`.
    """
    folders = sorted(p for p in (root / split).glob("*") if (p / "labels_v2").is_dir())
    if not config.classes:
        raise ConfigError(
            "dataset.classes is empty; RVT's tree does not contain class names: "
            "dataset.classes=[pedestrian,...]"
        )
    files = _OpenFiles()
    frames = FrameConfig(mode=FrameMode.rvt)
    recordings = []
    for folder in folders:
        path, frames = _rvt_representation(folder)
        recordings.append(_rvt_recording(folder, path, frames.downsample, files))
    height, width = (0, 0)
    if recordings:
        height, width = recordings[0].read(0, 1).shape[2:]
    return Dataset(recordings, frames, height, width, list(config.classes))


def _rvt_representation(folder: Path) -> tuple[Path, FrameConfig]:
    """The file of the frames, and their config from the names of folder and file."""
    pattern = "*/event_representations*.h5"
    paths = sorted((folder / "event_representations_v2").glob(pattern))
    matches = [(path, RVT_NAME.fullmatch(path.parent.name)) for path in paths]
    histograms = [(path, match) for path, match in matches if match is not None]
    if len(histograms) != 1:
        names = [str(path) for path, _ in histograms]
        raise ShardError(
            f"{folder}/event_representations_v2 has {len(histograms)} stacked histograms "
            f"({names}), not one. Keep one folder stacked_histogram_dt=..._nbins=... with one "
            "event_representations*.h5"
        )
    path, match = histograms[0]
    config = FrameConfig(
        mode=FrameMode.rvt,
        window_ms=int(match[1]),
        bins=int(match[2]),
        downsample=2 if "ds2" in path.stem else 1,
        downsample_by=DownsampleBy.nearest,
    )
    return path, config


def _rvt_recording(folder: Path, frames: Path, downsample: int, files: _OpenFiles) -> RecordingData:
    try:
        with np.load(folder / "labels_v2" / "labels.npz") as stored:
            labels = stored["labels"]
            first_label = stored["objframe_idx_2_label_idx"].astype(np.int64)
        end_us = np.load(frames.with_name("timestamps_us.npy")).astype(np.int64)
        labelled_frames = np.load(frames.with_name("objframe_idx_2_repr_idx.npy")).astype(np.int64)
    except (OSError, KeyError, ValueError) as error:
        raise ShardError(
            f"{folder} is no recording as RVT prepares it ({error}). Prepare it again"
        ) from error
    labelled = np.zeros(len(end_us), bool)
    labelled[labelled_frames] = True
    boxes_per_frame = np.zeros(len(end_us), np.int64)
    boxes_per_frame[labelled_frames] = np.diff(np.append(first_label, len(labels)))
    boxes = np.zeros(len(labels), BOX)
    boxes["t_us"] = labels["t"]
    boxes["class_id"] = labels["class_id"]
    boxes["track_id"] = labels["track_id"]
    for side in "xywh":
        boxes[side] = labels[side] / downsample  # RVT stores labels in pixels of the sensor
    return RecordingData(
        name=folder.name,
        clock_us=0,
        end_us=end_us,
        labelled=labelled,
        box_start=np.concatenate(([0], np.cumsum(boxes_per_frame))),
        read_frames=lambda rows: files.read(frames, "data", rows),
        read_boxes=lambda rows: boxes[rows],
    )
