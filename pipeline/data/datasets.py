"""One split of a prepared dataset: our shards, or the tree that RVT's preprocessing writes, behind one interface."""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

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
from evspan.data_prep.frames.codec import decode_frames
from evspan.data_prep.shards.format import BOX, RecordingEntry, load_manifest
from numpy.typing import NDArray

OPEN_FILES = 128  # at once; RVT's tree has a file per recording
RVT_NAME = re.compile(r"stacked_histogram_dt=(\d+)_nbins=(\d+)")


class _Files:
    """HDF5 files, the last used kept open. HDF5 lets one thread in at a time anyway, so one lock covers look-up and read."""

    def __init__(self) -> None:
        self.lock, self.opened = Lock(), OrderedDict[Path, h5py.File]()

    def read(self, path: Path, dataset: str, which: slice) -> NDArray:
        with self.lock:
            try:
                return self._file(path)[dataset][which]
            except (OSError, KeyError) as error:
                raise ShardError(
                    f"{path} cannot give {dataset}[{which.start}:{which.stop}] ({error}). The file is damaged or "
                    "gone: prepare it again (evspan prep redoes what is missing)"
                ) from error

    def _file(self, path: Path) -> h5py.File:
        file = self.opened.pop(path, None) or h5py.File(path, "r")
        self.opened[path] = file
        if len(self.opened) > OPEN_FILES:
            self.opened.popitem(last=False)[1].close()
        return file


@dataclass(frozen=True)
class RecordingData:
    """One recording of N frames.

    end_us: (N,) int64, since the recording's first event. labelled: (N,) bool. box_start: (N+1,) int64.
    """

    name: str
    clock_us: int  # the sensor's clock at time 0
    end_us: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    box_start: NDArray[np.int64]
    read_frames: Callable[[slice], NDArray[np.uint8]]
    read_boxes: Callable[[slice], NDArray]

    @property
    def frames(self) -> int:
        return len(self.labelled)

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """(last - first, 2 * bins, H, W)."""
        return self.read_frames(slice(first, last))

    def boxes(self, frame: int) -> NDArray:
        """(n,) shards.BOX of one frame, in pixels of the stored frames."""
        return self.boxes_of(frame, frame + 1)[0]

    def boxes_of(self, first: int, last: int) -> list[NDArray]:
        """The same of each frame from `first` to before `last`, in one read: finding the column takes most of its time."""
        start = self.box_start[first : last + 1]
        rows = (
            self.read_boxes(slice(int(start[0]), int(start[-1])))
            if start[-1] > start[0]
            else np.zeros(0, BOX)
        )
        return np.split(rows, start[1:-1] - start[0])


@dataclass(frozen=True)
class Dataset:
    """All recordings of a split; frames of one size, (2 * bins, height, width)."""

    recordings: list[RecordingData]
    frames: FrameConfig
    height: int
    width: int
    classes: list[str]

    @property
    def channels(self) -> int:
        return self.frames.channels


def open_dataset(config: DatasetConfig, split: str) -> Dataset:
    """
    Raises:
        ConfigError: no root given, or classes other than the dataset's. ShardError: nothing there, or not as it should be.
    """
    if not config.root:
        raise ConfigError(
            "dataset.root is empty. Name the folder that evspan prep wrote: dataset.root=SHARDS"
        )
    if not Path(config.root).is_dir():
        raise ShardError(
            f"dataset.root={config.root} is no folder. Make one: evspan prep source=RAW output={config.root}"
        )
    opened = (_open_shards if config.kind is DatasetKind.shards else _open_rvt_tree)(
        Path(config.root), config, split
    )
    if not opened.recordings:
        raise ShardError(
            f"{config.root} has no recordings in split {split!r}. Choose another split, or prepare recordings into "
            f"{split}/"
        )
    return opened


# -- our shards --------------------------------------------------------------------------------------------------
def _open_shards(root: Path, config: DatasetConfig, split: str) -> Dataset:
    manifest, files = load_manifest(root), _Files()
    if config.classes and config.classes != manifest.classes:
        raise ConfigError(
            f"{root} was prepared with the classes {manifest.classes}, dataset.classes are {config.classes}. "
            "Choose the dataset config that it was prepared with: dataset=..."
        )
    entries = manifest.split(split)
    if len(sizes := {(r.height, r.width) for r in entries}) > 1:
        raise ShardError(
            f"{root}, split {split}: frames of several sizes {sorted(sizes)}. Prepare recordings of one sensor size "
            "into a folder of their own"
        )
    height, width = sizes.pop() if sizes else (0, 0)
    frames = frame_config(manifest.config["frames"])
    return Dataset(
        [_shard_recording(root, r, frames.bins, files) for r in entries],
        frames,
        height,
        width,
        manifest.classes,
    )


def _shard_recording(root: Path, entry: RecordingEntry, bins: int, files: _Files) -> RecordingData:
    path, group = root / entry.shard, entry.group

    def column(name: str, which: slice = slice(None)) -> NDArray:
        return files.read(path, f"{group}/{name}", which)

    start, shape = column("frame_start"), (2 * bins, entry.height, entry.width)

    def frames(which: slice) -> NDArray[np.uint8]:
        place = start[which.start : which.stop + 1]
        code = column("frames", slice(int(place[0]), int(place[-1])))
        try:
            return decode_frames(
                code, place - place[0], shape
            )  # outside the files' lock: threads decode side by side
        except ValueError as error:
            raise ShardError(
                f"{path}, recording {group}: {error}. Run evspan prep verify, then the same evspan prep "
                "again"
            ) from error

    return RecordingData(
        entry.name,
        entry.first_us,
        column("end_us") - entry.first_us,
        column("labelled"),
        column("box_start"),
        frames,
        lambda which: column("boxes", which),
    )


# -- RVT's tree --------------------------------------------------------------------------------------------------
def _open_rvt_tree(root: Path, config: DatasetConfig, split: str) -> Dataset:
    """`<split>/<recording>/{labels_v2, event_representations_v2/<name>}` as RVT's preprocess_dataset.py writes them."""
    folders = sorted(p for p in (root / split).glob("*") if (p / "labels_v2").is_dir())
    if not config.classes:
        raise ConfigError(
            "dataset.classes is empty; RVT's tree does not tell its classes: dataset.classes=[pedestrian,...]"
        )
    files, frames, size = _Files(), FrameConfig(mode=FrameMode.rvt), (0, 0)
    recordings = []
    for folder in folders:
        path, frames = _rvt_representation(folder)
        recordings.append(_rvt_recording(folder, path, frames.downsample, files))
    if recordings:
        size = recordings[0].read(0, 1).shape[2:]
    return Dataset(recordings, frames, *size, list(config.classes))


def _rvt_representation(folder: Path) -> tuple[Path, FrameConfig]:
    """The frames' file, and what its folder and name tell about them."""
    found = [
        p
        for p in sorted((folder / "event_representations_v2").glob("*/event_representations*.h5"))
        if RVT_NAME.fullmatch(p.parent.name)
    ]
    if len(found) != 1:
        raise ShardError(
            f"{folder}/event_representations_v2 has {len(found)} stacked histograms ({[str(p) for p in found]}), "
            "not one. Keep one folder stacked_histogram_dt=..._nbins=... with one event_representations*.h5"
        )
    told = RVT_NAME.fullmatch(found[0].parent.name)
    assert told is not None
    downsample = 2 if "ds2" in found[0].stem else 1
    return found[0], FrameConfig(
        mode=FrameMode.rvt,
        window_ms=int(told[1]),
        bins=int(told[2]),
        downsample=downsample,
        downsample_by=DownsampleBy.nearest,
    )


def _rvt_recording(folder: Path, frames: Path, downsample: int, files: _Files) -> RecordingData:
    try:
        with np.load(folder / "labels_v2" / "labels.npz") as stored:
            labels, first_label = (
                stored["labels"],
                stored["objframe_idx_2_label_idx"].astype(np.int64),
            )
        end_us = np.load(frames.with_name("timestamps_us.npy")).astype(np.int64)
        labelled_frames = np.load(frames.with_name("objframe_idx_2_repr_idx.npy")).astype(np.int64)
    except (OSError, KeyError, ValueError) as error:
        raise ShardError(
            f"{folder} is no recording as RVT prepares it ({error}). Prepare it again"
        ) from error
    labelled = np.zeros(len(end_us), bool)
    labelled[labelled_frames] = True
    per_frame = np.zeros(len(end_us), np.int64)
    per_frame[labelled_frames] = np.diff(np.append(first_label, len(labels)))
    boxes = np.zeros(len(labels), BOX)
    boxes["t_us"], boxes["class_id"], boxes["track_id"] = (
        labels["t"],
        labels["class_id"],
        labels["track_id"],
    )
    for side in "xywh":
        boxes[side] = labels[side] / downsample  # RVT keeps labels in pixels of the sensor
    return RecordingData(
        folder.name,
        0,
        end_us,
        labelled,
        np.concatenate(([0], np.cumsum(per_frame))),
        lambda which: files.read(frames, "data", which),
        lambda which: boxes[which],
    )
