"""What the runs of a report used their time for: columns, a sentence, JSON and bars."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evspan.conf.errors import one_line
from evspan.launch.sweep.registry import Run, format_duration
from evspan.launch.sweep.state import State
from evspan.pipeline.time_use import RunNow, TimeUse, read_time_use, total_of

QUEUE = "queue"
HUES = {  # of a bar's segments, in degrees; None: grey
    QUEUE: None,
    "start-up": 45,
    "training": 145,
    "data wait": 25,
    "exchange": 200,
    "evaluation": 265,
    "saving": 225,
    "images": 300,
    "repeated steps": 335,
    "idle after failures": 0,
    "ending": 75,
}
LEAST_FRACTION = 0.0005  # a smaller part is left out of the sentence


def run_time_use(run: Run) -> tuple[TimeUse, str]:
    """The time of a run until now, and why its records cannot be read (may be empty)."""
    queued = None
    if run.alive and run.state in (State.waiting, State.requeued):
        queued = _queued_since(run)
    run_now = RunNow(
        now=time.time(),
        is_running=run.state is State.running,
        queued=queued,
        signs=[event["time"] for event in run.events if event["event"] != "submitted"],
    )
    try:
        return read_time_use(run.folder, run_now), ""
    except OSError as error:
        return TimeUse(), f"its times cannot be read: {one_line(error)}"


def _queued_since(run: Run) -> float | None:
    """When the run was submitted or requeued last; None if its history does not contain it."""
    times = [e["time"] for e in run.events if e["event"] in ("submitted", "requeued")]
    return max(times, default=None)


def hours_name(use: TimeUse) -> str:
    """The unit of `TimeUse.rank_hours`."""
    return "GPU-hours" if use.gpu else "rank-hours"


def ap_per_hour(use: TimeUse, best_ap: float | None) -> float | None:
    """AP (0 to 1) per GPU-hour, or per rank-hour on CPUs."""
    if best_ap is None or not use.rank_hours:
        return None
    return best_ap / use.rank_hours


class TimeCells(NamedTuple):
    """The columns of a run on its time, as numbers. None: not known."""

    goodput: float | None
    rank_hours: float | None
    ap_per_hour: float | None


def time_cells(use: TimeUse, best_ap: float | None) -> TimeCells:
    """The values under `time_headings`."""
    hours = use.rank_hours if use.allocated_s else None
    return TimeCells(use.goodput, hours, ap_per_hour(use, best_ap))


def time_headings(uses: Sequence[TimeUse]) -> list[str]:
    """The names of the columns of `TimeCells`; none if no run has records of its time."""
    if not any(use.allocated_s for use in uses):
        return []
    unit = hours_name(total_of(uses))
    return ["goodput", unit, f"AP per {unit.removesuffix('s')}"]


def time_texts(cells: TimeCells) -> list[str]:
    """The columns as text; empty where a value is not known."""
    goodput = "" if cells.goodput is None else f"{100 * cells.goodput:.1f} %"
    hours = "" if cells.rank_hours is None else f"{cells.rank_hours:.3g}"
    rate = "" if cells.ap_per_hour is None else f"{cells.ap_per_hour:.3g}"
    return [goodput, hours, rate]


def time_sentence(use: TimeUse, best_ap: float | None) -> str:
    """One line: the allocated time, its parts, goodput. Empty if nothing was allocated.

    best_ap: of all runs.
    """
    if use.goodput is None:
        return ""
    parts = []
    for name, seconds in use.groups().items():
        fraction = seconds / use.allocated_s
        if fraction >= LEAST_FRACTION:
            parts.append(f"{name} {100 * fraction:.1f} %")
    sentence = (
        f"allocated {format_duration(use.allocated_s)} ({use.rank_hours:.3g} {hours_name(use)}): "
        f"{', '.join(parts)}. Goodput {100 * use.goodput:.1f} %; queue "
        f"{format_duration(use.queue_s)}"
    )
    rate = ap_per_hour(use, best_ap)
    if rate is not None:
        sentence += f"; best AP {rate:.3g} per {hours_name(use).removesuffix('s')}"
    return sentence


def time_as_json(use: TimeUse, best_ap: float | None) -> dict[str, Any]:
    """The time of a run, or of all, as `evspan report --json` prints it."""
    return {
        "queue_s": round(use.queue_s, 3),
        "allocated_s": round(use.allocated_s, 3),
        "goodput": use.goodput,
        "rank_hours": use.rank_hours,
        "ranks_are_gpus": use.gpu,
        "ap_per_rank_hour": ap_per_hour(use, best_ap),
        "parts_s": {part.value: round(seconds, 3) for part, seconds in use.seconds.items()},
    }


# -- bars ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Segment:
    """A part of a bar. percent: of the longest bar. colour: CSS declaration."""

    name: str
    seconds: float
    percent: float
    colour: str


@dataclass(frozen=True)
class TimeBar:
    """The bar of a run: its time in the queue, then its allocated time by part."""

    name: str
    use: TimeUse
    segments: list[Segment]


def time_bars(names: Sequence[str], uses: Sequence[TimeUse]) -> list[TimeBar]:
    """A bar for each run that has had nodes or waits for them. names: of the runs."""
    longest_s = max((use.queue_s + use.allocated_s for use in uses), default=0.0)
    bars = []
    for name, use in zip(names, uses, strict=True):
        if use.queue_s + use.allocated_s > 0:
            bars.append(TimeBar(name, use, _segments(use, longest_s)))
    return bars


def _segments(use: TimeUse, longest_s: float) -> list[Segment]:
    segments = []
    for name, seconds in {QUEUE: use.queue_s, **use.groups()}.items():
        if seconds > 0:
            segments.append(Segment(name, seconds, 100 * seconds / longest_s, part_colour(name)))
    return segments


def part_colour(name: str) -> str:
    """The CSS declaration of the colour of a part."""
    hue = HUES[name]
    colour = "hsl(0 0% 60%)" if hue is None else f"hsl({hue} 55% 50%)"
    return f"--part:{colour}"
