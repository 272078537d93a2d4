"""Precision against recall at IoU 0.5, threshold by threshold, by COCO's matching."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from evspan.pipeline.evaluation.coco import EVERY, IOU50, Scorer
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0, 1, 101)  # of confidence, objectness x class score


@dataclass(frozen=True)
class PrCurve:
    """Of one class; all of shape (thresholds,). At a threshold count the detections that are at least as sure."""

    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    missed: NDArray[np.int64]  # boxes without a detection

    @property
    def precision(self) -> NDArray[np.float64]:
        """1 where nothing is detected."""
        found = self.true_positives + self.false_positives
        return np.where(found, self.true_positives / np.maximum(found, 1), 1.0)

    @property
    def recall(self) -> NDArray[np.float64]:
        return self.true_positives / (self.true_positives + self.missed)


def pr_curves(frames: LabelledFrames, classes: Sequence[str]) -> dict[str, PrCurve]:
    """By class, of the classes that have boxes."""
    total = np.bincount(frames.boxes["class_id"].astype(np.int64), minlength=len(classes))
    if not total.any():
        return {}
    # A sure detection chooses its box before an unsure one: those above any threshold are matched as if there were no others.
    sure: list[list[float]] = [[] for _ in classes]
    right: list[list[bool]] = [[] for _ in classes]
    for matched in Scorer(frames, classes).matched(areas=[EVERY]).eval_imgs:
        if matched is not None:
            sure[matched["category_id"] - 1] += matched["dtScores"]
            right[matched["category_id"] - 1] += matched["dtMatched"][IOU50]
    return {
        name: _curve(np.array(sure[k], float), np.array(right[k], bool), int(total[k]))
        for k, name in enumerate(classes)
        if total[k]
    }


def _curve(sure: NDArray[np.float64], right: NDArray[np.bool_], boxes: int) -> PrCurve:
    hits, misses = np.sort(sure[right]), np.sort(sure[~right])
    above = [len(s) - np.searchsorted(s, THRESHOLDS) for s in (hits, misses)]
    return PrCurve(above[0], above[1], boxes - above[0])
