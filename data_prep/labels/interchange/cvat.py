"""CVAT's XML 1.1, for video (tracks with keyframes) and for images."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

from evspan.conf.text import plural, printable
from evspan.data_prep.labels.interchange.annotations import (
    MOST_PICTURES,
    Annotations,
    Label,
    LabelsError,
    Picture,
    class_name,
    different_names,
    number,
    picture_size,
    require_classes,
    require_few_pictures,
    whole,
)
from evspan.data_prep.labels.interchange.numbers import digits
from evspan.data_prep.labels.interchange.xml_files import read_xml, text_of, write_xml

ROOT = "annotations"
PROJECT_TASK = "project/tasks/task"
CORNERS = ("xtl", "ytl", "xbr", "ybr")
NO_SHAPES = ("attribute", "box", "tag")  # parts of an image or a track; all others are shapes
IGNORE = "ignore"  # an attribute of boxes: true for ignore regions
CONFIDENCE = "confidence"
NAMED = 5  # kinds and tasks that a message lists
MOST_LABELS = 20_000_000


class Shape(NamedTuple):
    """A box of a track at a keyframe. corners: left, top, right, bottom in pixels."""

    frame: int
    corners: tuple[float, float, float, float]
    outside: bool
    ignore: bool = False
    confidence: float = 1.0


class _Range(NamedTuple):
    """The frames of a task: first, ..., last in steps."""

    first: int
    last: int
    step: int


def read_cvat(path: Path) -> Annotations:
    """Reads a file of tracks or of images.

    Boxes of a track are interpolated as CVAT does: linearly from one box to the next; after a box
    that is `outside` there is none until the next box that is not; after its last box a track
    stays where it is to the task's last frame. Every frame of the task is a labelled one.

    Raises:
        LabelsError: the file is no such file, has too many frames, other shapes than upright
            boxes, or tracks of several tasks.
        OSError: it cannot be read.
    """
    root = read_xml(path)
    if root.tag != ROOT:
        raise LabelsError(f"{path} has the root <{root.tag[:40]}>, not <{ROOT}> of CVAT")
    _require_boxes(root, path)
    if root.find("image") is not None:
        return _read_images(root, path)
    return _read_tracks(root, path)


def _require_boxes(root: Element, path: Path) -> None:
    """Refuses other shapes: without them, their frame would be a negative."""
    others = list(_other_shapes(root, path))
    if not others:
        return
    kinds = Counter(kind for _, kind in others)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(NAMED))
    raise LabelsError(
        f"{path}: {plural(len(others), 'shape')}, the first in {others[0][0]}, cannot be read: "
        f"{listed}. Only upright boxes are read: draw boxes in CVAT instead, or remove the "
        "shapes, and export again"
    )


def _other_shapes(root: Element, path: Path) -> Iterator[tuple[str, str]]:
    """(image or track, kind) of each shape that is not an upright box."""
    for tag in ("image", "track"):
        for i, parent in enumerate(root.iterfind(tag), 1):
            for shape in parent:
                kind = _kind(shape, f"{path}: {tag} {i}")
                if kind:
                    yield f"{tag} {i}", kind


def _kind(shape: Element, place: str) -> str:
    """The kind of a shape that is not an upright box; empty for such a box."""
    if shape.tag not in NO_SHAPES:
        return printable(shape.tag[:40])
    rotation = shape.get("rotation")
    if rotation and number(rotation, place, "rotation") % 360:
        return "rotated box"
    return ""


# -- for images -----------------------------------------------------------------------------------
def _read_images(root: Element, path: Path) -> Annotations:
    annotations = Annotations(classes=_label_names(root, path))
    for i, image in enumerate(root.iterfind("image")):
        place = f"{path}: image {i + 1}"
        size = picture_size(image.get("width"), image.get("height"), place)
        name = image.get("name") or ""
        index = None if name else whole(image.get("id"), place, "the id")
        annotations.pictures.append(Picture(name, index, size=size))
        for box in image.iterfind("box"):
            shape = _shape(box, place, frame=i)
            name = class_name(box.get("label"), place)
            annotations.labels.append(_label(shape, i, name, _track_attribute(box, place)))
    return _with_class_names(annotations, path)


def _track_attribute(box: Element, place: str) -> int | None:
    text = _attribute(box, "track_id")
    return whole(text, place, "track_id") if text else None


# -- for video ------------------------------------------------------------------------------------
def _read_tracks(root: Element, path: Path) -> Annotations:
    task = _task(root, path)
    size_element = None if task is None else task.find("original_size")
    size = picture_size(text_of(size_element, "width"), text_of(size_element, "height"), str(path))
    tracks = []
    for i, track in enumerate(root.iterfind("track")):
        place = f"{path}: track {i + 1}"
        name = class_name(track.get("label"), place)
        track_id = i if track.get("id") is None else whole(track.get("id"), place, "the id")
        shapes = [_shape(box, place) for box in track.iterfind("box")]
        tracks.append((name, track_id, sorted(shapes, key=lambda shape: shape.frame)))
    frames = _frame_range(task, [shapes for _, _, shapes in tracks], path)
    recording = text_of(task, "name") if text_of(task, "subset") == RECORDING else ""
    annotations = Annotations(classes=_label_names(root, path))
    numbers = range(frames.first, frames.last + 1, frames.step)
    for frame in numbers:
        annotations.pictures.append(Picture(frame=frame, recording=recording, size=size))
    for name, track_id, shapes in tracks:
        for shape in interpolated(shapes, frames.last):
            if shape.frame not in numbers:
                continue
            picture = (shape.frame - frames.first) // frames.step
            annotations.labels.append(_label(shape, picture, name, track_id))
        if len(annotations.labels) > MOST_LABELS:
            raise LabelsError(f"{path} has over {MOST_LABELS} boxes in all frames. Split it")
    return _with_class_names(annotations, path)


def interpolated(shapes: list[Shape], last_frame: int) -> Iterator[Shape]:
    """The visible boxes of a track in every frame from its first to `last_frame`.

    Args:
        shapes: of increasing frames; of several at one frame the first counts.
    """
    previous: Shape | None = None
    for shape in shapes:
        if previous is not None and shape.frame <= previous.frame:
            continue
        if previous is not None and not previous.outside:
            yield from _between(previous, shape)
        if not shape.outside:
            yield shape
        previous = shape
    if previous is not None and not previous.outside:
        for frame in range(previous.frame + 1, last_frame + 1):
            yield previous._replace(frame=frame)


def _between(before: Shape, after: Shape) -> Iterator[Shape]:
    distance = after.frame - before.frame
    for frame in range(before.frame + 1, after.frame):
        fraction = (frame - before.frame) / distance
        left, top, right, bottom = (
            low + (high - low) * fraction
            for low, high in zip(before.corners, after.corners, strict=True)
        )
        yield before._replace(frame=frame, corners=(left, top, right, bottom))


def _shape(box: Element, place: str, frame: int | None = None) -> Shape:
    if frame is None:
        frame = whole(box.get("frame"), place, "the frame", most=MOST_PICTURES)
    left, top, right, bottom = (number(box.get(key), place, key) for key in CORNERS)
    confidence = _attribute(box, CONFIDENCE)
    return Shape(
        frame,
        (left, top, right, bottom),
        outside=box.get("outside") == "1",
        ignore=_attribute(box, IGNORE).lower() in ("1", "true"),
        confidence=number(confidence, place, CONFIDENCE) if confidence else 1.0,
    )


def _label(shape: Shape, picture: int, name: str, track: int | None) -> Label:
    left, top, right, bottom = shape.corners
    return Label(
        picture,
        name,
        left,
        top,
        right - left,
        bottom - top,
        track=track,
        confidence=shape.confidence,
        ignore=shape.ignore,
    )


def _attribute(box: Element, name: str) -> str:
    for attribute in box.iterfind("attribute"):
        if attribute.get("name") == name:
            return (attribute.text or "").strip()
    return ""


def _frame_range(task: Element | None, tracks: list[list[Shape]], path: Path) -> _Range:
    """The task's frames; without a task's description, those from the first to the last box."""
    listed: list[int] = []
    for shapes in tracks:
        listed += [shape.frame for shape in shapes]
    first = min(listed, default=0)
    last = max(listed, default=-1)
    start, stop, size = (text_of(task, key) for key in ("start_frame", "stop_frame", "size"))
    if start:
        first = whole(start, str(path), "start_frame")
    elif size:
        first = 0
    step = 1
    frame_filter = text_of(task, "frame_filter")
    if frame_filter.startswith("step="):
        step = whole(frame_filter[5:], str(path), "frame_filter", least=1)
    if stop:
        last = whole(stop, str(path), "stop_frame")
    elif size:
        last = first + step * (whole(size, str(path), "the size") - 1)
    require_few_pictures((last - first) // step + 1, path)
    return _Range(first, last, step)


def _task(root: Element, path: Path) -> Element | None:
    """The description of the one task.

    Raises:
        LabelsError: there are several, as in the export of a project.
    """
    meta = root.find("meta")
    tasks = [] if meta is None else meta.findall(PROJECT_TASK)
    ids = {track.get("task_id") for track in root.iterfind("track")} - {None}
    if len(tasks) > 1 or len(ids) > 1:
        names = [printable(text_of(task, "name")[:40]) for task in tasks[:NAMED]]
        listed = f" ({', '.join(names)})" if names else ""
        raise LabelsError(
            f"{path} has {max(len(tasks), len(ids))} tasks of a project{listed}; the frames of a "
            "video must be of one. Export the tasks one by one"
        )
    if meta is None:
        return None
    for tag in (PROJECT_TASK, "task", "job"):
        element = meta.find(tag)
        if element is not None:
            return element
    return meta


def _label_names(root: Element, path: Path) -> list[str]:
    """The names in the description of the task, in its order."""
    meta = root.find("meta")
    if meta is None:
        return []
    names = []
    for labels in meta.iter("labels"):
        for label in labels.iterfind("label"):
            names.append(class_name(text_of(label, "name"), f"{path}: labels"))
    return names


def _with_class_names(annotations: Annotations, path: Path) -> Annotations:
    """Adds the names of boxes that the description of the task lacks."""
    used = different_names(label.class_name for label in annotations.labels)
    names = list(dict.fromkeys(annotations.classes))
    names += [name for name in used if name not in names]
    annotations.classes = require_classes(names, str(path))
    return annotations


# -- writing --------------------------------------------------------------------------------------
RECORDING = "recording"  # the subset of the tasks that Evspan writes: their name is a recording


def write_cvat(annotations: Annotations, path: Path) -> None:
    """Writes a file for video. Its pictures are the frames 0, 1, ... of one recording.

    A box without a track becomes a track of its own. Tracks of several classes, or with several
    boxes in a frame, are split.
    """
    root = Element(ROOT)
    SubElement(root, "version").text = "1.1"
    root.append(_meta(annotations))
    names: dict[tuple[int | str, str], list[Label]] = {}
    for i, label in enumerate(annotations.labels):
        key = f"box {i}" if label.track is None else label.track
        names.setdefault((key, label.class_name), []).append(label)
    used = {key for key, _ in names if isinstance(key, int)}
    unused = _unused_ids(used)
    taken: set[int] = set()
    for (key, name), labels in names.items():
        for part in _one_per_frame(labels):
            track_id = key if isinstance(key, int) and key not in taken else next(unused)
            taken.add(track_id)
            track = SubElement(root, "track", id=str(track_id), label=name, source="evspan")
            _add_boxes(track, part, len(annotations.pictures))
    write_xml(path, root)


def _unused_ids(used: set[int]) -> Iterator[int]:
    number = 0
    while True:
        if number not in used:
            yield number
        number += 1


def _one_per_frame(labels: list[Label]) -> list[list[Label]]:
    """The labels in lists that have at most one for each picture, in the order of pictures."""
    parts: list[list[Label]] = []
    for label in sorted(labels, key=lambda label: label.picture):
        for part in parts:
            if part[-1].picture < label.picture:
                part.append(label)
                break
        else:
            parts.append([label])
    return parts


def _add_boxes(track: Element, labels: list[Label], frames: int) -> None:
    """Adds every box as a keyframe, and one that is outside where a gap or the end follows."""
    for i, label in enumerate(labels):
        _add_box(track, label, label.picture, outside=False)
        following = label.picture + 1
        is_last = i + 1 == len(labels)
        has_gap = not is_last and labels[i + 1].picture > following
        if (is_last and following < frames) or has_gap:
            _add_box(track, label, following, outside=True)


def _add_box(track: Element, label: Label, frame: int, *, outside: bool) -> None:
    corners = (label.x, label.y, label.x + label.w, label.y + label.h)
    box = SubElement(
        track,
        "box",
        frame=str(frame),
        outside=str(int(outside)),
        occluded="0",
        keyframe="1",
    )
    for key, value in zip(CORNERS, corners, strict=True):
        box.set(key, repr(value))
    if label.ignore:
        SubElement(box, "attribute", name=IGNORE).text = "true"
    if label.confidence != 1:
        SubElement(box, "attribute", name=CONFIDENCE).text = digits(label.confidence)


def _meta(annotations: Annotations) -> Element:
    meta = Element("meta")
    task = SubElement(meta, "task")
    pictures = annotations.pictures
    recording = pictures[0].recording if pictures else ""
    SubElement(task, "name").text = recording
    SubElement(task, "size").text = str(len(pictures))
    SubElement(task, "mode").text = "interpolation"
    SubElement(task, "start_frame").text = "0"
    SubElement(task, "stop_frame").text = str(len(pictures) - 1)
    SubElement(task, "subset").text = RECORDING
    labels = SubElement(task, "labels")
    for name in annotations.classes:
        SubElement(SubElement(labels, "label"), "name").text = name
    size = pictures[0].size if pictures else None
    if size:
        original = SubElement(task, "original_size")
        SubElement(original, "width").text = str(size[0])
        SubElement(original, "height").text = str(size[1])
    return meta
