"""Recognises the format of a file or folder of labels from its content, and reads it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from evspan.data_prep.labels.interchange import coco, csv_tables, cvat, mot, voc, yolo
from evspan.data_prep.labels.interchange.annotations import (
    Annotations,
    LabelsError,
    require_classes,
    require_regular,
)
from evspan.data_prep.labels.interchange.images import files_below

FORMATS = ("coco", "yolo", "voc", "cvat", "csv", "mot")
HEAD_BYTES = 4096  # that are enough to recognise a format
ZIP = b"PK\x03\x04"
GENERAL_NAMES = {"annotations", "boxes", "data", "default", "detections", "labels"}
GIVE_FORMAT = f"Give one of {', '.join(FORMATS)} with --format"


@dataclass(frozen=True)
class ReadOptions:
    """What a reader cannot find in the files. None and empty: it is not given.

    size: (width, height) of the images. images: folder of the labelled images. classes: names in
    the order of their ids.
    """

    size: tuple[int, int] | None = None
    images: Path | None = None
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Annotations that were read together. path: the file or folder; name: of its recording."""

    path: Path
    name: str
    annotations: Annotations


def recognise(path: Path) -> str:
    """The format of a file or folder, one of `FORMATS`.

    Raises:
        LabelsError: the content is of no known format.
        OSError: it cannot be read.
    """
    name = _of_folder(path) if path.is_dir() else _of_file(path)
    if not name:
        raise LabelsError(
            f"{path} is no file or folder of labels that is recognised. {GIVE_FORMAT}"
        )
    return name


def _of_folder(folder: Path) -> str:
    if any((folder / name).is_file() for name in (*yolo.CONFIG_FILES, *yolo.NAME_FILES)):
        return "yolo"
    if _mot_files(folder):
        return "mot"
    for ending in (".json", ".xml", ".csv"):
        files = files_below(folder, (ending,))
        if files:
            return _of_file(files[0])
    return "yolo" if files_below(folder, (".txt",)) else ""


def _of_file(path: Path) -> str:
    """The format by the first bytes; empty if they are of none."""
    require_regular(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(ZIP):
        raise LabelsError(
            f"{path} is a ZIP archive. Unpack it (unzip -d labels FILE), and import it"
        )
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith(("{", "[")):
        return "coco"
    if text.startswith("<"):
        return "voc" if f"<{voc.ROOT}>" in text or f"<{voc.ROOT} " in text else "cvat"
    if path.name in (*yolo.CONFIG_FILES, *yolo.NAME_FILES):
        return "yolo"
    return _of_table(text.split("\n")[0])


def _of_table(line: str) -> str:
    words = [word.strip() for word in line.split(",")]
    if len(words) >= 6 and all(_is_number(word) for word in words):
        return "mot"
    known = set(chain.from_iterable(csv_tables.COLUMNS.values()))
    if len(words) >= 5 and len(known & {word.lower() for word in words}) >= 3:
        return "csv"
    return ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_annotations(path: Path, name: str, options: ReadOptions) -> list[Part]:
    """Reads all annotations of a file or folder.

    Args:
        name: the format, one of `FORMATS`.

    Raises:
        LabelsError: the content is not of this format.
        OSError: it cannot be read.
    """
    require_classes(options.classes, "--classes")
    return _READERS[name](path, options)


def _read_coco(path: Path, options: ReadOptions) -> list[Part]:
    return [Part(file, "", coco.read_coco(file)) for file in _files(path, ".json")]


def _read_yolo(path: Path, options: ReadOptions) -> list[Part]:
    root = path if path.is_dir() else path.parent
    files = files_below(root, (".txt",))
    annotations = yolo.read_yolo(root, files, options.images, options.size)
    return [Part(root, "", annotations)]


def _read_voc(path: Path, options: ReadOptions) -> list[Part]:
    return [Part(path, "", voc.read_voc(_files(path, ".xml")))]


def _read_cvat(path: Path, options: ReadOptions) -> list[Part]:
    return [Part(file, _name_of(file), cvat.read_cvat(file)) for file in _files(path, ".xml")]


def _read_csv(path: Path, options: ReadOptions) -> list[Part]:
    files = [file for file in _files(path, ".csv") if file.name != "frames.csv"]
    return [
        Part(file, _name_of(file), csv_tables.read_csv(file, options.classes)) for file in files
    ]


def _read_mot(path: Path, options: ReadOptions) -> list[Part]:
    files = [path]
    if path.is_dir():
        files = _mot_files(path)
    return [
        Part(file, mot.sequence_name(file), mot.read_mot(file, options.classes)) for file in files
    ]


def _name_of(file: Path) -> str:
    """The recording that a file's name stands for; empty for the names that tools give."""
    return "" if file.stem.lower() in GENERAL_NAMES else file.stem


def _mot_files(folder: Path) -> list[Path]:
    """The files of each sequence below a folder: the ground truth, else the detections."""
    chosen: dict[Path, Path] = {}
    for file in files_below(folder, (".txt",)):
        if file.name not in (mot.GROUND_TRUTH, mot.DETECTIONS):
            continue
        sequence = file.parent
        if sequence.name in ("gt", "det"):
            sequence = sequence.parent
        if sequence not in chosen or file.name == mot.GROUND_TRUTH:
            chosen[sequence] = file
    return list(chosen.values())


def _files(path: Path, ending: str) -> list[Path]:
    """The file itself, or those of a folder with this ending.

    Raises:
        LabelsError: there is none.
    """
    if not path.is_dir():
        return [path]
    files = files_below(path, (ending,))
    if not files:
        raise LabelsError(f"{path} has no {ending} files. {GIVE_FORMAT}")
    return files


_READERS: dict[str, Callable[[Path, ReadOptions], list[Part]]] = {
    "coco": _read_coco,
    "yolo": _read_yolo,
    "voc": _read_voc,
    "cvat": _read_cvat,
    "csv": _read_csv,
    "mot": _read_mot,
}
