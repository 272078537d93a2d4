"""What `evspan infer` reads: files, folders, lists, patterns and prepared shards. No torch."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.text import printable
from evspan.data_prep.labels.box_files import find_boxes, recording_name
from evspan.data_prep.recordings.open import holds_events, open_recording
from evspan.data_prep.recordings.sources import LISTS, Source, find_sources, source_readable
from evspan.data_prep.shards.format import MANIFEST, load_manifest

PATTERN_LETTERS = "*?["
MOST_FOLDERS = 100  # in front of a name


@dataclass(frozen=True)
class InferInput:
    """A recording to detect in.

    Attributes:
        path: its file, or the folder of the shards that contain it.
        name: of its outputs; with the folder below the input, such as `val/drive`.
        boxes: its box file.
        key: in shards, its split/name.
    """

    path: Path
    name: str
    boxes: Path | None = None
    key: str = ""


def expand_inputs(words: Sequence[Path], split: str | None = None) -> list[InferInput]:
    """The recordings that the arguments name, each once, with names that differ.

    Args:
        words: recordings, folders of them (perhaps with train/ val/ test/), lists as of
            `evspan prep source=`, patterns, folders of shards.
        split: only this split of folders, lists and shards; None: all.

    Raises:
        UserError: one is not there, or names nothing.
    """
    inputs: dict[tuple[Path, str], InferInput] = {}
    for word in words:
        for path in _matches(word):
            for item in _recordings_of(path, split):
                inputs.setdefault((item.path.resolve(), item.key), item)
    return _with_different_names(list(inputs.values()))


def _matches(word: Path) -> list[Path]:
    """The paths of a pattern; a path itself otherwise."""
    text = str(word)
    if word.exists() or not any(letter in text for letter in PATTERN_LETTERS):
        return [word]
    paths = sorted(glob.glob(text, recursive=True))
    if not paths:
        raise UserError(f"{printable(text)} matches no file. Correct the pattern")
    return [Path(path) for path in paths]


def _recordings_of(path: Path, split: str | None) -> Iterator[InferInput]:
    if (path / MANIFEST).is_file():
        yield from _in_shards(path, split)
        return
    with source_readable():
        is_list = path.suffix.lower() in LISTS and path.is_file() and not holds_events(path)
    if path.is_dir() or is_list:
        sources = find_sources(path)
        chosen = [s for s in sources if split in (None, s.split)]
        if not chosen:
            raise UserError(
                f"{path} has no recordings of {split}; it has some of "
                f"{', '.join(sorted({s.split for s in sources}))}"
            )
        for source in chosen:
            yield InferInput(source.path, _source_name(path, source), source.boxes)
        return
    if not path.is_file():
        open_recording(path)  # raises
    yield InferInput(path, recording_name(path), _boxes_of(path))


def _boxes_of(path: Path) -> Path | None:
    with source_readable():
        return find_boxes(path)


def _source_name(path: Path, source: Source) -> str:
    """split/name where the source has splits, else the name."""
    has_splits = path.is_file() or source.path.parent != path
    return source.key if has_splits else source.name


def _in_shards(root: Path, split: str | None) -> Iterator[InferInput]:
    recordings = load_manifest(root).recordings
    chosen = [r for r in recordings if split in (None, r.split)]
    if not chosen:
        raise UserError(
            f"{root} has no recordings of {split}; it has some of "
            f"{', '.join(sorted({r.split for r in recordings}))}"
        )
    for recording in chosen:
        key = f"{recording.split}/{recording.name}"
        yield InferInput(root, key, key=key)


def _with_different_names(inputs: list[InferInput]) -> list[InferInput]:
    """The inputs with folders, or the suffix, added to the names that several have."""
    for depth in range(MOST_FOLDERS):
        counts = Counter(item.name for item in inputs)
        if max(counts.values(), default=0) <= 1:
            return inputs
        inputs = [_longer(item, depth) if counts[item.name] > 1 else item for item in inputs]
    raise UserError("several recordings have the same name. Run evspan infer for each of them")


def _longer(item: InferInput, depth: int) -> InferInput:
    """First with the suffix where that differs (a.raw, a.dat), then with one folder more."""
    if depth == 0 and not item.key:
        return replace(item, name=item.name + item.path.suffix.lower().replace(".", "_"))
    folders = item.path.resolve().parts[:-1]
    if item.key:
        folders = item.path.resolve().parts
    folder = folders[-max(1, depth)] if depth <= len(folders) else "root"
    return replace(item, name=f"{folder.strip('/')}/{item.name}")
