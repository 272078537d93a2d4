"""Reads scalar curves from a run's TensorBoard event files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from evspan.launch.sweep.report.event_files import EventFile, Point, read_event_file

EVENT_FOLDER = "tensorboard"  # in the run folder


@dataclass
class Curve:
    """The scalars of one tag.

    Attributes:
        points: the valid ones: a step that a later attempt computed again counts once.
        all_points: also those that a later attempt replaced.
    """

    points: list[Point] = field(default_factory=list)
    all_points: list[Point] = field(default_factory=list)


class Curves(NamedTuple):
    """The curves of a run by tag, and what could not be read of its event files (may be empty)."""

    by_tag: dict[str, Curve]
    problem: str


def read_curves(run: Path, tags: Sequence[str]) -> Curves:
    """The curves of these tags. Damaged records and the half-written end of a file are skipped."""
    curves = {tag: Curve() for tag in tags}
    problems: list[str] = []
    for path in _event_files(run / EVENT_FOLDER, problems):
        try:
            contents = read_event_file(path, tags)
        except OSError as error:
            problems.append(f"{path.name}: {error.strerror or error}")
            continue
        if contents.problem():
            problems.append(f"{path.name}: {contents.problem()}")
        for tag, curve in curves.items():
            _extend(curve, contents, tag)
    return Curves(curves, "; ".join(problems))


def _event_files(folder: Path, problems: list[str]) -> list[Path]:
    """The event files of a run, in the order of their attempts."""
    try:
        return sorted(folder.glob("*tfevents*"))
    except OSError as error:
        problems.append(f"{folder.name}: {error.strerror or error}")
        return []


def _extend(curve: Curve, contents: EventFile, tag: str) -> None:
    """Adds the points of a file. An attempt starts at its step: later steps are computed again."""
    points = contents.points[tag]
    curve.all_points += [point for _, point in points]
    first = 0
    for position, step in contents.starts:
        end = first
        while end < len(points) and points[end][0] < position:
            end += 1
        curve.points += [point for _, point in points[first:end]]
        curve.points = [point for point in curve.points if point.step < step]
        first = end
    curve.points += [point for _, point in points[first:]]
