"""Pascal VOC: one XML file per image."""

from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from evspan.data_prep.labels.interchange.annotations import (
    Annotations,
    Label,
    LabelsError,
    Picture,
    class_name,
    different_names,
    number,
    picture_size,
    require_classes,
    whole,
)
from evspan.data_prep.labels.interchange.names import image_stem
from evspan.data_prep.labels.interchange.numbers import digits
from evspan.data_prep.labels.interchange.xml_files import read_xml, text_of, write_xml

ROOT = "annotation"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(files: list[Path]) -> Annotations:
    """Reads XML files, one per image; `difficult` objects become ignore regions.

    Corners are taken as coordinates of the box's edges, as LabelImg and CVAT write them.

    Raises:
        LabelsError: a file is no annotation of an image.
        OSError: a file cannot be read.
    """
    annotations = Annotations()
    for path in files:
        root = read_xml(path)
        if root.tag != ROOT:
            raise LabelsError(f"{path} has the root <{root.tag[:40]}>, not <{ROOT}> of Pascal VOC")
        size = root.find("size")
        name = text_of(root, "filename") or path.stem
        picture = Picture(
            name, size=picture_size(text_of(size, "width"), text_of(size, "height"), str(path))
        )
        annotations.pictures.append(picture)
        for i, item in enumerate(root.iterfind("object")):
            place = f"{path}: object {i + 1}"
            annotations.labels.append(_label(item, len(annotations.pictures) - 1, place))
    names = different_names(label.class_name for label in annotations.labels)
    annotations.classes = require_classes(names, str(files[0].parent if files else ""))
    return annotations


def _label(item: Element, picture: int, place: str) -> Label:
    box = item.find("bndbox")
    if box is None:
        raise LabelsError(f"{place} has no <bndbox>. Only boxes are read")
    left, top, right, bottom = (number(text_of(box, key), place, key) for key in CORNERS)
    score = text_of(item, "score")
    text = text_of(item, "track_id")
    track = whole(text, place, "track_id", least=-1, most=2**53) if text else -1
    return Label(
        picture,
        class_name(text_of(item, "name"), place),
        left,
        top,
        right - left,
        bottom - top,
        track=track if track >= 0 else None,
        confidence=number(score, place, "score") if score else 1.0,
        ignore=text_of(item, "difficult").lower() in ("1", "true"),
    )


def write_voc(annotations: Annotations, folder: Path) -> None:
    """Writes one file per picture. Beside VOC's elements, objects have `track_id` and `score`."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [_root(picture) for picture in annotations.pictures]
    for label in annotations.labels:
        item = SubElement(roots[label.picture], "object")
        SubElement(item, "name").text = label.class_name
        SubElement(item, "difficult").text = str(int(label.ignore))
        if label.track is not None:
            SubElement(item, "track_id").text = str(label.track)
        SubElement(item, "score").text = digits(label.confidence)
        box = SubElement(item, "bndbox")
        corners = (label.x, label.y, label.x + label.w, label.y + label.h)
        for key, value in zip(CORNERS, corners, strict=True):
            SubElement(box, key).text = repr(value)
    for picture, root in zip(annotations.pictures, roots, strict=True):
        write_xml(folder / f"{image_stem(picture.name)}.xml", root)


def _root(picture: Picture) -> Element:
    root = Element(ROOT)
    SubElement(root, "filename").text = picture.name
    if picture.size:
        size = SubElement(root, "size")
        SubElement(size, "width").text = str(picture.size[0])
        SubElement(size, "height").text = str(picture.size[1])
        SubElement(size, "depth").text = "3"
    return root
