"""Frames of recordings and shards as PNG images for a labelling tool, in pixels of the sensor."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, TimeUnit
from evspan.data_prep.draw import RGB, frame_to_rgb
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import WindowEnds, window_ends
from evspan.data_prep.labels.interchange.names import frame_file
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.reading import open_group, read_frames
from numpy.typing import NDArray
from PIL import Image

logger = logging.getLogger(__name__)
WINDOW_MS = 50
EVERY_MS = 100  # as dataset.labels.label_every_ms: prep takes a label every 100 ms
WHITE = 255
COMPRESSION = 3  # of PNG: a third of the time of the highest one, and a tenth larger


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Which frames are drawn. window_ms: span of a frame. None: the default.

    every_ms: time between frames; without it, where there are labels, one per time of a label.
    sensor_size: (height, width) of recordings that do not state it; time_unit: of text and NumPy
    recordings, None: what is certain.
    """

    window_ms: int = WINDOW_MS
    every_ms: int | None = None
    sensor_size: tuple[int, int] | None = None
    time_unit: TimeUnit | None = None

    def __post_init__(self) -> None:
        if self.window_ms < 1:
            raise UserError(f"--window-ms is {self.window_ms}; give 1 ms or more")
        every_ms = self.every_ms
        if every_ms is not None and (every_ms < 1 or every_ms % self.window_ms):
            raise UserError(
                f"--every-ms is {every_ms}; give a multiple of the window, {self.window_ms} ms, or "
                "another --window-ms"
            )

    @property
    def step_us(self) -> int:
        """Microseconds from one drawn frame to the next, where nothing is labelled."""
        if self.every_ms is not None:
            return 1000 * self.every_ms
        windows = -(-EVERY_MS // self.window_ms)
        return 1000 * windows * self.window_ms


class DrawnFrame(NamedTuple):
    """A frame that was written. time_us: end of its window. size: (width, height)."""

    file: str
    time_us: int
    size: tuple[int, int]


def draw_recording(
    path: Path,
    name: str,
    folder: Path,
    options: PictureOptions,
    label_times_us: NDArray[np.int64],
) -> Iterator[DrawnFrame]:
    """Writes the frames of a recording that `chosen_ends` selects.

    Args:
        name: of the recording, in the names of the images.
        folder: of the images.
        label_times_us: (L,) times of its labels.
    """
    recording = open_recording(path, unstated_size=options.sensor_size, time_unit=options.time_unit)
    # One bin and the highest cutoff: the drawing adds all bins up.
    config = FrameConfig(window_ms=options.window_ms, bins=1, cutoff=255, downsample=1)
    chosen: list[Iterator[int]] = []

    def ends(first_us: int) -> Iterable[int]:
        windows = windows_for(label_times_us, first_us, options)
        chosen.append(chosen_ends(windows, options, has_labels=bool(label_times_us.size)))
        return windows

    next_end = -1
    for end, frame in frames_of(recording, ends, config):
        while next_end < end:
            next_end = next(chosen[0])
        if end != next_end:
            continue
        file = frame_file(name, end)
        save_png(folder / file, frame_to_rgb(frame))
        yield DrawnFrame(file, end, (recording.width, recording.height))
    for text in recording.warnings().values():
        logger.warning("%s: %s", path, text)


def windows_for(
    label_times_us: NDArray[np.int64], first_us: int, options: PictureOptions
) -> WindowEnds:
    """The windows that prep makes for these labels."""
    window_us = 1000 * options.window_ms
    every_us = window_us
    if options.every_ms is not None:
        every_us = 1000 * options.every_ms
    return window_ends(label_times_us, first_us, window_us=window_us, label_every_us=every_us)


def chosen_ends(windows: WindowEnds, options: PictureOptions, *, has_labels: bool) -> Iterator[int]:
    """The ends of the frames to draw, increasing and infinite.

    Without labels: one per step, from the first event on. With labels: the labelled ends, and, if
    `every_ms` is set, also those at least a step away from them and from each other.
    """
    labelled = windows.labelled_us.tolist()
    fills_gaps = options.every_ms is not None or not has_labels
    step_us = options.step_us
    tolerance_us = 1000 * options.window_ms // 2
    last = windows.first_us
    position = 0
    for end in windows:
        while position < len(labelled) and labelled[position] < end:
            position += 1
        next_label = labelled[position] if position < len(labelled) else None
        is_label = end == next_label
        is_free = end - last > step_us - tolerance_us
        if next_label is not None:
            is_free = is_free and next_label - end > step_us - tolerance_us
        if is_label or (fills_gaps and is_free):
            last = end
            yield end
        elif not fills_gaps and next_label is None:
            yield 1 << 62  # nothing follows
            return


def draw_shard(
    root: Path, entry: RecordingEntry, folder: Path, indices: list[int]
) -> Iterator[DrawnFrame]:
    """Writes stored frames of a recording, enlarged to the sensor's pixels.

    Raises:
        ShardError: the shard is damaged.
        UnavailableFileError: it cannot be read now.
    """
    group = open_group(root, entry)
    try:
        end_us = group["end_us"][:]
        for i in indices:
            rgb = frame_to_rgb(read_frames(group, i, i + 1)[0])
            file = frame_file(entry.name, int(end_us[i]))
            height, width = entry.sensor_height, entry.sensor_width
            save_png(folder / file, enlarged(rgb, height, width))
            yield DrawnFrame(file, int(end_us[i]), (width, height))
    finally:
        group.file.close()


def enlarged(rgb: RGB, height: int, width: int) -> RGB:
    """Repeats pixels up to the sensor's size; what no block of pixels covered is white."""
    factor = max(1, height // rgb.shape[0])
    large = rgb.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]
    out = np.full((height, width, 3), WHITE, np.uint8)
    out[: large.shape[0], : large.shape[1]] = large
    return out


def save_png(path: Path, rgb: RGB) -> None:
    """Writes an image (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(rgb)).save(path, compress_level=COMPRESSION)
