"""MOT: a line `frame, id, left, top, width, height, confidence, class, visibility` per box."""

import configparser
from pathlib import Path

from evspan.data_prep.labels.interchange.annotations import (
    MOST_PICTURES,
    Annotations,
    Label,
    LabelsError,
    Picture,
    name_lines,
    number,
    picture_size,
    read_text,
    require_few_pictures,
    shown,
    whole,
)
from evspan.data_prep.labels.interchange.numbers import digits

GROUND_TRUTH = "gt.txt"
DETECTIONS = "det.txt"
NAMES = "labels.txt"  # next to gt.txt, as CVAT writes it
SEQUENCE = "seqinfo.ini"
# The classes of MOT16, MOT17 and MOT20, from id 1 on.
MOT_CLASSES = [
    "pedestrian",
    "person_on_vehicle",
    "car",
    "bicycle",
    "motorbike",
    "non_motorized_vehicle",
    "static_person",
    "distractor",
    "occluder",
    "occluder_on_the_ground",
    "occluder_full",
    "reflection",
    "crowd",
]
ONE_CLASS = "object"  # of files that state none
IGNORED_CLASSES = ("ignore", "ignored", "ignored regions", "ignore region")


def read_mot(path: Path, classes: list[str]) -> Annotations:
    """Reads gt.txt, det.txt or a tracker's result; frames are numbered from 1.

    In det.txt, and in any file whose track ids are all -1, the seventh value is a confidence. In
    others it is a flag: 0 makes an ignore region. seqinfo.ini in the folder or the one above
    gives the size of the images and the number of frames, each of which counts as labelled.

    Args:
        classes: the names of class 1, 2, ...; empty: those of labels.txt next to the file, or of
            the MOT benchmark.

    Raises:
        LabelsError: a line is no box.
        OSError: the file cannot be read.
    """
    rows = _rows(path)
    sequence = _sequence(path)
    size = picture_size(sequence.get("imwidth"), sequence.get("imheight"), f"{path}: {SEQUENCE}")
    frames = max((frame for frame, _ in rows), default=0)
    if sequence.get("seqlength"):
        frames = max(frames, whole(sequence["seqlength"], f"{path}: {SEQUENCE}", "seqLength"))
    require_few_pictures(frames, path)
    recording = sequence.get("name", "")
    pictures = [Picture(frame=i, recording=recording, size=size) for i in range(frames)]
    has_tracks = any(float(values[1]) >= 0 for _, values in rows)
    is_truth = has_tracks and path.name.lower() != DETECTIONS
    names = classes or _names(path, rows)
    labels = []
    for i, (frame, values) in enumerate(rows, 1):
        labels.append(_label(values, frame - 1, names, f"{path}, box {i}", is_truth))
    if names is MOT_CLASSES:  # most of them are not in use
        used = {label.class_name for label in labels}
        names = [name for name in MOT_CLASSES if name in used]
    return Annotations(names, pictures, labels)


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The frame and all values of each line."""
    rows = []
    for i, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        values = [value.strip() for value in line.split("," if "," in line else None)]
        place = f"{path}, line {i}"
        if not 6 <= len(values) <= 10:
            raise LabelsError(
                f"{place} has {len(values)} values ({shown(line[:40])}); a box is `frame, id, "
                "left, top, width, height`, and optionally confidence, class, visibility"
            )
        frame = whole(values[0], place, "the frame", least=1, most=MOST_PICTURES)
        number(values[1], place, "the track id", most=2**53)
        rows.append((frame, values))
    return rows


def _names(path: Path, rows: list[tuple[int, list[str]]]) -> list[str]:
    if (path.parent / NAMES).is_file():
        return name_lines(path.parent / NAMES)
    if all(_class_id(values, str(path)) is None for _, values in rows):
        return [ONE_CLASS]
    return MOT_CLASSES


def _class_id(values: list[str], place: str) -> int | None:
    """The class of a box, from 1 on; None where it states none."""
    if len(values) < 8 or len(values) == 10:  # the last three of ten are a place in the world
        return None
    class_id = whole(values[7], place, "the class", least=-1)
    return class_id if class_id > 0 else None


def _label(values: list[str], picture: int, names: list[str], place: str, is_truth: bool) -> Label:
    class_id = _class_id(values, place) or 1
    if class_id > len(names):
        raise LabelsError(
            f"{place} has class {class_id}; names are known of 1 to {len(names)}. Give the names "
            f"with --classes, or one per line in {NAMES} next to the file"
        )
    x, y, w, h = (number(value, place, "a coordinate") for value in values[2:6])
    track = whole(values[1], place, "the track id", least=-1)
    confidence = 1.0
    if len(values) > 6:
        confidence = number(values[6], place, "the confidence")
    name = names[class_id - 1]
    ignore = name.lower() in IGNORED_CLASSES or (is_truth and confidence == 0)
    return Label(
        picture,
        name,
        x,
        y,
        w,
        h,
        track=track if track >= 0 else None,
        confidence=1.0 if is_truth or ignore else confidence,
        ignore=ignore,
    )


def _sequence(path: Path) -> dict[str, str]:
    """The values of seqinfo.ini, by their names in small letters."""
    for folder in (path.parent, path.parent.parent):
        file = folder / SEQUENCE
        if not file.is_file():
            continue
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read_string(read_text(file))
        except configparser.Error as error:
            reason = " ".join(str(error).split())[:100]
            raise LabelsError(f"{file} is no INI file ({shown(reason)}). Remove it") from error
        for section in parser.sections():
            if section.lower() == "sequence":
                return dict(parser[section])
    return {}


def sequence_name(path: Path) -> str:
    """The name of a sequence: of seqinfo.ini's folder, above gt/ or det/."""
    folder = path.parent
    if folder.name in ("gt", "det"):
        folder = folder.parent
    return folder.resolve().name


def write_mot(annotations: Annotations, folder: Path, *, fps: float) -> None:
    """Writes seqinfo.ini, gt/gt.txt and gt/labels.txt of one recording; detections to det/.

    Detections, where a box has a confidence other than 1, go to det/det.txt with their classes.
    """
    is_truth = all(label.confidence == 1 for label in annotations.labels)
    target = folder / "gt" / GROUND_TRUTH
    if not is_truth:
        target = folder / "det" / DETECTIONS
    target.parent.mkdir(parents=True, exist_ok=True)
    ids = {name: i for i, name in enumerate(annotations.classes, 1)}
    lines = []
    for label in sorted(annotations.labels, key=lambda label: label.picture):
        confidence = digits(label.confidence)
        if label.ignore:
            confidence = "0"
        box = ",".join(digits(value) for value in (label.x, label.y, label.w, label.h))
        track = -1 if label.track is None else label.track
        lines.append(f"{label.picture + 1},{track},{box},{confidence},{ids[label.class_name]},1\n")
    target.write_text("".join(lines))
    names = "".join(name + "\n" for name in annotations.classes)
    (target.parent / NAMES).write_text(names, encoding="utf-8")
    pictures = annotations.pictures
    values = {
        "name": pictures[0].recording if pictures else "",
        "imDir": "images",
        "frameRate": f"{fps:g}",
        "seqLength": str(len(pictures)),
        "imExt": ".png",
    }
    if pictures and pictures[0].size:
        values["imWidth"] = str(pictures[0].size[0])
        values["imHeight"] = str(pictures[0].size[1])
    text = "[Sequence]\n" + "".join(f"{key}={value}\n" for key, value in values.items())
    (folder / SEQUENCE).write_text(text, encoding="utf-8")
