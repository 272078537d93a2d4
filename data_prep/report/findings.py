"""What a researcher should know of a dataset before training on it, in words."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from evspan.data_prep.report.markup import percent
from evspan.data_prep.report.survey import RecordingStats, Survey

RARE_CLASS = 0.01  # share of a split's boxes
EMPTY_FRAMES, SATURATED, MANY_DROPPED = 0.1, 0.05, 0.05  # shares that are worth a word
THINNED = "boxes_between_labelled_frames"
MANY_OF_OTHER_CLASSES = 0.5  # a class map leaves out what it should
FEW_EVENTS_LOST, MANY_EVENTS_LOST = 0.001, 0.01
ODD_RATE = 10.0  # times the median of events per second, either way


def findings(survey: Survey) -> list[str]:
    """One sentence each, the gravest first; nothing where nothing stands out."""
    if not survey.recordings:
        return ["The dataset holds no recordings."]
    parts: tuple[Callable[[Survey], Iterator[str]], ...] = (
        _splits,
        _copies,
        _sizes,
        _unlabelled,
        _classes,
        _empty_frames,
        _events_lost,
        _rates,
        _saturation,
        _boxes_dropped,
    )
    return [sentence for part in parts for sentence in part(survey)]


def some(names: Iterable[str], most: int = 4) -> str:
    """a, b, c, d and 7 more"""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _many(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{plural if number != 1 else ''}"


def _splits(survey: Survey) -> Iterator[str]:
    if not survey.chosen:
        missing = [s for s in ("train", "val") if s not in survey.splits]
        if len(missing) == 1:  # a test set alone is nobody's mistake
            use = "to train on" if missing == ["train"] else "to score training with"
            yield f"There is no split {missing[0]}: nothing {use}."


def _copies(survey: Survey) -> Iterator[str]:
    same = defaultdict(list)
    for r in survey.recordings:
        if r.entry.source_xxh3:
            same[r.entry.source_xxh3].append(r)
    for group in same.values():
        if len(group) > 1:
            leak = (
                ", in different splits: scores will flatter"
                if len({r.entry.split for r in group}) > 1
                else ""
            )
            yield f"{some(r.key for r in group)} are the same recording{leak}."


def _sizes(survey: Survey) -> Iterator[str]:
    sizes = defaultdict(list)
    for r in survey.recordings:
        sizes[r.entry.height, r.entry.width].append(r.key)
    if len(sizes) > 1:
        told = "; ".join(
            f"{w} x {h}: {some(keys, 2)}"
            for (h, w), keys in sorted(sizes.items(), key=lambda item: -len(item[1]))
        )
        yield f"Frames are of {len(sizes)} sizes ({told}); a model is trained on one."


def _unlabelled(survey: Survey) -> Iterator[str]:
    for split in survey.splits:
        of = survey.summary(split).of
        without = [r.entry.name for r in of if not r.entry.labelled_frames]
        if without:
            yield f"{_many(len(without), 'recording')} of {len(of)} in {split} without labels: {some(without)}."
        no_boxes = [r.entry.name for r in of if r.entry.labelled_frames and not r.entry.boxes]
        if no_boxes:
            yield (
                f"{_many(len(no_boxes), 'recording')} of {len(of)} in {split} labelled, but without a single box: "
                f"{some(no_boxes)}."
            )


def _classes(survey: Survey) -> Iterator[str]:
    classes, total = survey.manifest.classes, survey.summary().per_class
    if not total.sum():
        yield "There are no boxes."
        return
    for name, count in zip(classes, total.tolist(), strict=True):
        if not count:
            yield f"There are no boxes of class {name}."
    for split in survey.splits:
        counts = survey.summary(split).per_class
        if not counts.sum():
            continue  # told as recordings without labels
        for name, count, anywhere in zip(classes, counts.tolist(), total.tolist(), strict=True):
            if anywhere and not count:
                yield f"{split} has no boxes of class {name}."
            elif anywhere and count < RARE_CLASS * counts.sum():
                yield (
                    f"In {split}, class {name} has {_many(count, 'box', 'es')} of {counts.sum()} "
                    f"({percent(count / counts.sum())})."
                )


def _empty_frames(survey: Survey) -> Iterator[str]:
    found = [
        (r.empty_frames / r.entry.frames, r.key)
        for r in survey.recordings
        if r.entry.frames and r.empty_frames > EMPTY_FRAMES * r.entry.frames
    ]
    yield from _worst(found, "frames without events")


def _worst(found: list[tuple[float, str]], what: str) -> Iterator[str]:
    """Recordings with their shares, the largest first; several in one sentence."""
    if found:
        listed = some(
            f"{key} ({percent(share)})" for share, key in sorted(found, key=lambda f: (-f[0], f[1]))
        )
        yield f"{_many(len(found), 'recording')} with many {what}: {listed}."


def _events_lost(survey: Survey) -> Iterator[str]:
    found = []
    for r in survey.recordings:
        outside = r.entry.dropped_events.get("outside_sensor", 0)
        if outside > FEW_EVENTS_LOST * (outside + r.entry.events):
            found.append((outside / (outside + r.entry.events), r.key))
    yield from _worst(found, "events outside the sensor, which were dropped")
    late = [
        (r.entry.dropped_events.get("late_timestamps_raised", 0) / max(1, r.entry.events), r.key)
        for r in survey.recordings
    ]
    yield from _worst(
        [(share, key) for share, key in late if share > MANY_EVENTS_LOST],
        "timestamps that ran backwards",
    )


def _rates(survey: Survey) -> Iterator[str]:
    rates = [(r.entry.events / r.seconds, r) for r in survey.recordings if r.seconds > 0]
    if len(rates) < 3:
        return
    median = float(np.median([rate for rate, _ in rates]))

    def told(found: list[tuple[float, RecordingStats]]) -> str:
        return some(f"{r.key} ({rate / 1e6:.3g} M)" for rate, r in found)

    ordered = sorted(rates, key=lambda rate: rate[0])
    if few := [pair for pair in ordered if pair[0] < median / ODD_RATE]:
        yield f"Far fewer events per second than the median of {median / 1e6:.3g} M: {told(few)}."
    if many := [pair for pair in reversed(ordered) if pair[0] > median * ODD_RATE]:
        yield f"Far more events per second than the median of {median / 1e6:.3g} M: {told(many)}."


def _saturation(survey: Survey) -> Iterator[str]:
    share = survey.summary().saturated_fraction
    if share is not None and share > SATURATED:
        yield f"{percent(share)} of the cells that count anything are at the cutoff of {survey.cutoff}: what exceeds it is lost."


def _boxes_dropped(survey: Survey) -> Iterator[str]:
    summary = survey.summary()
    dropped = summary.dropped("dropped_boxes")
    thinned = dropped.pop(THINNED, 0)
    total = summary.total("boxes") + sum(dropped.values())
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        if (
            count
            > (MANY_OF_OTHER_CLASSES if reason == "boxes_of_other_classes" else MANY_DROPPED)
            * total
        ):
            yield (
                f"{percent(count / total)} of the boxes{' that thinning labels left' if thinned else ''} were dropped: "
                f"{reason.removeprefix('boxes_').replace('_', ' ')} ({count} of {total})."
            )
