"""A stream of frames -> a stream of detections: state carried, a few frames in memory."""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from evspan.pipeline.inference.streaming import raw_boxes
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.postprocess import detections
from numpy.typing import NDArray

T = TypeVar("T")
Frame = tuple[int, NDArray[np.uint8]]  # end of its window in us, (2 * bins, H, W)


class Detected(NamedTuple):
    """A frame (2 * bins, H, W) whose window ends at `end_us`, and its detections in RAW_BOX, the surest first.

    latency_ms: from when the frame was there to its detections, other frames of its call included.
    """

    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray
    latency_ms: float


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


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
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
        while (
            not waiting.empty()
        ):  # a `put` that waits for room goes through, and the thread sees `stop`
            waiting.get_nowait()
        thread.join()


def detect(
    detector: Detector,
    frames: Iterable[Frame],
    *,
    confidence: float,
    nms: float,
    frames_per_call: int,
    downsample: int,
    sensor: tuple[int, int],
    clock: Clock,
) -> Iterator[Detected]:
    """The detections of every frame of one recording, in order. Reads `frames_per_call` frames at a time.

    Args:
        frames: the recording's, from where the state begins at zero. sensor: its (height, width) in pixels, which boxes are
            scaled to (times `downsample`) and cut at. confidence: the smallest objectness * class score.
    """
    device, source = next(detector.parameters()).device, iter(frames)
    state, starts = None, torch.zeros(1, dtype=torch.bool, device=device)
    while batch := [(*frame, time.perf_counter()) for frame in islice(source, frames_per_call)]:
        height, width = batch[0][1].shape[1:]
        with clock("network"), torch.inference_mode():
            if state is None:
                state = detector.initial_state(1, height, width, device=device)
            stacked = torch.from_numpy(np.stack([frame for _, frame, _ in batch]))[:, None].to(
                device
            )
            all_ = torch.ones(len(batch), 1, dtype=torch.bool, device=device)
            raw, state = detector(stacked, state, starts=starts, labelled=all_)
            found = detections(
                detector.decode(raw, height, width),
                confidence_threshold=confidence,
                nms_threshold=nms,
            )
            rows = [r.cpu().numpy() for r in found]
        done = time.perf_counter()
        for (end, frame, came), k in zip(batch, rows, strict=True):
            yield Detected(
                end, frame, cut(raw_boxes([end], [k], downsample), sensor), 1000 * (done - came)
            )


def cut(boxes: NDArray, sensor: tuple[int, int]) -> NDArray:
    """RAW_BOX cut at the border of the sensor (height, width); those wholly outside, on the frames' padding, are left out."""
    right, bottom = (
        np.minimum(boxes["x"] + boxes["w"], sensor[1]),
        np.minimum(boxes["y"] + boxes["h"], sensor[0]),
    )
    out = boxes.copy()
    out["x"], out["y"] = np.maximum(boxes["x"], 0), np.maximum(boxes["y"], 0)
    out["w"], out["h"] = right - out["x"], bottom - out["y"]
    return out[(out["w"] > 0) & (out["h"] > 0)]


def class_name(classes: list[str], index: int) -> str:
    return classes[index] if index < len(classes) else f"class {index}"
