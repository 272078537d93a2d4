"""Detections to files as they come, so that none are held: Prophesee's .npy, CSV, lines of JSON."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.pipeline.inference.detect import Detected, class_name
from numpy.typing import NDArray

COLUMNS = ("t_us", "x", "y", "w", "h", "class_id", "class", "confidence")


class DetectionsFile:
    """RAW_BOX rows of a .npy; its header, which tells how many, is renewed at the end."""

    def __init__(self, path: Path) -> None:
        self.file, self.rows = path.open("wb"), 0
        self._write_header()
        self.start = self.file.tell()

    def _write_header(self) -> None:
        about = {
            "descr": np.lib.format.dtype_to_descr(RAW_BOX),
            "fortran_order": False,
            "shape": (self.rows,),
        }
        np.lib.format.write_array_header_1_0(
            self.file, about
        )  # leaves room for the row count to grow

    def add(self, boxes: NDArray) -> None:
        self.file.write(boxes.tobytes())
        self.rows += boxes.size

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start
        self.file.close()


class CsvFile:
    """A line per detection, with COLUMNS: pixels of the sensor, times of the windows' ends."""

    def __init__(self, path: Path, classes: list[str]) -> None:
        self.file, self.classes = path.open("w", newline=""), classes
        self.rows = csv.writer(self.file)
        self.rows.writerow(COLUMNS)

    def add(self, item: Detected) -> None:
        for box in _readable(item.boxes, self.classes):
            self.rows.writerow([item.end_us, *box.values()])

    def close(self) -> None:
        self.file.close()


class JsonLines:
    """A line per frame, of {end_us, latency_ms, detections}, there as soon as the frame is done; path "-": on standard output."""

    def __init__(self, path: Path, classes: list[str]) -> None:
        self.classes = classes
        if str(path) != "-":
            path.parent.mkdir(parents=True, exist_ok=True)
        self.file = sys.stdout if str(path) == "-" else path.open("w")

    def add(self, item: Detected) -> None:
        found = _readable(item.boxes, self.classes)
        frame = {
            "end_us": item.end_us,
            "latency_ms": round(item.latency_ms, 3),
            "detections": found,
        }
        print(json.dumps(frame), file=self.file, flush=True)

    def close(self) -> None:
        if self.file is not sys.stdout:
            self.file.close()


def _readable(boxes: NDArray, classes: list[str]) -> list[dict[str, float | int | str]]:
    return [
        {
            **{k: round(float(box[k]), 2) for k in "xywh"},
            "class_id": int(box["class_id"]),
            "class": class_name(classes, int(box["class_id"])),
            "confidence": round(float(box["class_confidence"]), 4),
        }
        for box in boxes
    ]
