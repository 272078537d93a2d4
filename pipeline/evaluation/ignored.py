"""Detections that match no box and lie in an ignore region, by the rule of the confusion matrix."""

import numpy as np
from evspan.pipeline.data.boxes import corners_of, covered_fraction, pairwise_iou
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray


def only_in_regions(
    frames: LabelledFrames, iou: float, threshold: float, most: int
) -> NDArray[np.bool_]:
    """Which detections match no box and lie in an ignore region.

    Boxes and detections of all classes compete, as in `Scorer.confusion`.

    Args:
        frames: with boxes, ignore regions and detections.
        iou: lowest IoU of a match, and lowest fraction of a detection's area in a region.
        threshold: lowest score of a detection that takes part.
        most: detections that take part per frame, those of the highest scores.

    Returns:
        (K,) bool.
    """
    ignored = np.zeros(len(frames.detections), bool)
    scores = frames.scores
    with_regions = np.unique(frames.region_frame)
    detections_of = _rows_of(with_regions, frames.detection_frame)
    boxes_of = _rows_of(with_regions, frames.box_frame)
    regions_of = _rows_of(with_regions, frames.region_frame)
    for i in range(len(with_regions)):
        rows = np.arange(detections_of[i].start, detections_of[i].stop)
        rows = rows[scores[rows] >= threshold]
        rows = rows[np.argsort(-scores[rows], kind="stable")][:most]
        corners = frames.detections[rows, :4].astype(np.float64)
        boxes = corners_of(frames.boxes[boxes_of[i]])
        regions = corners_of(frames.regions[regions_of[i]])
        free = ~_matched(pairwise_iou(corners, boxes), iou)
        inside = covered_fraction(corners, regions).max(1, initial=0.0) >= iou
        ignored[rows[free & inside]] = True
    return ignored


def _rows_of(frames: NDArray[np.int64], frame_of_row: NDArray[np.int64]) -> list[slice]:
    """The rows of each of these frames.

    Args:
        frame_of_row: index of the frame of each row, in ascending order.
    """
    first = np.searchsorted(frame_of_row, frames, side="left").tolist()
    last = np.searchsorted(frame_of_row, frames, side="right").tolist()
    return [slice(start, stop) for start, stop in zip(first, last, strict=True)]


def _matched(overlaps: NDArray[np.float64], iou: float) -> NDArray[np.bool_]:
    """(k,) which detections take a box. overlaps: (k, m) IoU, the highest score first."""
    matched = np.zeros(len(overlaps), bool)
    left = overlaps.copy()
    if not left.shape[1]:
        return matched
    for i in range(len(left)):
        best = int(left[i].argmax())
        if left[i, best] >= iou:
            matched[i] = True
            left[:, best] = -1.0
    return matched
