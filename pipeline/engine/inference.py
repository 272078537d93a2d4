"""A stream of frames -> a stream of detections: one recording, state carried, a few frames in memory."""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.boxes import RAW_BOX
from data_prep.config import FrameConfig
from data_prep.errors import RecordingError
from data_prep.formats.recording import Recording
from data_prep.histogram import frames_of
from pipeline.model.detector import Detector
from pipeline.model.postprocess import detections

T = TypeVar("T")
Frame = tuple[int, NDArray[np.uint8]]  # end of its window in us, (2 * bins, H, W)


class Detected(NamedTuple):
    """A frame (2 * bins, H, W) whose window ends at `end_us`, and its detections in RAW_BOX, the surest first."""

    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray


class Clock:
    """Seconds by part, waiting for other parts left out. A part belongs to one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def each(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; making each counts as `part`."""
        source = iter(items)
        while True:
            with self(part):
                item = next(source, self)
            if item is self:
                return
            yield item  # type: ignore[misc]  # the clock stands for the end and never comes out


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread of their own while the caller works; at most `depth` of them wait.

    An error there is raised here, after the items before it. Closing the generator ends the thread.
    """
    waiting: queue.Queue[Any] = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def work() -> None:
        last: tuple[object, BaseException | None] = (end, None)
        try:
            for item in items:
                waiting.put((item, None))
                if stop.is_set():
                    return
        except BaseException as error:  # handed over, whatever it is: nobody else would see it
            last = (end, error)
        if not stop.is_set():
            waiting.put(last)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        while not waiting.empty():  # a `put` that waits for room goes through, and the thread sees `stop`
            waiting.get_nowait()
        thread.join()


def windows(recording: Recording, config: FrameConfig, *, skip: int = 0, limit: int | None = None) -> Iterator[Frame]:
    """The frames of the windows that follow each other from the recording's first event on, without the first `skip`.

    Raises:
        RecordingError: the recording has no events, or ends before the windows asked for.
    """
    def ends(first_us: int) -> Iterator[int]:
        return count(first_us + (skip + 1) * config.window_us, config.window_us)

    end = None
    for end, frame in islice(frames_of(recording, ends, config), limit):
        if recording.last_us < end - config.window_us:  # it has been read to its end
            raise RecordingError(f"{recording.path} ends {(recording.last_us - recording.first_us) / 1e6:.2f} s after its first "
                                 f"event, before {skip * config.window_us / 1e6:.2f} s; begin earlier")
        yield end, frame
    if end is None:
        raise RecordingError(f"{recording.path} holds no events. Give another recording, or record it again")


def detect(detector: Detector, frames: Iterable[Frame], *, confidence: float, nms: float,
           frames_per_call: int, downsample: int, sensor: tuple[int, int], clock: Clock) -> Iterator[Detected]:
    """The detections of every frame of one recording, in order. Reads `frames_per_call` frames at a time.

    Args:
        frames: the recording's, from where the state begins at zero. sensor: its (height, width) in pixels, which boxes are
            scaled to (times `downsample`) and cut at. confidence: the smallest objectness * class score.
    """
    device, source = next(detector.parameters()).device, iter(frames)
    state, starts = None, torch.zeros(1, dtype=torch.bool, device=device)
    while batch := list(islice(source, frames_per_call)):
        height, width = batch[0][1].shape[1:]
        with clock("network"), torch.inference_mode():
            if state is None:
                state = detector.initial_state(1, height, width, device=device)
            stacked = torch.from_numpy(np.stack([frame for _, frame in batch]))[:, None].to(device)
            all_ = torch.ones(len(batch), 1, dtype=torch.bool, device=device)
            raw, state = detector(stacked, state, starts=starts, labelled=all_)
            found = detections(detector.decode(raw, height, width), confidence_threshold=confidence, nms_threshold=nms)
            boxes = [raw_boxes(rows.cpu().numpy(), end, downsample, sensor) for (end, _), rows in zip(batch, found, strict=True)]
        for (end, frame), rows in zip(batch, boxes, strict=True):
            yield Detected(end, frame, rows)


def raw_boxes(found: NDArray[np.float32], end_us: int, downsample: int, sensor: tuple[int, int]) -> NDArray:
    """Rows of `detections` (k, 7) in pixels of the frame -> RAW_BOX in pixels of the sensor (height, width), cut at its border;
    those wholly outside, on the frame's padding, are left out."""
    corners = np.clip(found[:, :4] * downsample, 0, (sensor[1], sensor[0]) * 2)
    sides = corners[:, 2:] - corners[:, :2]
    inside = (sides > 0).all(1)
    boxes = np.zeros(int(inside.sum()), RAW_BOX)
    boxes["t"] = end_us
    boxes["x"], boxes["y"] = corners[inside, :2].T
    boxes["w"], boxes["h"] = sides[inside].T
    boxes["class_id"], boxes["class_confidence"] = found[inside, 6], found[inside, 4] * found[inside, 5]
    return boxes
