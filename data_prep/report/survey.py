"""Numbers about a prepared dataset: all small columns are read, and a few frames per recording."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ShardError
from evspan.conf.progress import progress
from evspan.data_prep.report.images import FrameImage, draw_frame_image
from evspan.data_prep.shards.format import (
    SPLITS,
    BoxArray,
    Manifest,
    RecordingEntry,
    load_manifest,
)
from evspan.data_prep.shards.reading import open_group, read_frames, read_stored_boxes
from evspan.data_prep.shards.select import select_recordings
from numpy.typing import NDArray

FRAMES_PER_RECORDING = 8
MAX_IMAGES = 24
MAX_IMAGES_PER_RECORDING = 6
CURVE_POINTS = 120
COUNTS = 256  # values of a stored count, a byte
SIDE_EDGES = 2.0 ** (np.arange(0, 45) / 4)  # 1 to 2048 pixels, four to an octave
COCO_AREA_EDGES = (32.0**2, 96.0**2)  # small | medium | large, square pixels
BOXES_AT_ONCE = 1 << 18
# What h5py raises where a file is damaged.
DAMAGE_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError)


class Curve(NamedTuple):
    """A recording over time, in at most CURVE_POINTS intervals of neighbouring frames.

    edges_s: (n + 1,) seconds since the recording's first event.
    events: (n,) events of each interval. frames, labelled: (n,) its frames, and labelled frames.
    """

    edges_s: NDArray[np.float64]
    events: NDArray[np.float64]
    frames: NDArray[np.int64]
    labelled: NDArray[np.int64]

    @property
    def rate(self) -> NDArray[np.float64]:
        """(n,) events per second."""
        return self.events / np.maximum(np.diff(self.edges_s), 1e-6)


@dataclass(kw_only=True)
class RecordingStats:
    """Numbers and images of one recording."""

    entry: RecordingEntry
    code_bytes: int  # of its stored frames
    empty_frames: int  # without a single event
    negatives: int  # labelled frames without boxes
    per_class: NDArray[np.int64]  # (classes,) boxes
    per_size: NDArray[np.int64]  # (classes, 3) boxes: small, medium, large as COCO defines them
    per_side: NDArray[np.int64]  # (sides,) boxes by the root of their area, between SIDE_EDGES
    curve: Curve
    sampled_frames: int
    counts: NDArray[np.int64]  # (256,) cells of the sampled frames by their count
    images: list[FrameImage] = field(default_factory=list)

    @property
    def key(self) -> str:
        """split/name."""
        return f"{self.entry.split}/{self.entry.name}"

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return (self.entry.last_us - self.entry.first_us) / 1e6


@dataclass(frozen=True)
class Summary:
    """Some recordings taken together. Fractions and rates of nothing are None."""

    recordings: list[RecordingStats]
    cutoff: int

    def total(self, name: str) -> int:
        """The sum of a count of `RecordingEntry`."""
        return sum(getattr(recording.entry, name) for recording in self.recordings)

    def dropped(self, kind: str) -> dict[str, int]:
        """Counts by reason. kind: `dropped_events` or `dropped_boxes`."""
        totals: dict[str, int] = {}
        for recording in self.recordings:
            for reason, count in getattr(recording.entry, kind).items():
                totals[reason] = totals.get(reason, 0) + count
        return totals

    @cached_property
    def seconds(self) -> float:
        """Length of all recordings."""
        return sum(recording.seconds for recording in self.recordings)

    @cached_property
    def per_class(self) -> NDArray[np.int64]:
        """(classes,) boxes."""
        return _total([recording.per_class for recording in self.recordings])

    @cached_property
    def per_size(self) -> NDArray[np.int64]:
        """(classes, 3) boxes: small, medium, large."""
        return _total([recording.per_size for recording in self.recordings])

    @cached_property
    def per_side(self) -> NDArray[np.int64]:
        """(sides,) boxes between SIDE_EDGES."""
        return _total([recording.per_side for recording in self.recordings])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(256,) cells of the sampled frames by their count."""
        return _total([recording.counts for recording in self.recordings])

    @property
    def sampled_frames(self) -> int:
        """Frames that were decoded."""
        return sum(recording.sampled_frames for recording in self.recordings)

    @property
    def empty_frames(self) -> int:
        """Frames without a single event."""
        return sum(recording.empty_frames for recording in self.recordings)

    @property
    def negatives(self) -> int:
        """Labelled frames without boxes."""
        return sum(recording.negatives for recording in self.recordings)

    @property
    def labelled_fraction(self) -> float | None:
        """Labelled frames per frame."""
        return ratio(self.total("labelled_frames"), self.total("frames"))

    @property
    def label_rate(self) -> float | None:
        """Labelled frames per second."""
        return ratio(self.total("labelled_frames"), self.seconds)

    @property
    def event_rate(self) -> float | None:
        """Events per second."""
        return ratio(self.total("events"), self.seconds)

    @property
    def empty_fraction(self) -> float | None:
        """Frames without events per frame."""
        return ratio(self.empty_frames, self.total("frames"))

    @property
    def frame_bytes(self) -> float | None:
        """Stored bytes per frame."""
        code_bytes = sum(recording.code_bytes for recording in self.recordings)
        return ratio(code_bytes, self.total("frames"))

    @property
    def saturated_fraction(self) -> float | None:
        """Cells at the cutoff per cell with events, in the sampled frames."""
        return ratio(int(self.counts[self.cutoff :].sum()), int(self.counts[1:].sum()))


@dataclass(frozen=True)
class Survey:
    """A dataset, or the part of it that was selected."""

    root: Path
    manifest: Manifest
    recordings: list[RecordingStats]
    selection: str = ""  # in words: "recording a of split val"; empty: the whole dataset

    @property
    def cutoff(self) -> int:
        """The count at which frames saturate."""
        return int(self.manifest.config["frames"]["cutoff"])

    @property
    def splits(self) -> list[str]:
        """Splits that have recordings, in the order train, val, test."""
        existing = {recording.entry.split for recording in self.recordings}
        return [split for split in SPLITS if split in existing]

    def summary(self, split: str | None = None) -> Summary:
        """The recordings of a split, or all of them."""
        recordings = [r for r in self.recordings if split in (None, r.entry.split)]
        return Summary(recordings, self.cutoff)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; None where there is nothing to relate to."""
    return part / whole if whole else None


def _total(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = np.sum(arrays, axis=0)
    return total


def evenly(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of the values (n,), each in the middle of one of `count` equal parts."""
    count = min(count, values.size)
    middles = (np.arange(count) + 0.5) * values.size / max(1, count)
    return values[middles.astype(np.int64)]


def survey(
    root: Path,
    *,
    split: str | None = None,
    name: str | None = None,
    frames_per_recording: int = FRAMES_PER_RECORDING,
) -> Survey:
    """Reads the dataset, or one split, or the recordings of one name.

    Args:
        frames_per_recording: frames of each recording that are decoded, besides those drawn.

    Raises:
        ShardError: no prepared dataset, no such recording, or a damaged shard.
    """
    manifest = load_manifest(root)
    entries = manifest.recordings
    if split or name:
        entries = select_recordings(manifest, root, split=split, name=name)
    with_images = set(evenly(np.arange(len(entries)), MAX_IMAGES).tolist())
    images_each = min(MAX_IMAGES_PER_RECORDING, MAX_IMAGES // max(1, len(with_images)))
    recordings = []
    for i, entry in enumerate(progress(entries, "reading", unit="recording")):
        num_images = images_each if i in with_images else 0
        recordings.append(
            _survey_recording(root, manifest, entry, frames_per_recording, num_images)
        )
    return Survey(root, manifest, recordings, _selection(split, name))


def _selection(split: str | None, name: str | None) -> str:
    parts = []
    if name:
        parts.append(f"recording {name}")
    if split:
        parts.append(f"split {split}")
    return " of ".join(parts)


@contextmanager
def _damage_reported(root: Path, entry: RecordingEntry) -> Iterator[None]:
    try:
        yield
    except DAMAGE_ERRORS as error:
        raise ShardError(
            f"{root / entry.shard}: recording {entry.group!r} is damaged ({error}). Run "
            "evspan prep verify, then the same evspan prep again"
        ) from error


class _Columns(NamedTuple):
    """The small columns of a recording of N frames."""

    end_us: NDArray[np.int64]  # (N,)
    labelled: NDArray[np.bool_]  # (N,)
    code_bytes: NDArray[np.int64]  # (N,) stored bytes
    num_boxes: NDArray[np.int64]  # (N,)


class _Sample(NamedTuple):
    """Frames that were decoded. indices: (K,). events: (K,) of each. counts: (256,) cells."""

    indices: NDArray[np.int64]
    events: NDArray[np.int64]
    counts: NDArray[np.int64]


def _survey_recording(
    root: Path, manifest: Manifest, entry: RecordingEntry, sample: int, num_images: int
) -> RecordingStats:
    group = open_group(root, entry)
    try:
        with _damage_reported(root, entry):
            columns = _read_columns(group, entry)
            per_size, per_side = _box_sizes(read_stored_boxes(group), len(manifest.classes))
            decoded = _decode_sample(group, evenly(np.arange(entry.frames), sample))
            images = [
                draw_frame_image(group, entry, manifest.classes, index)
                for index in _frames_to_draw(columns, num_images).tolist()
            ]
    finally:
        group.file.close()
    sampled_bytes = columns.code_bytes[decoded.indices]
    events = _events_per_frame(columns.code_bytes, sampled_bytes, decoded.events)
    window_us = 1000 * int(manifest.config["frames"]["window_ms"])
    return RecordingStats(
        entry=entry,
        code_bytes=int(columns.code_bytes.sum()),
        empty_frames=int(np.count_nonzero(columns.code_bytes == 0)),
        negatives=int(np.count_nonzero(columns.labelled & (columns.num_boxes == 0))),
        per_class=per_size.sum(1),
        per_size=per_size,
        per_side=per_side,
        curve=_curve(entry, columns, events, window_us),
        sampled_frames=decoded.indices.size,
        counts=decoded.counts,
        images=images,
    )


def _read_columns(group: h5py.Group, entry: RecordingEntry) -> _Columns:
    """Raises ValueError where the columns disagree with each other or with the manifest."""
    columns = _Columns(
        end_us=group["end_us"][:],
        labelled=group["labelled"][:],
        code_bytes=np.diff(group["frame_start"][:]),
        num_boxes=np.diff(group["box_start"][:]),
    )
    stored_names = ("end_us", "labelled", "frame_start", "box_start")
    for name, column in zip(stored_names, columns, strict=True):
        if column.size != entry.frames:
            raise ValueError(
                f"{name} is of {column.size} frames, the manifest lists {entry.frames}"
            )
    stored_boxes = len(group["boxes"])
    boxes = int(columns.num_boxes.sum())
    if not boxes == stored_boxes == entry.boxes or (columns.num_boxes < 0).any():
        raise ValueError(
            f"it has {stored_boxes} boxes, its frames have {boxes}, "
            f"the manifest lists {entry.boxes}"
        )
    stored_bytes = len(group["frames"])
    frame_bytes = int(columns.code_bytes.sum())
    if frame_bytes != stored_bytes or (columns.code_bytes < 0).any():
        raise ValueError(
            f"its frames are {stored_bytes} bytes, the column of their starts ends at {frame_bytes}"
        )
    return columns


def _box_sizes(stored: BoxArray, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(classes, 3) boxes by class and COCO size, and (sides,) boxes by side.

    Args:
        stored: (M,) BOX.
    """
    per_size = np.zeros((num_classes, 3), np.int64)
    per_side = np.zeros(SIDE_EDGES.size - 1, np.int64)
    for first in range(0, len(stored), BOXES_AT_ONCE):
        boxes = stored[first : first + BOXES_AT_ONCE]
        class_ids = boxes["class_id"]
        if ((class_ids < 0) | (class_ids >= num_classes)).any():
            raise ValueError(
                f"its boxes are of class {class_ids.min()} to {class_ids.max()}, "
                f"the manifest lists {num_classes} classes"
            )
        area = boxes["w"].astype(np.float64) * boxes["h"]
        np.add.at(per_size, (class_ids, np.digitize(area, COCO_AREA_EDGES)), 1)
        side = np.sqrt(np.maximum(area, 0))
        side = np.clip(side, SIDE_EDGES[0], SIDE_EDGES[-1] * 0.999)
        per_side += np.histogram(side, SIDE_EDGES)[0]
    return per_size, per_side


def _decode_sample(group: h5py.Group, indices: NDArray[np.int64]) -> _Sample:
    counts = np.zeros(COUNTS, np.int64)
    events = np.zeros(indices.size, np.int64)
    for i, index in enumerate(indices.tolist()):
        frame = read_frames(group, index, index + 1)
        cells = np.bincount(frame.reshape(-1), minlength=COUNTS)
        counts += cells
        events[i] = cells @ np.arange(COUNTS)
    return _Sample(indices, events, counts)


def _frames_to_draw(columns: _Columns, count: int) -> NDArray[np.int64]:
    """Indices of frames with boxes; without any, of labelled frames; without any, of all frames."""
    candidates = np.flatnonzero(columns.num_boxes)
    if not candidates.size:
        candidates = np.flatnonzero(columns.labelled)
    if not candidates.size:
        candidates = np.arange(columns.labelled.size)
    return evenly(candidates, count)


def _events_per_frame(
    code_bytes: NDArray[np.int64],
    sampled_bytes: NDArray[np.int64],
    sampled_events: NDArray[np.int64],
) -> NDArray[np.float64]:
    """(N,) approximate events of every frame, from its stored size.

    A frame's code has a byte for each event and a few bytes to skip empty cells. The relation
    between size and events is interpolated from the decoded frames.
    """
    sizes, first = np.unique(np.append(0, sampled_bytes), return_index=True)
    events = np.maximum.accumulate(np.append(0, sampled_events)[first])
    beyond = np.maximum(code_bytes - sizes[-1], 0)
    per_frame: NDArray[np.float64] = np.interp(code_bytes, sizes, events) + beyond
    return per_frame


def _curve(
    entry: RecordingEntry, columns: _Columns, events: NDArray[np.float64], window_us: int
) -> Curve:
    """Sums neighbouring frames; scaled so that the sum is the manifest's exact number of events.

    Args:
        events: (N,) approximate events of the frames.
    """
    end_us = columns.end_us
    if not end_us.size:
        nothing = np.zeros(0, np.int64)
        return Curve(np.zeros(1), np.zeros(0), nothing, nothing)
    num_points = min(CURVE_POINTS, end_us.size)
    edges = np.linspace(0, end_us.size, num_points + 1).round().astype(np.int64)
    times_us = np.append(end_us[0] - window_us, end_us)
    # In mode rvt the frames end with the last label: only their part of the recording counts.
    framed_us = float(times_us[-1] - times_us[0])
    covered = min(1.0, framed_us / max(1, entry.last_us - entry.first_us))
    curve_events = np.add.reduceat(events, edges[:-1])
    curve_events *= covered * entry.events / (curve_events.sum() or 1)
    return Curve(
        edges_s=(times_us[edges] - entry.first_us) / 1e6,
        events=curve_events,
        frames=np.diff(edges),
        labelled=np.add.reduceat(columns.labelled.astype(np.int64), edges[:-1]),
    )
