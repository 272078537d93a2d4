"""Compares the times of labels with the span of the recording: wrong units, shifted clocks."""

from typing import NamedTuple

import numpy as np
from evspan.conf.schema.prep import LabelConfig, TimeUnit
from numpy.typing import NDArray

SHORTEST_SPAN = 0.01  # of the recording that labels span at least
MOST_OUTSIDE = 0.05  # of the boxes that lie outside the recording at most
FARTHEST_OUTSIDE_US = 500_000  # a label lies outside at most; EVT3's clock is off by up to 16.8 s
PLAUSIBLE_US = (1_000, 60_000_000)  # time between neighbouring labels
UNITS = (("ms", 1e3), ("s", 1e6), ("ns", 1e-3))  # name, and microseconds
RARELY_BELOW_US = 5_000  # time between neighbouring labels; of labels in ms it looks like less
REMEDY = "evspan prep preview shows them on the events"


class Span(NamedTuple):
    """A span of time in microseconds, both ends included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """Microseconds from the first moment to the last."""
        return self.last - self.first

    def __str__(self) -> str:
        return f"from {self.first} to {self.last} us"


def clock_problem(t: NDArray[np.int64], recording: Span, config: LabelConfig) -> str:
    """What does not fit between the times of labels and a recording; empty where all does.

    Labels do not fit where they span less than 1 % of the recording, where more than 5 % of the
    boxes lie outside or one lies more than 0.5 s outside, or where they follow each other in less
    than 1 ms or more than a minute.

    Args:
        t: (N,) times of all boxes in microseconds, sorted, as `config` corrects them.
        recording: the times of its first and last event.

    Returns:
        One line: the numbers, the likely cause and the remedy.
    """
    if not t.size:
        return ""
    labels = Span(int(t[0]), int(t[-1]))
    problems = _problems(t, labels, recording)
    if not problems:
        return ""
    return (
        f"labels {labels}, events {recording}: {' and '.join(problems)}. Do they belong together, "
        f"and to one clock? {_cause(np.unique(t), recording, config)}"
    )


def _problems(t: NDArray[np.int64], labels: Span, recording: Span) -> list[str]:
    problems = []
    times = np.unique(t)
    outside = int(np.count_nonzero((t < recording.first) | (t > recording.last)))
    farthest = max(recording.first - labels.first, labels.last - recording.last)
    if outside > MOST_OUTSIDE * t.size or farthest > FARTHEST_OUTSIDE_US:
        share = f"{outside} of {t.size} boxes ({outside / t.size:.0%})"
        problems.append(f"{share} lie outside, by up to {farthest / 1e6:.3g} s")
    if times.size < 2:
        return problems
    fraction = labels.length / max(1, recording.length)
    if fraction < SHORTEST_SPAN:
        problems.append(f"the labels span {fraction:.2%} of the recording")
    interval = _interval(times)
    if not PLAUSIBLE_US[0] <= interval <= PLAUSIBLE_US[1]:
        problems.append(f"there is a label every {interval:g} us")
    return problems


def _interval(times: NDArray[np.int64]) -> float:
    return float(np.median(np.diff(times))) if times.size > 1 else 0.0


def _cause(times: NDArray[np.int64], recording: Span, config: LabelConfig) -> str:
    """The likely cause and its remedy. times: (L,) of labels, increasing."""
    labels = Span(int(times[0]), int(times[-1]))
    is_rate_usual = times.size < 2 or RARELY_BELOW_US <= _interval(times) <= PLAUSIBLE_US[1]
    if _is_similar(labels, recording):
        return _shift(labels, recording, config.offset_us)
    in_file = times - config.offset_us  # in microseconds, without the offset
    for name, factor in UNITS:
        scaled = Span(int(in_file[0] * factor), int(in_file[-1] * factor))
        if not (_is_similar(scaled, recording) and _is_inside(scaled, recording)):
            continue
        if is_rate_usual and name == "ms":
            return (
                "The recording's times are likely in ns, 1000 times as large as in us: convert "
                "the recording's times to us"
            )
        if config.time_unit is not TimeUnit.us:
            return f"dataset.labels.time_unit={config.time_unit.name} is likely wrong"
        return (
            f"The label times are likely in {name}, not in us: set dataset.labels.time_unit={name}"
        )
    return REMEDY


def _is_similar(labels: Span, recording: Span) -> bool:
    """Whether labels of this length could be those of a recording of that length."""
    least = 10 * SHORTEST_SPAN * recording.length
    return least <= labels.length <= (1 + MOST_OUTSIDE) * recording.length


def _is_inside(labels: Span, recording: Span) -> bool:
    tolerance = MOST_OUTSIDE * recording.length
    begins = labels.first >= recording.first - tolerance
    return begins and labels.last <= recording.last + tolerance


def _shift(labels: Span, recording: Span, offset_us: int) -> str:
    """The shift that brings all labels into the recording. offset_us: what is added already."""
    least = recording.first - labels.first
    most = max(least, recording.last - labels.last)
    if least <= recording.first <= most and not offset_us:
        return (
            "The labels likely count from the recording's first event: set "
            f"dataset.labels.offset_us={recording.first}, or, where other recordings begin at "
            "other times, add to each box file's times its recording's first"
        )
    return (
        "The two clocks are likely shifted: dataset.labels.offset_us from "
        f"{offset_us + least} to {offset_us + most} brings all labels inside; it is the moment "
        "on the recording's clock at which the labels' clock is 0"
    )
