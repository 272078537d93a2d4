"""Shards of `frames.mode=rvt` -> the tree that RVT's preprocess_dataset.py writes, file for file.

    OUT/<split>/<recording>/labels_v2/labels.npz             labels, in pixels of the sensor; objframe_idx_2_label_idx
    OUT/<split>/<recording>/labels_v2/timestamps_us.npy      of labelled frames
    OUT/<split>/<recording>/event_representations_v2/stacked_histogram_dt=50_nbins=10/
        event_representations_ds2_nearest.h5                 data (N, 2*bins, H, W) uint8, a chunk per frame, Blosc zstd
        objframe_idx_2_repr_idx.npy, timestamps_us.npy       frame of each labelled frame; end of each frame

Shards keep no class_confidence: it is 1, as in the published box files.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.errors import ShardError, require
from evspan.conf.schema.prep import FrameConfig, FrameMode, frame_config
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.data_prep.shards.atomic import hdf5_written_whole, locked, written_whole
from evspan.data_prep.shards.format import (
    SPLITS,
    Manifest,
    RecordingEntry,
    load_manifest,
    open_group,
    read_frames,
)
from evspan.launch.cli.command import Parser
from numpy.typing import NDArray
from tqdm import tqdm

STAGING = ".exporting"  # recordings are written below it and moved to their place when complete
ZSTD = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class Report:
    """Recordings, as split/recording: written now, there already, without a label (RVT leaves such out)."""

    written: list[str]
    there: list[str]
    unlabelled: list[str]


@dataclass(frozen=True)
class _Small:
    """All of a recording's tree but its frames."""

    frame_ends: NDArray[np.int64]  # (N,)
    labelled_frames: NDArray[np.int64]  # (F,) indices of frames
    labels: NDArray  # (M,) RAW_BOX
    first_label: NDArray[np.int64]  # (F,) indices of labels


def export_rvt(root: Path, out: Path, splits: tuple[str, ...] = SPLITS) -> Report:
    """Write what is missing below `out`; each recording appears whole or not at all.

    Raises:
        ConfigError: the shards' frames are not RVT's. ShardError: a shard is damaged, or `out` holds something else under a
            recording's name. UserError: another process writes to `out`, or the disk is full.
    """
    manifest = load_manifest(root)
    config = _rvt_config(root, manifest)
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(
            f"output {out} lies inside the shards {root}; choose a folder outside them"
        )
    entries = [entry for split in splits for entry in manifest.split(split)]
    if not entries:
        raise ShardError(f"{root} has no recordings in {', '.join(splits)}. Choose another split")
    report = Report([], [], [])
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        shutil.rmtree(out / STAGING, ignore_errors=True)  # of a run that was ended
        try:
            for entry in tqdm(
                entries, desc="exporting", unit="recording", disable=None
            ):  # None: only on a terminal
                _export_recording(root, out, entry, config, report)
        finally:
            shutil.rmtree(out / STAGING, ignore_errors=True)
    return report


def _rvt_config(root: Path, manifest: Manifest) -> FrameConfig:
    config = frame_config(manifest.config["frames"])
    require(
        config.mode is FrameMode.rvt,
        f"{root} holds frames of mode {config.mode.name}, and RVT's tree holds RVT's own. "
        "Prepare the recordings so first: evspan prep source=RAW output=NEW dataset=gen4_rvt frames.mode=rvt",
    )
    require(
        config.downsample <= 2,
        f"{root} holds frames at 1/{config.downsample} of the resolution; RVT knows full and half. "
        "Prepare the recordings into a new folder with frames.downsample=2",
    )
    return config


def _export_recording(
    root: Path, out: Path, entry: RecordingEntry, config: FrameConfig, report: Report
) -> None:
    key = f"{entry.split}/{entry.name}"
    group = open_group(root, entry)
    try:
        small = _small(group, config.downsample)
        if not small.labels.size:
            report.unlabelled.append(key)
        elif (out / key).exists():
            _require_same(out / key, group, small, config)
            report.there.append(key)
        else:
            _write(out / STAGING / key, group, small, config)
            (out / key).parent.mkdir(exist_ok=True)
            os.replace(out / STAGING / key, out / key)
            report.written.append(key)
    finally:
        group.file.close()


def _small(group: h5py.Group, downsample: int) -> _Small:
    end_us, start, boxes = (group[name][:] for name in ("end_us", "box_start", "boxes"))
    labelled = np.flatnonzero(
        group["labelled"][:] & (np.diff(start) > 0)
    )  # RVT's readers cannot take one without labels
    labels = np.zeros(boxes.size, RAW_BOX)
    labels["t"], labels["class_id"], labels["track_id"], labels["class_confidence"] = (
        boxes["t_us"],
        boxes["class_id"],
        boxes["track_id"],
        1,
    )
    for side in "xywh":
        labels[side] = boxes[side] * downsample  # exact: a power of two
    return _Small(end_us, labelled, labels, start[labelled])


def _frames_file(config: FrameConfig) -> Path:
    folder = (
        Path("event_representations_v2")
        / f"stacked_histogram_dt={config.window_ms}_nbins={config.bins}"
    )
    return folder / f"event_representations{'_ds2_nearest' if config.downsample == 2 else ''}.h5"


def _write(folder: Path, group: h5py.Group, small: _Small, config: FrameConfig) -> None:
    labels, frames = folder / "labels_v2", folder / _frames_file(config)
    with written_whole(labels / "labels.npz") as beside:
        np.savez(beside, labels=small.labels, objframe_idx_2_label_idx=small.first_label)
    for path, array in (
        (labels / "timestamps_us.npy", small.frame_ends[small.labelled_frames]),
        (frames.with_name("timestamps_us.npy"), small.frame_ends),
        (frames.with_name("objframe_idx_2_repr_idx.npy"), small.labelled_frames),
    ):
        with written_whole(path) as beside:
            np.save(beside, array)
    count = len(small.frame_ends)
    with hdf5_written_whole(frames) as (file, check_disk):
        shape = read_frames(group, 0, 1).shape[1:]
        data = file.create_dataset(
            "data", (count, *shape), np.uint8, chunks=(1, *shape), maxshape=(None, *shape), **ZSTD
        )
        for i in range(0, count, FRAMES_AT_ONCE):
            data[i : i + FRAMES_AT_ONCE] = read_frames(group, i, min(i + FRAMES_AT_ONCE, count))
            check_disk()


def _require_same(folder: Path, group: h5py.Group, small: _Small, config: FrameConfig) -> None:
    """Raises ShardError where the folder holds other labels or times, or another frame in the middle."""
    frames, middle = folder / _frames_file(config), len(small.frame_ends) // 2
    try:
        with np.load(folder / "labels_v2" / "labels.npz") as stored:
            same = np.array_equal(stored["labels"], small.labels)
        same &= np.array_equal(np.load(frames.with_name("timestamps_us.npy")), small.frame_ends)
        with h5py.File(frames, "r") as file:
            same &= len(file["data"]) == len(small.frame_ends)
            same = same and np.array_equal(
                file["data"][middle], read_frames(group, middle, middle + 1)[0]
            )
    except (OSError, KeyError, ValueError):
        same = False
    if not same:
        raise ShardError(
            f"{folder} is there already, but is not what these shards hold. Delete it, or choose another folder"
        )


def main(argv: list[str]) -> None:
    parser = Parser(
        "evspan prep export-rvt",
        description="Shards of frames.mode=rvt to the tree that RVT's "
        "preprocess_dataset.py writes. Run again, it does only what is missing.",
        epilog="example: evspan prep export-rvt shards rvt_tree --split train val",
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: all")
    given = parser.parse_args(argv)
    began = time.perf_counter()
    report = export_rvt(given.shards, given.out, tuple(given.split))
    told = [
        f"{given.out}: {len(report.written)} recordings written in {time.perf_counter() - began:.1f} s"
    ]
    if report.there:
        told.append(f"{len(report.there)} there already")
    if report.unlabelled:
        told.append(
            f"{len(report.unlabelled)} without labels left out, as RVT does ({', '.join(report.unlabelled[:3])}"
            f"{', ...' if len(report.unlabelled) > 3 else ''})"
        )
    print("; ".join(told))
