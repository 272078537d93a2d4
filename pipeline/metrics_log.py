"""RUN/metrics.jsonl: the numbers of a run, one JSON object per line, for other programs.

A line is a logged training step or an evaluation:

    {"kind": "train", "step": 50, "epoch": 1.3, "loss": 12.3, ..., "time": 1764338400.0}
    {"kind": "evaluation", "step": 100, "epoch": 2.6, "ap": 0.31, ..., "time": 1764338460.0}

`time` is in seconds since 1970. Values that are not finite are null. A run that continues from a
checkpoint repeats the steps after it: their lines are removed first, so there is one line per kind
and step, in the order of the steps. A run that starts again (checkpoint.resume=false) removes the
lines of the one before.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evspan.conf.atomic_files import replace_file
from evspan.conf.json_files import JsonFileError, parse_json

METRICS = "metrics.jsonl"
MOST_BYTES = 256 << 20
TRAIN = "train"
EVALUATION = "evaluation"
logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes the file. A full disk is reported once; the run goes on without the lines.

    Args:
        run: the run's folder.
        enabled: whether this rank writes; rank 0 does.
        resume_step: of the checkpoint that the run continues from. Later lines are removed.
    """

    def __init__(self, run: Path, *, enabled: bool, resume_step: int = 0) -> None:
        self.path = run / METRICS
        self.enabled = enabled
        self._failed = False
        self._lines: dict[tuple[str, int], str] = {}  # of the file
        if enabled:
            self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        try:
            records = read_metrics(self.path.parent)
        except OSError as error:
            self._report(error)
            return
        for record in records:
            if record["step"] <= resume_step:
                self._lines[record["kind"], record["step"]] = json.dumps(record)
        if self.path.exists():
            self._rewrite()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; one of the same kind and step is replaced."""
        if not self.enabled:
            return
        record: dict[str, Any] = {"kind": kind, "step": step}
        for name, value in values.items():
            record[name] = value if math.isfinite(value) else None
        record["time"] = round(time.time(), 3)
        key = (kind, step)
        is_repeated = key in self._lines
        self._lines[key] = json.dumps(record)
        if is_repeated or self._failed:
            self._rewrite()
        else:
            self._append(self._lines[key] + "\n")

    def _append(self, line: str) -> None:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            self._report(error)
            return
        if written < len(line):
            self._failed = True  # the next line repairs the file

    def _rewrite(self) -> None:
        text = "".join(f"{line}\n" for line in self._lines.values())
        try:
            replace_file(self.path, text)
        except OSError as error:
            self._report(error)
        else:
            self._failed = False

    def _report(self, error: OSError) -> None:
        if not self._failed:
            logger.warning("%s could not be written; the run goes on: %s", self.path, error)
        self._failed = True


def read_metrics(run: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """The records of a run in their order, one per kind and step; [] without the file.

    Lines that are cut off or damaged are left out.

    Args:
        kind: only records of this kind, which saves parsing the others; all where it is empty.

    Raises:
        OSError: the file exists and cannot be read.
    """
    path = Path(run, METRICS)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for line in data.splitlines():
        if kind.encode() not in line:
            continue
        try:
            record = parse_json(line, str(path))
        except JsonFileError:
            continue
        if isinstance(record, dict) and _is_record(record) and kind in ("", record["kind"]):
            records[record["kind"], record["step"]] = record
    return list(records.values())


def _is_record(record: Mapping[str, Any]) -> bool:
    step = record.get("step")
    return record.get("kind") in (TRAIN, EVALUATION) and type(step) is int and step >= 0
