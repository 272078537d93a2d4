"""COCO JSON: images, categories and annotations in one file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evspan.conf.json_files import read_json
from evspan.data_prep.labels.interchange.annotations import (
    MOST_BYTES,
    Annotations,
    Label,
    LabelsError,
    Picture,
    class_name,
    number,
    picture_size,
    require_classes,
    require_regular,
    shown,
    whole,
)
from evspan.data_prep.labels.interchange.numbers import plain

MOST_VALUES = 20_000_000
LABEL_STUDIO_KEYS = {"data", "annotations"}  # of a task in Label Studio's own JSON


def read_coco(path: Path) -> Annotations:
    """Reads a COCO file; `iscrowd` and `ignore` make ignore regions.

    Track ids are `track_id` or `instance_id` of an annotation, or of its `attributes` (CVAT).

    Raises:
        LabelsError, JsonFileError: the file is no COCO file.
        OSError: it cannot be read.
    """
    require_regular(path)
    content = read_json(path, most_bytes=MOST_BYTES, most_values=MOST_VALUES)
    if isinstance(content, list):
        raise LabelsError(_no_coco(content, path))
    tables = {name: _table(content, name, path) for name in ("images", "categories", "annotations")}
    used = set()
    for i, annotation in enumerate(tables["annotations"]):
        used.add(_id(annotation, "category_id", f"{path}: annotations[{i}]"))
    categories = _categories(tables["categories"], used, path)
    pictures: list[Picture] = []
    by_id: dict[int, int] = {}
    for i, image in enumerate(tables["images"]):
        place = f"{path}: images[{i}]"
        image_id = _id(image, "id", place)
        if image_id in by_id:
            raise LabelsError(f"{place} has the id {image_id}, as another image has. Renumber them")
        by_id[image_id] = len(pictures)
        pictures.append(_picture(image, place))
    labels = []
    for i, annotation in enumerate(tables["annotations"]):
        labels.append(_label(annotation, f"{path}: annotations[{i}]", by_id, categories))
    return Annotations(list(categories.values()), pictures, labels)


def _table(content: Any, name: str, path: Path) -> list[dict[str, Any]]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LabelsError(
            f"{path} has no list of objects {name!r}. A COCO file has images, categories and "
            "annotations"
        )
    return rows


def _no_coco(content: list[Any], path: Path) -> str:
    """What a file is that is a list."""
    first = content[0] if content else None
    if isinstance(first, dict) and first.keys() & LABEL_STUDIO_KEYS:
        return f"{path} is Label Studio's own JSON, which is not read. Export from it as COCO"
    return (
        f"{path} is a list of detections (COCO results), which name no images and no classes. "
        "Import the file that has images, categories and annotations"
    )


def _categories(rows: list[dict[str, Any]], used: set[int], path: Path) -> dict[int, str]:
    """Names by id, in the order of the ids.

    Args:
        used: ids of categories that annotations have. Another category that is only the
            supercategory of others, as Roboflow writes one, is no class.
    """
    names: dict[int, str] = {}
    ids = set()
    groups = _supercategories(rows)
    for i, row in enumerate(rows):
        place = f"{path}: categories[{i}]"
        category = _id(row, "id", place)
        if category in ids:
            raise LabelsError(f"{place} has the id {category}, as another has. Renumber them")
        ids.add(category)
        name = class_name(row.get("name"), place)
        is_group = name in groups and row.get("supercategory") != name
        if category in used or not is_group:
            names[category] = name
    ordered = dict(sorted(names.items()))
    require_classes(list(ordered.values()), str(path))
    return ordered


def _supercategories(rows: list[dict[str, Any]]) -> set[str]:
    names = [row.get("supercategory") for row in rows]
    return {name for name in names if isinstance(name, str)}


def _picture(image: Mapping[str, Any], place: str) -> Picture:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise LabelsError(f"{place} has the file_name {shown(name)}; it must be the image's name")
    frame = image.get("frame_id")
    return Picture(
        name=name,
        frame=None if frame is None else whole(frame, place, "frame_id"),
        size=picture_size(image.get("width"), image.get("height"), place),
    )


def _label(
    annotation: Mapping[str, Any],
    place: str,
    pictures: Mapping[int, int],
    categories: Mapping[int, str],
) -> Label:
    image = _id(annotation, "image_id", place)
    category = _id(annotation, "category_id", place)
    if image not in pictures or category not in categories:
        missing = f"image_id {image}" if image not in pictures else f"category_id {category}"
        raise LabelsError(f"{place} has the {missing}, which the file does not define")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise LabelsError(f"{place} has the bbox {shown(box)}; it must be [x, y, width, height]")
    _require_upright(annotation, place)
    x, y, w, h = (number(value, place, "bbox") for value in box)
    score = annotation.get("score")
    return Label(
        pictures[image],
        categories[category],
        x,
        y,
        w,
        h,
        track=_track(annotation, place),
        confidence=1.0 if score is None else number(score, place, "score"),
        ignore=bool(annotation.get("iscrowd")) or annotation.get("ignore") in (1, True),
    )


def _require_upright(annotation: Mapping[str, Any], place: str) -> None:
    """Refuses a rotated box of CVAT, whose bbox is that before the rotation."""
    attributes = annotation.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    if rotation is not None and number(rotation, place, "rotation") % 360:
        raise LabelsError(
            f"{place} is a box that is rotated by {shown(rotation)} degrees; only upright boxes "
            "are read. Draw it again without a rotation, or remove it"
        )


def _track(annotation: Mapping[str, Any], place: str) -> int | None:
    attributes = annotation.get("attributes")
    for source in (annotation, attributes):
        if not isinstance(source, dict):
            continue
        for key in ("track_id", "instance_id"):
            if source.get(key) is not None:
                track = whole(source[key], place, key, least=-1)
                return track if track >= 0 else None
    return None


def _id(row: Mapping[str, Any], key: str, place: str) -> int:
    return whole(row.get(key), place, key)


def write_coco(annotations: Annotations, path: Path) -> None:
    """Writes a COCO file. Beside COCO's keys, annotations have `track_id` and `score`."""
    categories = {name: i for i, name in enumerate(annotations.classes, 1)}
    images: list[dict[str, Any]] = []
    for i, picture in enumerate(annotations.pictures, 1):
        image: dict[str, Any] = {"id": i, "file_name": picture.name}
        if picture.size:
            image["width"], image["height"] = picture.size
        images.append(image)
    rows = []
    for i, label in enumerate(annotations.labels, 1):
        box = [plain(value) for value in (label.x, label.y, label.w, label.h)]
        row: dict[str, Any] = {
            "id": i,
            "image_id": label.picture + 1,
            "category_id": categories[label.class_name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(label.ignore),
            "score": plain(label.confidence),
        }
        if label.track is not None:
            row["track_id"] = label.track
        rows.append(row)
    content = {
        "images": images,
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
        "annotations": rows,
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
