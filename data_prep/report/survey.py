"""What a prepared dataset holds, in numbers: all of its small columns are read, and a few frames of each recording."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from evspan.conf.errors import ShardError
from evspan.data_prep.report.pictures import Picture, draw_picture
from evspan.data_prep.shards.format import (
    SPLITS,
    Manifest,
    RecordingEntry,
    load_manifest,
    open_group,
    read_frames,
)
from evspan.data_prep.shards.select import select_recordings
from numpy.typing import NDArray
from tqdm import tqdm

FRAMES_PER_RECORDING = 8
PICTURES, PICTURES_PER_RECORDING = 24, 6
CURVE_BINS = 120
SIDE_EDGES = 2.0 ** (np.arange(0, 45) / 4)  # 1 to 2048 pixels, four to an octave
SMALL, MEDIUM = 32.0**2, 96.0**2  # COCO's areas
BLOCK = 1 << 18  # boxes that are read at once


class Curve(NamedTuple):
    """A recording over time. edges_s: (n + 1,) seconds since its first event; events, frames, labelled: (n,) between them."""

    edges_s: NDArray[np.float64]
    events: NDArray[np.float64]
    frames: NDArray[np.int64]
    labelled: NDArray[np.int64]

    @property
    def rate(self) -> NDArray[np.float64]:
        return self.events / np.maximum(np.diff(self.edges_s), 1e-6)


@dataclass(kw_only=True)
class RecordingStats:
    """What the page tells of one recording."""

    entry: RecordingEntry
    code_bytes: int  # of its stored frames
    empty_frames: int  # without a single count
    negatives: int  # labelled frames without boxes
    per_class: NDArray[np.int64]  # (classes,) boxes
    per_size: NDArray[np.int64]  # (classes, 3) boxes: small, medium, large
    per_side: NDArray[np.int64]  # (sides,) boxes by the root of their area, between SIDE_EDGES
    curve: Curve
    sampled_frames: int
    counts: NDArray[np.int64]  # (256,) cells of the sampled frames by their count
    pictures: list[Picture] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.entry.split}/{self.entry.name}"

    @property
    def seconds(self) -> float:
        return (self.entry.last_us - self.entry.first_us) / 1e6


@dataclass(frozen=True)
class Summary:
    """Some recordings taken together. Shares and rates are None where there is nothing that they could be of."""

    of: list[RecordingStats]
    cutoff: int

    def total(self, name: str) -> int:
        """The sum of a count of `RecordingEntry`."""
        return sum(getattr(r.entry, name) for r in self.of)

    def dropped(self, kind: str) -> dict[str, int]:
        """kind: `dropped_events` or `dropped_boxes`."""
        out: dict[str, int] = {}
        for r in self.of:
            for reason, count in getattr(r.entry, kind).items():
                out[reason] = out.get(reason, 0) + count
        return out

    @cached_property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.of)

    @cached_property
    def per_class(self) -> NDArray[np.int64]:
        return np.sum([r.per_class for r in self.of], axis=0)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        return np.sum([r.counts for r in self.of], axis=0)

    @property
    def labelled_fraction(self) -> float | None:
        return ratio(self.total("labelled_frames"), self.total("frames"))

    @property
    def label_rate(self) -> float | None:
        return ratio(self.total("labelled_frames"), self.seconds)

    @property
    def event_rate(self) -> float | None:
        return ratio(self.total("events"), self.seconds)

    @property
    def empty_fraction(self) -> float | None:
        return ratio(sum(r.empty_frames for r in self.of), self.total("frames"))

    @property
    def frame_bytes(self) -> float | None:
        return ratio(sum(r.code_bytes for r in self.of), self.total("frames"))

    @property
    def saturated_fraction(self) -> float | None:
        """Of the cells that counted anything, in the sampled frames."""
        return ratio(int(self.counts[self.cutoff :].sum()), int(self.counts[1:].sum()))


@dataclass(frozen=True)
class Survey:
    root: Path
    manifest: Manifest
    recordings: list[RecordingStats]
    chosen: str = ""  # what of the dataset this is, in words; empty: all

    @property
    def cutoff(self) -> int:
        return int(self.manifest.config["frames"]["cutoff"])

    def summary(self, split: str | None = None) -> Summary:
        return Summary([r for r in self.recordings if split in (None, r.entry.split)], self.cutoff)

    @property
    def splits(self) -> list[str]:
        return [s for s in SPLITS if any(r.entry.split == s for r in self.recordings)]


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def survey(
    root: Path,
    *,
    split: str | None = None,
    name: str | None = None,
    frames_per_recording: int = FRAMES_PER_RECORDING,
) -> Survey:
    """Read the dataset: all of the small columns, `frames_per_recording` frames of each recording, and those of the pictures.

    Raises:
        ShardError: it is no prepared dataset, has none of the recordings wanted, or a shard is damaged.
    """
    manifest = load_manifest(root)
    entries = manifest.recordings
    if split or name:
        entries = select_recordings(manifest, root, split=split, name=name)
    pictured = set(evenly(np.arange(len(entries)), PICTURES).tolist())
    each = min(PICTURES_PER_RECORDING, PICTURES // max(1, len(pictured)))
    recordings = [
        _recording(root, manifest, entry, frames_per_recording, each if i in pictured else 0)
        for i, entry in enumerate(tqdm(entries, desc="reading", unit="recording", disable=None))
    ]
    chosen = f"split {split}" if split else ""
    return Survey(
        root,
        manifest,
        recordings,
        f"recording {name}{f' of {chosen}' if chosen else ''}" if name else chosen,
    )


@contextmanager
def _damage_told(root: Path, entry: RecordingEntry) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
    ) as error:  # all that h5py says of damage
        raise ShardError(
            f"{root / entry.shard}: recording {entry.group!r} is damaged ({error}). Run "
            "evspan prep verify, then the same evspan prep again"
        ) from error


def _recording(
    root: Path, manifest: Manifest, entry: RecordingEntry, sample: int, pictures: int
) -> RecordingStats:
    group, classes = open_group(root, entry), len(manifest.classes)
    try:
        with _damage_told(root, entry):
            end_us, labelled = group["end_us"][:], group["labelled"][:]
            code_bytes, boxes_in = np.diff(group["frame_start"][:]), np.diff(group["box_start"][:])
            _require_whole(entry, group, end_us, labelled, code_bytes, boxes_in)
            per_size, per_side = _box_sizes(group["boxes"], classes)
            chosen = evenly(np.arange(entry.frames), sample)
            counts, kept = np.zeros(256, np.int64), np.zeros(chosen.size, np.int64)
            for i, frame in enumerate(chosen.tolist()):
                cells = np.bincount(read_frames(group, frame, frame + 1).reshape(-1), minlength=256)
                counts += cells
                kept[i] = cells @ np.arange(256)
            shown = np.flatnonzero(boxes_in)
            if not shown.size:
                shown = np.flatnonzero(labelled) if labelled.any() else np.arange(entry.frames)
            drawn = [
                draw_picture(group, entry, manifest.classes, i)
                for i in evenly(shown, pictures).tolist()
            ]
    finally:
        group.file.close()
    events = _events_per_frame(code_bytes, code_bytes[chosen], kept)
    return RecordingStats(
        entry=entry,
        code_bytes=int(code_bytes.sum()),
        empty_frames=int(np.count_nonzero(code_bytes == 0)),
        negatives=int(np.count_nonzero(labelled & (boxes_in == 0))),
        per_class=per_size.sum(1),
        per_size=per_size,
        per_side=per_side,
        curve=_curve(
            entry, end_us, labelled, events, 1000 * int(manifest.config["frames"]["window_ms"])
        ),
        sampled_frames=chosen.size,
        counts=counts,
        pictures=drawn,
    )


def _require_whole(
    entry: RecordingEntry,
    group: h5py.Group,
    end_us: NDArray,
    labelled: NDArray,
    code_bytes: NDArray,
    boxes_in: NDArray,
) -> None:
    told = {
        "end_us": end_us.size,
        "labelled": labelled.size,
        "frame_start": code_bytes.size,
        "box_start": boxes_in.size,
    }
    for name, size in told.items():
        if size != entry.frames:
            raise ValueError(f"{name} is of {size} frames, the manifest tells {entry.frames}")
    if not int(boxes_in.sum()) == len(group["boxes"]) == entry.boxes or (boxes_in < 0).any():
        raise ValueError(
            f"it holds {len(group['boxes'])} boxes, its frames {boxes_in.sum()}, the manifest tells {entry.boxes}"
        )
    if int(code_bytes.sum()) != len(group["frames"]) or (code_bytes < 0).any():
        raise ValueError(
            f"its frames are {len(group['frames'])} bytes, their starts tell {code_bytes.sum()}"
        )


def _box_sizes(stored: h5py.Dataset, classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Boxes by (class, COCO size) and by side."""
    per_size, per_side = np.zeros((classes, 3), np.int64), np.zeros(SIDE_EDGES.size - 1, np.int64)
    for first in range(0, len(stored), BLOCK):
        boxes = stored[first : first + BLOCK]
        if ((boxes["class_id"] < 0) | (boxes["class_id"] >= classes)).any():
            raise ValueError(
                f"its boxes are of class {boxes['class_id'].min()} to {boxes['class_id'].max()}, "
                f"the manifest names {classes} classes"
            )
        area = boxes["w"].astype(np.float64) * boxes["h"]
        np.add.at(per_size, (boxes["class_id"], np.digitize(area, (SMALL, MEDIUM))), 1)
        side = np.clip(np.sqrt(np.maximum(area, 0)), SIDE_EDGES[0], SIDE_EDGES[-1] * 0.999)
        per_side += np.histogram(side, SIDE_EDGES)[0]
    return per_size, per_side


def evenly(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of them, in the middle of equal parts."""
    count = min(count, values.size)
    return values[((np.arange(count) + 0.5) * values.size / max(1, count)).astype(np.int64)]


def _events_per_frame(
    code_bytes: NDArray[np.int64],
    sampled_bytes: NDArray[np.int64],
    sampled_counts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """(N,) about how many events the frames count: a frame's code has a byte for each and some to skip what is empty; what
    that comes to is read off frames that were decoded."""
    size, first = np.unique(np.append(0, sampled_bytes), return_index=True)
    counted = np.maximum.accumulate(np.append(0, sampled_counts)[first])
    return np.interp(code_bytes, size, counted) + np.maximum(code_bytes - size[-1], 0)


def _curve(
    entry: RecordingEntry,
    end_us: NDArray[np.int64],
    labelled: NDArray[np.bool_],
    counted: NDArray[np.float64],
    window_us: int,
) -> Curve:
    """Neighbouring frames together; the manifest's exact number of events is spread as they counted."""
    none = np.zeros(0, np.int64)
    if not end_us.size:
        return Curve(np.zeros(1), np.zeros(0), none, none)
    at = np.linspace(0, end_us.size, min(CURVE_BINS, end_us.size) + 1).round().astype(np.int64)
    times = np.append(end_us[0] - window_us, end_us)
    # Frames of mode rvt end with the last label: only what they cover of the recording is theirs.
    covered = min(1.0, float(times[-1] - times[0]) / max(1, entry.last_us - entry.first_us))
    events = np.add.reduceat(counted, at[:-1])
    events *= covered * entry.events / (events.sum() or 1)
    return Curve(
        (times[at] - entry.first_us) / 1e6,
        events,
        np.diff(at),
        np.add.reduceat(labelled.astype(np.int64), at[:-1]),
    )
