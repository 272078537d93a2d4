"""From detections of both directions in time to pseudo-boxes and ignore regions. numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.pipeline.data.boxes import corners_of, pairwise_iou
from evspan.pipeline.pseudo_labels.options import FilterOptions
from evspan.pipeline.tracking import Tracker, TrackerOptions
from numpy.typing import NDArray

Rows = NDArray[np.float32]  # (k, 7) x1, y1, x2, y2, objectness, class score, class id


def merge_directions(forward: Rows, backward: Rows, nms_iou: float) -> Rows:
    """The detections of a frame from both directions, after NMS per class.

    Args:
        nms_iou: of two that overlap more, the one with the higher objectness x class score stays;
            of equal ones the forward one.

    Returns:
        (k, 7) by falling score.
    """
    rows = np.concatenate((forward, backward))
    scores = rows[:, 4].astype(np.float64) * rows[:, 5]
    rows = rows[np.argsort(-scores, kind="stable")]
    corners = rows[:, :4].astype(np.float64)
    overlaps = pairwise_iou(corners, corners) > nms_iou
    overlaps &= rows[:, 6] == rows[:, 6][:, None]
    kept = np.ones(len(rows), bool)
    for i in range(len(rows)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return rows[kept]


def has_size(boxes: NDArray[np.void], width: int, options: FilterOptions) -> NDArray[np.bool_]:
    """(k,) which RAW_BOX rows have a plausible size. width: of the sensor, in pixels."""
    sized: NDArray[np.bool_] = np.minimum(boxes["w"], boxes["h"]) >= options.min_side
    sized &= boxes["w"] <= options.max_width_fraction * width
    return sized


def is_certain(
    rows: Rows, objectness: Sequence[float], class_score: Sequence[float]
) -> NDArray[np.bool_]:
    """(k,) which detections are above both thresholds of their class.

    Args:
        objectness, class_score: thresholds of class 0, 1, ...
    """
    class_id = rows[:, 6].astype(np.int64)
    certain: NDArray[np.bool_] = rows[:, 4] > np.asarray(objectness, np.float32)[class_id]
    certain &= rows[:, 5] > np.asarray(class_score, np.float32)[class_id]
    return certain


@dataclass(frozen=True)
class FrameBoxes:
    """The boxes that are tracked: labels, and certain detections where a frame has no labels.

    Attributes:
        end_us: (F,) end of each frame, increasing.
        boxes: (N,) RAW_BOX in the order of the frames.
        frame: (N,) index of each box's frame.
        is_label: (N,) the box is a label.
        labelled: (F,) the frame has labels, possibly none.
    """

    end_us: NDArray[np.int64]
    boxes: NDArray[np.void]
    frame: NDArray[np.int64]
    is_label: NDArray[np.bool_]
    labelled: NDArray[np.bool_]


def track(
    given: FrameBoxes, options: FilterOptions, *, backward: bool = False
) -> NDArray[np.int64]:
    """The number of each box's track, (N,).

    Args:
        backward: frames are visited from the last one to the first.
    """
    tracker = Tracker(
        TrackerOptions(
            high_confidence=0.0,
            low_confidence=0.0,
            match_iou=options.match_iou,
            buffer_ms=options.gap_ms,
        )
    )
    numbers = np.full(len(given.boxes), -1, np.int64)
    first = np.searchsorted(given.frame, np.arange(len(given.end_us) + 1))
    order = range(len(given.end_us))
    for i in reversed(order) if backward else order:
        rows = slice(first[i], first[i + 1])
        time_us = int(given.end_us[i])
        numbers[rows] = tracker.update(given.boxes[rows], -time_us if backward else time_us)
    return numbers


def in_long_tracks(
    given: FrameBoxes,
    numbers: NDArray[np.int64],
    options: FilterOptions,
    window_us: int,
    *,
    backward: bool = False,
) -> NDArray[np.bool_]:
    """(N,) whether a box's track is long, contains a label, or had not ended.

    A track's length is from its first frame to its last one, both included. One that could have
    gone on after the recording's end (backward: before its beginning) has not ended.

    Args:
        numbers: (N,) of `track` in this direction.
        window_us: length of a frame's window.
    """
    if not len(numbers):
        return np.zeros(0, bool)
    times = given.end_us[given.frame]
    count = int(numbers.max()) + 1
    first = np.full(count, np.iinfo(np.int64).max)
    last = np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(first, numbers, times)
    np.maximum.at(last, numbers, times)
    has_label = np.zeros(count, bool)
    has_label[numbers[given.is_label]] = True
    # Windows are up to 2 ms longer or shorter: half of one is the tolerance.
    is_long = last - first + 1.5 * window_us >= 1000 * options.min_track_ms
    gap_us = 1000 * options.gap_ms
    if backward:
        open_ended = first - given.end_us[0] <= gap_us
    else:
        open_ended = given.end_us[-1] - last <= gap_us
    kept: NDArray[np.bool_] = (is_long | has_label | open_ended)[numbers]
    return kept


def gap_boxes(
    given: FrameBoxes, numbers: NDArray[np.int64], kept: NDArray[np.bool_]
) -> NDArray[np.void]:
    """Interpolated boxes at the frames between two boxes of a track, where it has none.

    Frames with labels are left out: they are complete.

    Args:
        numbers: (N,) track of each box. kept: (N,) boxes of the tracks that stay.

    Returns:
        (G,) RAW_BOX, sorted by time.
    """
    gaps: list[NDArray[np.void]] = []
    order = np.lexsort((given.frame, numbers))
    for before, after in pairwise(order):
        if numbers[before] != numbers[after] or not kept[before]:
            continue
        frames = np.arange(given.frame[before] + 1, given.frame[after])
        frames = frames[~given.labelled[frames]]
        if not frames.size:
            continue
        start = given.boxes[before]
        end = given.boxes[after]
        at = given.end_us[frames]
        fraction = (at - start["t"]) / (end["t"] - start["t"])
        between = np.repeat(given.boxes[before : before + 1], frames.size)
        between["t"] = at
        for side in "xywh":
            between[side] = start[side] + fraction * (end[side] - start[side])
        gaps.append(between)
    if not gaps:
        return np.zeros(0, RAW_BOX)
    joined = np.concatenate(gaps)
    return joined[np.argsort(joined["t"], kind="stable")]


def without_overlap(
    regions: NDArray[np.void], boxes: NDArray[np.void], iou: float
) -> NDArray[np.void]:
    """The regions that overlap no box of the same time by `iou` or more.

    Args:
        regions: (R,) RAW_BOX. boxes: (N,) RAW_BOX.
    """
    kept = np.ones(len(regions), bool)
    for time_us in np.unique(regions["t"]):
        rows = np.flatnonzero(regions["t"] == time_us)
        others = boxes[boxes["t"] == time_us]
        overlaps = pairwise_iou(corners_of(regions[rows]), corners_of(others))
        kept[rows] = overlaps.max(1, initial=0.0) < iou
    return regions[kept]
