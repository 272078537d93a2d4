"""The charts of the report page: what each one shows, as SVG."""

from itertools import pairwise

import numpy as np
from evspan.data_prep.report.number_format import count, percent, short
from evspan.data_prep.report.plots import (
    band_over_time,
    grouped_bars,
    histogram,
    over_time,
    round_ticks,
    sparkline,
)
from evspan.data_prep.report.survey import SIDE_EDGES, RecordingStats, Survey, evenly
from markupsafe import Markup
from numpy.typing import NDArray

MAX_RECORDING_CHARTS = 12  # --recording shows the others
MIN_RECORDINGS_FOR_BAND = 3
BAND_POINTS = 120
BAND_QUANTILES = (0.1, 0.5, 0.9)
# Indices of SIDE_EDGES (16 and 128 pixels) that the chart of box sizes covers at least.
FIRST_SIDE = 16
LAST_SIDE = 28


def class_chart(survey: Survey) -> Markup | None:
    """Classes by their fraction of each split's boxes; None without boxes."""
    if not survey.summary().per_class.sum():
        return None
    classes = survey.manifest.classes
    series = []
    tips = []
    for split in survey.splits:
        boxes = survey.summary(split).per_class
        fractions = boxes / max(1, boxes.sum())
        series.append((f"bar {split}", (100 * fractions).tolist()))
        tips.append(
            [
                f"{split}, {name}: {count(number)} boxes, {percent(fraction)}"
                for name, number, fraction in zip(classes, boxes, fractions, strict=True)
            ]
        )
    return grouped_bars(
        classes,
        series,
        tips,
        name="classes by split",
        x_label="fraction of the split's boxes, %",
    )


def size_chart(survey: Survey) -> Markup | None:
    """Boxes by the square root of their area; None without boxes."""
    boxes = survey.summary().per_side
    nonzero = np.flatnonzero(boxes)
    if not nonzero.size:
        return None
    first = min(int(nonzero[0]), FIRST_SIDE)
    last = max(int(nonzero[-1]), LAST_SIDE)
    values = boxes[first : last + 1].tolist()
    edges = np.log2(SIDE_EDGES[first : last + 2]).tolist()
    tips = [
        f"{2**low:.3g} to {2**high:.3g} pixels: {count(value)} boxes"
        for (low, high), value in zip(pairwise(edges), values, strict=True)
    ]
    octaves = range(int(np.ceil(edges[0])), int(edges[-1]) + 1)
    return histogram(
        edges,
        values,
        tips,
        name="boxes by size",
        x_label="square root of the area, pixels of the stored frames",
        y_label="boxes",
        x_ticks=[(float(octave), f"{2**octave:g}") for octave in octaves],
        marks=[(5.0, "medium from 32²"), (float(np.log2(96)), "large from 96²")],
    )


def charted_recordings(survey: Survey) -> list[RecordingStats]:
    """The recordings that get a chart of events over time: evenly spaced, and with frames."""
    indices = evenly(np.arange(len(survey.recordings)), MAX_RECORDING_CHARTS).tolist()
    recordings = [survey.recordings[i] for i in indices]
    return [recording for recording in recordings if recording.curve.events.size]


def recording_chart(recording: RecordingStats, highest_rate: float) -> Markup:
    """Events per second and labelled frames of a recording over time."""
    curve = recording.curve
    tips = []
    for i, rate in enumerate(curve.rate.tolist()):
        tips.append(
            f"{curve.edges_s[i]:.2f} to {curve.edges_s[i + 1]:.2f} s: {short(rate)} events/s, "
            f"{curve.labelled[i]} of {curve.frames[i]} frames labelled"
        )
    return over_time(
        curve.edges_s,
        curve.rate,
        curve.labelled / curve.frames,
        tips,
        name=f"events per second of {recording.key}",
        y_max=highest_rate,
    )


def band_chart(survey: Survey) -> Markup | None:
    """Events per second over all recordings: the median and the middle 80 % at every time.

    None where there are too few recordings.
    """
    curves = [r.curve for r in survey.recordings if r.curve.events.size]
    if len(curves) < MIN_RECORDINGS_FOR_BAND:
        return None
    longest_s = max(float(curve.edges_s[-1]) for curve in curves)
    times = (np.arange(BAND_POINTS) + 0.5) * longest_s / BAND_POINTS
    rates = np.full((len(curves), times.size), np.nan)
    for row, curve in zip(rates, curves, strict=True):
        interval = np.searchsorted(curve.edges_s, times, side="right") - 1
        inside = (interval >= 0) & (interval < curve.events.size)
        row[inside] = curve.rate[interval[inside]]
    covered = ~np.isnan(rates).all(axis=0)
    times = times[covered]
    rates = rates[:, covered]
    low, middle, high = np.nanquantile(rates, BAND_QUANTILES, axis=0)
    return band_over_time(
        times,
        low,
        middle,
        high,
        _band_tips(times, rates, low, middle, high),
        name="events per second over all recordings",
    )


def _band_tips(
    times: NDArray[np.float64],
    rates: NDArray[np.float64],
    low: NDArray[np.float64],
    middle: NDArray[np.float64],
    high: NDArray[np.float64],
) -> list[str]:
    num_recordings = np.count_nonzero(~np.isnan(rates), axis=0)
    return [
        f"{times[i]:.2f} s: {short(middle[i])} events/s in the middle recording of "
        f"{num_recordings[i]}, 80 % of them between {short(low[i])} and {short(high[i])}"
        for i in range(times.size)
    ]


def count_chart(survey: Survey) -> Markup | None:
    """Cells of the decoded frames by their count; None where all are zero."""
    counts = survey.summary().counts
    cutoff = survey.cutoff
    nonzero = int(counts[1:].sum())
    if not nonzero:
        return None
    percents = (100 * counts[1 : cutoff + 1] / nonzero).tolist()
    tips = []
    for value, cells_percent in enumerate(percents, 1):
        tip = f"{count(counts[value])} cells count {value}"
        if value == cutoff:
            tip += " (the cutoff: that many or more)"
        tips.append(f"{tip}: {cells_percent:.3g} %")
    ticks: list[float] = list(range(1, cutoff + 1))
    if cutoff > 20:
        ticks = [*round_ticks(cutoff)[1:-1], cutoff]
    return histogram(
        [value + 0.5 for value in range(cutoff + 1)],
        percents,
        tips,
        name="cells by their count",
        unit=" %",
        x_label="events that a cell counts",
        y_label="fraction of the cells with events",
        x_ticks=[(float(value), f"{value:g}") for value in ticks],
        highlight_last=True,
    )


def rate_sparkline(recording: RecordingStats) -> Markup:
    """Events per second of a recording over time, without axes."""
    rate = recording.curve.rate
    highest = short(float(rate.max(initial=0)))
    return sparkline(rate, f"events per second of {recording.key}, up to {highest}")
