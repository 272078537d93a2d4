"""AP of frames drawn anew, recording by recording: matched once, summed up for every draw."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.evaluation.coco import EVERY, IOU50, SMALL, Scorer
from evspan.pipeline.evaluation.frames import LabelledFrames, scored
from evspan.pipeline.evaluation.motion import motion
from numpy.typing import NDArray

RECALLS, THRESHOLDS = np.linspace(0.0, 1.0, 101), 10
AT_ONCE = 2000  # frames that are matched, which takes Python objects for each
BLOCK = 1 << 22  # numbers in memory at once
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
class Found:
    """The detections of one class in R recordings, by falling score, and what they were matched to at the IoU thresholds."""

    recording: NDArray[np.int64]  # (D,)
    matched: NDArray[np.bool_]  # (thresholds, D)
    ignored: NDArray[np.bool_]
    boxes: NDArray[np.float64]  # (R,) boxes that count


def draws(recordings: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """(1 + resamples, R) how often each recording is drawn: once each in the first row, then R times with replacement."""
    drawn = np.random.default_rng(seed).multinomial(
        recordings, np.full(recordings, 1 / recordings), size=resamples
    )
    return np.concatenate((np.ones((1, recordings)), drawn))


def measures(
    frames: LabelledFrames,
    classes: Sequence[str],
    config: EvaluationConfig,
    weights: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Of MEASURES, (S,) for the S rows of `draws`; nan where a draw has no such boxes."""
    weights, same = np.unique(
        weights, axis=0, return_inverse=True
    )  # of few recordings there are few draws
    moved = motion(frames, config.still_speed)
    chosen, kept = scored(frames, config)
    every, small = found(chosen, classes, None, [EVERY, SMALL])
    (still,), (moving,) = (
        found(chosen, classes, group[kept], [EVERY])
        for group in (moved.still(config.still_s), moved.moving(config.still_s))
    )
    ap, _ = _curve_values(every, weights)
    ap_still, recall_still = _curve_values(still, weights)
    ap_moving, recall_moving = _curve_values(moving, weights)
    out = {
        "ap": ap.mean(1),
        "ap50": ap[:, IOU50],
        "ap_small": _curve_values(small, weights)[0].mean(1),
        "ap_still": ap_still.mean(1),
        "ap_moving": ap_moving.mean(1),
        "recall_still": recall_still.mean(1),
        "recall_moving": recall_moving.mean(1),
    }
    return {name: out[name][same.reshape(-1)] for name in MEASURES}


def found(
    frames: LabelledFrames,
    classes: Sequence[str],
    group: NDArray[np.bool_] | None,
    areas: Sequence[tuple[float, float]],
) -> list[list[Found]]:
    """Per area range, per class. group: (M,) boxes that count, see `Scorer.matched`."""
    parts: dict[tuple[Any, int], list[tuple]] = defaultdict(list)
    number = np.arange(len(frames))
    for first in range(0, len(frames), AT_ONCE):
        inside = (number >= first) & (number < first + AT_ONCE)
        boxes = inside[frames.box_frame]
        part = frames.only(inside, boxes, inside[frames.detection_frame])
        ones = defaultdict(list)  # of a frame each
        for one in (
            Scorer(part, classes).matched(None if group is None else group[boxes], areas).eval_imgs
        ):
            if one is not None:
                ones[tuple(one["aRng"]), one["category_id"] - 1].append(one)
        for key, of_frames in ones.items():
            parts[key].append(_arrays(sorted(of_frames, key=lambda one: one["image_id"]), part))
    return [
        [_joined(parts[area, k], len(frames.names)) for k in range(len(classes))] for area in areas
    ]


def _arrays(ones: list[dict[str, Any]], frames: LabelledFrames) -> tuple[NDArray, ...]:
    """recording of each frame, its boxes that count; recording of each detection, its score, matched, ignored."""
    recording, count = (
        frames.recording[[one["image_id"] - 1 for one in ones]],
        [len(one["dtScores"]) for one in ones],
    )
    matched, ignored = (
        np.concatenate([np.array(one[k], bool).reshape(THRESHOLDS, -1) for one in ones], 1)
        for k in ("dtMatched", "dtIgnore")
    )
    return (
        recording,
        np.array([len(one["gtIgnore"]) - sum(one["gtIgnore"]) for one in ones]),
        np.repeat(recording, count),
        np.concatenate([np.array(one["dtScores"], np.float64) for one in ones]),
        matched,
        ignored,
    )


def _joined(parts: list[tuple[NDArray, ...]], recordings: int) -> Found:
    boxes = np.zeros(recordings)
    if not parts:
        none = np.zeros((THRESHOLDS, 0), bool)
        return Found(np.zeros(0, np.int64), none, none, boxes)
    frame_recording, count, recording, scores, matched, ignored = (
        np.concatenate(p, -1) for p in zip(*parts, strict=True)
    )
    np.add.at(boxes, frame_recording, count)
    order = np.argsort(
        -scores, kind="stable"
    )  # frames in turn where scores are equal, as COCO has it
    return Found(recording[order], matched[:, order], ignored[:, order], boxes)


def _curve_values(by_class: list[Found], weights: NDArray) -> tuple[NDArray, NDArray]:
    """AP and recall, (S, thresholds): means over those classes that a draw has boxes of."""
    ap, recall, there = (np.zeros((len(weights), n)) for n in (THRESHOLDS, THRESHOLDS, 1))
    for one in by_class:
        boxes = weights @ one.boxes
        there += boxes[:, None] > 0
        for i in range(THRESHOLDS):
            hit, counts = one.matched[i] & ~one.ignored[i], ~one.ignored[i]
            recall[:, i] += (
                weights
                @ np.bincount(one.recording[hit], minlength=weights.shape[1])
                / np.maximum(boxes, 1)
            )
            ap[:, i] += _average_precision(one.recording, hit, counts, boxes, weights)
    with np.errstate(invalid="ignore"):
        return ap / there, recall / there


def _average_precision(
    recording: NDArray, hit: NDArray, counts: NDArray, boxes: NDArray, weights: NDArray
) -> NDArray:
    """(S,) of each draw: the mean over 101 recalls of the best precision from there on, as COCO has it.

    Only the P places of boxes found matter, between them precision falls. A recording that is drawn m times counts m times at
    once: over detections of one score precision rises or falls all the way, so it is the same.

    Args:
        recording, hit, counts: (D,) of each detection by falling score: whose it is, whether it found a box, or counts at all.
        boxes: (S,) how many each draw has.
    """
    places, out = np.flatnonzero(hit), np.zeros(len(weights))
    if not places.size:
        return out
    so_far = np.stack(
        [np.cumsum((recording == r) & counts)[places] for r in range(weights.shape[1])]
    ).astype(np.float64)
    step = max(1, BLOCK // places.size)
    for first in range(0, len(weights), step):
        drawn = weights[first : first + step]
        hits = np.cumsum(drawn[:, recording[places]], axis=1)
        precision = hits / np.maximum(drawn @ so_far, 1)  # none so far: none found either
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for i, row in enumerate(hits / np.maximum(boxes[first : first + step, None], 1)):
            at = np.searchsorted(row, RECALLS, side="left")
            out[first + i] = best[i, at[at < places.size]].sum() / len(RECALLS)
    return out
