"""Scores of a checkpoint on a set, with those of bootstrap samples of its recordings, kept on disk.

    python tests/benchmarks/learning/scores.py CHECKPOINT SHARDS OUTPUT [--detector NAME] [KEY=VALUE ...]

evaluates a checkpoint (`evspan evaluate`, the moving average of its weights) and writes OUTPUT/
score.npz last: every measure on all recordings, and on SAMPLES of them. The samples are the same for
all detectors on the same recordings, so differences are paired by recording.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.evaluation.bootstrap import (
    MatchedDetections,
    curve_values,
    draws,
    match_detections,
)
from evspan.pipeline.evaluation.coco import EVERY, IOU50, SMALL
from evspan.pipeline.evaluation.compare import open_evaluation
from evspan.pipeline.evaluation.frames import LabelledFrames, scored
from evspan.pipeline.evaluation.motion import motion
from learning import other_detectors
from numpy.typing import NDArray

VERSION = 4  # of the measures: with another one, scores are computed again
SAMPLES = 200
SCORE = "score.npz"
SPEEDS = (5.0, 25.0, 50.0, 100.0)  # pixels of the stored frames per second
RESTS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds at rest
LONG_REST = 4.0
TIMES = (5.0, 10.0, 20.0, 30.0)  # seconds since the recording's first event

Values = NDArray[np.float64]


class Score(NamedTuple):
    """values: measure -> (1 + SAMPLES,), first all recordings; nan where there are no such boxes."""

    recordings: int
    values: dict[str, Values]


def bin_names(edges: Sequence[float]) -> list[str]:
    """'0-5', '5-25', '25+'."""
    spans = [f"{low:g}-{high:g}" for low, high in pairwise([0.0, *edges])]
    return [*spans, f"{edges[-1]:g}+"]


def measures(
    frames: LabelledFrames, classes: Sequence[str], config: EvaluationConfig, weights: Values
) -> dict[str, Values]:
    """AP of all boxes and of groups, and the fraction that is found, on every sample of recordings.

    Args:
        weights: (S, R) of `draws`.

    Returns:
        ap, ap50, ap_small, ap/class/NAME; for G of speed/BIN, rest/BIN, rest/long, and since/BIN:
        ap/G, and found/G: the recall at IoU 0.5 of detections of the confidence above which half of
        all detections are right. So a detector does not find more by guessing more. Other boxes
        than the group's are ignored.
    """
    unique, sample = np.unique(weights, axis=0, return_inverse=True)
    sample = sample.reshape(-1)
    moved = motion(frames, config.still_speed)
    chosen, kept = scored(frames, config)
    values: dict[str, Values] = {}
    every, small = match_detections(chosen, classes, None, [EVERY, SMALL])
    ap, _ = curve_values(every, unique)
    values["ap"] = ap.mean(1)
    values["ap50"] = ap[:, IOU50]
    values["ap_small"] = curve_values(small, unique)[0].mean(1)
    for name, of_class in zip(classes, every, strict=True):
        values[f"ap/class/{name}"] = curve_values([of_class], unique)[0].mean(1)
    confidence = confidence_of_half(every)

    def add(name: str, part: LabelledFrames, group: NDArray[np.bool_] | None) -> None:
        if (group is not None and not group.any()) or not len(part.boxes):
            return
        (matched,) = match_detections(part, classes, group, [EVERY])
        values[f"ap/{name}"] = curve_values(matched, unique)[0].mean(1)
        values[f"found/{name}"] = found(matched, confidence, unique)

    speed = moved.speed[kept]
    rest = np.where(speed < config.still_speed, moved.rest_s[kept], np.nan)
    for name, inside in _bins(speed, SPEEDS):
        add(f"speed/{name}", chosen, inside)
    for name, inside in _bins(rest, RESTS):
        add(f"rest/{name}", chosen, inside)
    add("rest/long", chosen, rest >= LONG_REST)
    every_box = np.ones(len(chosen.boxes), bool)
    every_detection = np.ones(len(chosen.detections), bool)
    for name, inside in _bins(chosen.end_us / 1e6, TIMES):
        add(f"since/{name}", chosen.only(inside, every_box, every_detection), None)
    return {name: of_unique[sample] for name, of_unique in values.items()}


def confidence_of_half(by_class: Sequence[MatchedDetections]) -> float:
    """The lowest confidence from which on half of all detections are right, at IoU 0.5.

    Infinite where there is none.
    """
    if not by_class:
        return np.inf
    counts = [~matched.ignored[IOU50] for matched in by_class]
    scores = np.concatenate([m.scores[c] for m, c in zip(by_class, counts, strict=True)])
    right = np.concatenate([m.matched[IOU50][c] for m, c in zip(by_class, counts, strict=True)])
    order = np.argsort(-scores)
    precision = np.cumsum(right[order]) / np.arange(1, len(scores) + 1)
    (enough,) = np.nonzero(precision >= 0.5)
    return float(scores[order][enough[-1]]) if len(enough) else np.inf


def found(by_class: Sequence[MatchedDetections], confidence: float, weights: Values) -> Values:
    """The fraction of the boxes that detections of this confidence or more find, per sample.

    Args:
        weights: (S, R) of `draws`.
    """
    hits = np.zeros(weights.shape[1])
    for matched in by_class:
        hit = matched.matched[IOU50] & ~matched.ignored[IOU50] & (matched.scores >= confidence)
        hits += np.bincount(matched.recording[hit], minlength=len(hits))
    boxes = weights @ np.sum([matched.boxes for matched in by_class], axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(weights @ hits / boxes, np.float64)


def _bins(values: Values, edges: Sequence[float]) -> list[tuple[str, NDArray[np.bool_]]]:
    spans = pairwise([0.0, *edges, np.inf])
    return [
        (name, (values >= low) & (values < high))
        for name, (low, high) in zip(bin_names(edges), spans, strict=True)
    ]


# -- on disk ---------------------------------------------------------------------------------------
def read_score(folder: Path) -> Score | None:
    """What `write_score` wrote to a folder; None where it is missing, damaged or of another version."""
    try:
        with np.load(folder / SCORE) as stored:
            if int(stored["version"]) != VERSION:
                return None
            values = np.column_stack((stored["points"], stored["samples"])).astype(np.float64)
            names = stored["names"].tolist()
            return Score(int(stored["recordings"]), dict(zip(names, values, strict=True)))
    except (OSError, BadZipFile, ValueError, KeyError, EOFError):
        return None


def write_score(folder: Path, score: Score) -> None:
    """Writes score.npz, whole or not at all. Samples have 11 bits: 0.02 points of 40."""
    values = np.array(list(score.values.values()))
    temporary = folder / f".{SCORE}"
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            version=VERSION,
            recordings=score.recordings,
            names=np.array(list(score.values)),
            points=values[:, 0].astype(np.float32),
            samples=values[:, 1:].astype(np.float16),
        )
    os.replace(temporary, folder / SCORE)


def score_of(folder: Path) -> Score:
    """Computes the score of an evaluation's output."""
    evaluation = open_evaluation(folder)
    recordings = len(evaluation.frames.names)
    weights = draws(recordings, SAMPLES, seed=0)
    values = measures(evaluation.frames, evaluation.classes, evaluation.config, weights)
    return Score(recordings, values)


def main(argv: list[str], evaluate: Callable[[list[str]], object] = other_detectors.evspan) -> None:
    """Evaluates what is not evaluated yet, and writes the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--detector", choices=["", *other_detectors.DETECTORS], default="")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    if not args.output.exists():
        other_detectors.use(args.detector)
        writing = args.output.with_name(f".{args.output.name}.writing")
        shutil.rmtree(writing, ignore_errors=True)  # of a killed attempt
        words = [str(args.checkpoint), f"dataset.root={args.shards}", f"output={writing}"]
        try:
            evaluate(["evaluate", *words, *args.overrides])
        except SystemExit as ended:
            if ended.code:
                raise
        writing.rename(args.output)
    write_score(args.output, score_of(args.output))


if __name__ == "__main__":
    main(sys.argv[1:])
