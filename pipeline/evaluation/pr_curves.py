"""Precision and recall at IoU 0.5 over the confidence threshold, by COCO's matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from evspan.pipeline.evaluation.bootstrap import match_detections
from evspan.pipeline.evaluation.coco import EVERY, IOU50
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0, 1, 101)  # of the score, objectness x class score


@dataclass(frozen=True)
class PrCurve:
    """Counts of one class, all (thresholds,), of detections with at least that score.

    missed: boxes without a detection.
    """

    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    missed: NDArray[np.int64]

    @property
    def precision(self) -> NDArray[np.float64]:
        """(thresholds,); 1 where nothing is detected."""
        detected = self.true_positives + self.false_positives
        return np.where(detected, self.true_positives / np.maximum(detected, 1), 1.0)

    @property
    def recall(self) -> NDArray[np.float64]:
        """(thresholds,)."""
        return self.true_positives / (self.true_positives + self.missed)


def pr_curves(frames: LabelledFrames, classes: Sequence[str]) -> dict[str, PrCurve]:
    """The curve of each class that has boxes, by name."""
    if not len(frames.boxes):
        return {}
    # A detection of a higher score is matched first, so those above any threshold are matched as if
    # there were no others.
    (by_class,) = match_detections(frames, classes, None, [EVERY])
    curves = {}
    for name, detections in zip(classes, by_class, strict=True):
        num_boxes = int(detections.boxes.sum())
        if num_boxes:
            counts = ~detections.ignored[IOU50]  # not those in ignore regions
            hits = detections.matched[IOU50][counts]
            curves[name] = _curve(detections.scores[counts], hits, num_boxes)
    return curves


def _curve(scores: NDArray[np.float64], hits: NDArray[np.bool_], boxes: int) -> PrCurve:
    """Args: scores, hits: (K,) of each detection. boxes: number of boxes."""
    hit_scores = np.sort(scores[hits])
    other_scores = np.sort(scores[~hits])
    true_positives = len(hit_scores) - np.searchsorted(hit_scores, THRESHOLDS)
    false_positives = len(other_scores) - np.searchsorted(other_scores, THRESHOLDS)
    return PrCurve(true_positives, false_positives, boxes - true_positives)
