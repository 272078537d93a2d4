"""Detections that match no box and lie in an ignore region, by the rule of the confusion matrix."""

import numpy as np
from evspan.pipeline.data.boxes import corners_of, covered_fraction, pairwise_iou
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray

MOST_DETECTIONS = 100  # per frame


def only_in_regions(frames: LabelledFrames, iou: float, threshold: float) -> NDArray[np.bool_]:
    """Which detections match no box and lie in an ignore region.

    Boxes and detections of all classes compete, as in `Scorer.confusion`.

    Args:
        frames: with boxes, ignore regions and detections.
        iou: lowest IoU of a match, and lowest fraction of a detection's area in a region.
        threshold: lowest score of a detection that takes part.

    Returns:
        (K,) bool.
    """
    ignored = np.zeros(len(frames.detections), bool)
    for frame in np.unique(frames.region_frame):
        rows = np.flatnonzero(frames.detection_frame == frame)
        rows = rows[frames.scores[rows] >= threshold]
        rows = rows[np.argsort(-frames.scores[rows], kind="stable")][:MOST_DETECTIONS]
        corners = frames.detections[rows, :4].astype(np.float64)
        boxes = corners_of(frames.boxes[frames.box_frame == frame])
        regions = corners_of(frames.regions[frames.region_frame == frame])
        free = ~_matched(pairwise_iou(corners, boxes), iou)
        inside = covered_fraction(corners, regions).max(1, initial=0.0) >= iou
        ignored[rows[free & inside]] = True
    return ignored


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
