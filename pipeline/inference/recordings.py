"""Runs a detector over recordings: decodes, detects, draws and writes, in bounded memory."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from evspan.conf.errors import NO_SPACE_ERRNOS, UserError, one_line
from evspan.conf.progress import progress
from evspan.conf.schema.training import DeviceKind
from evspan.conf.text import plural
from evspan.data_prep.draw import AnimationWriter
from evspan.data_prep.shards.atomic import NoSpaceError, atomic_write
from evspan.pipeline.inference.cuda_graph import require_cuda_graphs
from evspan.pipeline.inference.detect import (
    Detected,
    WorkTimer,
    class_name,
    detect,
    prefetch,
)
from evspan.pipeline.inference.options import InferOptions, RecordingFiles, RecordingSummary
from evspan.pipeline.inference.overlay import Overlay
from evspan.pipeline.inference.precision import parse_precision
from evspan.pipeline.inference.sources import FrameSource, num_windows, open_source
from evspan.pipeline.inference.tracks import DetectionTracker
from evspan.pipeline.inference.trained_detector import TrainedDetector, detector_from
from evspan.pipeline.inference.writers import STANDARD_OUTPUT, CsvFile, DetectionsFile, JsonLines
from evspan.pipeline.parallel import devices
from evspan.pipeline.rvt_checkpoint import open_weights
from evspan.pipeline.weights import Weights

logger = logging.getLogger(__name__)


def infer_recordings(options: InferOptions) -> Iterator[RecordingSummary]:
    """Writes the detections of each recording, and yields its summary when its files are complete.

    A recording that cannot be read does not stop the others. An error leaves no new file of the
    recording that it concerns, except the lines of JSON of a file that still grows.

    Raises:
        UserError: the checkpoint cannot be read, or this machine lacks the device; or, when all
            others are done, recordings that could not be read.
    """
    weights = open_weights(options.checkpoint, raw=options.weights == "raw")
    if options.seconds is not None and not num_windows(options.seconds, weights.frames):
        raise UserError(
            f"{options.seconds:g} seconds are less than a window of {weights.frames.window_ms} ms; "
            "read a longer part"
        )
    # One core is left to decoding and drawing: otherwise the network's threads wait for it.
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    device = choose_device(options.device)
    if options.cuda_graphs:
        require_cuda_graphs(device)
    detector = detector_from(weights, device=device, precision=parse_precision(options.precision))
    if len(options.recordings) == 1:
        yield _infer(options.recordings[0], weights, detector, options)
        return
    failed: list[str] = []
    for files in options.recordings:
        try:
            summary = _infer(files, weights, detector, options)
        except NoSpaceError:
            raise
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
                raise
            message = one_line(error)
            logger.error("%s", message)
            failed.append(message)
            continue
        yield summary
    if failed:
        raise UserError(
            f"{len(failed)} of {plural(len(options.recordings), 'recording')} could not be read; "
            f"the others are done. The first: {failed[0]}"
        )


def choose_device(name: str | None) -> torch.device:
    """The device of this name; without one, this machine's GPU, or its CPU if it has none.

    Raises:
        UserError: this machine lacks it, or torch cannot use its GPUs.
    """
    if name is None:
        return devices.choose_device(DeviceKind.auto, 0, os.environ)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # unknown; not compiled in; no such card
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"the device {name} cannot be used here; there is {', '.join(available)}"
        ) from error


def _infer(
    files: RecordingFiles,
    weights: Weights,
    detector: TrainedDetector,
    options: InferOptions,
) -> RecordingSummary:
    """Decodes, detects and draws in a thread each; the files appear when all is done."""
    config = weights.frames
    source = open_source(files, config, options)
    limits = weights.model.postprocess
    confidence = limits.confidence_threshold if options.confidence is None else options.confidence
    clock = WorkTimer()
    per_class = np.zeros(weights.model.head.num_classes, np.int64)
    latencies_ms: list[float] = []
    began = time.perf_counter()
    with ExitStack() as stack:
        writers = _Writers(files, source, weights, options, clock, stack)
        frames = source.frames(options.start_s, options.seconds)
        decoded = prefetch(clock.each("decoding", frames), options.frames_per_call)
        detected = detect(
            detector,
            stack.enter_context(closing(decoded)),
            confidence=confidence,
            nms=limits.nms_threshold if options.nms is None else options.nms,
            frames_per_call=options.frames_per_call,
            downsample=config.downsample,
            sensor=(source.height, source.width),
            clock=clock,
            cuda_graphs=options.cuda_graphs,
        )
        # The thread of `results` waits for the one that decodes, and that one for more data.
        results = prefetch(detected, options.frames_per_call, on_close=source.stop)
        stack.enter_context(closing(results))
        tracker = DetectionTracker(clock, options.track_confidence) if options.track else None
        for item in progress(results, files.key or files.recording.name, unit="frame"):
            if tracker is not None:
                item = tracker.numbered(item)
            per_class += np.bincount(item.boxes["class_id"], minlength=per_class.size)
            latencies_ms.append(item.latency_ms)
            writers.add(item)
    return RecordingSummary(
        files=files,
        labels=source.labels,
        frames=len(latencies_ms),
        config=config,
        width=source.width,
        height=source.height,
        events=source.events,
        dropped=source.dropped,
        step=weights.step,
        confidence=confidence,
        detections_per_class=[
            (class_name(weights.classes, i), int(number)) for i, number in enumerate(per_class)
        ],
        work_seconds=dict(clock.seconds),
        wall_seconds=time.perf_counter() - began,
        latencies_ms=latencies_ms,
        tracks=tracker.tracks if tracker is not None else None,
    )


def _has_live_lines(path: Path, options: InferOptions) -> bool:
    """Whether others read the lines of JSON while they are written."""
    if str(path) == STANDARD_OUTPUT or options.follow_s is not None:
        return True
    return path.exists() and not path.is_file()  # a pipe or a device


class _Writers:
    """The files of one recording. They appear when `stack` closes without an error.

    Lines of JSON that others read meanwhile are written in place: see `_has_live_lines`.
    """

    def __init__(
        self,
        files: RecordingFiles,
        source: FrameSource,
        weights: Weights,
        options: InferOptions,
        clock: WorkTimer,
        stack: ExitStack,
    ) -> None:
        self.source = source
        self.clock = clock
        enter = stack.enter_context
        self.detections = enter(closing(DetectionsFile(enter(atomic_write(files.detections)))))
        self.tables: list[CsvFile | JsonLines] = []
        if files.csv:
            self.tables.append(
                enter(
                    closing(
                        CsvFile(
                            enter(atomic_write(files.csv)), weights.classes, tracks=options.track
                        )
                    )
                )
            )
        if files.json:
            path = files.json
            if not _has_live_lines(path, options):
                path = enter(atomic_write(path))
            self.tables.append(
                enter(closing(JsonLines(path, weights.classes, tracks=options.track)))
            )
        self.animation: AnimationWriter | None = None
        if files.video:
            labels = source.boxes()
            frames_per_second = 1000 / weights.frames.window_ms
            self.overlay = Overlay(
                weights.frames,
                weights.classes,
                labels,
                side_by_side=options.side_by_side,
                lowest_confidence=options.video_confidence,
            )
            self.animation = enter(
                AnimationWriter(enter(atomic_write(files.video)), frames_per_second)
            )

    def add(self, item: Detected) -> None:
        """Writes a frame's detections to every file."""
        self.detections.add(item.boxes)
        for table in self.tables:
            table.add(item)
        if self.animation:
            with self.clock("drawing"):
                self.animation.add(self.overlay.draw(item, self.source.first_us))
