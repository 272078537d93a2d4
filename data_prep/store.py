"""One recording -> one part file, whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.boxes import find_boxes, read_boxes
from data_prep.config import PrepConfig
from data_prep.errors import BoxesError, RecordingError
from data_prep.formats import open_recording
from data_prep.formats.recording import Recording
from data_prep.histogram import frame_size, frames_of
from data_prep.labels import filter_boxes
from data_prep.shards import BOX, RecordingEntry
from data_prep.windows import LabelledEnds, labelled_ends

ENTRY = "entry"  # HDF5 attribute of a group: its RecordingEntry as JSON, so that a file tells by itself what it holds
BLOCK = 1 << 24


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; on success the file is synced and takes `path`'s place, on failure it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.writing{path.suffix}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_recording(source: Path, part: Path, config: PrepConfig, *, split: str, name: str, source_name: str) -> RecordingEntry:
    """Write the recording's group to the file `part`.

    Raises:
        RecordingError, BoxesError: what is wrong with the source.
    """
    recording, box_file = open_recording(source), find_boxes(source)
    raw = read_boxes(box_file) if box_file else None
    frames, label_every_us = config.frames, 1000 * config.dataset.labels.label_every_ms
    height, width = frame_size(frames, recording.height, recording.width)
    chosen: list[LabelledEnds] = []  # filled when the first event is known

    def ends(first_us: int) -> Iterator[int]:
        times = raw["t"] if raw is not None else np.zeros(0, np.int64)
        chosen.append(labelled_ends(times, first_us, window_us=frames.window_us, label_every_us=label_every_us))
        return chosen[0].without_end(first_us, frames.window_us)

    digest, end_us = xxhash.xxh3_64(), list[int]()
    with written_whole(part) as beside, h5py.File(beside, "w") as file:
        group = file.create_group(name)
        shape = (2 * frames.bins, height, width)
        stored = group.create_dataset("frames", (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape),
                                      **hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))
        for end, frame in frames_of(recording, ends, frames):
            if len(end_us) == len(stored):
                stored.resize((len(end_us) + 64, *shape))
            stored[len(end_us)] = frame
            digest.update(frame.data)
            end_us.append(end)
        _refuse_invalid(recording, config)
        if not end_us:
            raise RecordingError(f"{source} holds no events. Remove it, or record it again")
        stored.resize((len(end_us), *shape))
        boxes, box_start, labelled, dropped = _boxes_of_frames(source, raw, chosen[0], np.array(end_us), config, recording, split)
        columns = {"end_us": np.array(end_us, np.int64), "boxes": boxes, "box_start": box_start, "labelled": labelled}
        for key, values in columns.items():
            group[key] = values
            digest.update(np.ascontiguousarray(values).tobytes())
        about = source.stat()
        entry = RecordingEntry(
            name=name, split=split, shard="", group=name, frames=len(end_us),
            labelled_frames=int(labelled.sum()), boxes=len(boxes),
            height=height, width=width, sensor_height=recording.height, sensor_width=recording.width,
            first_us=recording.first_us, last_us=recording.last_us, events=recording.events,
            boxes_per_class={k: int((boxes["class_id"] == i).sum()) for i, k in enumerate(config.dataset.classes)},
            dropped={k: v for k, v in {**recording.dropped, **dropped}.items() if v}, source=source_name,
            source_bytes=about.st_size, source_mtime_ns=about.st_mtime_ns, source_xxh3=file_xxh3(source),
            boxes_xxh3=file_xxh3(box_file) if box_file else "", group_xxh3=digest.hexdigest())
        group.attrs[ENTRY] = json.dumps(asdict(entry))
    return entry


def _refuse_invalid(recording: Recording, config: PrepConfig) -> None:
    outside = recording.dropped["outside_sensor"]
    total = outside + recording.events
    if outside > config.max_invalid_share * total:
        raise RecordingError(f"{recording.path}: {outside} of {total} events ({outside / total:.1%}) lie outside the sensor. "
                             "The file may be damaged or its "
                             "header may tell a wrong size; to drop them all the same set "
                             f"max_invalid_share={outside / total + 0.001:.3f}")


def _boxes_of_frames(source: Path, raw: NDArray | None, ends: LabelledEnds, end_us: NDArray[np.int64], config: PrepConfig,
                     recording: Recording, split: str) -> tuple[NDArray, NDArray[np.int64], NDArray[np.bool_], dict[str, int]]:
    """Boxes sorted by frame in BOX, box_start (N+1,), labelled (N,), and what was dropped."""
    labelled = np.zeros(len(end_us), bool)
    shared = min(len(end_us), len(ends.end_us))
    labelled[:shared] = ends.labelled[:shared]
    if raw is None or not raw.size:
        return np.zeros(0, BOX), np.zeros(len(end_us) + 1, np.int64), labelled, {}
    inside = (raw["t"] > recording.first_us) & (raw["t"] <= end_us[-1])
    if not inside.any():
        raise BoxesError(f"{find_boxes(source)}: all {raw.size} boxes lie outside the recording {source.name}: boxes from "
                         f"{raw['t'][0]} to {raw['t'][-1]} us, "
                         f"events from {recording.first_us} to {recording.last_us} us. Do they belong together, and to one "
                         "clock?")
    labels = config.dataset.labels
    kept, dropped = filter_boxes(raw[inside], labels, classes=len(config.dataset.classes), height=recording.height,
                                 width=recording.width, split=split)
    dropped |= {"boxes_outside_the_recording": int(raw.size - inside.sum()), "label_times_unaligned": ends.unaligned,
                "label_times_thinned": ends.thinned}
    frame = np.searchsorted(end_us, kept["t"])  # exact only where a frame ends at the label's time
    at_end = labelled[frame] & (end_us[frame] == kept["t"])
    kept, frame = kept[at_end], frame[at_end]
    boxes = np.zeros(kept.size, BOX)
    boxes["t_us"] = kept["t"]
    for key in "xywh":
        boxes[key] = kept[key] / config.frames.downsample
    boxes["class_id"], boxes["track_id"] = kept["class_id"], kept["track_id"]
    return boxes, np.searchsorted(frame, np.arange(len(end_us) + 1)), labelled, dropped
