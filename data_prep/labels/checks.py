"""What is doubtful about the boxes of a recording, by kind, for the terminal and the report."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from evspan.conf.schema.prep import LabelConfig
from evspan.conf.text import printable
from evspan.data_prep.labels.box_files import NO_TRACK, BoxArray
from evspan.data_prep.labels.clock import Span, clock_problem
from numpy.typing import NDArray

NAMED = 3  # recordings that a warning names
SAME_PLACE = ["t", "class_id", "x", "y", "w", "h"]
SAME_TRACK = ["t", "class_id", "track_id"]


def label_warnings(
    file: str, boxes: BoxArray, recording: Span, config: LabelConfig
) -> dict[str, str]:
    """What is doubtful, by kind: `clock`, `duplicates`, `normalised`.

    Args:
        file: name of the box file, for the messages.
        boxes: (N,) RAW_BOX, all of the box file.
        recording: the times of the first and the last event.
    """
    problems = {
        "clock": clock_problem(boxes["t"], recording, config),
        "duplicates": _duplicates(boxes),
        "normalised": _normalised(boxes),
    }
    return {kind: f"{printable(file)}: {text}" for kind, text in problems.items() if text}


def _duplicates(boxes: BoxArray) -> str:
    """Boxes that are there twice: of one place, or of one track, at the same time."""
    place = _repeats(boxes, SAME_PLACE)
    track = np.zeros(boxes.size, bool)
    has_track = boxes["track_id"] != NO_TRACK
    if np.unique(boxes["track_id"][has_track]).size > 1:  # else tracks are not in use
        track[has_track] = _repeats(boxes[has_track], SAME_TRACK)
    twice = int(np.count_nonzero(place | track))
    if not twice:
        return ""
    return (
        f"{twice} of {boxes.size} boxes are duplicates, with the time, the class and the place or "
        "track of another. They count as objects of their own: keep one of each"
    )


def _repeats(boxes: BoxArray, fields: list[str]) -> NDArray[np.bool_]:
    """(N,) whether an earlier box has the same values in all fields."""
    repeats = np.ones(boxes.size, bool)
    keys = np.zeros(boxes.size, [(name, boxes.dtype[name]) for name in fields])
    for name in fields:
        keys[name] = boxes[name]
    _, first = np.unique(keys, return_index=True)
    repeats[first] = False
    return repeats


def _normalised(boxes: BoxArray) -> str:
    if not boxes.size:
        return ""
    right = boxes["x"] + boxes["w"]
    bottom = boxes["y"] + boxes["h"]
    lowest = min(float(boxes[name].min()) for name in "xywh")
    highest = float(max(right.max(), bottom.max()))
    if lowest < 0 or not 0 < highest <= 1.001:
        return ""
    return (
        f"all {boxes.size} boxes lie within 0 to 1: their coordinates are likely fractions of the "
        "sensor. Boxes are in pixels, x and y of the top left corner: multiply x and w by the "
        "width, y and h by the height"
    )


def grouped(warnings: Iterable[tuple[str, Mapping[str, str]]]) -> Iterator[str]:
    """One line for each kind of warning.

    Args:
        warnings: of each recording, its split/name and its warnings by kind.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for key, of_recording in warnings:
        for kind, text in of_recording.items():
            by_kind.setdefault(kind, []).append((key, text))
    for affected in by_kind.values():
        key, text = affected[0]
        line = f"{printable(key)}: {text}"
        others = [printable(key) for key, _ in affected[1:]]
        if others:
            line += f". The same in {len(others)} more: {', '.join(others[:NAMED])}"
            if len(others) > NAMED:
                line += ", ..."
        yield line
