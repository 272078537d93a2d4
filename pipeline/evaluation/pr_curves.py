"""Precision and recall at IoU 0.5 over the confidence threshold, by COCO's matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from evspan.pipeline.evaluation.coco import EVERY, IOU50, Scorer
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
    total = np.bincount(frames.boxes["class_id"].astype(np.int64), minlength=len(classes))
    if not total.any():
        return {}
    # A detection of a higher score is matched first, so those above any threshold are matched as if
    # there were no others.
    scores: list[list[float]] = [[] for _ in classes]
    hits: list[list[bool]] = [[] for _ in classes]
    for matched in Scorer(frames, classes).matched(areas=[EVERY]).eval_imgs:
        if matched is not None:
            counts = ~np.array(matched["dtIgnore"][IOU50], bool)  # not those in ignore regions
            k = matched["category_id"] - 1
            scores[k] += np.array(matched["dtScores"], float)[counts].tolist()
            hits[k] += np.array(matched["dtMatched"][IOU50], bool)[counts].tolist()
    curves = {}
    for k, name in enumerate(classes):
        if total[k]:
            of_class = np.array(scores[k], float)
            curves[name] = _curve(of_class, np.array(hits[k], bool), int(total[k]))
    return curves


def _curve(scores: NDArray[np.float64], hits: NDArray[np.bool_], boxes: int) -> PrCurve:
    """Args: scores, hits: (K,) of each detection. boxes: number of boxes."""
    hit_scores = np.sort(scores[hits])
    other_scores = np.sort(scores[~hits])
    true_positives = len(hit_scores) - np.searchsorted(hit_scores, THRESHOLDS)
    false_positives = len(other_scores) - np.searchsorted(other_scores, THRESHOLDS)
    return PrCurve(true_positives, false_positives, boxes - true_positives)
