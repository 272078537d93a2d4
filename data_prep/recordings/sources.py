"""Which recordings a source has, in which split each is, and where its boxes are."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.data_prep.labels.box_files import find_boxes, recording_name
from evspan.data_prep.recordings.open import SUFFIXES
from evspan.data_prep.shards.format import SPLITS

LISTS = (".txt", ".csv")
NO_BOXES = "-"


@dataclass(frozen=True)
class Source:
    path: Path
    split: str
    name: str  # unique within the split: the group's name
    relative: str  # below the source folder, or as the list names it: a path from its folder, or an absolute one
    boxes: Path | None  # its box file

    @property
    def key(self) -> str:
        return f"{self.split}/{self.name}"


def find_sources(source: Path) -> list[Source]:
    """Recordings below train/ val/ test/; a folder without these, or one file, counts as test. A .txt or .csv lists them.

    Raises:
        RecordingError: nothing there, two recordings of one name, or a line of a list that is wrong.
    """
    if not source.exists():
        raise RecordingError(
            f"source {source} is not there. Give a folder with {'/ '.join(SPLITS)}/ of recordings, one "
            "recording, or a list of them: source=PATH"
        )
    if source.suffix in LISTS and source.is_file():
        return _listed(source)
    found: list[Source] = []
    folders = [(s, source / s) for s in SPLITS if (source / s).is_dir()]
    for split, folder in folders or [("test", source)]:
        paths = [folder] if folder.is_file() else _recordings(folder)
        found += [
            Source(
                p,
                split,
                recording_name(p),
                str(p.relative_to(source)) if p != source else p.name,
                find_boxes(p),
            )
            for p in paths
        ]
    if not found:
        raise RecordingError(
            f"source {source} holds no recordings ({', '.join(SUFFIXES)}) in "
            f"{', '.join(str(f) for _, f in folders) or source}"
        )
    by_key: dict[str, Source] = {}
    for s in found:
        if (other := by_key.setdefault(s.key, s)) is not s:
            raise RecordingError(
                f"{other.path} and {s.path} would both be recording {s.key}. Rename one, or move it out of "
                f"{source}"
            )
    return found


def _listed(path: Path) -> list[Source]:
    """A line per recording: `split path [boxes]`, parted by blanks or commas; # begins a comment."""
    found: dict[str, tuple[int, Source]] = {}
    for number, fields in _lines(path):
        where = f"{path}, line {number}"
        if len(fields) not in (2, 3):
            raise RecordingError(
                f"{where}: {len(fields)} field{'s' if len(fields) > 1 else ''} where a line is: split "
                "path [boxes.npy]. Write paths that hold blanks between commas: split,path,boxes"
            )
        split, recording = fields[0], path.parent / fields[1]
        if split not in SPLITS:
            raise RecordingError(
                f"{where}: split {split!r} is none of {', '.join(SPLITS)}. Write one of these first"
            )
        _require_file(recording, f"{where}: recording", path)
        if recording.suffix not in SUFFIXES:
            raise RecordingError(
                f"{where}: {recording} is no recording ({', '.join(SUFFIXES)}). Name one that is"
            )
        source = Source(
            recording,
            split,
            recording_name(recording),
            fields[1],
            _listed_boxes(recording, fields[2:], where, path),
        )
        first, other = found.setdefault(source.key, (number, source))
        if other is not source:
            raise RecordingError(
                f"{where}: {recording} would be recording {source.key}, as {other.path} in line {first} is. "
                "Take one out, rename it, or list a link to it that has another name"
            )
    if not found:
        raise RecordingError(
            f"{path} lists no recordings. Write a line for each: split path [boxes.npy]"
        )
    return [source for _, source in found.values()]


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of lines that tell something."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecordingError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}). A list of recordings has a "
            "line for each: split path [boxes.npy]"
        ) from error
    for number, line in enumerate(lines, 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        try:
            fields = (
                [f.strip() for f in next(csv.reader([line], skipinitialspace=True))]
                if "," in line
                else line.split()
            )
        except csv.Error as error:
            raise RecordingError(
                f"{path}, line {number}: {error}. Write: split,path,boxes"
            ) from error
        while fields and not fields[-1]:  # a table's empty last column
            fields.pop()
        if fields and fields[:2] != ["split", "path"]:  # a table's heading
            yield number, fields


def _listed_boxes(recording: Path, field: list[str], where: str, path: Path) -> Path | None:
    if field == [NO_BOXES]:
        return None
    if not field or not field[0]:
        return find_boxes(recording)
    _require_file(path.parent / field[0], f"{where}: box file", path)
    return path.parent / field[0]


def _require_file(file: Path, what: str, path: Path) -> None:
    if not file.is_file():
        raise RecordingError(
            f"{what} {file} is {'a folder' if file.is_dir() else 'not there'}. Correct the line: paths are "
            f"absolute, or start at the list's folder {path.parent.absolute()}"
        )


def _recordings(folder: Path) -> list[Path]:
    """Hidden files are none: another system's copies leave such beside every file."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def in_no_split(source: Path) -> list[Path]:
    """Recordings beside train/ val/ test/, or in folders such as validation/: they are left out, which a user should hear."""
    if not any((source / s).is_dir() for s in SPLITS):
        return []
    others = sorted(
        p
        for p in source.iterdir()
        if p.is_dir() and p.name not in SPLITS and not p.name.startswith(".")
    )
    return _recordings(source) + [r for folder in others for r in _recordings(folder)]
