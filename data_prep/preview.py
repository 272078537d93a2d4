"""Draws frames with their boxes, of a recording or of shards, as one sheet or as an animation."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import (
    ANIMATION_SUFFIXES,
    RGB,
    AnimationWriter,
    box_corners,
    draw_boxes,
    draw_label,
    frame_to_rgb,
    write_strip,
)
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import window_ends
from evspan.data_prep.labels.box_files import RAW_BOX, find_boxes, read_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import (
    MANIFEST,
    RecordingEntry,
    load_manifest,
)
from evspan.data_prep.shards.reading import open_group, read_frames, read_stored_boxes
from evspan.data_prep.shards.select import select_recordings
from numpy.typing import NDArray

SHEET_SUFFIX = ".png"
SHEET_FRAMES = 12
ANIMATION_FRAMES = 200
WINDOW_MS = 50
DOWNSAMPLE = 2
NARROW_PIXELS = 400  # frames that are narrower are drawn at twice their size

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """What to draw, and where to. None stands for the default."""

    source: Path  # a recording, a prepared dataset, or one of its shards
    out: Path  # .png: a sheet of frames over the time span; .gif, .mp4: all frames
    frames: int | None = None  # at most
    from_s: float = 0.0  # seconds since the recording's first event; earlier frames are left out
    # Of a prepared dataset:
    recording: str | None = None
    split: str | None = None
    # Of a recording:
    downsample: int | None = None  # 1, 2 or 4
    window_ms: int | None = None
    classes: list[str] = field(default_factory=list)  # names of class 0, 1, ...

    @property
    def is_sheet(self) -> bool:
        """Whether the output is one image instead of an animation."""
        return self.out.suffix.lower() == SHEET_SUFFIX

    @property
    def max_frames(self) -> int:
        """`frames`, or the default of the output's kind."""
        if self.frames is not None:
            return self.frames
        return SHEET_FRAMES if self.is_sheet else ANIMATION_FRAMES


class PreviewSummary(NamedTuple):
    """What was drawn. name: of the file, or split/name of a prepared recording."""

    name: str
    frames: int
    boxes: int


class PreviewFrame(NamedTuple):
    """A frame ready to be drawn.

    end_us: end of its window since the recording's first event. frame: (2 * bins, H, W) counts.
    boxes: (N, 4) left, top, right, bottom in pixels of the frame. labels: N class names.
    """

    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    labels: list[str]

    def draw(self) -> RGB:
        """The frame with its boxes and, in the lower left corner, its time."""
        upscale = 2 if self.frame.shape[2] < NARROW_PIXELS else 1
        rgb = draw_boxes(frame_to_rgb(self.frame), self.boxes, self.labels, upscale=upscale)
        return draw_label(rgb, f"{self.end_us / 1e6:.2f} s")


class PreviewSource(NamedTuple):
    """An opened source. fps: frames per second of its own time."""

    name: str
    fps: float
    frames: Iterator[PreviewFrame]


def write_preview(options: PreviewOptions) -> PreviewSummary:
    """Writes the sheet or the animation.

    Raises:
        UserError: options that do not fit the source or the output, a source without frames in the
            time span, or one that cannot be read.
    """
    _check(options)
    source = _open_source(options)
    first = next(source.frames, None)
    if first is None:
        raise UserError(
            f"{source.name} has no frames from {options.from_s:g} s on; give an earlier --from"
        )
    frames = chain([first], source.frames)
    if options.is_sheet:
        return _write_sheet(options.out, source.name, frames)
    return _write_animation(options.out, source, frames)


def _check(options: PreviewOptions) -> None:
    suffixes = (SHEET_SUFFIX, *ANIMATION_SUFFIXES)
    if options.out.suffix.lower() not in suffixes:
        raise UserError(
            f"{options.out} ends in none of {', '.join(suffixes)}; give the output one of them"
        )
    is_time = math.isfinite(options.from_s) and options.from_s >= 0
    if options.max_frames < 1 or not is_time:
        raise UserError(
            f"--frames {options.max_frames} --from {options.from_s:g}: "
            "give 1 frame or more, and a time of 0 s or later"
        )


def _write_sheet(out: Path, name: str, frames: Iterable[PreviewFrame]) -> PreviewSummary:
    images = []
    num_boxes = 0
    for frame in frames:
        images.append(frame.draw())
        num_boxes += len(frame.boxes)
    write_strip(out, images)
    return PreviewSummary(name, len(images), num_boxes)


def _write_animation(
    out: Path, source: PreviewSource, frames: Iterable[PreviewFrame]
) -> PreviewSummary:
    num_frames = 0
    num_boxes = 0
    with AnimationWriter(out, source.fps) as animation:
        for frame in frames:
            animation.add(frame.draw())
            num_frames += 1
            num_boxes += len(frame.boxes)
    return PreviewSummary(source.name, num_frames, num_boxes)


def _open_source(options: PreviewOptions) -> PreviewSource:
    prepared = _find_prepared(options.source)
    if prepared is None:
        return _open_recording(options)
    return _open_prepared(options, *prepared)


def _find_prepared(path: Path) -> tuple[Path, str | None] | None:
    """(root of the prepared dataset, shard below it or None); None for a recording."""
    if path.is_dir():
        return path, None
    root = path.parent.parent
    if path.is_file() and path.suffix == ".h5" and (root / MANIFEST).is_file():
        return root, f"{path.parent.name}/{path.name}"
    return None


def _open_recording(options: PreviewOptions) -> PreviewSource:
    if options.recording or options.split:
        raise UserError(
            "--recording and --split choose from a prepared dataset, which "
            f"{options.source} is not; leave them out"
        )
    # One bin and the highest cutoff: the drawing adds all bins up.
    config = FrameConfig(
        window_ms=WINDOW_MS if options.window_ms is None else options.window_ms,
        bins=1,
        cutoff=255,
        downsample=options.downsample or DOWNSAMPLE,
    )
    frames = recording_frames(options.source, config, options.classes, options.from_s)
    if options.is_sheet:
        chosen = iter(sample_evenly(frames, options.max_frames))
    else:
        chosen = islice(frames, options.max_frames)
    return PreviewSource(options.source.name, 1000 / config.window_ms, chosen)


def _open_prepared(options: PreviewOptions, root: Path, shard: str | None) -> PreviewSource:
    if options.downsample or options.window_ms is not None or options.classes:
        raise UserError(
            "--downsample, --window-ms and --classes are for recordings; the frames in "
            f"{options.source} exist already. Leave them out"
        )
    manifest = load_manifest(root)
    entry = select_recordings(
        manifest, root, split=options.split, name=options.recording, shard=shard
    )[0]
    window_ms = int(manifest.config["frames"]["window_ms"])
    first = _first_frame(root, entry, 1000 * window_ms, options.from_s)
    indices = list(range(first, entry.frames))
    if options.is_sheet:
        indices = [indices[i] for i in _even_indices(len(indices), options.max_frames)]
    else:
        indices = indices[: options.max_frames]
    frames = shard_frames(root, entry, manifest.classes, indices)
    return PreviewSource(f"{entry.split}/{entry.name}", 1000 / window_ms, frames)


def recording_frames(
    path: Path, config: FrameConfig, classes: list[str], from_s: float
) -> Iterator[PreviewFrame]:
    """Yields the frames of a recording that begin at `from_s` seconds or later, to half a window.

    Where the recording has boxes, frames end at their times, as `evspan prep` aligns them.
    """
    recording = open_recording(path)
    box_file = find_boxes(path)
    boxes = read_boxes(box_file) if box_file else np.zeros(0, RAW_BOX)

    def ends(first_us: int) -> Iterable[int]:
        return window_ends(
            boxes["t"], first_us, window_us=config.window_us, label_every_us=config.window_us
        )

    lowest_end_us = _lowest_end_us(from_s, config.window_us)
    for end, frame in frames_of(recording, ends, config):
        if end - recording.first_us < lowest_end_us:
            continue
        boxes_at_end = boxes[boxes["t"] == end]
        yield PreviewFrame(
            end - recording.first_us,
            frame,
            box_corners(boxes_at_end) / config.downsample,
            _class_names(boxes_at_end, classes),
        )


def _lowest_end_us(from_s: float, window_us: int) -> float:
    """The lowest end, since the first event, of a window that begins at `from_s` or later.

    The beginning is rounded: up to half a window earlier counts. 0 s is the first window, which
    may begin before the first event.
    """
    if from_s == 0:
        return -math.inf
    return 1e6 * from_s + window_us / 2


def _first_frame(root: Path, entry: RecordingEntry, window_us: int, from_s: float) -> int:
    """Index of the first stored frame that begins at `from_s` seconds or later.

    Stored windows differ from `window_us` where labels end them, so their ends decide.
    """
    group = open_group(root, entry)
    try:
        end_us = group["end_us"][:] - entry.first_us
    finally:
        group.file.close()
    return int(np.searchsorted(end_us, _lowest_end_us(from_s, window_us)))


def shard_frames(
    root: Path, entry: RecordingEntry, classes: list[str], indices: Iterable[int]
) -> Iterator[PreviewFrame]:
    """Yields the stored frames of a recording at `indices`.

    Raises:
        ShardError: the shard is damaged.
        UnavailableFileError: it cannot be read now.
    """
    group = open_group(root, entry)
    try:
        end_us = group["end_us"][:]
        for i in indices:
            boxes = read_stored_boxes(group, i, i + 1)
            yield PreviewFrame(
                int(end_us[i]) - entry.first_us,
                read_frames(group, i, i + 1)[0],
                box_corners(boxes),
                _class_names(boxes, classes),
            )
    finally:
        group.file.close()


def _class_names(boxes: NDArray[np.void], classes: list[str]) -> list[str]:
    class_ids = boxes["class_id"].tolist()
    return [classes[i] if i < len(classes) else f"class {i}" for i in class_ids]


def sample_evenly(items: Iterable[T], count: int) -> list[T]:
    """Returns up to `count` items, evenly spaced, of a stream of unknown length.

    At most 8 * `count` items are in memory: whenever that many are kept, every second one is
    dropped, and from then on half as many are taken.
    """
    kept: list[T] = []
    every = 1
    for i, item in enumerate(items):
        if i % every == 0:
            kept.append(item)
        if len(kept) == 8 * count:
            kept = kept[::2]
            every *= 2
    return [kept[i] for i in _even_indices(len(kept), count)]


def _even_indices(length: int, count: int) -> list[int]:
    """Up to `count` indices below `length`, evenly spaced from the first to the last."""
    if not length:
        return []
    positions = np.linspace(0, length - 1, min(count, length))
    indices: list[int] = np.unique(positions.round().astype(int)).tolist()
    return indices
