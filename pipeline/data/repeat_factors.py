"""Repeat-factor sampling: what has rare classes is read more often.

f(c) is the fraction of the labelled frames of the training data that have a box of class c. With
several roots it is the mean of their fractions, weighted as the roots are. A class has the factor
r(c) = max(1, sqrt(threshold / f(c))). A recording, and a chunk, has the largest factor of the
classes of its labelled frames, 1 without boxes. `pipeline.data.plan` reads a recording, in streamed
lanes, and a chunk, in random ones, in proportion to its factor.

Source: LVIS (Gupta, Dollar & Girshick, CVPR 2019), with images there and chunks here.
"""

import logging
from collections.abc import Sequence

import numpy as np
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.data.plan import Part, Repeats
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def repeat_factors(data: Dataset, threshold: float, sequence_length: int) -> Repeats:
    """The factors of the recordings and chunks of a dataset. It reads all boxes once.

    Args:
        data: the training split.
        threshold: classes in a smaller fraction of the labelled frames are repeated; above 0.
        sequence_length: frames of a chunk.

    Raises:
        ShardError: the stored boxes are damaged.
    """
    classes = [frame_classes(recording, len(data.classes)) for recording in data.recordings]
    parts = data.parts or [Part("", 1.0, range(len(data.recordings)))]
    frequencies = _frequencies(data.recordings, classes, parts)
    factors = class_factors(frequencies, threshold)
    _log(data.classes, frequencies, factors, threshold)
    of_recordings = [_largest(present, factors).max(initial=1.0) for present in classes]
    of_ends = [_largest(_in_chunk(present, sequence_length), factors) for present in classes]
    return Repeats(np.array(of_recordings), of_ends)


def frame_classes(recording: RecordingData, num_classes: int) -> NDArray[np.bool_]:
    """(frames, num_classes) whether a labelled frame has a box of a class."""
    boxes, frame = recording.all_boxes()
    kept = recording.labelled[frame]
    present = np.zeros((recording.frames, num_classes), bool)
    present[frame[kept], boxes["class_id"][kept]] = True
    return present


def class_factors(frequencies: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """(C,) r(c) of (C,) f(c); 1 for classes without a box."""
    factors = np.ones(len(frequencies))
    known = frequencies > 0
    factors[known] = np.maximum(1, np.sqrt(threshold / frequencies[known]))
    return factors


def _frequencies(
    recordings: Sequence[RecordingData],
    classes: Sequence[NDArray[np.bool_]],
    parts: Sequence[Part],
) -> NDArray[np.float64]:
    """(C,) f(c)."""
    total_weight = sum(part.weight for part in parts)
    frequencies = np.zeros(classes[0].shape[1])
    for part in parts:
        labelled = sum(int(recordings[i].labelled.sum()) for i in part.recordings)
        with_class = sum(classes[i].sum(0) for i in part.recordings)
        frequencies += part.weight / total_weight * with_class / max(1, labelled)
    return frequencies


def _in_chunk(present: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """(frames, C) the classes of the chunk that ends at each frame.

    The chunks of the first frames are the recording's first `length` frames.
    """
    frames = len(present)
    counts = np.concatenate((np.zeros((1, present.shape[1]), int), np.cumsum(present, axis=0)))
    first = np.maximum(0, np.arange(frames) + 1 - length)
    last = np.minimum(frames, first + length)
    in_chunk: NDArray[np.bool_] = counts[last] > counts[first]
    return in_chunk


def _largest(present: NDArray[np.bool_], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) the largest factor of the classes of each row, 1 without one."""
    largest: NDArray[np.float64] = np.where(present, factors, 1.0).max(axis=1, initial=1.0)
    return largest


def _log(
    classes: Sequence[str],
    frequencies: NDArray[np.float64],
    factors: NDArray[np.float64],
    threshold: float,
) -> None:
    values = []
    for name, frequency, factor in zip(classes, frequencies, factors, strict=True):
        values.append(f"{name} {factor:.2f} (in {100 * frequency:.2g} % of the frames)")
    logger.info(
        "repeat factors (training.repeat_factor_threshold=%g): %s", threshold, ", ".join(values)
    )
