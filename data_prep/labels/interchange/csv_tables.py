"""CSV: a line per box, with a heading that names the columns."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from evspan.data_prep.labels.interchange.annotations import (
    Annotations,
    Label,
    LabelsError,
    Picture,
    class_name,
    different_names,
    number,
    picture_size,
    read_text,
    require_classes,
    shown,
    whole,
)
from evspan.data_prep.labels.interchange.numbers import digits

# Names of columns, in small letters; the first is the one that is written.
COLUMNS = {
    "recording": ("recording", "sequence", "video"),
    "image": ("image", "filename", "file_name", "image_name", "name", "path"),
    "time_us": ("time_us", "timestamp_us", "t_us", "t", "ts"),
    "time_ms": ("time_ms", "timestamp_ms", "t_ms"),
    "time_s": ("time_s", "timestamp_s", "t_s", "seconds"),
    "frame": ("frame", "frame_index", "frame_id"),
    "x": ("x", "left", "x1", "xmin", "bbox_x"),
    "y": ("y", "top", "y1", "ymin", "bbox_y"),
    "w": ("w", "width", "bbox_w"),
    "h": ("h", "height", "bbox_h"),
    "right": ("x2", "xmax", "right"),
    "bottom": ("y2", "ymax", "bottom"),
    "class": ("class", "class_name", "label", "category"),
    "class_id": ("class_id",),
    "track": ("track_id", "track"),
    "confidence": ("confidence", "class_confidence", "score"),
    "ignore": ("ignore", "difficult", "iscrowd"),
    "image_width": ("image_width", "img_width"),
    "image_height": ("image_height", "img_height"),
}
TIMES = {"time_us": 1.0, "time_ms": 1e3, "time_s": 1e6}
HEADING = [
    "recording",
    "time_us",
    "x",
    "y",
    "w",
    "h",
    "class",
    "track_id",
    "confidence",
    "ignore",
]
EXAMPLE = "time_us,x,y,w,h,class"
LONGEST_FIELD = 10_000


def read_csv(path: Path, classes: list[str]) -> Annotations:
    """Reads a table. A line that names a frame but no class is a frame without boxes.

    Args:
        classes: names of class_id 0, 1, ..., for a table with ids only.

    Raises:
        LabelsError: a column is missing, or a value does not fit.
        OSError: the file cannot be read.
    """
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    annotations = Annotations()
    pictures: dict[Picture, int] = {}
    try:
        columns = _columns(next(reader, []), path)
        for row in reader:
            if any(value.strip() for value in row):
                place = f"{path}, line {reader.line_num}"
                _add_row(row, columns, annotations, pictures, classes, place)
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise LabelsError(f"{place}: {error}. Save it as plain CSV with commas") from error
    names = different_names(label.class_name for label in annotations.labels)
    if classes and "class" not in columns:
        names = classes
    annotations.classes = require_classes(names, str(path))
    return annotations


def _columns(heading: list[str], path: Path) -> dict[str, int]:
    """The place of each known column."""
    places = {name.strip().lower(): i for i, name in enumerate(heading)}
    columns = {}
    for column, names in COLUMNS.items():
        known = [name for name in names if name in places]
        if known:
            columns[column] = places[known[0]]
    if "right" in columns and "bottom" in columns:  # then a width is that of the image
        for side, of_image in (("w", "image_width"), ("h", "image_height")):
            if side in columns:
                columns.setdefault(of_image, columns.pop(side))
    has_side = ("w" in columns or "right" in columns) and ("h" in columns or "bottom" in columns)
    has_class = "class" in columns or "class_id" in columns
    has_time = bool(columns.keys() & {*TIMES, "frame", "image"})
    if not (has_time and has_class and has_side and {"x", "y"} <= columns.keys()):
        known_text = shown(", ".join(heading[:20]))
        raise LabelsError(
            f"{path} has the columns {known_text}. The first line must name the columns of a time "
            f"(time_us, time_ms, time_s, frame or image), a box (x, y, w, h or x1, y1, x2, y2) and "
            f"a class: {EXAMPLE}"
        )
    return columns


def _add_row(
    row: list[str],
    columns: Mapping[str, int],
    annotations: Annotations,
    pictures: dict[Picture, int],
    classes: list[str],
    place: str,
) -> None:
    values = {name: row[i].strip() for name, i in columns.items() if i < len(row)}
    values = {name: value for name, value in values.items() if value}
    picture = _picture(values, place)
    if picture not in pictures:
        pictures[picture] = len(annotations.pictures)
        annotations.pictures.append(picture)
    if "class" in values or "class_id" in values:
        annotations.labels.append(_label(values, pictures[picture], classes, place))


def _picture(values: Mapping[str, str], place: str) -> Picture:
    time_us = None
    for column, unit in TIMES.items():
        if column in values and time_us is None:
            time_us = round(number(values[column], place, column, most=2**52 / unit) * unit)
    frame = None
    if "frame" in values:
        frame = whole(values["frame"], place, "the frame")
    if time_us is None and frame is None and "image" not in values:
        raise LabelsError(f"{place} has no time. Fill in time_us, time_ms, time_s, frame or image")
    return Picture(
        name=values.get("image", ""),
        frame=frame,
        time_us=time_us,
        recording=values.get("recording", ""),
        size=picture_size(values.get("image_width"), values.get("image_height"), place),
    )


def _label(values: Mapping[str, str], picture: int, classes: list[str], place: str) -> Label:
    x = number(values.get("x"), place, "x")
    y = number(values.get("y"), place, "y")
    if "w" in values:
        w = number(values["w"], place, "the width")
    else:
        w = number(values.get("right"), place, "the right side") - x
    if "h" in values:
        h = number(values["h"], place, "the height")
    else:
        h = number(values.get("bottom"), place, "the lower side") - y
    track = None
    if "track" in values:
        track = whole(values["track"], place, "the track id", least=-1)
    confidence = 1.0
    if "confidence" in values:
        confidence = number(values["confidence"], place, "the confidence")
    return Label(
        picture,
        _class_of(values, classes, place),
        x,
        y,
        w,
        h,
        track=track if track != -1 else None,
        confidence=confidence,
        ignore=values.get("ignore", "").lower() in ("1", "true", "yes"),
    )


def _class_of(values: Mapping[str, str], classes: list[str], place: str) -> str:
    if "class" in values:
        return class_name(values["class"], place)
    class_id = whole(values["class_id"], place, "class_id")
    if classes and class_id >= len(classes):
        raise LabelsError(
            f"{place} has class_id {class_id}; --classes names 0 to {len(classes) - 1}. Add a name"
        )
    return classes[class_id] if classes else f"class_{class_id}"


def write_csv(annotations: Annotations, path: Path) -> None:
    """Writes a table; a picture without boxes is a line with its time only."""
    empty = set(range(len(annotations.pictures)))
    rows: list[tuple[int, list[str]]] = []
    for label in annotations.labels:
        empty.discard(label.picture)
        rows.append((label.picture, _row(label, annotations.pictures[label.picture])))
    for picture in empty:
        rows.append((picture, _frame_columns(annotations.pictures[picture])))
    rows.sort(key=lambda row: row[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADING)
        for _, row in rows:
            writer.writerow(row + [""] * (len(HEADING) - len(row)))


def _frame_columns(picture: Picture) -> list[str]:
    return [picture.recording, str(picture.time_us)]


def _row(label: Label, picture: Picture) -> list[str]:
    box = [digits(value) for value in (label.x, label.y, label.w, label.h)]
    track = "" if label.track is None else str(label.track)
    return [
        *_frame_columns(picture),
        *box,
        label.class_name,
        track,
        digits(label.confidence),
        str(int(label.ignore)),
    ]
