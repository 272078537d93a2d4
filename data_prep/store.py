"""One recording -> a group with its frames and boxes, in a part file of its own; and what such files hold."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.boxes import find_boxes, read_boxes
from data_prep.config import PrepConfig
from data_prep.errors import BoxesError, RecordingError
from data_prep.files import file_xxh3, hdf5_written_whole
from data_prep.formats import open_recording
from data_prep.histogram import frame_size, frames_of
from data_prep.labels import filter_boxes
from data_prep.shards import BOX, CONFIG, ENTRY, RecordingEntry
from data_prep.sources import Source
from data_prep.windows import WindowEnds, tolerance, window_ends

COMPRESSION = hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE)
RESIZE_BY = 64  # frames


class Stored(NamedTuple):
    """A recording's group in a file, and the config that it was made with."""

    entry: RecordingEntry
    config: dict[str, Any]
    file: Path


def stored_in(path: Path) -> dict[str, Stored]:
    """What a part file or a shard holds, by split/recording, without what is damaged."""
    found: dict[str, Stored] = {}
    try:
        with h5py.File(path, "r") as file:
            for group in file.values():
                entry = RecordingEntry(**json.loads(group.attrs[ENTRY]))
                if len(group["frames"]) == entry.frames and all(k in group for k in ("end_us", "boxes", "box_start", "labelled")):
                    found[f"{entry.split}/{entry.name}"] = Stored(entry, json.loads(group.attrs[CONFIG]), path)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):  # all that h5py says of damage, and json of an attribute
        pass
    return found


def config_of(config: PrepConfig) -> dict[str, Any]:
    """What decides over frames and boxes: the config without paths, processes, file sizes and what may be refused."""
    dataset = asdict(config.dataset)
    raw = {"frames": asdict(config.frames), "dataset": {k: dataset[k] for k in ("name", "classes", "labels")}}
    return json.loads(json.dumps(raw, default=lambda v: v.name if isinstance(v, Enum) else str(v)))


def prepare_recording(source: Source, part: Path, config: PrepConfig, reuse: Stored | None = None) -> RecordingEntry:
    """Write the recording's group to the file `part`.

    Args:
        reuse: an older group of the same recording and frame config: where its windows are still the right ones, its frames
            are copied and only boxes and labels are made anew.
    Raises:
        RecordingError, BoxesError: what is wrong with the source. NoSpaceError: the disk is full.
    """
    before, box_file = source.path.stat(), find_boxes(source.path)
    raw = read_boxes(box_file) if box_file else None
    with hdf5_written_whole(part) as (file, check_disk):
        group = file.create_group(source.name)
        entry = _copy_frames(group, reuse, raw, config) if reuse else None
        entry = entry or _make_frames(group, source, raw, config, check_disk)
        refuse_invalid(source.path, entry, config.max_invalid_share)
        entry = _write_labels(group, entry, box_file, raw, config)
        about = source.path.stat()
        if (about.st_size, about.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise RecordingError(f"{source.path} changed while it was read. Run the same again when it is complete")
        entry = replace(entry, source=source.relative, source_bytes=about.st_size, source_mtime_ns=about.st_mtime_ns,
                        boxes_xxh3=file_xxh3(box_file) if box_file else "")
        group.attrs[ENTRY], group.attrs[CONFIG] = json.dumps(asdict(entry)), json.dumps(config_of(config))
    return entry


def _windows(raw: NDArray | None, first_us: int, config: PrepConfig) -> WindowEnds:
    times = raw["t"] if raw is not None else np.zeros(0, np.int64)
    return window_ends(times, first_us, window_us=config.frames.window_us,
                       label_every_us=1000 * config.dataset.labels.label_every_ms)


def _make_frames(group: h5py.Group, source: Source, raw: NDArray | None, config: PrepConfig,
                 check_disk: Callable[[], None]) -> RecordingEntry:
    """Write `frames` and `end_us`; the entry of the recording without its labels."""
    recording = open_recording(source.path)
    height, width = frame_size(config.frames, recording.height, recording.width)
    shape, end_us, digest = (config.frames.channels, height, width), list[int](), xxhash.xxh3_64()
    stored = group.create_dataset("frames", (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(1, *shape), **COMPRESSION)
    for end, frame in frames_of(recording, lambda first_us: _windows(raw, first_us, config), config.frames):
        if len(end_us) == len(stored):
            stored.resize((len(end_us) + RESIZE_BY, *shape))
        stored[len(end_us)] = frame
        check_disk()
        digest.update(frame.data)
        end_us.append(end)
    stored.resize((len(end_us), *shape))
    group["end_us"] = np.array(end_us, np.int64)
    return RecordingEntry(
        name=source.name, split=source.split, shard="", group=source.name, frames=len(end_us), labelled_frames=0, boxes=0,
        height=height, width=width, sensor_height=recording.height, sensor_width=recording.width, first_us=recording.first_us,
        last_us=recording.last_us, events=recording.events, dropped_events=dict(recording.dropped),
        source_xxh3=file_xxh3(source.path), frames_xxh3=digest.hexdigest())


def _copy_frames(group: h5py.Group, old: Stored, raw: NDArray | None, config: PrepConfig) -> RecordingEntry | None:
    """The same from an older group; None where its windows end elsewhere now, or it cannot be read."""
    wanted = list(islice(_windows(raw, old.entry.first_us, config), old.entry.frames))
    try:
        with h5py.File(old.file, "r") as file:
            end_us = file[old.entry.group]["end_us"][:]
            if end_us.tolist() != wanted:
                return None
            file.copy(f"{old.entry.group}/frames", group)  # chunks are copied as they are stored
    except (OSError, RuntimeError, KeyError):
        group.pop("frames", None)
        return None
    group["end_us"] = end_us
    return replace(old.entry, shard="")


def refuse_invalid(path: Path, entry: RecordingEntry, max_share: float) -> None:
    """Raises RecordingError: no events, or a larger share than `max_share` outside the sensor."""
    outside = entry.dropped_events.get("outside_sensor", 0)
    total = outside + entry.events
    if outside > max_share * total:
        raise RecordingError(f"{path}: {outside} of {total} events ({outside / total:.1%}) lie outside the sensor of "
                             f"{entry.sensor_width} x {entry.sensor_height} pixels. The file may be damaged or its header may "
                             "tell a wrong size; to drop them all the same set "
                             f"max_invalid_share={min(1, outside / total + 0.001):.3f}")
    if not entry.events:
        raise RecordingError(f"{path} holds no events{' inside the sensor' if outside else ''}. Remove it, or record it again")


def _write_labels(group: h5py.Group, entry: RecordingEntry, box_file: Path | None, raw: NDArray | None,
                  config: PrepConfig) -> RecordingEntry:
    """Write boxes, box_start and labelled; the entry with their counts and the checksum of the group."""
    end_us, classes = group["end_us"][:], config.dataset.classes
    label_ends = _windows(raw, entry.first_us, config).labelled_us
    labelled = np.isin(end_us, label_ends)
    kept, dropped = np.zeros(0, BOX), dict[str, int]()
    if box_file is not None and raw is not None and raw.size:
        at_ends, dropped = _at_labelled_ends(raw, end_us, label_ends, box_file, entry, config)
        kept, filtered = filter_boxes(at_ends, config.dataset.labels, classes=len(classes), height=entry.sensor_height,
                                      width=entry.sensor_width, split=entry.split)
        dropped |= filtered
    boxes = np.zeros(kept.size, BOX)
    if kept.size:
        boxes["t_us"], boxes["class_id"], boxes["track_id"] = kept["t"], kept["class_id"], kept["track_id"]
        for side in "xywh":
            boxes[side] = kept[side] / config.frames.downsample
    box_start = np.append(np.searchsorted(boxes["t_us"], end_us), boxes.size).astype(np.int64)
    group["boxes"], group["box_start"], group["labelled"] = boxes, box_start, labelled
    digest = xxhash.xxh3_64(entry.frames_xxh3.encode())
    for column in (end_us, boxes, box_start, labelled):
        digest.update(np.ascontiguousarray(column).tobytes())
    return replace(entry, labelled_frames=int(labelled.sum()), boxes=boxes.size, dropped_boxes=dropped,
                   boxes_per_class={name: int((boxes["class_id"] == i).sum()) for i, name in enumerate(classes)},
                   group_xxh3=digest.hexdigest())


def _at_labelled_ends(raw: NDArray, end_us: NDArray[np.int64], label_ends: NDArray[np.int64], box_file: Path,
                      entry: RecordingEntry, config: PrepConfig) -> tuple[NDArray, dict[str, int]]:
    """The boxes at whose time a labelled frame ends, and how many of the others lie where."""
    inside = (raw["t"] > entry.first_us) & (raw["t"] <= end_us[-1])
    if not inside.any():
        raise BoxesError(f"{box_file}: all {raw.size} boxes lie outside the recording {entry.name}: boxes from {raw['t'][0]} to "
                         f"{raw['t'][-1]} us, events from {entry.first_us} to {entry.last_us} us. Do they belong together, and "
                         "to one clock?")
    times = raw["t"][inside]
    after = np.searchsorted(label_ends, times)
    nearest = label_ends[np.stack((np.maximum(after - 1, 0), np.minimum(after, label_ends.size - 1)))]
    distance = abs(times - nearest).min(0)
    near = distance < 1000 * config.dataset.labels.label_every_ms - tolerance(config.frames.window_us)
    return raw[inside][distance == 0], {
        "boxes_outside_the_recording": int(raw.size - times.size),
        "boxes_between_labelled_frames": int(np.count_nonzero((distance > 0) & near)),
        "boxes_off_the_windows": int(np.count_nonzero(~near))}
