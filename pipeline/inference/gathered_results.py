"""Collects the results of an evaluation from all ranks: JSON and numbers, nothing is unpickled."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from evspan.conf.errors import LostRanksError
from evspan.data_prep.shards.format import BOX
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.model.postprocess import COLUMNS, MAX_DETECTIONS
from evspan.pipeline.parallel.reductions import FOREIGN, gather_bytes, gather_json
from numpy.typing import NDArray

DETECTION = np.dtype((np.float32, (COLUMNS,)))
MOST_BOXES = 1 << 20  # of one frame


def gather_results(own: Sequence[RecordingResult]) -> list[RecordingResult]:
    """The results of all ranks, by rank, on every rank. A collective (six of torch).

    Raises:
        LostRanksError: what a rank sent is no list of results: it is not a rank of this run.
    """
    headers = gather_json([_header(result) for result in own], name="results")
    if len(headers) == 1:
        return list(own)
    own_boxes: list[NDArray[Any]] = []
    own_detections: list[NDArray[Any]] = []
    for result in own:
        own_boxes += result.boxes
        own_detections += result.detections
    boxes = gather_bytes(
        _joined(own_boxes, BOX),
        name="labels of the results",
        most_bytes=max(_num_bytes(header, "boxes") for header in headers),
    )
    detections = gather_bytes(
        _joined(own_detections, DETECTION),
        name="detections of the results",
        most_bytes=max(_num_bytes(header, "detections") for header in headers),
    )
    results: list[RecordingResult] = []
    for rank, header in enumerate(headers):
        try:
            results += _results(header, boxes[rank], detections[rank])
        except (ValueError, TypeError, KeyError) as error:
            raise _foreign(f"results of rank {rank} do not fit their sizes ({error})") from error
    return results


def _header(result: RecordingResult) -> dict[str, Any]:
    """JSON values: name, frames, and the numbers of rows of each frame."""
    return {
        "name": result.name,
        "frames": [int(frame) for frame in result.frames],
        "boxes": [len(rows) for rows in result.boxes],
        "detections": [len(rows) for rows in result.detections],
    }


def _joined(parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> bytes:
    rows = [np.ascontiguousarray(part, dtype.base) for part in parts]
    return b"".join(part.tobytes() for part in rows)


def _num_bytes(header: Any, rows: str) -> int:
    """Bytes of all rows that a header announces.

    Raises:
        LostRanksError: the header is damaged, or a frame has more rows than any can have.
    """
    most, dtype = (MOST_BOXES, BOX) if rows == "boxes" else (MAX_DETECTIONS, DETECTION)
    counts: list[Any] = []
    try:
        for result in header:
            counts += result[rows]
    except (TypeError, KeyError, IndexError) as error:
        raise _foreign(f"a rank sent a damaged list of results ({error})") from error
    if not all(isinstance(count, int) and 0 <= count <= most for count in counts):
        raise _foreign(f"a rank sent results with more than {most} {rows} in a frame")
    return int(dtype.itemsize * sum(counts))


def _results(header: Any, boxes: bytes, detections: bytes) -> list[RecordingResult]:
    box_rows = np.frombuffer(boxes, BOX)
    detection_rows = np.frombuffer(detections, np.float32).reshape(-1, COLUMNS)
    results = []
    for values in header:
        num_boxes = sum(values["boxes"])
        num_detections = sum(values["detections"])
        result = RecordingResult(
            str(values["name"]),
            [int(frame) for frame in values["frames"]],
            _cut(box_rows[:num_boxes], values["boxes"]),
            _cut(detection_rows[:num_detections], values["detections"]),
        )
        if not len(result.frames) == len(result.boxes) == len(result.detections):
            raise ValueError(f"{json.dumps(result.name)} has other numbers of frames")
        box_rows = box_rows[num_boxes:]
        detection_rows = detection_rows[num_detections:]
        results.append(result)
    if len(box_rows) or len(detection_rows):
        raise ValueError(f"{len(box_rows)} boxes and {len(detection_rows)} detections are left")
    return results


def _cut(rows: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """Copies of consecutive parts with these numbers of rows."""
    if sum(counts) != len(rows):
        raise ValueError(f"{len(rows)} rows for {sum(counts)}")
    ends = np.cumsum(counts, dtype=np.int64)
    return [rows[end - count : end].copy() for end, count in zip(ends, counts, strict=True)]


def _foreign(problem: str) -> LostRanksError:
    return LostRanksError(f"{problem}. {FOREIGN}")
