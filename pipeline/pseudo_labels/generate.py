"""Runs a detector over recordings in both directions of time, and writes pseudo-labels."""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import BoxesError, UserError
from evspan.conf.progress import progress
from evspan.conf.schema.prep import FrameConfig, FrameMode
from evspan.conf.text import plural, printable
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import tolerance, window_ends
from evspan.data_prep.labels.box_files import (
    BOXES_ENDING,
    NO_TRACK,
    RAW_BOX,
    LabelRows,
    empty_boxes,
    read_labels,
    write_boxes,
)
from evspan.data_prep.labels.classes import CLASSES_FILE, read_classes
from evspan.data_prep.recordings.open import holds_events, open_recording
from evspan.data_prep.recordings.sources import LISTS, Source, find_sources
from evspan.data_prep.shards.atomic import NoSpaceError, atomic_write
from evspan.data_prep.shards.format import MANIFEST, SPLITS
from evspan.pipeline.inference.detect import clip_boxes
from evspan.pipeline.inference.recordings import choose_device
from evspan.pipeline.inference.streaming import of_named_classes, raw_boxes
from evspan.pipeline.inference.streaming_detector import StreamingDetector, StreamingOptions
from evspan.pipeline.inference.trained_detector import TrainedDetector, detector_from
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import check_positive, limits_from
from evspan.pipeline.model.postprocess import DetectionLimits
from evspan.pipeline.pseudo_labels.filters import (
    FrameBoxes,
    Rows,
    gap_boxes,
    has_size,
    in_long_tracks,
    is_certain,
    merge_directions,
    track,
    without_overlap,
)
from evspan.pipeline.pseudo_labels.options import Counts, PseudoOptions, PseudoSummary
from evspan.pipeline.pseudo_labels.reversed_time import FrameSpool
from evspan.pipeline.weights import Weights, load_weights
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

LIST_FILE = "recordings.txt"
SUMMARY_FILE = "summary.json"
INDEX_FILES = (CLASSES_FILE, LIST_FILE, SUMMARY_FILE)  # they describe the box files
NO_ROWS = np.zeros((0, 7), np.float32)


@dataclass(frozen=True)
class BothDirections:
    """Detections of F frames: (k, 7) of each, forward and backward in time.

    end_us: (F,) ends of the windows. sensor: (height, width) in pixels. taken_us: (L,) those of the
    ends that are times of labels which `evspan prep` takes; it skips labels that are too close.
    """

    end_us: NDArray[np.int64]
    forward: list[Rows]
    backward: list[Rows]
    sensor: tuple[int, int]
    taken_us: NDArray[np.int64]


def label_recordings(options: PseudoOptions) -> Iterator[PseudoSummary]:
    """Writes the pseudo-labels of every recording, and yields its summary.

    At the end it writes the list of the recordings, classes.txt and summary.json. Those of an
    earlier run are removed at the start, so that they never name box files of both. A recording
    that cannot be read does not stop the others, and is not in the list.

    Raises:
        UserError: the checkpoint cannot be read, there are no recordings, or their labels do not
            fit the detector; or, when all others are done, recordings that could not be read.
    """
    sources = _sources(options)
    weights = load_weights(options.checkpoint, raw=options.weights == "raw")
    options.filters.objectness.of(weights.classes)
    options.filters.class_score.of(weights.classes)
    if options.keep_labels and any(source.boxes for source in sources):
        _require_same_classes(options, weights.classes)
    labels = [_read_labels(source, options, len(weights.classes)) for source in sources]
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    detector = detector_from(weights, device=choose_device(options.device))
    _warn_of_rvt_frames(weights.frames)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in INDEX_FILES:
        (options.output / name).unlink(missing_ok=True)
    summaries: list[PseudoSummary] = []
    lines: list[str] = []
    failed: list[str] = []
    for source, of_recording in zip(sources, labels, strict=True):
        try:
            summary = _label(source, of_recording, detector, options)
        except NoSpaceError:
            raise
        except UserError as error:
            if len(sources) == 1:
                raise
            logger.error("%s", error)
            failed.append(str(error))
            continue
        summaries.append(summary)
        lines.append(_line(source, options))
        yield summary
    if summaries:
        _write_index(summaries, lines, weights, options)
    if failed:
        raise UserError(
            f"{len(failed)} of {plural(len(sources), 'recording')} could not be labelled; the "
            f"others are done. The first: {failed[0]}"
        )


def _warn_of_rvt_frames(config: FrameConfig) -> None:
    if config.mode is FrameMode.rvt:
        logger.warning(
            "the detector takes RVT's frames (frames.mode=rvt), which evspan prep makes of labels "
            "at 30 or 60 Hz only, and pseudo-labels are further apart. Prepare them with "
            "frames.mode=exact; its counts differ slightly"
        )


def _write_index(
    summaries: Sequence[PseudoSummary],
    lines: Sequence[str],
    weights: Weights,
    options: PseudoOptions,
) -> None:
    """Writes classes.txt, the list and summary.json.

    Args:
        lines: of the list, one for each summary.
    """
    recordings: list[dict[str, object]] = []
    for summary in summaries:
        values = asdict(summary)
        del values["config"]
        values["boxes"] = summary.boxes.name
        recordings.append(values)
    text = json.dumps({"recordings": recordings, "step": weights.step}, indent=1)
    replace_file(options.output / CLASSES_FILE, "\n".join(weights.classes) + "\n")
    replace_file(options.output / SUMMARY_FILE, text + "\n")
    replace_file(options.output / LIST_FILE, "\n".join(lines) + "\n")


def box_file(source: Source, options: PseudoOptions) -> Path:
    """The box file that is written for a recording."""
    return options.output / f"{source.name.replace('/', '_')}{BOXES_ENDING}"


def output_files(options: PseudoOptions) -> list[Path]:
    """All files that are written.

    Raises:
        UserError: the source has no recordings in the split, or two of the same name, or its own
            box files are at these places.
    """
    files = [box_file(source, options) for source in _sources(options)]
    return [*files, *(options.output / name for name in INDEX_FILES)]


def _sources(options: PseudoOptions) -> list[Source]:
    if (options.source / MANIFEST).is_file():
        raise UserError(
            f"{options.source} is a folder of prepared shards, which have no box files to write "
            "beside them. Give the recordings that they were prepared from"
        )
    sources = find_sources(options.source)
    is_list = options.source.is_file() and options.source.suffix.lower() in LISTS
    if is_list and holds_events(options.source):
        is_list = False  # a recording in text
    if is_list or any((options.source / split).is_dir() for split in SPLITS):
        sources = [source for source in sources if source.split == options.split]
    else:
        sources = [replace(source, split=options.split) for source in sources]
    if not sources:
        raise UserError(
            f"{options.source} has no recordings in split {options.split}; choose another --split"
        )
    names = [box_file(source, options).name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{plural(names.count(name), 'recording')} would have the box file {name}; label "
                "them in separate commands"
            )
    for source in sources:
        if source.boxes and source.boxes.resolve() == box_file(source, options).resolve():
            raise UserError(
                f"{source.boxes} has the labels of {source.path.name}, and pseudo-labels would "
                "replace it. Give another folder as OUT"
            )
    return sources


def _line(source: Source, options: PseudoOptions) -> str:
    """The recording's line in the list: paths from the list's folder on."""
    recording = os.path.relpath(source.path.resolve(), options.output.resolve())
    boxes = box_file(source, options).name
    fields = [source.split, recording, boxes]
    return ",".join(f'"{text}"' if set(text) & set(' ,"') else text for text in fields)


def _require_same_classes(options: PseudoOptions, classes: Sequence[str]) -> None:
    """Refuses labels whose class ids have other names than the detector's, without a class map."""
    names = read_classes(options.source)
    if options.class_map is not None or names == list(classes[: len(names)]):
        return
    pairs: list[str] = []
    for i, name in enumerate(names):
        if name in classes:
            pairs.append(f"{i}:{classes.index(name)}")
    remedy = "--no-labels"
    if pairs:
        remedy = f"--class-map {','.join(pairs)} (others are left out), or {remedy}"
    listed = printable(", ".join(names))
    raise BoxesError(
        f"the labels of {options.source} have the classes {listed[:200]}, and the detector has "
        f"{printable(', '.join(classes))[:200]}. Give {remedy}"
    )


def _read_labels(source: Source, options: PseudoOptions, num_classes: int) -> LabelRows:
    """The labels that are kept, with the detector's class ids."""
    if source.boxes is None or not options.keep_labels:
        return LabelRows(empty_boxes(), empty_boxes())
    boxes, regions = read_labels(
        source.boxes, time_unit=options.label_time_unit, offset_us=options.label_offset_us
    )
    class_map = options.class_map
    if class_map is not None:
        known = np.isin(boxes["class_id"], list(class_map))
        regions = _by_time(regions, _empty_frames(boxes[~known]["t"]))
        boxes = boxes[known]
        boxes["class_id"] = [class_map[int(class_id)] for class_id in boxes["class_id"]]
    wrong = boxes["class_id"] >= num_classes
    if wrong.any():
        raise BoxesError(
            f"{source.boxes}: {np.count_nonzero(wrong)} of {boxes.size} boxes have a class id that "
            f"the detector lacks, first {boxes['class_id'][wrong][0]}; it has "
            f"{plural(num_classes, 'class')}. Map the ids with --class-map 0:0,2:1 "
            "(others are left out), or give --no-labels"
        )
    return LabelRows(boxes, regions)


def _empty_frames(times: NDArray[np.int64]) -> NDArray[np.void]:
    """(T,) regions without an area: frames that are labelled, perhaps without boxes."""
    different = np.unique(times)
    regions = np.zeros(different.size, RAW_BOX)
    regions["t"] = different
    regions["class_confidence"] = 1
    return regions


def _label(
    source: Source, labels: LabelRows, detector: TrainedDetector, options: PseudoOptions
) -> PseudoSummary:
    detected = detect_both_ways(source.path, labels, detector, options)
    labelled = np.isin(detected.end_us, labels.times)
    boxes, regions, per_class = choose_labels(detected, labels, detector, options)
    path = box_file(source, options)
    with atomic_write(path) as temporary:
        write_boxes(temporary, boxes, regions)
    times = np.concatenate((boxes["t"], regions["t"], detected.end_us[labelled]))
    return PseudoSummary(
        name=source.name,
        boxes=path,
        frames=len(detected.end_us),
        labelled_frames=int(np.isin(detected.end_us, times).sum()),
        config=detector.frames,
        per_class=per_class,
    )


# -- detection -------------------------------------------------------------------------------------
def detect_both_ways(
    path: Path, labels: LabelRows, detector: TrainedDetector, options: PseudoOptions
) -> BothDirections:
    """Detections of all frames of a recording.

    Windows end at the times of labels, as `evspan prep` puts them, and tile the rest. Frames wait
    for the second direction in a temporary file.
    """
    recording = open_recording(path, unstated_size=options.sensor_size, time_unit=options.time_unit)
    config = detector.frames
    limits = limits_from(options.filters.confidence, options.filters.nms_iou)
    ends: list[int] = []
    taken: list[int] = []

    def window_ends_of(first_us: int) -> Iterator[int]:
        every_us = 1000 * options.label_every_ms
        all_ends = window_ends(
            labels.times, first_us, window_us=config.window_us, label_every_us=every_us
        )
        taken.extend(all_ends.labelled_us.tolist())
        return iter(all_ends)

    with FrameSpool(options.output) as spool:

        def frames() -> Iterator[NDArray[np.uint8]]:
            for end_us, frame in frames_of(recording, window_ends_of, config):
                ends.append(end_us)
                if options.backward:
                    spool.add(frame)
                yield frame

        bar = progress(frames(), f"{path.name}, forward", unit="frame")
        forward = list(detect_frames(detector, bar, limits, options.frames_per_call))
        backward = [NO_ROWS] * len(forward)
        if options.backward:
            bar = progress(spool.backward(), f"{path.name}, backward", unit="frame")
            reverse = list(detect_frames(detector, bar, limits, options.frames_per_call))
            # The reversed frame i ends where frame i begins: at the end of frame i - 1.
            backward = [*reverse[:-1][::-1], NO_ROWS]
    for text in recording.warnings().values():
        logger.warning("%s: %s", path, text)
    if not ends:
        raise UserError(f"{path} holds no events. Give another recording, or record it again")
    return BothDirections(
        end_us=np.array(ends, np.int64),
        forward=forward,
        backward=backward,
        sensor=(recording.height, recording.width),
        taken_us=np.array(taken, np.int64),
    )


def detect_frames(
    detector: Detector,
    frames: Iterable[NDArray[np.uint8]],
    limits: DetectionLimits,
    frames_per_call: int,
) -> Iterator[Rows]:
    """(k, 7) detections of each frame of one recording, from zero state on.

    Args:
        frames: (2 * bins, H, W) each, all of the same size.

    Raises:
        InputError: frames_per_call is less than 1.
    """
    check_positive(frames_per_call=frames_per_call)
    source = iter(frames)
    stream: StreamingDetector | None = None
    while batch := list(islice(source, frames_per_call)):
        stacked = np.stack(batch)
        if stream is None:
            height, width = stacked.shape[2:]
            settings = StreamingOptions(1, height, width, limits, frames_per_call)
            stream = StreamingDetector(detector, settings)
        for rows in stream.start(torch.from_numpy(stacked)[:, None]).read():
            yield rows.numpy()


# -- choice ----------------------------------------------------------------------------------------
def choose_labels(
    detected: BothDirections, labels: LabelRows, detector: TrainedDetector, options: PseudoOptions
) -> tuple[NDArray[np.void], NDArray[np.void], dict[str, Counts]]:
    """Boxes and ignore regions of a recording, and counts by class.

    Returns:
        (N,) RAW_BOX sorted by time, with the labels; (R,) RAW_BOX; class name -> counts.
    """
    filters = options.filters
    classes = detector.classes
    labelled = np.isin(detected.end_us, labels.times)
    certain, uncertain = _by_certainty(detected, labelled, detector, options)
    tracked = _with_labels(certain, labels.boxes, detected.end_us, labelled)
    numbers = track(tracked, filters)
    window_us = detector.frames.window_us
    long_forward = in_long_tracks(tracked, numbers, filters, window_us)
    reverse_numbers = track(tracked, filters, backward=True)
    long_backward = in_long_tracks(tracked, reverse_numbers, filters, window_us, backward=True)
    kept = long_forward | long_backward
    gaps = empty_boxes()
    if filters.gap_regions:
        gaps = gap_boxes(tracked, numbers, long_forward)
    pseudo = kept & ~tracked.is_label
    boxes = tracked.boxes.copy()
    ids = labels.boxes["track_id"][labels.boxes["track_id"] != NO_TRACK]
    boxes["track_id"][pseudo] = numbers[pseudo] + int(ids.max(initial=0)) + 1
    emitted = _emitted_times(detected, options.label_every_ms, window_us)
    emitted = np.setdiff1d(emitted, labels.times)
    pseudo_boxes = _at(boxes[pseudo], emitted)
    short = _at(boxes[~kept], emitted)
    gaps = _at(gaps, emitted)
    uncertain = without_overlap(_at(uncertain, emitted), pseudo_boxes, filters.nms_iou)
    if not filters.uncertain_regions:
        uncertain = uncertain[:0]
    per_class: dict[str, Counts] = {}
    for class_id, name in enumerate(classes):
        per_class[name] = Counts(
            labels=_number(labels.boxes, class_id),
            pseudo_boxes=_number(pseudo_boxes, class_id),
            short_tracks=_number(short, class_id),
            uncertain=_number(uncertain, class_id),
            gaps=_number(gaps, class_id),
            tracks=len(np.unique(pseudo_boxes["track_id"][pseudo_boxes["class_id"] == class_id])),
        )
    all_boxes = _by_time(labels.boxes, pseudo_boxes)
    return all_boxes, _by_time(labels.regions, short, uncertain, gaps), per_class


def _by_certainty(
    detected: BothDirections,
    labelled: NDArray[np.bool_],
    detector: TrainedDetector,
    options: PseudoOptions,
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Detections above the thresholds, and the others, in frames without labels: RAW_BOX."""
    filters = options.filters
    objectness = filters.objectness.of(detector.classes)
    class_score = filters.class_score.of(detector.classes)
    certain = [empty_boxes()]
    uncertain = [empty_boxes()]
    for i in np.flatnonzero(~labelled).tolist():
        rows = merge_directions(detected.forward[i], detected.backward[i], filters.nms_iou)
        rows = of_named_classes(rows, detector.classes)
        is_sure = is_certain(rows, objectness, class_score)
        for mask, parts in ((is_sure, certain), (~is_sure, uncertain)):
            boxes = raw_boxes([detected.end_us[i]], [rows[mask]], detector.frames.downsample)
            boxes = clip_boxes(boxes, detected.sensor)
            parts.append(boxes[has_size(boxes, detected.sensor[1], filters)])
    return np.concatenate(certain), np.concatenate(uncertain)


def _with_labels(
    certain: NDArray[np.void],
    labels: NDArray[np.void],
    end_us: NDArray[np.int64],
    labelled: NDArray[np.bool_],
) -> FrameBoxes:
    at_frames = labels[np.isin(labels["t"], end_us)]
    boxes = np.concatenate((at_frames, certain))
    is_label = np.arange(len(boxes)) < len(at_frames)
    order = np.argsort(boxes["t"], kind="stable")
    boxes = boxes[order]
    return FrameBoxes(
        end_us=end_us,
        boxes=boxes,
        frame=np.searchsorted(end_us, boxes["t"]),
        is_label=is_label[order],
        labelled=labelled,
    )


def _emitted_times(
    detected: BothDirections, label_every_ms: int, window_us: int
) -> NDArray[np.int64]:
    """Ends of the frames that get pseudo-labels: `label_every_ms` apart, counted from labels on.

    `evspan prep` takes labels at multiples of this step from the label that it took before.
    Between two labels that are no such multiple apart it would take pseudo-labels, and skip the
    second label: there are none.
    """
    end_us = detected.end_us
    step = _step(1000 * label_every_ms, window_us)
    frames = np.arange(len(end_us))
    origins = np.flatnonzero(np.isin(end_us, detected.taken_us))
    if not origins.size:
        origins = np.array([step - 1])
    previous = origins[np.maximum(np.searchsorted(origins, frames, "right") - 1, 0)]
    is_emitted = (frames - previous) % step == 0
    for first, last in pairwise(origins.tolist()):
        duration_us = int(end_us[last] - end_us[first])
        if (last - first) % step or not _keeps_steps(duration_us, last - first, window_us):
            is_emitted[first:last] = False
    emitted: NDArray[np.int64] = end_us[is_emitted]
    return emitted


def _step(label_every_us: int, window_us: int) -> int:
    """Windows from label to label: the least distance at which `evspan prep` takes the next one."""
    step = max(1, round(label_every_us / window_us))
    shortest_us = max(label_every_us, window_us) - tolerance(window_us)
    return step * math.ceil(shortest_us / (step * window_us))


def _keeps_steps(duration_us: int, windows: int, window_us: int) -> bool:
    """Whether `evspan prep` takes any labels at whole steps within these windows.

    It takes a label at most the tolerance off a multiple of the step. From so many windows on
    that they absorb half a window, it takes any label: see `data_prep.frames.windows`.
    """
    slack_us = tolerance(window_us)
    most_windows = min(windows, window_us / (2 * slack_us))
    off_us = abs(duration_us - windows * window_us) / windows
    return off_us * most_windows <= slack_us


def _at(boxes: NDArray[np.void], times: NDArray[np.int64]) -> NDArray[np.void]:
    return boxes[np.isin(boxes["t"], times)]


def _number(boxes: NDArray[np.void], class_id: int) -> int:
    return int(np.count_nonzero(boxes["class_id"] == class_id))


def _by_time(*parts: NDArray[np.void]) -> NDArray[np.void]:
    joined = np.concatenate(parts)
    return joined[np.argsort(joined["t"], kind="stable")]
