"""The report as HTML: one file that needs no network, light and dark, for the screen and for paper.

The template is `templates/dataset.html`; this module computes the values that it shows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from evspan.conf.text import plural
from evspan.data_prep.report import charts
from evspan.data_prep.report.number_format import count, decimals, duration, percent, short
from evspan.data_prep.report.survey import Summary, Survey
from evspan.data_prep.report.templating import Column, KeyFigure, report_environment
from numpy.typing import NDArray

# Reasons among the dropped events whose events are kept, with corrected times.
CORRECTED = ("late_timestamps_raised", "late_by_1_ms_or_more")
# The filter behind a count of dropped boxes: a key of dataset.labels.
FILTER_KEYS = {
    "boxes_between_labelled_frames": "label_every_ms",
    "boxes_off_the_windows": "label_every_ms",
    "boxes_outside_the_sensor": "crop",
    "boxes_under_min_side": "min_side",
    "boxes_under_min_diagonal": "min_diagonal",
    "boxes_over_max_width": "max_width_fraction",
}
SIZES = ("small", "medium", "large")


class Measure(NamedTuple):
    """A column of the tables by split and by recording."""

    title: str
    value: Callable[[Summary], float | None]
    form: Callable[[float], str]


class ClassRow(NamedTuple):
    """A row of the table of classes: numbers of boxes."""

    name: str
    per_split: list[int]
    boxes: int
    fraction: float | None
    per_size: list[int]


class DropRow(NamedTuple):
    """A row of the tables of what was kept and dropped."""

    reason: str
    note: str
    number: int
    fraction: float


def _events_dropped(summary: Summary) -> int:
    dropped = summary.dropped("dropped_events")
    return sum(number for reason, number in dropped.items() if reason not in CORRECTED)


def _frame_kilobytes(summary: Summary) -> float | None:
    return None if summary.frame_bytes is None else summary.frame_bytes / 1000


MEASURES = [
    Measure("seconds", lambda s: s.seconds, decimals(1)),
    Measure("frames", lambda s: s.total("frames"), count),
    Measure("labelled", lambda s: s.total("labelled_frames"), count),
    Measure("fraction labelled", lambda s: s.labelled_fraction, percent),
    Measure("labels/s", lambda s: s.label_rate, decimals(2)),
    Measure("without boxes", lambda s: s.negatives, count),
    Measure("boxes", lambda s: s.total("boxes"), count),
    Measure("boxes dropped", lambda s: sum(s.dropped("dropped_boxes").values()), count),
    Measure("events", lambda s: s.total("events"), short),
    Measure("events/s", lambda s: s.event_rate, short),
    Measure("events dropped", _events_dropped, count),
    Measure("frames empty", lambda s: s.empty_fraction, percent),
    Measure("at cutoff", lambda s: s.saturated_fraction, percent),
    Measure("kB/frame", _frame_kilobytes, decimals(1)),
]
MEASURE_COLUMNS = [Column(measure.title) for measure in MEASURES]


def page(survey: Survey, warnings: list[str]) -> Iterator[str]:
    """Yields the text of the page, part by part, so that all images are never one string."""
    template = report_environment().get_template("dataset.html")
    name = survey.root.resolve().name
    yield from template.generate(
        title=f"{name}: dataset report",
        name=name,
        about=_about(survey),
        survey=survey,
        summary=survey.summary(),
        warnings_title=f"{plural(len(warnings), 'thing')} to look at",
        warning_sentences=warnings,
        charts=charts,
        figures=_key_figures(survey) if survey.recordings else [],
        measures=MEASURES,
        columns=_columns(survey),
        class_rows=_class_rows(survey) if survey.recordings else [],
        box_drops=_box_drops(survey),
        event_drops=_event_drops(survey),
        one_recording=lambda recording: Summary([recording], survey.cutoff),
        highest_rate=_highest_rate,
        plural=plural,
    )


def _about(survey: Survey) -> str:
    frames = survey.manifest.config["frames"]
    sizes = sorted({f"{r.entry.width} x {r.entry.height}" for r in survey.recordings})
    parts = [
        survey.manifest.config.get("dataset", {}).get("name", ""),
        f"frames of {', '.join(sizes)} pixels" if sizes else "no frames",
        f"mode {frames['mode']}",
        f"{frames['window_ms']} ms in {frames['bins']} bins",
        f"cutoff {frames['cutoff']}",
        f"downsampled by {frames['downsample']}",
        f"{len(survey.manifest.classes)} classes",
    ]
    return " · ".join(part for part in parts if part)


def _key_figures(survey: Survey) -> list[KeyFigure]:
    summary = survey.summary()
    splits = plural(len(survey.splits), "split")
    frame_kilobytes = _frame_kilobytes(summary) or 0
    labelled = percent(summary.labelled_fraction or 0)
    boxes_per_frame = summary.total("boxes") / max(1, summary.total("labelled_frames"))
    return [
        KeyFigure(
            "recordings",
            count(len(summary.recordings)),
            f"{duration(summary.seconds)} in {splits}",
        ),
        KeyFigure(
            "frames", count(summary.total("frames")), f"{frame_kilobytes:.1f} kB each, stored"
        ),
        KeyFigure(
            "labelled frames",
            count(summary.total("labelled_frames")),
            f"{labelled} of frames, {summary.label_rate or 0:.2f} a second",
        ),
        KeyFigure(
            "boxes", count(summary.total("boxes")), f"{boxes_per_frame:.2f} on a labelled frame"
        ),
        KeyFigure(
            "events",
            short(summary.total("events")),
            f"{short(summary.event_rate or 0)} a second",
        ),
        KeyFigure(
            "frames without events",
            percent(summary.empty_fraction or 0),
            f"{count(summary.empty_frames)} frames",
        ),
    ]


def _columns(survey: Survey) -> dict[str, list[Column]]:
    """The heads of every table."""
    class_columns = [*survey.splits, "boxes", "fraction", *SIZES]
    drop_columns = [
        Column("", numeric=False),
        Column("number"),
        Column("fraction"),
        Column("", numeric=False),
    ]
    return {
        "splits": [Column("split", numeric=False), Column("recordings"), *MEASURE_COLUMNS],
        "classes": [Column("class", numeric=False), *map(Column, class_columns)],
        "drops": drop_columns,
        "recordings": [
            Column("recording", numeric=False),
            Column("split", numeric=False),
            Column("events over time"),
            *MEASURE_COLUMNS,
            *map(Column, survey.manifest.classes),
        ],
    }


def _class_rows(survey: Survey) -> list[ClassRow]:
    """A row of each class, and the total."""
    per_split = [survey.summary(split).per_class for split in survey.splits]
    total = survey.summary().per_class
    per_size = survey.summary().per_size
    rows = []
    for class_id, name in enumerate(survey.manifest.classes):
        rows.append(
            ClassRow(
                name,
                [int(boxes[class_id]) for boxes in per_split],
                int(total[class_id]),
                float(total[class_id] / max(1, total.sum())),
                _integers(per_size[class_id]),
            )
        )
    rows.append(
        ClassRow(
            "total",
            [int(boxes.sum()) for boxes in per_split],
            int(total.sum()),
            1.0 if total.sum() else None,
            _integers(per_size.sum(axis=0)),
        )
    )
    return rows


def _integers(array: NDArray[np.int64]) -> list[int]:
    return [int(value) for value in array]


def _box_drops(survey: Survey) -> list[DropRow]:
    """Boxes that were kept, then those dropped by reason, the most frequent first."""
    labels = survey.manifest.config.get("dataset", {}).get("labels", {})
    notes = {
        reason: f"{key} = {labels[key]}" for reason, key in FILTER_KEYS.items() if key in labels
    }
    kept = survey.summary().total("boxes")
    dropped = survey.summary().dropped("dropped_boxes")
    return _drop_rows(kept, dropped, kept + sum(dropped.values()), notes)


def _event_drops(survey: Survey) -> list[DropRow]:
    """Events that were kept, then those dropped by reason, the most frequent first."""
    summary = survey.summary()
    kept = summary.total("events")
    notes = dict.fromkeys(CORRECTED, "kept, their time corrected")
    total = kept + _events_dropped(summary)
    return _drop_rows(kept, summary.dropped("dropped_events"), total, notes)


def _drop_rows(
    kept: int, dropped: dict[str, int], total: int, notes: dict[str, str]
) -> list[DropRow]:
    rows = [DropRow("kept", "", kept, kept / max(1, total))]
    for reason, number in sorted(dropped.items(), key=lambda item: -item[1]):
        readable = reason.removeprefix("boxes_").replace("_", " ")
        rows.append(DropRow(readable, notes.get(reason, ""), number, number / max(1, total)))
    return rows


def _highest_rate(survey: Survey) -> float:
    """The highest rate of the recordings with a chart: their charts share one scale."""
    rates = [r.curve.rate.max(initial=0) for r in charts.charted_recordings(survey)]
    return float(max(rates, default=0))
