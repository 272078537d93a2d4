"""YOLO folders: a text file per image, with lines `class cx cy w h` as fractions of the image."""

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]  # without annotations
from evspan.conf.errors import ConfigError
from evspan.conf.yaml_files import check_config_file
from evspan.data_prep.labels.interchange.annotations import (
    Annotations,
    Label,
    LabelsError,
    Picture,
    class_name,
    name_lines,
    number,
    picture_size,
    read_text,
    require_classes,
    shown,
    whole,
)
from evspan.data_prep.labels.interchange.images import image_sizes
from evspan.data_prep.labels.interchange.names import image_stem

CONFIG_FILES = ("data.yaml", "dataset.yaml", "data.yml")
NAME_FILES = ("classes.txt", "obj.names")
# Text files of a YOLO folder that hold no boxes.
OTHER_TEXTS = {"classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "frames.txt"}
SIZE_KEY = "image_size"  # [width, height] in the data.yaml that Evspan writes
WHOLE = re.compile(r"[0-9]{1,15}")


class _Line(NamedTuple):
    """A box. place: file and line, for messages. values: its numbers."""

    place: str
    values: list[str]


def read_yolo(
    root: Path, files: list[Path], images: Path | None, size: tuple[int, int] | None
) -> Annotations:
    """Reads the text files of a folder.

    An image without a text file counts as one without boxes, as it does for YOLO.

    Args:
        files: of the folder that may hold boxes.
        images: folder of the images; None: `root`.
        size: (width, height) of the images in pixels; None: that of the image files.

    Raises:
        LabelsError: a line is no box, a class has no name, the size of an image is not known, or
            two files are of one image.
        OSError: a file cannot be read.
    """
    config = _config(root)
    names = _names(root, config)
    if size is None and isinstance(config.get(SIZE_KEY), list) and len(config[SIZE_KEY]) == 2:
        width, height = config[SIZE_KEY]
        size = picture_size(width, height, str(root))
    sizes = image_sizes(images or root)
    texts = _texts_by_image([path for path in files if not _is_other_text(path)])
    lines = {stem: _lines(path) for stem, path in texts.items()}
    tracks = _have_track_ids(chain.from_iterable(lines.values()))
    annotations = Annotations(classes=names)
    for picture, stem in enumerate(sorted(lines.keys() | sizes.keys())):
        picture_wh = sizes.get(stem, size)
        annotations.pictures.append(Picture(name=stem, size=picture_wh))
        if not lines.get(stem):
            continue
        if picture_wh is None:
            raise LabelsError(
                f"{texts[stem]} has boxes as fractions of its image, whose size is not known. Give "
                "the images (--images FOLDER), the recording (--recording FILE) or --size WxH"
            )
        for line in lines[stem]:
            annotations.labels.append(_label(line, picture, names, picture_wh, tracks=tracks))
    return annotations


def _texts_by_image(files: list[Path]) -> dict[str, Path]:
    """The files by the stem of their image.

    Raises:
        LabelsError: two are of one image, or of images of one name in several folders.
    """
    texts: dict[str, Path] = {}
    for path in files:
        other = texts.setdefault(image_stem(path.stem), path)
        if other is not path:
            raise LabelsError(
                f"{other} and {path} have labels of images of the same name. Import folder by "
                "folder, each into the boxes of its recording; of augmented copies keep the first"
            )
    return texts


def _is_other_text(path: Path) -> bool:
    name = path.name.lower()
    return name in OTHER_TEXTS or name.startswith(("readme", "license"))


def _config(root: Path) -> dict[str, Any]:
    """The content of data.yaml; empty without one."""
    for name in CONFIG_FILES:
        path = root / name
        if not path.is_file():
            continue
        try:
            check_config_file(path)
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ConfigError, yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split("; restore it")[0].split())[:200]
            raise LabelsError(f"{path}: {reason}. Correct it, or write classes.txt") from error
        return config if isinstance(config, dict) else {}
    return {}


def _names(root: Path, config: dict[str, Any]) -> list[str]:
    """The class names, from data.yaml, classes.txt or obj.names."""
    names = config.get("names")
    place = f"{root}: names in data.yaml"
    if isinstance(names, dict):
        ids = [whole(key, place, "an id", most=len(names) - 1) for key in names]
        if len(set(ids)) < len(ids):
            raise LabelsError(f"{place} have an id twice. Number them from 0 on")
        names = [name for _, name in sorted(zip(ids, names.values(), strict=True))]
    if isinstance(names, list) and names:
        return require_classes([class_name(name, place) for name in names], place)
    for name in NAME_FILES:
        for folder in (root, root / "labels"):
            if (folder / name).is_file():
                return name_lines(folder / name)
    raise LabelsError(
        f"{root} names no classes. Write data.yaml with `names: [...]`, or classes.txt with the "
        "name of class 0, 1, ... per line"
    )


def _lines(path: Path) -> list[_Line]:
    """The boxes of a file.

    Raises:
        LabelsError: a line has other values than a box.
    """
    lines = []
    for i, text in enumerate(read_text(path).splitlines(), 1):
        values = text.split()
        if not values:
            continue
        place = f"{path}, line {i}"
        if len(values) not in (5, 6, 7):
            raise LabelsError(
                f"{place} has {len(values)} values ({shown(text[:40])}); a box is `class cx cy w "
                "h`, and optionally a confidence. Outlines (segmentation) are not read"
            )
        lines.append(_Line(place, values))
    return lines


def _have_track_ids(lines: Iterable[_Line]) -> bool:
    """Whether the sixth values are track ids, as CVAT writes them, and no confidences.

    They are if all are whole numbers, one is over 1, and no line has both.
    """
    exceeds_one = False
    for line in lines:
        if len(line.values) == 7:
            return False
        if len(line.values) == 6:
            if not WHOLE.fullmatch(line.values[5]):
                return False
            exceeds_one = exceeds_one or int(line.values[5]) > 1
    return exceeds_one


def _label(
    line: _Line, picture: int, names: list[str], size: tuple[int, int], *, tracks: bool
) -> Label:
    place, values = line
    class_id = whole(values[0], place, "the class")
    if class_id >= len(names):
        raise LabelsError(
            f"{place} has class {class_id}; the {len(names)} names are of 0 to "
            f"{len(names) - 1}. Add its name to data.yaml or classes.txt"
        )
    cx, cy, w, h = (number(value, place, "a coordinate", most=100) for value in values[1:5])
    track = None
    if len(values) == 7 or (tracks and len(values) == 6):
        track = whole(values[-1], place, "the track id")
    confidence = 1.0
    if len(values) > 5 and not tracks:
        confidence = _confidence(values[5], place)
    return Label(
        picture,
        names[class_id],
        (cx - w / 2) * size[0],
        (cy - h / 2) * size[1],
        w * size[0],
        h * size[1],
        track=track,
        confidence=confidence,
    )


def _confidence(text: str, place: str) -> float:
    confidence = number(text, place, "the confidence")
    if not 0 <= confidence <= 1:
        raise LabelsError(
            f"{place}: the confidence is {shown(text)}; it must be from 0 to 1. Correct it; if it "
            "is a track id, all lines with six values must have one"
        )
    return confidence


def write_yolo(annotations: Annotations, folder: Path) -> None:
    """Writes labels/*.txt and data.yaml; every picture has a size.

    A confidence other than 1 is the sixth value, as YOLO's detections have it.

    Args:
        annotations: without ignore regions, which YOLO does not have.
    """
    labels = folder / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    ids = {name: i for i, name in enumerate(annotations.classes)}
    lines: list[list[str]] = [[] for _ in annotations.pictures]
    for label in annotations.labels:
        picture = annotations.pictures[label.picture]
        lines[label.picture].append(_line(label, ids[label.class_name], picture))
    for picture, of_picture in zip(annotations.pictures, lines, strict=True):
        text = "".join(line + "\n" for line in of_picture)
        (labels / f"{image_stem(picture.name)}.txt").write_text(text)
    config: dict[str, Any] = {
        "train": "images",
        "val": "images",
        "names": dict(enumerate(annotations.classes)),
    }
    sizes = {picture.size for picture in annotations.pictures}
    if len(sizes) == 1:
        config[SIZE_KEY] = list(sizes.pop() or ())
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")


def _line(label: Label, class_id: int, picture: Picture) -> str:
    assert picture.size is not None
    width, height = picture.size
    values = [
        (label.x + label.w / 2) / width,
        (label.y + label.h / 2) / height,
        label.w / width,
        label.h / height,
    ]
    words = [str(class_id), *(f"{value:.9f}" for value in values)]
    if label.confidence != 1:
        words.append(f"{label.confidence:.7g}")
    return " ".join(words)
