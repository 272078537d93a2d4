"""One recording -> a group with its frames and boxes, in a part file of its own; and what such files hold."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import hdf5plugin
import numpy as np
import xxhash
from evspan.conf.errors import BoxesError, RecordingError
from evspan.conf.schema.prep import Codec, FrameMode, PrepConfig
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.frames.histogram import each_window, frame_size
from evspan.data_prep.frames.rvt import RvtEnds
from evspan.data_prep.frames.windows import WindowEnds, tolerance, window_ends
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.labels.filters import filter_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.sources import Source
from evspan.data_prep.shards.atomic import file_xxh3, hdf5_written_whole
from evspan.data_prep.shards.format import (
    BOX,
    COLUMNS,
    CONFIG,
    ENTRY,
    FRAME_SHAPE,
    RecordingEntry,
    columns_digest,
)
from numpy.typing import NDArray

CODE_CHUNK = 1 << 17  # bytes of code in a chunk of the file
FILTERS = {Codec.fast: {}, Codec.small: hdf5plugin.Zstd(clevel=3)}
# All that h5py says of damage, and json of an attribute.
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


class Stored(NamedTuple):
    """A recording's group in a file, and the config that it was made with."""

    entry: RecordingEntry
    config: dict[str, Any]
    file: Path


def stored_in(path: Path) -> dict[str, Stored]:
    """What a part file or a shard holds, by split/recording, without what is damaged."""
    found: dict[str, Stored] = {}
    with suppress(*UNREADABLE), h5py.File(path, "r") as file:
        for name in file:
            with suppress(*UNREADABLE):  # one damaged group does not take the others along
                group = file[name]
                entry = RecordingEntry(**json.loads(group.attrs[ENTRY]))
                if (
                    "frames" in group
                    and all(k in group for k in COLUMNS)
                    and len(group["end_us"]) == entry.frames
                ):
                    found[f"{entry.split}/{entry.name}"] = Stored(
                        entry, json.loads(group.attrs[CONFIG]), path
                    )
    return found


def config_of(config: PrepConfig) -> dict[str, Any]:
    """What decides over frames and boxes: the config without paths, processes, file sizes and what may be refused."""
    dataset = asdict(config.dataset)
    raw = {
        "frames": asdict(config.frames),
        "dataset": {k: dataset[k] for k in ("name", "classes", "labels")},
    }
    return json.loads(json.dumps(raw, default=lambda v: v.name if isinstance(v, Enum) else str(v)))


def prepare_recording(
    source: Source, part: Path, config: PrepConfig, reuse: Stored | None = None
) -> RecordingEntry:
    """Write the recording's group to the file `part`.

    Args:
        reuse: an older group of the same recording and frame config: where its windows are still the right ones, its frames
            are copied and only boxes and labels are made anew.
    Raises:
        RecordingError, BoxesError: what is wrong with the source. NoSpaceError: the disk is full.
    """
    before, box_file = source.path.stat(), source.boxes
    labels = _Labels(box_file, read_boxes(box_file) if box_file else np.zeros(0, RAW_BOX))
    with hdf5_written_whole(part) as (file, check_disk):
        group = file.create_group(source.name)
        entry = _copy_frames(group, reuse, labels, config) if reuse else None
        entry = entry or _make_frames(group, source, labels, config, check_disk)
        refuse_invalid(source.path, entry, config.max_invalid_fraction)
        entry = _write_labels(group, entry, labels, config)
        about = source.path.stat()
        if (about.st_size, about.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise RecordingError(
                f"{source.path} changed while it was read. Run the same again when it is complete"
            )
        entry = replace(
            entry,
            source=source.relative,
            source_bytes=about.st_size,
            source_mtime_ns=about.st_mtime_ns,
            boxes_xxh3=file_xxh3(box_file) if box_file else "",
        )
        group.attrs[ENTRY], group.attrs[CONFIG] = (
            json.dumps(asdict(entry)),
            json.dumps(config_of(config)),
        )
    return entry


class _Labels(NamedTuple):
    """What is known of a recording's labels before its frames are made."""

    file: Path | None
    raw: NDArray  # RAW_BOX; empty without a file

    def windows(
        self, first_us: int, size: tuple[int, int], config: PrepConfig, split: str
    ) -> WindowEnds | RvtEnds:
        """size: (height, width) of the sensor."""
        labels = config.dataset.labels
        if config.frames.mode is FrameMode.exact:
            return window_ends(
                self.raw["t"],
                first_us,
                window_us=config.frames.window_us,
                label_every_us=1000 * labels.label_every_ms,
            )
        if self.file is None:
            raise BoxesError(
                "it has no box file, and RVT's frames (frames.mode=rvt) end at labels. Add X_bbox.npy beside it, or "
                "use frames.mode=exact"
            )
        # RVT filters first: where nothing is left of a label, it ends no frame.
        kept, _ = filter_boxes(
            self.raw,
            labels,
            classes=len(config.dataset.classes),
            height=size[0],
            width=size[1],
            split=split,
        )
        return RvtEnds(kept["t"], config.frames.window_us)


def _make_frames(
    group: h5py.Group,
    source: Source,
    labels: _Labels,
    config: PrepConfig,
    check_disk: Callable[[], None],
) -> RecordingEntry:
    """Write `frames`, `frame_start` and `end_us`; the entry of the recording without its labels."""
    recording = open_recording(source.path)
    size = (recording.height, recording.width)
    height, width = frame_size(config.frames, *size)
    ends, lengths, digest = list[int](), list[int](), xxhash.xxh3_64()
    with CodeWriter(group, FILTERS[config.codec]) as writer:
        for end, code in each_window(
            recording,
            lambda first_us: labels.windows(first_us, size, config, source.split),
            config.frames,
            FrameEncoder(),
        ):
            writer.write(code)
            digest.update(code.data)
            lengths.append(code.size)
            ends.append(end)
            check_disk()
    group["frame_start"] = np.cumsum([0, *lengths], dtype=np.int64)
    group["end_us"] = np.array(ends, np.int64)
    group.attrs[FRAME_SHAPE] = (config.frames.channels, height, width)
    return RecordingEntry(
        name=source.name,
        split=source.split,
        shard="",
        group=source.name,
        frames=len(ends),
        labelled_frames=0,
        boxes=0,
        height=height,
        width=width,
        sensor_height=recording.height,
        sensor_width=recording.width,
        first_us=recording.first_us,
        last_us=recording.last_us,
        events=recording.events,
        dropped_events=dict(recording.dropped),
        source_xxh3=file_xxh3(source.path),
        frames_xxh3=digest.hexdigest(),
    )


class CodeWriter:
    """The dataset `frames`, written in whole chunks."""

    def __init__(self, group: h5py.Group, filters: Mapping[str, Any]) -> None:
        self.stored = group.create_dataset(
            "frames", (0,), np.uint8, maxshape=(None,), chunks=(CODE_CHUNK,), **filters
        )
        self.waiting: list[NDArray[np.uint8]] = []
        self.size = 0

    def write(self, code: NDArray[np.uint8]) -> None:
        self.waiting.append(code.copy())
        self.size += code.size
        if self.size >= 8 * CODE_CHUNK:
            self._flush(self.size // CODE_CHUNK * CODE_CHUNK)

    def _flush(self, size: int) -> None:
        together = np.concatenate(self.waiting) if self.waiting else np.zeros(0, np.uint8)
        at = len(self.stored)
        self.stored.resize((at + size,))
        self.stored[at:] = together[:size]
        self.waiting, self.size = [together[size:]], together.size - size

    def __enter__(self) -> "CodeWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush(self.size)


def _copy_frames(
    group: h5py.Group, old: Stored, labels: _Labels, config: PrepConfig
) -> RecordingEntry | None:
    """The same from an older group; None where its windows end elsewhere now, or it cannot be read."""
    entry = old.entry
    wanted = labels.windows(
        entry.first_us, (entry.sensor_height, entry.sensor_width), config, entry.split
    )
    try:
        with h5py.File(old.file, "r") as file:
            stored = file[entry.group]
            # One more than there are: where they come to an end, it must be the same one.
            if stored["end_us"][:].tolist() != list(
                islice(wanted, entry.frames + isinstance(wanted, RvtEnds))
            ):
                return None
            for name in ("frames", "frame_start", "end_us"):
                file.copy(stored[name], group)  # chunks are copied as they are stored
            group.attrs[FRAME_SHAPE] = stored.attrs[FRAME_SHAPE]
    except (OSError, RuntimeError, KeyError):
        for name in ("frames", "frame_start", "end_us"):
            group.pop(name, None)
        return None
    return replace(entry, shard="")


def refuse_invalid(path: Path, entry: RecordingEntry, max_fraction: float) -> None:
    """Raises RecordingError: no events, or a larger share than `max_fraction` outside the sensor."""
    outside = entry.dropped_events.get("outside_sensor", 0)
    total = outside + entry.events
    if outside > max_fraction * total:
        raise RecordingError(
            f"{path}: {outside} of {total} events ({outside / total:.1%}) lie outside the sensor of "
            f"{entry.sensor_width} x {entry.sensor_height} pixels. The file may be damaged or its header may "
            "tell a wrong size; to drop them all the same set "
            f"max_invalid_fraction={min(1, outside / total + 0.001):.3f}"
        )
    if not entry.events:
        raise RecordingError(
            f"{path} holds no events{' inside the sensor' if outside else ''}. Remove it, or record it again"
        )


def _write_labels(
    group: h5py.Group, entry: RecordingEntry, labels: _Labels, config: PrepConfig
) -> RecordingEntry:
    """Write boxes, box_start and labelled; the entry with their counts and the checksum of the group."""
    end_us, classes, size = (
        group["end_us"][:],
        config.dataset.classes,
        (entry.sensor_height, entry.sensor_width),
    )
    label_ends = labels.windows(entry.first_us, size, config, entry.split).labelled_us
    labelled = np.isin(end_us, label_ends)
    kept, dropped = labels.raw[:0], dict[str, int]()
    if labels.raw.size:
        at_ends, dropped = _at_labelled_ends(labels, end_us, label_ends, entry, config)
        kept, filtered = filter_boxes(
            at_ends,
            config.dataset.labels,
            classes=len(classes),
            height=size[0],
            width=size[1],
            split=entry.split,
        )
        dropped |= filtered
    boxes = np.zeros(kept.size, BOX)
    if kept.size:
        boxes["t_us"], boxes["class_id"], boxes["track_id"] = (
            kept["t"],
            kept["class_id"],
            kept["track_id"],
        )
        for side in "xywh":
            boxes[side] = kept[side] / config.frames.downsample
    box_start = np.append(np.searchsorted(boxes["t_us"], end_us), boxes.size).astype(np.int64)
    group["boxes"], group["box_start"], group["labelled"] = boxes, box_start, labelled
    return replace(
        entry,
        labelled_frames=int(labelled.sum()),
        boxes=boxes.size,
        dropped_boxes=dropped,
        boxes_per_class={
            name: int((boxes["class_id"] == i).sum()) for i, name in enumerate(classes)
        },
        group_xxh3=columns_digest(
            entry.frames_xxh3, [group["frame_start"][:], end_us, boxes, box_start, labelled]
        ),
    )


def _at_labelled_ends(
    labels: _Labels,
    end_us: NDArray[np.int64],
    label_ends: NDArray[np.int64],
    entry: RecordingEntry,
    config: PrepConfig,
) -> tuple[NDArray, dict[str, int]]:
    """The boxes at whose time a labelled frame ends, and how many of the others lie where."""
    raw = labels.raw
    inside = (raw["t"] > entry.first_us) & (raw["t"] <= end_us.max(initial=entry.last_us))
    if not inside.any():
        raise BoxesError(
            f"{labels.file}: all {raw.size} boxes lie outside the recording {entry.name}: boxes from "
            f"{raw['t'][0]} to {raw['t'][-1]} us, events from {entry.first_us} to {entry.last_us} us. Do they "
            "belong together, and to one clock?"
        )
    times = raw["t"][inside]
    distance = np.full(times.size, np.iinfo(np.int64).max)
    if label_ends.size:
        after = np.searchsorted(label_ends, times)
        nearest = label_ends[
            np.stack((np.maximum(after - 1, 0), np.minimum(after, label_ends.size - 1)))
        ]
        distance = abs(times - nearest).min(0)
    near = distance < 1000 * config.dataset.labels.label_every_ms - tolerance(
        config.frames.window_us
    )
    return raw[inside][distance == 0], {
        "boxes_outside_the_recording": int(raw.size - times.size),
        "boxes_between_labelled_frames": int(np.count_nonzero((distance > 0) & near)),
        "boxes_off_the_windows": int(np.count_nonzero(~near)),
    }
