"""The metrics of a run's checkpoints, and the pointer `best` to the one with the highest AP.

A run may continue with another evaluation: another split, fewer recordings, other filters. `best`
compares the checkpoints whose evaluation is that of the newest one with an AP.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evspan.pipeline.checkpoint_files import (
    BEST,
    METRICS,
    DamagedError,
    FileSum,
    checkpoint_name,
    dump_with_checksum,
    read_meta,
    read_pointer,
    read_with_checksum,
    step_names,
    step_of,
    sum_of,
)

NOT_EVALUATED = -1.0  # lower than any AP
EVALUATION_ID = "evaluation_id"  # key of metrics.json, from `evaluation_id`


def comparable(first: str, second: str) -> bool:
    """Whether the APs of two evaluations can be compared.

    Args:
        first, second: EVALUATION_ID of their metrics; empty in those of an earlier version, which
            count as comparable with all others.
    """
    return not first or not second or first == second


class _Score(NamedTuple):
    """The AP of a checkpoint, NOT_EVALUATED without one, and the EVALUATION_ID of its metrics."""

    ap: float
    evaluation: str = ""

    @property
    def has_ap(self) -> bool:
        return self.ap > NOT_EVALUATED

    def is_comparable(self, other: "_Score") -> bool:
        return comparable(self.evaluation, other.evaluation)


class BestCheckpoint:
    """The metrics of the checkpoints in `folder`. Used by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def evaluated(self, step: int) -> bool:
        """Whether the checkpoint of `step` has intact metrics."""
        try:
            self._read_score(checkpoint_name(step))
        except DamagedError:
            return False
        return True

    def recorded(self, step: int) -> dict[str, Any]:
        """The metrics of the checkpoint of `step`; {} without intact ones."""
        if not self.evaluated(step):
            return {}
        metrics, _ = read_with_checksum(self.folder / checkpoint_name(step), METRICS)
        return metrics

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes metrics.json of the newest checkpoint; updates `best` where it has an AP.

        Args:
            metrics: JSON values; `ap` is a number or None.
        """
        name = checkpoint_name(step)
        write_file(self.folder / name / METRICS, dump_with_checksum({**metrics, "step": step}))
        if metrics["ap"] is None:
            return
        highest = self._highest(step_names(self.folder))
        if highest is not None and highest != read_pointer(self.folder / BEST):
            self._write(highest)

    def name(self) -> str | None:
        """The name of the checkpoint with the highest AP; None before the first evaluation."""
        names = step_names(self.folder)
        newest = self._newest(names)
        name = read_pointer(self.folder / BEST)
        if name is not None:
            score = self._score(name)
            if score.has_ap and score.is_comparable(newest):
                return name
        return self._highest(names)

    def repair(self, newest: str) -> list[str]:
        """Sets damaged metrics aside, and lets `best` name the highest AP that is left.

        Args:
            newest: the name of the newest checkpoint that counts.

        Returns:
            What was wrong, as parts of a sentence.
        """
        names = [name for name in step_names(self.folder) if step_of(name) <= step_of(newest)]
        notes = []
        for name in names:
            try:
                self._read_score(name)
            except DamagedError as error:
                if (self.folder / name / METRICS).exists():
                    aside = self.folder / name / f"damaged-{METRICS}"
                    os.replace(self.folder / name / METRICS, aside)
                    notes.append(
                        f"{name}/{METRICS} {error.problem}, is kept as {aside.name}, and the "
                        "checkpoint counts as not evaluated"
                    )
        stored = read_pointer(self.folder / BEST)
        highest = self._highest(names)
        if stored == highest:
            return notes
        problem = self._problem_of(stored, highest)
        if highest is None:
            (self.folder / BEST).unlink()
            return [*notes, f"{problem}; no checkpoint has an AP, and it is removed"]
        self._write(highest)
        return [*notes, f"{problem}; it now names {highest}"]

    def _problem_of(self, stored: str | None, highest: str | None) -> str:
        """What is wrong with `best`, which does not name `highest`."""
        if stored is None:
            return f"{BEST} is missing"
        if step_of(stored) < 0:
            return f"{BEST} contains {stored!r}, which is no name of a checkpoint"
        if not (self.folder / stored).is_dir():
            return f"{BEST} names {stored}, which is not there"
        if not (self.folder / stored / METRICS).exists():
            return f"{BEST} names {stored}, whose {METRICS} is missing"
        if not self._score(stored).is_comparable(self._score(highest)):
            return f"{BEST} names {stored}, whose evaluation is not that of the newest AP"
        return f"{BEST} names {stored}, which does not have the highest AP"

    def _highest(self, names: Sequence[str]) -> str | None:
        """The first step with the highest AP, of those with the evaluation of the newest AP.

        Args:
            names: the highest step first.
        """
        newest = self._newest(names)
        best = None
        best_ap = NOT_EVALUATED
        for name in reversed(names):
            score = self._score(name)
            if score.ap > best_ap and score.is_comparable(newest):
                best = name
                best_ap = score.ap
        return best

    def _newest(self, names: Sequence[str]) -> _Score:
        """The score of the newest checkpoint with an AP. names: the highest step first."""
        for name in names:
            score = self._score(name)
            if score.has_ap:
                return score
        return _Score(NOT_EVALUATED)

    def _score(self, name: str | None) -> _Score:
        """NOT_EVALUATED where a checkpoint has no AP, or no intact metrics."""
        try:
            return _Score(NOT_EVALUATED) if name is None else self._read_score(name)
        except DamagedError:
            return _Score(NOT_EVALUATED)

    def _read_score(self, name: str) -> _Score:
        """NOT_EVALUATED where the metrics have no AP.

        Raises:
            DamagedError: the metrics are missing or damaged.
        """
        folder = self.folder / name
        if step_of(name) < 0:
            raise DamagedError(self.folder, BEST, f"contains {name!r}")
        metrics, has_checksum = read_with_checksum(folder, METRICS)
        if not has_checksum and read_meta(folder).files is not None:
            raise DamagedError(folder, METRICS, "lacks its checksum")
        if metrics.get("step", step_of(name)) != step_of(name):
            raise DamagedError(folder, METRICS, f"is of step {metrics['step']}")
        ap = metrics.get("ap", "")
        evaluation = str(metrics.get(EVALUATION_ID, ""))
        if ap is None:
            return _Score(NOT_EVALUATED, evaluation)
        if isinstance(ap, bool) or not isinstance(ap, int | float) or math.isnan(ap):
            raise DamagedError(folder, METRICS, "has no AP")
        return _Score(float(ap), evaluation)

    def _write(self, name: str) -> None:
        write_file(self.folder / BEST, f"{name}\n".encode())


def write_file(path: Path, data: bytes) -> FileSum:
    """Replaces a small file as a whole."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(data)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
    return sum_of(data)


def fsync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
