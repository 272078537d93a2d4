"""Runs a detector over a stream of frames: carries the state, holds a few frames in memory."""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from evspan.pipeline.inference.streaming import raw_boxes
from evspan.pipeline.inference.streaming_detector import StreamingDetector, StreamingOptions
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import check_positive, limits_from
from numpy.typing import NDArray

T = TypeVar("T")
Frame = tuple[int, NDArray[np.uint8]]  # end of its window in us, (2 * bins, H, W)


class Detected(NamedTuple):
    """A frame with its detections.

    end_us: end of its window, in microseconds. frame: (2 * bins, H, W). boxes: (k,) RAW_BOX, the
    most confident first. latency_ms: from the time at which the frame was ready until its
    detections were, including the other frames of the same call.
    """

    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray[np.void]
    latency_ms: float


class WorkTimer:
    """Seconds of work by part, without the time spent waiting for other parts.

    A part belongs to one thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """While open, time counts as `part`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def each(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time to produce each counts as `part`."""
        source = iter(items)
        while True:
            with self(part):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item


def prefetch(
    items: Iterable[T], depth: int, on_close: Callable[[], None] = lambda: None
) -> Generator[T, None, None]:
    """The same items, produced by a thread while the caller works.

    At most `depth` items wait. An error of the thread is raised here, after the items before it.
    Closing the generator ends the thread.

    Args:
        on_close: called before the thread is joined: ends a wait of `items` for more data.
    """
    waiting: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    end = object()

    def work() -> None:
        last: tuple[object, BaseException | None] = (end, None)
        try:
            for item in items:
                waiting.put((item, None))
                if stop.is_set():
                    return
        except BaseException as error:  # raised by the caller's thread
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
        on_close()
        # If the thread waits in `put`, it continues, and then sees `stop`.
        while not waiting.empty():
            waiting.get_nowait()
        thread.join()


class _TimedFrame(NamedTuple):
    end_us: int
    frame: NDArray[np.uint8]
    ready: float  # time.perf_counter()


def detect(
    detector: Detector,
    frames: Iterable[Frame],
    *,
    confidence: float,
    nms: float,
    frames_per_call: int,
    downsample: int,
    sensor: tuple[int, int],
    clock: WorkTimer,
    cuda_graphs: bool = False,
) -> Iterator[Detected]:
    """Detects on every frame of one recording, in order. Waits once per call for the device.

    Args:
        frames: all of the same size. The state is zero before the first one.
        confidence: lowest objectness * class score.
        nms: IoU threshold of the suppression.
        frames_per_call: how many frames are read, and passed to the network together.
        downsample: pixels of the sensor per pixel of a frame; boxes are scaled by it.
        sensor: (height, width) in pixels; boxes are cut at its border.
        cuda_graphs: repeat the network as one CUDA graph; on a GPU only.

    Raises:
        UserError: CUDA graphs are requested, and the detector is not on a GPU.
        InputError: a threshold is outside 0..1, frames_per_call is less than 1, or frames are not
            of the detector's channels.
    """
    check_positive(frames_per_call=frames_per_call)
    source = iter(frames)
    limits = limits_from(confidence, nms)
    stream: StreamingDetector | None = None
    while True:
        batch = [
            _TimedFrame(end_us, frame, time.perf_counter())
            for end_us, frame in islice(source, frames_per_call)
        ]
        if not batch:
            return
        with clock("network"):
            stacked = np.stack([item.frame for item in batch])
            if stream is None:
                height, width = stacked.shape[2:]
                options = StreamingOptions(1, height, width, limits, frames_per_call, cuda_graphs)
                stream = StreamingDetector(detector, options)
            detections = stream.start(torch.from_numpy(stacked)[:, None]).read()
        finished = time.perf_counter()
        for item, rows in zip(batch, detections, strict=True):
            boxes = clip_boxes(raw_boxes([item.end_us], [rows.numpy()], downsample), sensor)
            yield Detected(item.end_us, item.frame, boxes, 1000 * (finished - item.ready))


def clip_boxes(boxes: NDArray[np.void], sensor: tuple[int, int]) -> NDArray[np.void]:
    """Cuts boxes at the border of the sensor.

    Args:
        boxes: (N,) RAW_BOX, in pixels. sensor: (height, width) in pixels.

    Returns:
        (M,) RAW_BOX, without the boxes outside, which are in the padding of the frames.
    """
    height, width = sensor
    right = np.minimum(boxes["x"] + boxes["w"], width)
    bottom = np.minimum(boxes["y"] + boxes["h"], height)
    inside = boxes.copy()
    inside["x"] = np.maximum(boxes["x"], 0)
    inside["y"] = np.maximum(boxes["y"], 0)
    inside["w"] = right - inside["x"]
    inside["h"] = bottom - inside["y"]
    return inside[(inside["w"] > 0) & (inside["h"] > 0)]


def class_name(classes: list[str], index: int) -> str:
    """The name of a class id; a head may have more classes than there are names."""
    return classes[index] if index < len(classes) else f"class {index}"
