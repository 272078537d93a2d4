"""AP of bootstrap samples of recordings; detections are matched once for all samples."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.evaluation.coco import EVERY, IOU50, SMALL, Scorer
from evspan.pipeline.evaluation.frames import LabelledFrames, scored
from evspan.pipeline.evaluation.motion import motion
from numpy.typing import NDArray

RECALLS = np.linspace(0.0, 1.0, 101)
THRESHOLDS = 10  # IoU 0.50, 0.55, ..., 0.95
AT_ONCE = 2000  # frames matched per call; each takes Python objects
BLOCK = 1 << 22  # numbers in memory at a time
MEASURES = {
    "ap": "AP 0.50:0.95",
    "ap50": "AP50",
    "ap_small": "AP small",
    "ap_still": "AP still",
    "ap_moving": "AP moving",
    "recall_still": "recall still",
    "recall_moving": "recall moving",
}


@dataclass(frozen=True)
class MatchedDetections:
    """The D detections of one class in R recordings, by falling score, at each IoU threshold.

    Attributes:
        recording: (D,) index.
        scores: (D,) objectness times class score.
        matched: (thresholds, D) whether the detection found a box.
        ignored: (thresholds, D) whether it does not count.
        boxes: (R,) number of boxes that count.
    """

    recording: NDArray[np.int64]
    scores: NDArray[np.float64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    boxes: NDArray[np.float64]


def draws(recordings: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each recording is in each sample.

    Returns:
        (1 + resamples, R): once each in the first row, then R drawn with replacement per row.
    """
    rng = np.random.default_rng(seed)
    probabilities = np.full(recordings, 1 / recordings)
    drawn = rng.multinomial(recordings, probabilities, size=resamples)
    return np.concatenate((np.ones((1, recordings)), drawn))


def measures(
    frames: LabelledFrames,
    classes: Sequence[str],
    config: EvaluationConfig,
    weights: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """The measures of every sample.

    Args:
        frames: all labelled frames.
        classes: names of class 0, 1, ...
        config: filters of the protocol.
        weights: (S, R) of `draws`.

    Returns:
        For each name in MEASURES (S,); nan where a sample has no such boxes.
    """
    # With few recordings there are few different samples.
    weights, sample = np.unique(weights, axis=0, return_inverse=True)
    moved = motion(frames, config.still_speed)
    chosen, kept = scored(frames, config)
    every, small = match_detections(chosen, classes, None, [EVERY, SMALL])
    is_still = moved.still(config.still_s)[kept]
    is_moving = moved.moving(config.still_s)[kept]
    (still,) = match_detections(chosen, classes, is_still, [EVERY])
    (moving,) = match_detections(chosen, classes, is_moving, [EVERY])
    ap, _ = curve_values(every, weights)
    ap_small, _ = curve_values(small, weights)
    ap_still, recall_still = curve_values(still, weights)
    ap_moving, recall_moving = curve_values(moving, weights)
    values = {
        "ap": ap.mean(1),
        "ap50": ap[:, IOU50],
        "ap_small": ap_small.mean(1),
        "ap_still": ap_still.mean(1),
        "ap_moving": ap_moving.mean(1),
        "recall_still": recall_still.mean(1),
        "recall_moving": recall_moving.mean(1),
    }
    return {name: values[name][sample.reshape(-1)] for name in MEASURES}


class _FrameMatches(NamedTuple):
    """Some frames' matches of one class.

    frame_recording, frame_boxes: (F,) recording of each frame, and number of its boxes that count.
    recording, scores: (D,) of each detection. matched, ignored: (thresholds, D).
    """

    frame_recording: NDArray[np.int64]
    frame_boxes: NDArray[np.int64]
    recording: NDArray[np.int64]
    scores: NDArray[np.float64]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


def match_detections(
    frames: LabelledFrames,
    classes: Sequence[str],
    group: NDArray[np.bool_] | None,
    areas: Sequence[tuple[float, float]],
) -> list[list[MatchedDetections]]:
    """Matches detections to boxes as COCO does.

    Args:
        group: (M,) boxes that count, see `Scorer.matched`; None: all.
        areas: ranges in square pixels.

    Returns:
        Per area range, per class.
    """
    parts: dict[tuple[Any, int], list[_FrameMatches]] = defaultdict(list)
    number = np.arange(len(frames))
    for first in range(0, len(frames), AT_ONCE):
        inside = (number >= first) & (number < first + AT_ONCE)
        boxes = inside[frames.box_frame]
        part = frames.only(inside, boxes, inside[frames.detection_frame])
        group_part = None if group is None else group[boxes]
        images: dict[tuple[Any, int], list[dict[str, Any]]] = defaultdict(list)
        for image in Scorer(part, classes).matched(group_part, areas).eval_imgs:
            if image is not None:
                images[tuple(image["aRng"]), image["category_id"] - 1].append(image)
        for key, of_key in images.items():
            of_key.sort(key=lambda image: image["image_id"])
            parts[key].append(_frame_matches(of_key, part))
    num_recordings = len(frames.names)
    result = []
    for area in areas:
        by_class = [_joined(parts[area, k], num_recordings) for k in range(len(classes))]
        result.append(by_class)
    return result


def _frame_matches(images: list[dict[str, Any]], frames: LabelledFrames) -> _FrameMatches:
    """images: COCO's results of one class and area range, by frame."""
    recording = frames.recording[[image["image_id"] - 1 for image in images]]
    num_detections = [len(image["dtScores"]) for image in images]
    num_boxes = [len(image["gtIgnore"]) - sum(image["gtIgnore"]) for image in images]
    scores = [np.array(image["dtScores"], np.float64) for image in images]
    matched = [np.array(image["dtMatched"], bool).reshape(THRESHOLDS, -1) for image in images]
    ignored = [np.array(image["dtIgnore"], bool).reshape(THRESHOLDS, -1) for image in images]
    return _FrameMatches(
        frame_recording=recording,
        frame_boxes=np.array(num_boxes),
        recording=np.repeat(recording, num_detections),
        scores=np.concatenate(scores),
        matched=np.concatenate(matched, 1),
        ignored=np.concatenate(ignored, 1),
    )


def _joined(parts: list[_FrameMatches], recordings: int) -> MatchedDetections:
    boxes = np.zeros(recordings)
    if not parts:
        none = np.zeros((THRESHOLDS, 0), bool)
        return MatchedDetections(np.zeros(0, np.int64), np.zeros(0), none, none, boxes)
    whole = _FrameMatches(*(np.concatenate(p, -1) for p in zip(*parts, strict=True)))
    np.add.at(boxes, whole.frame_recording, whole.frame_boxes)
    # Stable: frames in turn where scores are equal, as in COCO.
    order = np.argsort(-whole.scores, kind="stable")
    return MatchedDetections(
        recording=whole.recording[order],
        scores=whole.scores[order],
        matched=whole.matched[:, order],
        ignored=whole.ignored[:, order],
        boxes=boxes,
    )


def curve_values(
    by_class: list[MatchedDetections], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AP and recall, both (S, thresholds): means over the classes that a sample has boxes of.

    Args:
        by_class: of `match_detections`.
        weights: (S, R) how often each recording is in each sample.
    """
    num_samples, num_recordings = weights.shape
    ap = np.zeros((num_samples, THRESHOLDS))
    recall = np.zeros((num_samples, THRESHOLDS))
    num_classes = np.zeros((num_samples, 1))
    for detections in by_class:
        boxes = weights @ detections.boxes
        num_classes += boxes[:, None] > 0
        for i in range(THRESHOLDS):
            counts = ~detections.ignored[i]
            hit = detections.matched[i] & counts
            hits = np.bincount(detections.recording[hit], minlength=num_recordings)
            recall[:, i] += weights @ hits / np.maximum(boxes, 1)
            ap[:, i] += _average_precision(detections.recording, hit, counts, boxes, weights)
    with np.errstate(invalid="ignore"):
        return ap / num_classes, recall / num_classes


def _average_precision(
    recording: NDArray[np.int64],
    hit: NDArray[np.bool_],
    counts: NDArray[np.bool_],
    boxes: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """COCO's AP of each sample: the mean over 101 recalls of the best precision from there on.

    Only the P positions of hits matter; between them precision falls. A recording that is drawn m
    times counts m times in place: over detections of one score precision rises or falls
    monotonically, so the result is the same.

    Args:
        recording, hit, counts: (D,) of each detection by falling score: its recording, whether it
            found a box, and whether it counts.
        boxes: (S,) number of boxes in each sample.
        weights: (S, R).

    Returns:
        (S,).
    """
    positions = np.flatnonzero(hit)
    result = np.zeros(len(weights))
    if not positions.size:
        return result
    # (R, P): detections of each recording up to each hit.
    so_far = []
    for r in range(weights.shape[1]):
        so_far.append(np.cumsum((recording == r) & counts)[positions])
    detections_so_far = np.stack(so_far).astype(np.float64)
    step = max(1, BLOCK // positions.size)
    for first in range(0, len(weights), step):
        drawn = weights[first : first + step]
        hits = np.cumsum(drawn[:, recording[positions]], axis=1)
        precision = hits / np.maximum(drawn @ detections_so_far, 1)  # none so far: no hits either
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recalls = hits / np.maximum(boxes[first : first + step, None], 1)
        for i, row in enumerate(recalls):
            at = np.searchsorted(row, RECALLS, side="left")
            result[first + i] = best[i, at[at < positions.size]].sum() / len(RECALLS)
    return result
