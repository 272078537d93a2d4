"""Which files of the checkout differ from the code that waiting and running jobs import."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evspan.conf.code_version import content_digest, package_files, read_manifest
from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.text import plural, printable
from evspan.launch.sweep.registry import SUBMITTED, Run

MOST_NAMES = 5  # in a line
# Digests of files by their path, size and time: `status --watch` looks every few seconds.
_digests: dict[tuple[Path, int, int], str] = {}


class CodeChange(NamedTuple):
    """Files of a checkout that were changed, added or removed since jobs were submitted from it.

    archive: the folder of the copy that the jobs import.
    """

    archive: Path
    source: Path
    files: list[str]

    def line(self, runs: Sequence[str]) -> str:
        """The change in one line. runs: names of the runs that import the copy."""
        names = ", ".join(self.files[:MOST_NAMES])
        if len(self.files) > MOST_NAMES:
            names += f" and {len(self.files) - MOST_NAMES} more"
        return (
            f"note: {self.source} has changed since {plural(len(runs), 'run')} "
            f"({_shorten(runs)}) started from it: {names}; they go on with {self.archive}"
        )


def code_changes(runs: Sequence[Run]) -> dict[str, CodeChange]:
    """The changes by the names of the runs that wait or run, without those whose code is the same.

    A run without a copy (cluster.code=live, or trained on this machine) is left out, and one whose
    copy or checkout cannot be read.
    """
    by_archive: dict[Path, CodeChange | None] = {}
    changes: dict[str, CodeChange] = {}
    for run in runs:
        archive = _archive_of(run.folder) if run.active and run.job else None
        if archive is None:
            continue
        if archive not in by_archive:
            by_archive[archive] = _change(archive)
        change = by_archive[archive]
        if change is not None:
            changes[run.name] = change
    return changes


def code_notes(runs: Sequence[Run]) -> list[str]:
    """A line for each copy whose checkout has changed."""
    changes = code_changes(runs)
    names: dict[Path, list[str]] = {}
    for name, change in changes.items():
        names.setdefault(change.archive, []).append(name)
    return [printable(changes[group[0]].line(group)) for group in names.values()]


def _archive_of(run: Path) -> Path | None:
    try:
        code = read_json_object(run / SUBMITTED).get("code")
    except (OSError, JsonFileError):
        return None
    folder = code.get("folder") if isinstance(code, dict) else None
    return Path(folder) if isinstance(folder, str) and folder else None


def _change(archive: Path) -> CodeChange | None:
    manifest = read_manifest(archive)
    submitted = manifest.get("files")
    source = manifest.get("source")
    if not isinstance(submitted, dict) or not isinstance(source, str):
        return None
    try:
        current = {name: _digest(path) for name, path in package_files(Path(source)).items()}
    except (OSError, UserError, ValueError):
        return None
    if not current:  # there is no checkout any more
        return None
    names = sorted(submitted.keys() | current.keys())
    files = [name for name in names if submitted.get(name) != current.get(name)]
    return CodeChange(archive, Path(source), files) if files else None


def _digest(path: Path) -> str:
    info = path.stat()
    key = (path, info.st_size, info.st_mtime_ns)
    if key not in _digests:
        _digests[key] = content_digest(path.read_bytes())
    return _digests[key]


def _shorten(names: Sequence[str]) -> str:
    text = ", ".join(names[:MOST_NAMES])
    return f"{text}, ..." if len(names) > MOST_NAMES else text
