"""Which recordings a source folder holds, and in which split each is."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.boxes import recording_name
from data_prep.errors import RecordingError
from data_prep.formats import SUFFIXES
from data_prep.shards import SPLITS


@dataclass(frozen=True)
class Source:
    path: Path
    split: str
    name: str  # unique within the split: the group's name
    relative: str  # below the source folder

    @property
    def key(self) -> str:
        return f"{self.split}/{self.name}"


def find_sources(source: Path) -> list[Source]:
    """Recordings below train/ val/ test/; a folder without these, or one file, counts as test.

    Raises:
        RecordingError: nothing there, or two recordings of one name.
    """
    if not source.exists():
        raise RecordingError(f"source {source} is not there. Give a folder with {'/ '.join(SPLITS)}/ of recordings, or one "
                             "recording: source=PATH")
    found: list[Source] = []
    folders = [(s, source / s) for s in SPLITS if (source / s).is_dir()]
    for split, folder in folders or [("test", source)]:
        paths = [folder] if folder.is_file() else _recordings(folder)
        found += [Source(p, split, recording_name(p), str(p.relative_to(source)) if p != source else p.name) for p in paths]
    if not found:
        raise RecordingError(f"source {source} holds no recordings ({', '.join(SUFFIXES)}) in "
                             f"{', '.join(str(f) for _, f in folders) or source}")
    by_key: dict[str, Source] = {}
    for s in found:
        if (other := by_key.setdefault(s.key, s)) is not s:
            raise RecordingError(f"{other.path} and {s.path} would both be recording {s.key}. Rename one, or move it out of "
                                 f"{source}")
    return found


def _recordings(folder: Path) -> list[Path]:
    """Hidden files are none: another system's copies leave such beside every file."""
    return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith("."))


def in_no_split(source: Path) -> list[Path]:
    """Recordings beside train/ val/ test/, or in folders such as validation/: they are left out, which a user should hear."""
    if not any((source / s).is_dir() for s in SPLITS):
        return []
    others = sorted(p for p in source.iterdir() if p.is_dir() and p.name not in SPLITS and not p.name.startswith("."))
    return _recordings(source) + [r for folder in others for r in _recordings(folder)]
