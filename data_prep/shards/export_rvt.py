"""Exports shards of `frames.mode=rvt` to the tree of RVT's preprocess_dataset.py, file for file.

    OUT/<split>/<recording>/
        labels_v2/labels.npz             labels, in pixels of the sensor; objframe_idx_2_label_idx
        labels_v2/timestamps_us.npy      time of each labelled frame
        event_representations_v2/stacked_histogram_dt=50_nbins=10/
            event_representations_ds2_nearest.h5
                                         data (N, 2*bins, H, W) uint8, a chunk per frame, Blosc zstd
            objframe_idx_2_repr_idx.npy  frame of each labelled frame
            timestamps_us.npy            end of each frame

Shards have no class_confidence: it is 1, as in the published box files. The tree has no place for
ignore regions and for labelled frames without boxes; they are left out and counted.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.errors import ShardError, require
from evspan.conf.schema.prep import FrameConfig, FrameMode, frame_config
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
from evspan.data_prep.labels.box_files import RAW_BOX, BoxArray
from evspan.data_prep.shards.atomic import atomic_hdf5, atomic_write, locked
from evspan.data_prep.shards.format import (
    SPLITS,
    Manifest,
    RecordingEntry,
    load_manifest,
)
from evspan.data_prep.shards.reading import open_group, read_frames, read_stored_boxes
from numpy.typing import NDArray
from tqdm import tqdm

STAGING = ".exporting"  # recordings are written here, and moved to their place when complete
ZSTD = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
FRAMES_AT_ONCE = 8


@dataclass
class ExportReport:
    """Recordings by what was done, as split/recording, and what the others lack in the tree.

    Attributes:
        written: exported by this run.
        existing: exported before, with the same content.
        unlabelled: left out, as RVT does.
        ignore_regions: of the recordings in the tree, which has no place for them.
        negatives: labelled frames without boxes of these recordings; RVT has none.
    """

    written: list[str] = field(default_factory=list)
    existing: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    ignore_regions: int = 0
    negatives: int = 0


@dataclass(frozen=True)
class _Columns:
    """A recording's arrays apart from its frames."""

    frame_ends: NDArray[np.int64]  # (N,) in microseconds
    labelled_frames: NDArray[np.int64]  # (F,) indices of frames
    labels: BoxArray  # (M,) RAW_BOX
    first_label: NDArray[np.int64]  # (F,) index of the first label of each labelled frame


def export_rvt(root: Path, out: Path, splits: tuple[str, ...] = SPLITS) -> ExportReport:
    """Writes the recordings that are missing in `out`; each appears whole or not at all.

    Raises:
        ConfigError: the shards' frames are not RVT's.
        ShardError: a shard is damaged, or `out` holds other data under a recording's name.
        UserError: another process writes to `out`, or the disk is full.
    """
    manifest = load_manifest(root)
    config = _rvt_config(root, manifest)
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(
            f"output {out} lies inside the shards {root}; choose a folder outside them"
        )
    entries = [entry for entry in manifest.recordings if entry.split in splits]
    if not entries:
        raise ShardError(f"{root} has no recordings in {', '.join(splits)}. Choose another split")
    report = ExportReport()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        shutil.rmtree(out / STAGING, ignore_errors=True)  # of a run that was killed
        try:
            # disable=None: a bar only on a terminal
            for entry in tqdm(entries, desc="exporting", unit="recording", disable=None):
                _export_recording(root, out, entry, config, report)
        finally:
            shutil.rmtree(out / STAGING, ignore_errors=True)
    return report


def _rvt_config(root: Path, manifest: Manifest) -> FrameConfig:
    config = frame_config(manifest.config["frames"])
    require(
        config.mode is FrameMode.rvt,
        f"{root} holds frames of mode {config.mode.name}, and RVT's tree holds RVT's own. "
        "Prepare the recordings so first: evspan prep source=RAW output=NEW dataset=gen4_rvt "
        "frames.mode=rvt",
    )
    require(
        config.downsample <= 2,
        f"{root} holds frames at 1/{config.downsample} of the resolution; RVT has full and half. "
        "Prepare the recordings into a new folder with frames.downsample=2",
    )
    return config


def _export_recording(
    root: Path, out: Path, entry: RecordingEntry, config: FrameConfig, report: ExportReport
) -> None:
    key = f"{entry.split}/{entry.name}"
    group = open_group(root, entry)
    try:
        columns = _read_columns(group, config.downsample)
        if not columns.labels.size:
            report.unlabelled.append(key)
            return
        report.ignore_regions += entry.ignore_regions
        report.negatives += entry.labelled_frames - len(columns.labelled_frames)
        if (out / key).exists():
            _require_same(out / key, group, columns, config)
            report.existing.append(key)
        else:
            _write(out / STAGING / key, group, columns, config)
            (out / key).parent.mkdir(exist_ok=True)
            os.replace(out / STAGING / key, out / key)
            report.written.append(key)
    finally:
        group.file.close()


def _read_columns(group: h5py.Group, downsample: int) -> _Columns:
    start = group["box_start"][:]
    boxes = read_stored_boxes(group)
    # RVT's readers require a label on every labelled frame.
    labelled = np.flatnonzero(group["labelled"][:] & (np.diff(start) > 0))
    labels = np.zeros(boxes.size, RAW_BOX)
    labels["t"] = boxes["t_us"]
    labels["class_id"] = boxes["class_id"]
    labels["track_id"] = boxes["track_id"]
    labels["class_confidence"] = 1
    for side in "xywh":
        labels[side] = boxes[side] * downsample  # exact: a power of two
    return _Columns(group["end_us"][:], labelled, labels, start[labelled])


def _frames_file(config: FrameConfig) -> Path:
    folder = Path(
        "event_representations_v2",
        f"stacked_histogram_dt={config.window_ms}_nbins={config.bins}",
    )
    suffix = "_ds2_nearest" if config.downsample == 2 else ""
    return folder / f"event_representations{suffix}.h5"


def _write(folder: Path, group: h5py.Group, columns: _Columns, config: FrameConfig) -> None:
    labels = folder / "labels_v2"
    frames = folder / _frames_file(config)
    with atomic_write(labels / "labels.npz") as temporary:
        np.savez(temporary, labels=columns.labels, objframe_idx_2_label_idx=columns.first_label)
    for path, array in (
        (labels / "timestamps_us.npy", columns.frame_ends[columns.labelled_frames]),
        (frames.with_name("timestamps_us.npy"), columns.frame_ends),
        (frames.with_name("objframe_idx_2_repr_idx.npy"), columns.labelled_frames),
    ):
        with atomic_write(path) as temporary:
            np.save(temporary, array)
    count = len(columns.frame_ends)
    with atomic_hdf5(frames) as (file, check_disk):
        shape = read_frames(group, 0, 1).shape[1:]
        data = file.create_dataset(
            "data", (count, *shape), np.uint8, chunks=(1, *shape), maxshape=(None, *shape), **ZSTD
        )
        for i in range(0, count, FRAMES_AT_ONCE):
            data[i : i + FRAMES_AT_ONCE] = read_frames(group, i, min(i + FRAMES_AT_ONCE, count))
            check_disk()


def _require_same(folder: Path, group: h5py.Group, columns: _Columns, config: FrameConfig) -> None:
    """Raises ShardError where the folder has other labels or times, or another middle frame."""
    try:
        same = _is_same(folder, group, columns, config)
    except (OSError, KeyError, ValueError):
        same = False
    if not same:
        raise ShardError(
            f"{folder} exists already, and differs from these shards. Delete it, or choose another "
            "folder"
        )


def _is_same(folder: Path, group: h5py.Group, columns: _Columns, config: FrameConfig) -> bool:
    frames = folder / _frames_file(config)
    with np.load(folder / "labels_v2" / "labels.npz") as stored:
        if not np.array_equal(stored["labels"], columns.labels):
            return False
    if not np.array_equal(np.load(frames.with_name("timestamps_us.npy")), columns.frame_ends):
        return False
    count = len(columns.frame_ends)
    middle = count // 2
    with open_hdf5_for_reading(frames) as file:
        if len(file["data"]) != count:
            return False
        frame = read_frames(group, middle, middle + 1)[0]
        return bool(np.array_equal(file["data"][middle], frame))
