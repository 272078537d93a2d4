"""Finds the recordings of a source, their splits and their box files."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import xxhash
from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import split_fractions
from evspan.conf.text import plural, printable
from evspan.data_prep.hdf5_files import unavailable
from evspan.data_prep.labels.box_files import BOXES_ENDING, find_boxes, recording_name
from evspan.data_prep.recordings.left_out import files_of, is_recording, left_out
from evspan.data_prep.recordings.links import require_targets, stat_of
from evspan.data_prep.recordings.open import SUFFIXES, holds_events, require_own_content
from evspan.data_prep.shards.format import SPLITS

LISTS = (".txt", ".csv")
NO_BOXES = "-"


@dataclass(frozen=True)
class Source:
    """A recording of the source."""

    path: Path
    split: str
    name: str  # unique within the split: the name of its group in a shard
    relative: str  # path below the source folder; of a list: the path as it is written there
    boxes: Path | None  # its box file

    @property
    def key(self) -> str:
        """split/name."""
        return f"{self.split}/{self.name}"


@contextmanager
def source_readable() -> Iterator[None]:
    """Stops where a file cannot be read at the moment: it counts neither as removed nor damaged.

    Raises:
        UnavailableFileError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise unavailable(error.filename or "a file of the source", error) from error


def find_sources(source: Path, split: str = "") -> list[Source]:
    """Finds the recordings below train/ val/ test/, or those that a list names.

    Args:
        source: a folder; without train/ val/ test/ its recordings count as test, as does a single
            file. A .txt or .csv without events is a list of recordings.
        split: fractions of train, val and test, for a source without such folders: `assigned`.

    Raises:
        RecordingError: nothing there, a link without a target, a name that cannot be stored, two
            recordings of one name, or a wrong line of a list.
        UnavailableFileError: a folder or a link's target cannot be read now.
    """
    with source_readable():
        if not split:
            return _find(source)
        if source.is_dir() and any((source / name).is_dir() for name in SPLITS):
            raise RecordingError(
                f"source {source} has folders {'/, '.join(SPLITS)}/, so that split={split} has "
                "nothing to assign. Leave split= out, or move the recordings to one folder"
            )
        return assigned(_find(source, has_splits=False), split)


def assigned(sources: Sequence[Source], split: str) -> list[Source]:
    """The same recordings in the splits that the hashes of their names give.

    The hash (xxh3-64) of a name is a number from 0 to 1: train is below the first fraction, and so
    on. It depends on nothing else, so that another recording moves none.

    Args:
        split: the fractions, as `split_fractions` reads them.
    """
    fractions = split_fractions(split)
    assert fractions is not None
    moved: list[Source] = []
    for source in sources:
        position = xxhash.xxh3_64_intdigest(source.name.encode()) / 2**64
        name = SPLITS[-1]
        if position < fractions[0]:
            name = SPLITS[0]
        elif position < fractions[0] + fractions[1] or not fractions[2]:
            name = SPLITS[1]
        moved.append(replace(source, split=name))
    return moved


def _find(source: Path, *, has_splits: bool = True) -> list[Source]:
    require_targets([source])
    if stat_of(source) is None:
        raise RecordingError(
            f"source {source} is not there. Give a folder with {'/ '.join(SPLITS)}/ of "
            "recordings, one recording, or a list of them: source=PATH"
        )
    if source.suffix.lower() in LISTS and source.is_file() and not holds_events(source):
        return _listed(source, has_splits=has_splits)
    if source.is_file():
        sources = [Source(source, "test", recording_name(source), source.name, find_boxes(source))]
    else:
        sources = _in_folders(source, split_folders(source))
    _require_storable([s.path for s in sources])
    _require_unique(sources, source)
    return sources


def split_folders(source: Path) -> dict[str, Path]:
    """The folders of a source that are read, by split; the folder itself counts as test.

    Raises:
        RecordingError: the folder of a split is a link without a target.
    """
    folders = {split: source / split for split in SPLITS}
    require_targets(list(folders.values()))
    return {split: path for split, path in folders.items() if path.is_dir()} or {"test": source}


def unused_files(source: Path) -> list[str]:
    """A line for each kind of file in a source folder that is not used; see `left_out`."""
    return left_out(source, split_folders(source)) if source.is_dir() else []


def _in_folders(source: Path, folders: dict[str, Path]) -> list[Source]:
    listed = {split: files_of(folder) for split, folder in folders.items()}
    dangling = [path for files in listed.values() for path in files.dangling]
    require_targets([path for path in dangling if _is_used(path)])
    sources = []
    for split, files in listed.items():
        for path in files.recordings:
            name = recording_name(path)
            relative = str(path.relative_to(source))
            sources.append(Source(path, split, name, relative, files.boxes.get(name)))
    if not sources:
        searched = ", ".join(str(folder) for folder in folders.values())
        unused = "".join(f"; {line}" for line in left_out(source, folders))
        raise RecordingError(
            f"source {source} holds no recordings ({', '.join(SUFFIXES)}) in {searched}{unused}"
        )
    return sources


def _is_used(path: Path) -> bool:
    """Whether a file of this name would be read: a recording, or a box file."""
    return is_recording(path.name) or path.name.lower().endswith(BOXES_ENDING)


def _require_storable(paths: Sequence[Path]) -> None:
    """Raises RecordingError where a file's name cannot be the name of a group in a shard."""
    unnamed = [path for path in paths if not recording_name(path).strip(".")]
    if unnamed:
        raise RecordingError(
            f"{printable(str(unnamed[0]))} has no name before its ending "
            f"({plural(len(unnamed), 'such file')}). Rename it, for example to a_td.raw, or move "
            "it out of the source"
        )
    for path in paths:
        try:
            recording_name(path).encode()
        except UnicodeEncodeError as error:
            raise RecordingError(
                f"{printable(str(path))}: the file name is not UTF-8. Rename it (convmv -f latin1 "
                "-t utf8 --notest FILE, and its box file), or move it out of the source"
            ) from error


def _require_unique(sources: list[Source], folder: Path) -> None:
    by_key: dict[str, Source] = {}
    for source in sources:
        other = by_key.setdefault(source.key, source)
        if other is not source:
            for path in (other.path, source.path):
                if path.is_file():
                    require_own_content(path)  # pointers of Git LFS have every suffix
            raise RecordingError(
                f"{other.path} and {source.path} would both be recording {source.key}. Rename one, "
                f"or move it out of {folder}"
            )


class _Line(NamedTuple):
    """A line of a list that names a recording."""

    number: int
    fields: list[str]


def _listed(path: Path, *, has_splits: bool) -> list[Source]:
    """The recordings of a list: a line `split path [boxes]` for each, or `path [boxes]`.

    Fields are separated by blanks or commas; # begins a comment.
    """
    sources: dict[str, Source] = {}
    lines: dict[str, int] = {}
    listed: dict[Path, dict[str, Path]] = {}
    for line in _lines(path):
        where = f"{path}, line {line.number}"
        if not has_splits:
            if line.fields[0] in SPLITS:
                raise RecordingError(
                    f"{where}: it names a split, so that split= has nothing to assign. Leave "
                    "split= out, or write lines: path [boxes.npy]"
                )
            line = line._replace(fields=["test", *line.fields])
        source = _listed_source(path, line.fields, where, listed)
        if source.key in sources:
            other = sources[source.key]
            raise RecordingError(
                f"{where}: {source.path} would be recording {source.key}, as {other.path} in line "
                f"{lines[source.key]} is. Take one out, rename it, or list a link to it that has "
                "another name"
            )
        sources[source.key] = source
        lines[source.key] = line.number
    if not sources:
        raise RecordingError(
            f"{path} lists no recordings. Write a line for each: split path [boxes.npy]"
        )
    _require_storable([source.path for source in sources.values()])
    return list(sources.values())


def _listed_source(
    path: Path, fields: list[str], where: str, listed: dict[Path, dict[str, Path]]
) -> Source:
    """where: the list and the line, for messages."""
    if len(fields) not in (2, 3):
        raise RecordingError(
            f"{where}: {plural(len(fields), 'field')} where a line is: split path [boxes.npy]. "
            "Write paths that contain blanks between commas: split,path,boxes"
        )
    split = fields[0]
    if split not in SPLITS:
        raise RecordingError(
            f"{where}: split {split!r} is none of {', '.join(SPLITS)}. Write one of these first"
        )
    recording = path.parent / fields[1]
    _require_file(recording, f"{where}: recording", path)
    if recording.suffix.lower() not in SUFFIXES:
        raise RecordingError(
            f"{where}: {recording} is no recording ({', '.join(SUFFIXES)}). Name one that is"
        )
    boxes = _listed_boxes(recording, fields[2:], where, path, listed)
    return Source(recording, split, recording_name(recording), fields[1], boxes)


def _lines(path: Path) -> Iterator[_Line]:
    """Yields the lines that name a recording: no comments, blank lines or headings."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecordingError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). A list of "
            "recordings has a line for each: split path [boxes.npy]"
        ) from error
    if any("\0" in line for line in lines):
        raise RecordingError(
            f"{path} contains NUL bytes, so it is no text. A list of recordings has a line for "
            "each: split path [boxes.npy]"
        )
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        try:
            fields = _fields(text)
        except csv.Error as error:
            raise RecordingError(
                f"{path}, line {number}: {error}. Write: split,path,boxes"
            ) from error
        is_heading = fields[:2] == ["split", "path"]
        if fields and not is_heading:
            yield _Line(number, fields)


def _fields(text: str) -> list[str]:
    """The fields of a line, without empty ones at its end (the last columns of a table)."""
    if "," in text:
        row = next(csv.reader([text], skipinitialspace=True))
        fields = [field.strip() for field in row]
    else:
        fields = text.split()
    while fields and not fields[-1]:
        fields.pop()
    return fields


def _listed_boxes(
    recording: Path,
    field: list[str],
    where: str,
    path: Path,
    listed: dict[Path, dict[str, Path]],
) -> Path | None:
    """The box file of a line. field: the third field, or nothing."""
    if field == [NO_BOXES]:
        return None
    if not field or not field[0]:
        return find_boxes(recording, listed)
    boxes = path.parent / field[0]
    _require_file(boxes, f"{where}: box file", path)
    return boxes


def _require_file(file: Path, what: str, path: Path) -> None:
    require_targets([file])
    if stat_of(file) is not None and file.is_file():
        return
    problem = "is a folder" if file.is_dir() else "is not there"
    raise RecordingError(
        f"{what} {file} {problem}. Correct the line: paths are absolute, or start at the list's "
        f"folder {path.parent.absolute()}"
    )
