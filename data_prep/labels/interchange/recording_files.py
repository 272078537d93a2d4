"""Finds recordings in folders by their names, and the size of the sensor that they state."""

from collections.abc import Collection, Iterable
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import TimeUnit
from evspan.data_prep.labels.box_files import recording_name
from evspan.data_prep.recordings.left_out import is_recording_file
from evspan.data_prep.recordings.open import SUFFIXES, open_recording


def recordings_by_name(paths: Iterable[Path], names: Collection[str]) -> dict[str, list[Path]]:
    """The visible files that are recordings, sorted by path, by the name of the recording.

    Args:
        paths: of files and folders.
        names: of the recordings to find.

    Raises:
        OSError: a file cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(paths):
        name = recording_name(path)
        has_suffix = path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
        if name in names and has_suffix and path.is_file() and is_recording_file(path):
            found.setdefault(name, []).append(path)
    return found


def stated_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of the sensor; None where the recording does not state it.

    Raises:
        RecordingError: it is no recording.
        OSError: it cannot be read.
    """
    # Of times in text, the unit may not be certain; the size does not depend on it.
    recording = open_recording(path, time_unit=TimeUnit.us)
    if recording.size_is_assumed:
        return None
    return recording.width, recording.height


class FolderSensors:
    """The sensors of the recordings in a folder.

    names: of the files with the suffix of a recording.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the folder, which may be missing.

        Raises:
            OSError: it cannot be read.
        """
        paths = list(folder.iterdir()) if folder.is_dir() else []
        self._paths = [path for path in paths if path.name.lower().endswith(SUFFIXES)]
        self.names = {recording_name(path) for path in self._paths}
        self._sizes: dict[str, tuple[int, int] | None] = {}

    def size(self, name: str) -> tuple[int, int] | None:
        """(width, height) for a recording's name.

        None where there is no such recording, where it does not state its size or cannot be read,
        or where files of this name state different ones.

        Raises:
            OSError: a file cannot be read.
        """
        if name not in self._sizes:
            files = recordings_by_name(self._paths, {name})
            self._sizes[name] = _common_size(files.get(name, []))
        return self._sizes[name]


def _common_size(paths: list[Path]) -> tuple[int, int] | None:
    sizes = set()
    for path in paths:
        try:
            sizes.add(stated_size(path))
        except RecordingError:
            return None
    return sizes.pop() if len(sizes) == 1 else None
