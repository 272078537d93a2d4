"""`evspan labels import`: labels of other tools -> box files next to the recordings."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import UserError
from evspan.conf.text import plural, printable
from evspan.data_prep.labels.box_files import (
    BOXES_ENDING,
    IGNORE,
    NO_TRACK,
    RAW_BOX,
    RAW_LABEL,
    BoxArray,
    recording_name,
)
from evspan.data_prep.labels.classes import CLASSES_FILE, read_classes
from evspan.data_prep.labels.interchange.annotations import (
    Annotations,
    Label,
    LabelsError,
    Picture,
    require_classes,
)
from evspan.data_prep.labels.interchange.formats import (
    Part,
    ReadOptions,
    read_annotations,
    recognise,
)
from evspan.data_prep.labels.interchange.names import own_prefixes
from evspan.data_prep.labels.interchange.recording_files import FolderSensors, stated_size
from evspan.data_prep.labels.interchange.timing import PictureTimes, Timing
from evspan.data_prep.shards.format import SPLITS

NAMED = 5  # names that a message lists
CLIP_TOLERANCE = 1e-3  # pixels that are no more than rounding


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to import, and where to.

    Attributes:
        out: a folder, or the box file of one recording.
        format: one of `FORMATS`; None: it is recognised.
        classes: names of class 0, 1, ...; empty: those of classes.txt in `out`, else of the labels.
        drop_other_classes: leave out boxes whose class is not in `classes`.
        size: (width, height) of the sensor in pixels; None: of `recording`, else of the recording
            next to the box file, else of the images.
        images: folder of the labelled images.
        recording: the labelled recording: its name and its sensor's size.
        keep_empty: frames without boxes become negatives; otherwise they are not labelled.
    """

    labels: Path
    out: Path
    format: str | None = None
    timing: Timing = field(default_factory=Timing)
    classes: list[str] = field(default_factory=list)
    drop_other_classes: bool = False
    size: tuple[int, int] | None = None
    images: Path | None = None
    recording: Path | None = None
    keep_empty: bool = True
    overwrite: bool = False


@dataclass
class ImportSummary:
    """What was imported.

    Attributes:
        boxes: without ignore regions. frames: with and without boxes. empty: those without.
        tracks: of all recordings. first_us, last_us: times of the first and the last frame.
        boxes_per_class: in the order of classes.txt.
        clipped: boxes that were cut at the border of the picture. outside: boxes wholly outside,
            which were left out. flat: boxes without an area, which were left out.
        dropped: boxes of classes that were left out, by name.
        scaled: sizes of pictures whose boxes were scaled to the sensor's.
        unscaled: sizes of pictures whose boxes were stored in their pixels, since the sensor's
            size is not known.
    """

    format: str
    files: list[Path] = field(default_factory=list)
    classes_file: Path = Path()
    source: Path = Path()
    boxes: int = 0
    frames: int = 0
    empty: int = 0
    ignored: int = 0
    tracks: int = 0
    first_us: int = 0
    last_us: int = 0
    boxes_per_class: dict[str, int] = field(default_factory=dict)
    clipped: int = 0
    outside: int = 0
    flat: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    scaled: set[tuple[int, int]] = field(default_factory=set)
    unscaled: set[tuple[int, int]] = field(default_factory=set)


class _Place(NamedTuple):
    """Where a picture belongs: the recording's name, and the time."""

    recording: str
    time_us: int


class _Row(NamedTuple):
    """A box in pixels of the sensor. class_name: empty for a frame without boxes."""

    time_us: int
    x: float
    y: float
    w: float
    h: float
    class_name: str
    track: int | None
    confidence: float
    ignore: bool


@dataclass
class _Recording:
    """The rows of a recording, and the times of all its labelled frames."""

    rows: list[_Row] = field(default_factory=list)
    times: set[int] = field(default_factory=set)


def import_labels(options: ImportOptions) -> ImportSummary:
    """Reads labels and writes a box file per recording, and classes.txt.

    A labelled frame without boxes is a row of no size with `ignore`: prep labels the frame and
    stores no box.

    Raises:
        UserError: the labels cannot be read, their times, sizes or classes are not known, or a
            file is there already.
        OSError: a file cannot be read or written.
    """
    if not options.labels.exists():
        raise UserError(f"{options.labels} is not there. Give a file or folder of labels")
    name = options.format or recognise(options.labels)
    summary = ImportSummary(name)
    sensor = _sensor_size(options)
    parts = read_annotations(
        options.labels,
        name,
        ReadOptions(size=sensor, images=options.images, classes=options.classes),
    )
    summary.source, summary.classes_file = _places(options.out)
    classes = _classes(options, [part.annotations for part in parts], summary)
    recordings = _located(options, parts, sensor, set(classes), summary)
    files = _output_files(options, recordings)
    arrays = {name: _array(rows, classes) for name, rows in recordings.items()}
    _boxes_folder(options.out).mkdir(parents=True, exist_ok=True)
    for recording, path in files.items():
        _save(path, arrays[recording])
    replace_file(summary.classes_file, "".join(f"{name}\n" for name in classes))
    summary.files = list(files.values())
    _count(summary, recordings, classes)
    return summary


def _sensor_size(options: ImportOptions) -> tuple[int, int] | None:
    """(width, height) of the sensor where the command gives it."""
    if options.size or options.recording is None:
        return options.size
    return stated_size(options.recording)


# -- classes --------------------------------------------------------------------------------------
def _places(out: Path) -> tuple[Path, Path]:
    """The folder that prep takes as source, and classes.txt in it."""
    folder = _boxes_folder(out)
    for path in (folder, folder.resolve()):  # as it is written, and behind `.` or a link
        if path.name in SPLITS:
            return path.parent, path.parent / CLASSES_FILE
    return folder, folder / CLASSES_FILE


def _boxes_folder(out: Path) -> Path:
    """The folder of the box files."""
    return out.parent if out.suffix == ".npy" else out


def _classes(
    options: ImportOptions, annotations: list[Annotations], summary: ImportSummary
) -> list[str]:
    """The names of class 0, 1, ...; checks that all boxes have one of them.

    Raises:
        UserError: boxes have other names; lists them.
    """
    boxes: Counter[str] = Counter()
    names: list[str] = []
    for part in annotations:
        names += part.classes
        boxes.update(label.class_name for label in part.labels if not label.ignore)
    existing = read_classes(summary.source) if summary.source.is_dir() else []
    is_sure = bool(options.classes) or not existing
    classes = list(options.classes) or existing
    if not classes:
        only_ignored = _only_ignored(annotations, boxes)
        classes = [name for name in dict.fromkeys(names) if name not in only_ignored]
        return require_classes(classes, str(options.labels))
    other = Counter({name: n for name, n in boxes.items() if name not in classes})
    if other and not options.drop_other_classes:
        listed = ", ".join(f"{name} ({n})" for name, n in other.most_common(NAMED))
        if len(other) > NAMED:
            listed += ", ..."
        place = "--classes" if is_sure else str(summary.classes_file)
        extended = ",".join([*classes, *other])
        raise UserError(
            f"{options.labels} has classes that {place} does not name, with their boxes: {listed}. "
            f"Give all names (--classes {extended}), or --drop-other-classes"
        )
    _require_same_ids(existing, classes, options, summary)
    return classes


def _only_ignored(annotations: list[Annotations], boxes: Counter[str]) -> set[str]:
    """Names that stand for ignore regions only."""
    ignored = set()
    for part in annotations:
        ignored |= {label.class_name for label in part.labels if label.ignore}
    return ignored - boxes.keys()


def _require_same_ids(
    existing: list[str], classes: list[str], options: ImportOptions, summary: ImportSummary
) -> None:
    """Refuses to change the ids of box files that were imported before."""
    if existing == classes[: len(existing)] or options.overwrite:
        return
    raise UserError(
        f"{summary.classes_file} names {', '.join(existing[:NAMED])} in another order, and box "
        "files there have these ids. Give --classes in that order with new names at the end, or "
        "another OUT"
    )


# -- boxes ----------------------------------------------------------------------------------------
def _located(
    options: ImportOptions,
    parts: list[Part],
    sensor: tuple[int, int] | None,
    classes: set[str],
    summary: ImportSummary,
) -> dict[str, _Recording]:
    """The rows of each recording, with times, in pixels of the sensor.

    Args:
        sensor: (width, height) of all recordings; None: of those in the folder of the box files.
    """
    sensors = FolderSensors(_boxes_folder(options.out))
    places = _places_of(options, parts, sensors.names)
    _require_one_image_per_frame(options, parts, places)
    recordings: dict[str, _Recording] = {}
    for part, of_part in zip(parts, places, strict=True):
        for place in of_part:
            recordings.setdefault(place.recording, _Recording()).times.add(place.time_us)
        for label in part.annotations.labels:
            recording, time_us = of_part[label.picture]
            picture = part.annotations.pictures[label.picture]
            size = sensor
            if size is None and picture.size:
                size = sensors.size(recording)
            row = _row(label, time_us, picture, size, classes, summary)
            if row is not None:
                recordings[recording].rows.append(row)
    if not recordings:
        raise LabelsError(f"{options.labels} has no labelled frame. Is it the right file?")
    for located in recordings.values():
        _mark_empty(located, summary, keep=options.keep_empty)
    return recordings


def _places_of(
    options: ImportOptions, parts: list[Part], known: Iterable[str]
) -> list[list[_Place]]:
    """The place of each picture of each part.

    Args:
        known: names of the recordings in the folder of the box files.

    Raises:
        UserError: the pictures are of several recordings, and the command names one.
    """
    given = _given_name(options)
    images: list[str] = []
    for part in parts:
        images += [picture.name for picture in part.annotations.pictures]
    own = own_prefixes(images, [*known, given])
    names: set[str] = set()
    places = []
    for part in parts:
        times = PictureTimes(
            part.path, part.name, options.timing, images=options.images, recording=given, own=own
        )
        places.append([_Place(*times.locate(picture)) for picture in part.annotations.pictures])
        names |= times.names or _names_of(part)
    if given and len(names) > 1:
        listed = ", ".join(sorted(names)[:NAMED])
        raise UserError(
            f"{options.labels} has the labels of {len(names)} recordings ({listed}), and the "
            "command names one. Give a folder as OUT, and no --recording; or import them one by one"
        )
    return places


def _names_of(part: Part) -> set[str]:
    """What stands for the recording of a part whose pictures do not name it.

    Frames of a video have numbers only: each file is a recording of its own.
    """
    pictures = part.annotations.pictures
    if pictures and part.name:
        return {part.name}
    if pictures and not any(picture.name for picture in pictures):
        return {printable(str(part.path))}
    return set()


def _require_one_image_per_frame(
    options: ImportOptions, parts: list[Part], places: list[list[_Place]]
) -> None:
    """Refuses augmented copies, and images of one name from several folders.

    Raises:
        LabelsError: images of different names are of one frame.
    """
    images: dict[_Place, str] = {}
    repeated: dict[_Place, str] = {}
    for part, of_part in zip(parts, places, strict=True):
        for picture, place in zip(part.annotations.pictures, of_part, strict=True):
            if picture.name and images.setdefault(place, picture.name) != picture.name:
                repeated.setdefault(place, picture.name)
    if not repeated:
        return
    place, second = next(iter(repeated.items()))
    raise LabelsError(
        f"{options.labels}: the images {printable(images[place])} and {printable(second)} are of "
        f"one frame, {place.recording} at {place.time_us} us ({plural(len(repeated), 'such frame')}"
        "). Import folder by folder, each into the boxes of its recording; of augmented copies "
        "keep the first"
    )


def _given_name(options: ImportOptions) -> str:
    """The recording's name by the command; empty if it gives none."""
    if options.out.suffix == ".npy":
        if not options.out.name.endswith(BOXES_ENDING) or options.out.name == BOXES_ENDING:
            raise UserError(
                f"{options.out} is no name of a box file. Name it X{BOXES_ENDING} for recording X"
            )
        return options.out.name[: -len(BOXES_ENDING)]
    return recording_name(options.recording) if options.recording else ""


def _row(
    label: Label,
    time_us: int,
    picture: Picture,
    sensor: tuple[int, int] | None,
    classes: set[str],
    summary: ImportSummary,
) -> _Row | None:
    """The box on the sensor, cut at its border; None where nothing remains."""
    if label.class_name not in classes and not label.ignore:
        summary.dropped[label.class_name] += 1
        return None
    if label.w <= 0 or label.h <= 0:
        summary.flat += 1
        return None
    corners = [label.x, label.y, label.x + label.w, label.y + label.h]
    if sensor and picture.size and picture.size != sensor:
        summary.scaled.add(picture.size)
        for i in range(4):
            corners[i] *= sensor[i % 2] / picture.size[i % 2]
    if picture.size and sensor is None:
        summary.unscaled.add(picture.size)
    size = sensor or picture.size
    if size:
        inside = [min(max(corner, 0.0), size[i % 2]) for i, corner in enumerate(corners)]
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            summary.outside += 1
            return None
        if max(abs(a - b) for a, b in zip(inside, corners, strict=True)) > CLIP_TOLERANCE:
            summary.clipped += 1
            corners = inside
    left, top, right, bottom = corners
    return _Row(
        time_us,
        left,
        top,
        right - left,
        bottom - top,
        label.class_name,
        label.track,
        label.confidence,
        label.ignore,
    )


def _mark_empty(recording: _Recording, summary: ImportSummary, *, keep: bool) -> None:
    """Adds a row for each frame without boxes, or removes these frames."""
    empty = recording.times - {row.time_us for row in recording.rows}
    summary.empty += len(empty)
    if not keep:
        recording.times -= empty
        return
    for time_us in empty:
        recording.rows.append(_Row(time_us, 0, 0, 0, 0, "", None, 1.0, True))


def _array(recording: _Recording, classes: list[str]) -> BoxArray:
    """(N,) RAW_BOX sorted by time, or RAW_LABEL where there are ignore regions."""
    ids = {name: i for i, name in enumerate(classes)}
    rows = sorted(recording.rows, key=lambda row: row.time_us)
    boxes = np.zeros(len(rows), RAW_LABEL)
    boxes["t"] = [row.time_us for row in rows]
    for side in "xywh":
        boxes[side] = [getattr(row, side) for row in rows]
    boxes["class_id"] = [ids.get(row.class_name, 0) for row in rows]
    boxes["track_id"] = _track_ids([row.track for row in rows])
    boxes["class_confidence"] = [row.confidence for row in rows]
    boxes[IGNORE] = [row.ignore for row in rows]
    if boxes[IGNORE].any():
        return boxes
    plain = np.zeros(boxes.size, RAW_BOX)
    for name in RAW_BOX.names or ():
        plain[name] = boxes[name]
    return plain


def _track_ids(tracks: list[int | None]) -> list[int]:
    """Ids that fit into a box file: as they are, or numbered where one is too large."""
    known = sorted({track for track in tracks if track is not None})
    numbers = {track: track for track in known}
    if known and known[-1] >= NO_TRACK:
        numbers = {track: i for i, track in enumerate(known)}
    return [NO_TRACK if track is None else numbers[track] for track in tracks]


# -- output ---------------------------------------------------------------------------------------
def _output_files(options: ImportOptions, recordings: Iterable[str]) -> dict[str, Path]:
    """The box file of each recording.

    Raises:
        UserError: one is there already.
    """
    if options.out.suffix == ".npy":
        files = {name: options.out for name in recordings}
    else:
        files = {name: options.out / f"{name}{BOXES_ENDING}" for name in recordings}
    existing = [path for path in files.values() if path.exists()]
    if existing and not options.overwrite:
        raise UserError(
            f"{printable(str(existing[0]))} is there already ({plural(len(existing), 'file')}). "
            "Give another OUT, or --overwrite"
        )
    return files


def _save(path: Path, boxes: BoxArray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, boxes)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _count(summary: ImportSummary, recordings: dict[str, _Recording], classes: list[str]) -> None:
    per_class = dict.fromkeys(classes, 0)
    tracks = set()
    times: set[int] = set()
    for name, recording in recordings.items():
        summary.frames += len(recording.times)
        times |= recording.times
        for row in recording.rows:
            if row.track is not None:
                tracks.add((name, row.track))
            if not row.ignore:
                per_class[row.class_name] += 1
            elif row.class_name:
                summary.ignored += 1
    summary.boxes = sum(per_class.values())
    summary.boxes_per_class = per_class
    summary.tracks = len(tracks)
    summary.first_us = min(times, default=0)
    summary.last_us = max(times, default=0)
