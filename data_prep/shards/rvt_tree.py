"""RVT's tree (see `export_rvt`), validated before it is used.

`open_recording` reads labels, times and indices of one recording and the sizes of its frames, and
checks that they fit together: files, types, lengths, order, ranges. Training and evaluation open
recordings with it. `frame_problems` also decodes all frames: `evspan prep verify` runs it.

A tree has no checksums but the CRC of labels.npz: a count or a corner that changes within its range
cannot be noticed.
"""

import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from evspan.conf.errors import ConfigError, ShardError, UserError
from evspan.conf.schema.prep import DownsampleBy, FrameConfig, FrameMode
from evspan.conf.text import one_line, printable
from evspan.data_prep.hdf5_files import (
    is_damage,
    open_hdf5_for_reading,
    plain_member,
    require_plain_dataset,
    unavailable,
)
from evspan.data_prep.shards.format import SPLITS, BoxArray
from evspan.data_prep.shards.npy import ArrayFileError, read_npy, read_npz
from evspan.data_prep.shards.reading import READ_ERRORS, require_readable_place
from numpy.typing import NDArray

logger = logging.getLogger(__name__)
REPRESENTATIONS = "event_representations_v2"
LABELS = "labels_v2"
HISTOGRAM = re.compile(r"stacked_histogram_dt=(\d{1,6})_nbins=(\d{1,3})", re.ASCII)
FRAMES_FILE = re.compile(r"event_representations(_ds2_nearest)?\.h5")
LABEL_FIELDS = {
    "t": "iu",
    "x": "f",
    "y": "f",
    "w": "f",
    "h": "f",
    "class_id": "iu",
    "track_id": "iu",
}
MOST_TIME_US = 1 << 53
MOST_SIDE = 1 << 14  # pixels
MOST_CHUNK_BYTES = 1 << 28
NEAR_US = 5000  # a labelled frame ends at its label's time, within this


@dataclass(frozen=True)
class RvtRecording:
    """A validated recording of N frames, of which F are labelled with M boxes.

    Attributes:
        frames_file: its HDF5 file; the dataset `data` has (N, channels, height, width) uint8.
        end_us: (N,) int64 end of each frame.
        labelled_frames: (F,) int64 indices, increasing.
        first_label: (F,) int64 index of the first box of each labelled frame, increasing from 0.
        labels: (M,) structured, with LABEL_FIELDS; pixels of the sensor.
    """

    folder: Path
    frames_file: Path
    config: FrameConfig
    shape: tuple[int, int, int]
    end_us: NDArray[np.int64]
    labelled_frames: NDArray[np.int64]
    first_label: NDArray[np.int64]
    labels: BoxArray

    @property
    def name(self) -> str:
        """Of the recording."""
        return self.folder.name


class _DamageError(Exception):
    """What is wrong with a recording."""


def is_rvt_tree(root: Path) -> bool:
    """Whether a folder has a recording as RVT prepares it."""
    return any(next((root / split).glob(f"*/{LABELS}"), None) for split in SPLITS)


def recording_folders(root: Path, split: str) -> list[Path]:
    """The folders of a split's recordings, by name.

    Raises:
        ShardError: one is incomplete, or lies outside the tree through a link.
        UnavailableFileError: a folder cannot be read now.
    """
    folders: list[Path] = []
    others: list[str] = []
    try:
        paths = sorted(path for path in (root / split).glob("*") if not path.name.startswith("."))
        for path in paths:
            has_labels = (path / LABELS).is_dir()
            has_frames = (path / REPRESENTATIONS).is_dir()
            if has_labels != has_frames or (path.is_symlink() and not path.exists()):
                missing = REPRESENTATIONS if has_labels else LABELS
                raise _no_recording(path, f"{missing} is missing")
            if has_labels:
                require_readable_place(root, split, path)
                folders.append(path)
            else:
                others.append(printable(path.name))
    except OSError as error:
        raise unavailable(root / split, error) from error
    if others:
        named = ", ".join(others[:3])
        logger.warning("%s: not of RVT's tree, and not read: %s", root / split, named)
    return folders


def open_recording(root: Path, folder: Path, num_classes: int) -> RvtRecording:
    """Reads and validates all of a recording but the values of its frames.

    Args:
        root: of the tree; every file lies in it, or in the folder of its split.
        num_classes: of the dataset.

    Raises:
        ShardError: the recording is incomplete or damaged; the message names it.
        UnavailableFileError: a file cannot be read now.
    """
    try:
        frames_file, config = _representation(folder)
        for path in _files(folder, frames_file):
            require_readable_place(root, folder.parent.name, path)
        shape = _frames_shape(frames_file, config)
        recording = _read_labels(folder, frames_file, config, shape)
        _check_frames(recording, shape[0])
        _check_labels(recording)
        _check_boxes(recording, num_classes)
    except _DamageError as error:
        raise _no_recording(folder, str(error)) from error
    except OSError as error:
        path = Path(error.filename) if error.filename else folder
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            name = path.relative_to(folder) if path.is_relative_to(folder) else path
            raise _no_recording(folder, f"{name} is missing") from error
        raise unavailable(path, error) from error
    return recording


def require_one_config(recordings: list[RvtRecording]) -> None:
    """Raises ShardError where the recordings of a split have frames of different kinds."""
    for recording in recordings[1:]:
        first = recordings[0]
        if (recording.config, recording.shape) != (first.config, first.shape):
            raise ShardError(
                f"{first.folder} and {recording.folder} have different frames: "
                f"{_describe(first)} and {_describe(recording)}. Keep recordings of one config in "
                "a tree"
            )


def frame_problems(recording: RvtRecording) -> list[str]:
    """Decodes all frames; what is wrong with them, and with times that RVT writes equal.

    Raises:
        UnavailableFileError: the file cannot be read now.
    """
    problems: list[str] = []
    ends = recording.end_us[recording.labelled_frames]
    label_times = recording.labels["t"][recording.first_label].astype(np.int64)
    if (ends != label_times).any():
        problems.append("labelled frames do not end at the times of their labels")
    beyond = _num_beyond(recording)
    if beyond:
        problems.append(f"{beyond} of {len(recording.labels)} boxes reach beyond the frame")
    cutoff = recording.config.cutoff
    with _open_frames(recording.frames_file) as file:
        data = file["data"]
        for i in range(len(data)):
            try:
                highest = int(data[i].max())
            except READ_ERRORS as error:
                if not is_damage(error):
                    raise unavailable(recording.frames_file, error) from error
                problems.append(f"frame {i} cannot be read: {one_line(error)}")
                break
            if highest > cutoff:
                problems.append(f"frame {i} has a count of {highest}, beyond RVT's {cutoff}")
                break
    return problems


def _no_recording(folder: Path, problem: str) -> ShardError:
    return ShardError(
        f"{folder} is no recording as RVT prepares it ({problem}). Copy it again, or prepare it "
        "again"
    )


def _describe(recording: RvtRecording) -> str:
    config = recording.config
    channels, height, width = recording.shape
    return f"{config.window_ms} ms, {channels} channels, {height} x {width} pixels"


def recording_files(folder: Path) -> list[Path]:
    """The files of a recording, sorted: labels, times and indices, and that of the frames.

    Raises:
        ShardError: it has no file of frames, or several.
        OSError: the folder cannot be read now.
    """
    try:
        return sorted(_files(folder, _representation(folder)[0]))
    except _DamageError as error:
        raise _no_recording(folder, str(error)) from error


def _files(folder: Path, frames_file: Path) -> list[Path]:
    return [
        folder / LABELS / "labels.npz",
        folder / LABELS / "timestamps_us.npy",
        frames_file,
        frames_file.with_name("timestamps_us.npy"),
        frames_file.with_name("objframe_idx_2_repr_idx.npy"),
    ]


def _representation(folder: Path) -> tuple[Path, FrameConfig]:
    """The file of the frames, and their config from the names of folder and file."""
    paths = sorted((folder / REPRESENTATIONS).glob("*/event_representations*.h5"))
    histograms = [path for path in paths if HISTOGRAM.fullmatch(path.parent.name)]
    if len(histograms) != 1:
        names = printable(", ".join(str(path.relative_to(folder)) for path in histograms[:3]))
        raise ShardError(
            f"{folder}/{REPRESENTATIONS} has {len(histograms)} stacked histograms ({names}), not "
            "one. Keep one folder stacked_histogram_dt=..._nbins=... with one "
            "event_representations*.h5"
        )
    path = histograms[0]
    match = HISTOGRAM.fullmatch(path.parent.name)
    suffix = FRAMES_FILE.fullmatch(path.name)
    if match is None or suffix is None:
        raise _DamageError(f"{printable(path.name)} is no name of a file of frames")
    try:
        config = FrameConfig(
            mode=FrameMode.rvt,
            window_ms=int(match[1]),
            bins=int(match[2]),
            downsample=2 if suffix[1] else 1,
            downsample_by=DownsampleBy.nearest,
        )
    except ConfigError as error:
        raise _DamageError(f"{path.parent.name}: {one_line(error)}") from error
    return path, config


def _open_frames(path: Path) -> h5py.File:
    """Opens the file, and validates its dataset `data` without reading values."""
    if not path.is_file() and os.path.lexists(path) and not path.is_symlink():
        raise _DamageError(f"{path.name} is no regular file")
    try:
        file = open_hdf5_for_reading(path)
        try:
            _check_dataset(plain_member(file, "data"), path)
        except BaseException:
            file.close()
            raise
    except (FileNotFoundError, _DamageError):
        raise
    except (UserError, *READ_ERRORS) as error:
        if not is_damage(error):
            raise unavailable(path, error) from error
        raise _DamageError(f"{path.name} cannot give data[0:1]: {one_line(error)}") from error
    return file


def _check_dataset(data: h5py.Dataset | h5py.Group | None, path: Path) -> None:
    if not isinstance(data, h5py.Dataset):
        raise _DamageError(f"{path.name} has no dataset data")
    if data.dtype != np.uint8 or data.ndim != 4:
        raise _DamageError(f"{path.name}: data is {data.dtype} of shape {data.shape}")
    if data.chunks is not None and math.prod(data.chunks) > MOST_CHUNK_BYTES:
        raise _DamageError(f"{path.name}: data has chunks of {data.chunks}")
    require_plain_dataset(data)


def _frames_shape(path: Path, config: FrameConfig) -> tuple[int, int, int, int]:
    with _open_frames(path) as file:
        frames, channels, height, width = file["data"].shape
    if channels != config.channels:
        raise _DamageError(f"frames have {channels} channels, the folder's name {config.channels}")
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise _DamageError(f"frames have {height} x {width} pixels")
    if channels * height * width > MOST_CHUNK_BYTES:
        raise _DamageError(f"a frame has {channels * height * width} bytes")
    return frames, channels, height, width


def _read_labels(
    folder: Path, frames_file: Path, config: FrameConfig, shape: tuple[int, int, int, int]
) -> RvtRecording:
    names = ("labels", "objframe_idx_2_label_idx")
    try:
        place = "labels.npz"
        labels, first_label = read_npz(folder / LABELS / place, names)
        place = "timestamps_us.npy"
        end_us = read_npy(frames_file.with_name(place))
        place = "objframe_idx_2_repr_idx.npy"
        labelled_frames = read_npy(frames_file.with_name(place))
        place = f"{LABELS}/timestamps_us.npy"
        label_us = read_npy(folder / LABELS / "timestamps_us.npy")
    except ArrayFileError as error:
        raise _DamageError(f"{place}: {error}") from error
    for name, kinds in LABEL_FIELDS.items():
        field = labels.dtype[name] if name in (labels.dtype.names or ()) else np.dtype(object)
        if field.kind not in kinds or field.shape:
            raise _DamageError(f"labels.npz: labels have no field {name} of numbers")
    recording = RvtRecording(
        folder=folder,
        frames_file=frames_file,
        config=config,
        shape=shape[1:],
        end_us=_integers(end_us, "timestamps_us.npy"),
        labelled_frames=_integers(labelled_frames, "objframe_idx_2_repr_idx.npy"),
        first_label=_integers(first_label, "objframe_idx_2_label_idx"),
        labels=labels,
    )
    times = _integers(label_us, f"{LABELS}/timestamps_us.npy")
    if len(recording.first_label) != len(times):
        raise _DamageError(
            f"{len(recording.first_label)} labelled frames have {len(times)} timestamps"
        )
    if len(times):
        _check_range(recording.first_label, len(labels), "objframe_idx_2_label_idx")
        if (labels["t"][recording.first_label] != times).any():
            raise _DamageError(f"{LABELS}/timestamps_us.npy has other times than the labels")
    return recording


def _integers(values: NDArray[np.generic], place: str) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        raise _DamageError(f"{place} has {values.dtype}, not integers")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= MOST_TIME_US:
        raise _DamageError(f"{place} has values from {values.min()} to {values.max()}")
    return values.astype(np.int64)


def _check_range(indices: NDArray[np.int64], size: int, place: str) -> None:
    """Indices below `size` that increase."""
    if (indices[1:] <= indices[:-1]).any():
        raise _DamageError(f"{place} does not increase")
    if indices.size and int(indices[-1]) >= size:
        raise _DamageError(f"{place} leads to {indices[-1]} of {size}")


def _check_frames(recording: RvtRecording, num_frames: int) -> None:
    end_us = recording.end_us
    if len(end_us) != num_frames:
        raise _DamageError(f"{num_frames} frames have {len(end_us)} timestamps")
    if not num_frames:
        raise _DamageError("it has no frames")
    steps = np.diff(end_us)
    window_us = recording.config.window_us
    if not steps.size:
        return
    # Ends of windows are moved to labels, by a few milliseconds.
    if steps.min() < window_us // 2 or steps.max() > window_us * 3 // 2:
        raise _DamageError(
            f"frames end {steps.min()} to {steps.max()} us apart, the folder's name says "
            f"{window_us}"
        )
    if abs(float(np.median(steps)) - window_us) > 0.1 * window_us:
        raise _DamageError(
            f"frames end {np.median(steps):.0f} us apart, the folder's name says {window_us}"
        )


def _check_labels(recording: RvtRecording) -> None:
    labelled = recording.labelled_frames
    first_label = recording.first_label
    labels = recording.labels
    if len(labelled) != len(first_label):
        raise _DamageError(f"{len(labelled)} labelled frames, {len(first_label)} groups of labels")
    _check_range(labelled, len(recording.end_us), "objframe_idx_2_repr_idx.npy")
    if bool(len(first_label)) != bool(len(labels)) or (len(labels) and first_label[0] != 0):
        raise _DamageError(
            f"objframe_idx_2_label_idx does not start with the first of {len(labels)}"
        )
    if not len(labels):
        return
    times = labels["t"].astype(np.int64)
    counts = np.diff(np.append(first_label, len(labels)))
    if (times != np.repeat(times[first_label], counts)).any():
        raise _DamageError("labels of one frame have different times")
    distance = np.abs(recording.end_us[labelled] - times[first_label])
    if distance.max() > NEAR_US:
        raise _DamageError(
            f"labelled frames end up to {distance.max()} us from the times of their labels"
        )


def _check_boxes(recording: RvtRecording, num_classes: int) -> None:
    labels = recording.labels
    if not len(labels):
        return
    class_id = labels["class_id"]
    if int(class_id.min()) < 0 or int(class_id.max()) >= num_classes:
        raise _DamageError(
            f"labels.npz has classes {class_id.min()} to {class_id.max()}, dataset.classes has "
            f"{num_classes} names"
        )
    sides = np.stack([labels[side].astype(np.float64) for side in "xywh"], 1)
    _, height, width = recording.shape
    size = recording.config.downsample * np.array([width, height])
    corner = sides[:, :2]
    extent = sides[:, 2:]
    wrong = ~np.isfinite(sides).all(1) | (extent <= 0).any(1)
    wrong |= ((corner >= size) | (corner + extent <= 0) | (extent > 2 * size)).any(1)
    if wrong.any():
        raise _DamageError(
            f"{np.count_nonzero(wrong)} of {len(labels)} boxes are not finite, have no size, or "
            "lie outside the frame"
        )


def _num_beyond(recording: RvtRecording) -> int:
    """Boxes that reach more than a pixel beyond the frame; RVT cuts them there."""
    labels = recording.labels
    _, height, width = recording.shape
    downsample = recording.config.downsample
    beyond = (labels["x"] < -1) | (labels["x"] + labels["w"] > downsample * width + 1)
    beyond |= (labels["y"] < -1) | (labels["y"] + labels["h"] > downsample * height + 1)
    return int(np.count_nonzero(beyond))
