"""Describes the files of a source that are not used, one line for each kind."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from evspan.conf.text import printable
from evspan.data_prep.labels.box_files import BOXES_ENDING, boxes_in, recording_name
from evspan.data_prep.recordings.links import leads_nowhere
from evspan.data_prep.recordings.open import AMBIGUOUS_SUFFIXES, OWN_SUFFIXES, holds_events
from evspan.data_prep.shards.format import SPLITS

COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz")
BOXES_SUFFIXES = (".npy", ".npz")  # of files that look like boxes
NAMED = 1  # files that a line names
MOST_ENTRIES = 20_000  # that are looked at below sub-folders


def is_recording(name: str) -> bool:
    """Whether a file has a suffix that only recordings have, in any case."""
    return name.lower().endswith(OWN_SUFFIXES)


def is_recording_file(path: Path) -> bool:
    """Whether a file is a recording: by its suffix or, of text and archives, by its content.

    Raises:
        OSError: the file cannot be read.
    """
    if path.name.lower().endswith(AMBIGUOUS_SUFFIXES):
        return holds_events(path)
    return is_recording(path.name)


@dataclass
class FolderFiles:
    """The entries of a folder that matter, each kind sorted by name.

    Attributes:
        recordings: files, and links to files, with the suffix of a recording.
        boxes: box files by the name of their recording; see `boxes_in`.
        dangling: links without a target, whatever their name.
        hidden: recordings and box files whose name begins with a dot.
    """

    path: Path
    recordings: list[Path] = field(default_factory=list)
    boxes: dict[str, Path] = field(default_factory=dict)
    dangling: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    compressed: list[Path] = field(default_factory=list)
    like_boxes: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)

    @property
    def unmatched_boxes(self) -> list[Path]:
        """Files that look like boxes, of which no recording of the folder has the name."""
        used = {self.boxes.get(recording_name(path)) for path in self.recordings}
        return [path for path in self.like_boxes if path not in used]


def files_of(folder: Path) -> FolderFiles:
    """Lists a folder, without its sub-folders' entries.

    Raises:
        OSError: the folder, or the target of a link, cannot be read now.
    """
    files = FolderFiles(folder)
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        _sort_in(files, entry)
    files.boxes = boxes_in(files.like_boxes + files.dangling)
    return files


def _sort_in(files: FolderFiles, entry: "os.DirEntry[str]") -> None:
    path = files.path / entry.name
    name = entry.name.lower()
    of_interest = name.endswith((*OWN_SUFFIXES, *BOXES_SUFFIXES, *COMPRESSED))
    if entry.name.startswith("."):
        if of_interest and not entry.is_dir():
            files.hidden.append(path)
    elif entry.is_symlink() and leads_nowhere(path):
        files.dangling.append(path)
    elif entry.is_dir():
        files.folders.append(path)
    elif not entry.is_file():  # opening a pipe would wait forever
        return
    elif is_recording_file(path):
        files.recordings.append(path)
    elif name.endswith(COMPRESSED):
        files.compressed.append(path)
    elif name.endswith(BOXES_SUFFIXES):
        files.like_boxes.append(path)


def left_out(source: Path, folders: dict[str, Path]) -> list[str]:
    """One line for each kind of file in a source that is not used.

    Args:
        source: the source folder.
        folders: the folders that are read, by split.

    Raises:
        OSError: a folder cannot be read now.
    """
    read = [files_of(folder) for folder in folders.values()]
    lines = []
    if source not in folders.values():
        top = files_of(source)
        others = [path for path in top.folders if path.name not in SPLITS]
        in_no_split = top.recordings + _recordings_below(others)
        if in_no_split:
            splits = "/, ".join(SPLITS)
            lines.append(f"left out, being in none of {splits}/: {_named(in_no_split, source)}")
        read.append(FolderFiles(source, compressed=top.compressed, dangling=top.dangling))
    lines += _lines_of(read, source)
    return lines


def _lines_of(folders: list[FolderFiles], source: Path) -> Iterator[str]:
    nested = _joined(_recordings_below(files.folders) for files in folders)
    if nested:
        yield (
            f"left out, in sub-folders: {_named(nested, source)}. Move them up, or name them in "
            "a list: source=LIST.txt"
        )
    compressed = _joined(files.compressed for files in folders)
    if compressed:
        yield f"left out, compressed: {_named(compressed, source)}. Unpack them (gunzip, unzstd)"
    unmatched = _joined(files.unmatched_boxes for files in folders)
    if unmatched:
        line = (
            f"left out, box files of no recording: {_named(unmatched, source)}. The box file of "
            f"X_td.* is X{BOXES_ENDING}; source=LIST.txt names others"
        )
        if any(path.suffix.lower() == ".npz" for path in unmatched):
            line += "; of an .npz, save the array of boxes with numpy.save"
        yield line
    links = _joined(files.dangling for files in folders)
    if links:
        yield f"left out, links to files that are not there: {_named(links, source)}"
    hidden = _joined(files.hidden for files in folders)
    if hidden:
        yield f"left out, hidden: {_named(hidden, source)}"


def _recordings_below(folders: Iterable[Path]) -> list[Path]:
    """Recordings in these folders and below, of the first MOST_ENTRIES files."""
    paths = chain.from_iterable(map(_visible_below, folders))
    return sorted(path for path in islice(paths, MOST_ENTRIES) if _is_recording_below(path))


def _is_recording_below(path: Path) -> bool:
    return path.is_file() and is_recording_file(path)


def _visible_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(parent, name)


def _joined(lists: Iterable[list[Path]]) -> list[Path]:
    return list(chain.from_iterable(lists))


def _named(paths: list[Path], source: Path) -> str:
    """'train/a.gz, train/b.gz and 7 more'."""
    text = ", ".join(printable(str(path.relative_to(source))) for path in paths[:NAMED])
    if len(paths) > NAMED:
        text += f" and {len(paths) - NAMED} more"
    return text
