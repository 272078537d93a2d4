"""Writes detections to files frame by frame: Prophesee's .npy, CSV, lines of JSON."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from evspan.data_prep.labels.box_files import NO_TRACK, RAW_BOX
from evspan.pipeline.inference.detect import Detected, class_name
from numpy.typing import NDArray

COLUMNS = ("t_us", "x", "y", "w", "h", "class_id", "class", "confidence")
TRACK = "track_id"
STANDARD_OUTPUT = "-"


class DetectionsFile:
    """RAW_BOX rows of a .npy file. Its header has the number of rows; `close` rewrites it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.rows = 0
        self._write_header()
        self.start = self.file.tell()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(RAW_BOX),
            "fortran_order": False,
            "shape": (self.rows,),
        }
        # NumPy leaves space in the header for the row count to grow.
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, boxes: NDArray[np.void]) -> None:
        """Appends (k,) RAW_BOX."""
        self.file.write(boxes.tobytes())
        self.rows += boxes.size

    def close(self) -> None:
        """Completes the file."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start
        self.file.close()


class CsvFile:
    """A line per detection: COLUMNS, in pixels of the sensor and times of the windows' ends.

    Args:
        tracks: with a further column, track_id; -1: none.
    """

    def __init__(self, path: Path, classes: list[str], *, tracks: bool = False) -> None:
        self.file = path.open("w", newline="")
        self.classes = classes
        self.tracks = tracks
        self.rows = csv.writer(self.file)
        self.rows.writerow((*COLUMNS, TRACK) if tracks else COLUMNS)

    def add(self, item: Detected) -> None:
        """Appends the detections of a frame."""
        for box in _readable(item.boxes, self.classes, self.tracks):
            self.rows.writerow([item.end_us, *box.values()])

    def close(self) -> None:
        """Completes the file."""
        self.file.close()


class JsonLines:
    """A line per frame: {end_us, latency_ms, detections}. Each is flushed at once.

    Args:
        path: "-" for standard output; else a file, a pipe or a device that is written in place.
        tracks: detections have a track_id; -1: none.
    """

    def __init__(self, path: Path, classes: list[str], *, tracks: bool = False) -> None:
        self.classes = classes
        self.tracks = tracks
        if str(path) == STANDARD_OUTPUT:
            self.file = sys.stdout
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("w")

    def add(self, item: Detected) -> None:
        """Writes the detections of a frame."""
        frame = {
            "end_us": item.end_us,
            "latency_ms": round(item.latency_ms, 3),
            "detections": _readable(item.boxes, self.classes, self.tracks),
        }
        print(json.dumps(frame), file=self.file, flush=True)

    def close(self) -> None:
        """Completes the file."""
        if self.file is not sys.stdout:
            self.file.close()


def _readable(
    boxes: NDArray[np.void], classes: list[str], tracks: bool
) -> list[dict[str, float | int | str]]:
    """(k,) RAW_BOX -> JSON values: pixels to 2 digits, confidence to 4."""
    rows: list[dict[str, float | int | str]] = [
        {
            "x": round(float(box["x"]), 2),
            "y": round(float(box["y"]), 2),
            "w": round(float(box["w"]), 2),
            "h": round(float(box["h"]), 2),
            "class_id": int(box["class_id"]),
            "class": class_name(classes, int(box["class_id"])),
            "confidence": round(float(box["class_confidence"]), 4),
        }
        for box in boxes
    ]
    if tracks:
        for row, box in zip(rows, boxes, strict=True):
            row[TRACK] = -1 if box[TRACK] == NO_TRACK else int(box[TRACK])
    return rows
