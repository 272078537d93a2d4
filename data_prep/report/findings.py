"""Warnings about a dataset, as sentences, for a researcher who is about to train on it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from evspan.conf.text import plural
from evspan.data_prep.labels.checks import grouped
from evspan.data_prep.report.number_format import percent
from evspan.data_prep.report.survey import RecordingStats, Survey

# Fractions above which a warning is given.
EMPTY_FRAMES = 0.1
SATURATED = 0.05
BOXES_DROPPED = 0.05
BOXES_OF_OTHER_CLASSES = 0.5  # a class map leaves classes out on purpose
EVENTS_OUTSIDE = 0.001
TIMESTAMPS_LATE = 0.01
RARE_CLASS = 0.01  # below this fraction of a split's boxes
RATE_FACTOR = 10.0  # times the median of events per second, either way
THINNED = "boxes_between_labelled_frames"


class _Affected(NamedTuple):
    """A recording and the fraction of it that a warning is about."""

    key: str
    fraction: float


def findings(survey: Survey) -> list[str]:
    """Returns one sentence per finding, the most severe first."""
    if not survey.recordings:
        return ["The dataset holds no recordings."]
    checks: tuple[Callable[[Survey], Iterator[str]], ...] = (
        _missing_split,
        _duplicates,
        _frame_sizes,
        _without_labels,
        _doubtful_labels,
        _classes,
        _empty_frames,
        _events_dropped,
        _event_rates,
        _saturation,
        _boxes_dropped,
    )
    return [sentence for check in checks for sentence in check(survey)]


def some(names: Iterable[str], most: int = 4) -> str:
    """'a, b, c, d and 7 more'."""
    listed = list(names)
    text = ", ".join(listed[:most])
    if len(listed) > most:
        text += f" and {len(listed) - most} more"
    return text


def _missing_split(survey: Survey) -> Iterator[str]:
    if survey.selection:
        return
    has_train = "train" in survey.splits
    has_val = "val" in survey.splits
    if has_val and not has_train:
        yield "There is no split train: nothing to train on."
    if has_train and not has_val:
        yield "There is no split val: nothing to score training with."
    # Without both it is a test set, which is no mistake.


def _duplicates(survey: Survey) -> Iterator[str]:
    by_digest: dict[str, list[RecordingStats]] = defaultdict(list)
    for recording in survey.recordings:
        if recording.entry.source_xxh3:
            by_digest[recording.entry.source_xxh3].append(recording)
    for copies in by_digest.values():
        if len(copies) == 1:
            continue
        sentence = f"{some(copy.key for copy in copies)} are the same recording"
        splits = {copy.entry.split for copy in copies}
        if len(splits) > 1:
            sentence += ", in different splits: scores will be too high"
        yield f"{sentence}."


def _frame_sizes(survey: Survey) -> Iterator[str]:
    keys_by_size: dict[str, list[str]] = defaultdict(list)
    for recording in survey.recordings:
        size = f"{recording.entry.width} x {recording.entry.height}"
        keys_by_size[size].append(recording.key)
    if len(keys_by_size) == 1:
        return
    most_common_first = sorted(keys_by_size.items(), key=lambda item: -len(item[1]))
    sizes = "; ".join(f"{size}: {some(keys, 2)}" for size, keys in most_common_first)
    yield f"Frames are of {len(keys_by_size)} sizes ({sizes}); a model is trained on one."


def _without_labels(survey: Survey) -> Iterator[str]:
    for split in survey.splits:
        entries = [recording.entry for recording in survey.summary(split).recordings]
        unlabelled = [e.name for e in entries if not e.labelled_frames]
        if unlabelled:
            yield (
                f"{plural(len(unlabelled), 'recording')} of {len(entries)} in {split} "
                f"without labels: {some(unlabelled)}."
            )
        no_boxes = [e.name for e in entries if e.labelled_frames and not e.boxes]
        if no_boxes:
            yield (
                f"{plural(len(no_boxes), 'recording')} of {len(entries)} in {split} "
                f"labelled, but without a single box: {some(no_boxes)}."
            )


def _doubtful_labels(survey: Survey) -> Iterator[str]:
    warnings = [(r.key, r.entry.event_warnings) for r in survey.recordings]
    warnings += [(r.key, r.entry.label_warnings) for r in survey.recordings]
    for line in grouped(warnings):
        yield f"{line}."


def _classes(survey: Survey) -> Iterator[str]:
    totals = dict(zip(survey.manifest.classes, survey.summary().per_class.tolist(), strict=True))
    if not any(totals.values()):
        yield "There are no boxes."
        return
    for name, total in totals.items():
        if not total:
            yield f"There are no boxes of class {name}."
    existing = [name for name, total in totals.items() if total]
    for split in survey.splits:
        yield from _classes_of_split(survey, split, existing)


def _classes_of_split(survey: Survey, split: str, existing: list[str]) -> Iterator[str]:
    """existing: the classes that have boxes in some split."""
    counts = dict(
        zip(survey.manifest.classes, survey.summary(split).per_class.tolist(), strict=True)
    )
    total = sum(counts.values())
    if not total:
        return  # reported as recordings without labels
    for name in existing:
        count = counts[name]
        if not count:
            yield f"{split} has no boxes of class {name}."
        elif count < RARE_CLASS * total:
            boxes = "1 box" if count == 1 else f"{count} boxes"
            yield f"In {split}, class {name} has {boxes} of {total} ({percent(count / total)})."


def _affected_recordings(
    recordings: Iterable[_Affected], threshold: float, what: str
) -> Iterator[str]:
    """One sentence about all recordings above the threshold, the worst first."""
    affected = [recording for recording in recordings if recording.fraction > threshold]
    if not affected:
        return
    affected.sort(key=lambda recording: (-recording.fraction, recording.key))
    listed = some(f"{key} ({percent(fraction)})" for key, fraction in affected)
    yield f"{plural(len(affected), 'recording')} with many {what}: {listed}."


def _empty_frames(survey: Survey) -> Iterator[str]:
    fractions = [
        _Affected(recording.key, recording.empty_frames / max(1, recording.entry.frames))
        for recording in survey.recordings
    ]
    yield from _affected_recordings(fractions, EMPTY_FRAMES, "frames without events")


def _events_dropped(survey: Survey) -> Iterator[str]:
    outside = []
    late = []
    for recording in survey.recordings:
        dropped = recording.entry.dropped_events
        kept = recording.entry.events
        num_outside = dropped.get("outside_sensor", 0)
        num_late = dropped.get("late_timestamps_raised", 0) + dropped.get("time_spikes", 0)
        outside.append(_Affected(recording.key, num_outside / max(1, num_outside + kept)))
        late.append(_Affected(recording.key, num_late / max(1, kept)))
    yield from _affected_recordings(
        outside, EVENTS_OUTSIDE, "events outside the sensor, which were dropped"
    )
    yield from _affected_recordings(
        late, TIMESTAMPS_LATE, "timestamps that ran backwards or were far ahead"
    )


def _event_rates(survey: Survey) -> Iterator[str]:
    rates = {r.key: r.entry.events / r.seconds for r in survey.recordings if r.seconds > 0}
    if len(rates) < 3:
        return
    median = float(np.median(list(rates.values())))
    ascending = sorted(rates.items(), key=lambda item: item[1])
    low = [_in_millions(key, rate) for key, rate in ascending if rate < median / RATE_FACTOR]
    high = [_in_millions(key, rate) for key, rate in ascending if rate > median * RATE_FACTOR]
    median_text = f"the median of {median / 1e6:.3g} M"
    if low:
        yield f"Far fewer events per second than {median_text}: {some(low)}."
    if high:
        yield f"Far more events per second than {median_text}: {some(reversed(high))}."


def _in_millions(key: str, rate: float) -> str:
    return f"{key} ({rate / 1e6:.3g} M)"


def _saturation(survey: Survey) -> Iterator[str]:
    fraction = survey.summary().saturated_fraction
    if fraction is not None and fraction > SATURATED:
        yield (
            f"{percent(fraction)} of the cells that have events are at the cutoff of "
            f"{survey.cutoff}: events beyond it are lost."
        )


def _boxes_dropped(survey: Survey) -> Iterator[str]:
    summary = survey.summary()
    dropped = summary.dropped("dropped_boxes")
    thinned = dropped.pop(THINNED, 0)
    total = summary.total("boxes") + sum(dropped.values())
    boxes = "the boxes that remain after thinning" if thinned else "the boxes"
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        threshold = BOXES_DROPPED
        if reason == "boxes_of_other_classes":
            threshold = BOXES_OF_OTHER_CLASSES
        if count > threshold * total:
            readable = reason.removeprefix("boxes_").replace("_", " ")
            yield (
                f"{percent(count / total)} of {boxes} were dropped: "
                f"{readable} ({count} of {total})."
            )
