"""What a prepared folder holds, what is missing, and which process works on it. Changes nothing."""

import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import ShardError
from evspan.conf.folder_lock import holder_of, is_in_use
from evspan.conf.lock_holder import Holder
from evspan.conf.text import printable
from evspan.data_prep.recordings.sources import Source, find_sources, source_readable
from evspan.data_prep.shards.atomic import LOCK, UNFINISHED, file_xxh3
from evspan.data_prep.shards.format import MANIFEST, SPLITS, Manifest, load_manifest
from evspan.data_prep.shards.marks import read_marks
from evspan.data_prep.shards.pack import PARTS, shard_files, stored_groups
from evspan.data_prep.shards.write import Stored

LOCKS = Path("/proc/locks")  # the kernel's list of file locks of this machine


class State(str, Enum):
    """State of a recording."""

    done = "done"  # in a shard
    part = "part"  # in a part file
    missing = "missing"  # in no file
    changed = "changed"  # the recording or its box file is another one than it was
    damaged = "damaged"  # marked by `evspan prep verify`
    extra = "extra"  # the source does not have it


class WrittenFile(NamedTuple):
    """A file of the output and its time of modification, in seconds since the epoch."""

    path: Path
    time: float


@dataclass
class Lock:
    """Who holds the lock on the folder, as written in the lock files. Each text may be empty.

    Attributes:
        at_work: a process of this machine, and since when it has the lock.
        remote: a process of another machine, which may have been killed.
        killed: a process that no longer runs.
        writing: files that are being written: recordings by split/recording, shards by path.
    """

    at_work: str = ""
    remote: str = ""
    killed: str = ""
    writing: list[str] = field(default_factory=list)

    @property
    def taken(self) -> bool:
        """Whether a process works on the folder, as far as can be found out."""
        return bool(self.at_work or self.remote)


@dataclass
class Status:
    """The state of a prepared folder.

    Attributes:
        state: by split/recording.
        stored: groups in shards, by split/recording.
        marks: what `evspan prep verify` found, by split/recording.
        has_manifest: whether there is a manifest; it is written last.
        bytes_per_split: size of shards and part files.
        last_written: the newest of these files.
    """

    state: dict[str, State]
    stored: dict[str, Stored]
    marks: dict[str, str]
    has_manifest: bool
    bytes_per_split: dict[str, int]
    last_written: WrittenFile | None
    lock: Lock

    def with_state(self, state: State, prefix: str = "") -> list[str]:
        """Recordings in this state whose split/recording begins with `prefix`."""
        return [k for k, value in self.state.items() if value is state and k.startswith(prefix)]

    @property
    def complete(self) -> bool:
        """Whether all recordings are done, and no process is at work."""
        done = all(state is State.done for state in self.state.values())
        return self.has_manifest and done and not self.lock.taken


def status(output: Path, source: Path | None = None) -> Status:
    """Reads the state of a folder that `evspan prep` writes.

    Args:
        source: compare with these recordings, too: find those that are new, changed or removed.

    Raises:
        ShardError: `output` is no folder that `evspan prep` writes.
        RecordingError: the source holds no recordings.
        UnavailableFileError: a file cannot be read now.
    """
    if not any((output / name).exists() for name in (MANIFEST, LOCK, PARTS)):
        raise ShardError(
            f"{output} holds nothing of evspan prep. Name the folder that was its output, or make "
            f"one: evspan prep source={source or 'RAW'} output={output}"
        )
    manifest = load_manifest(output) if (output / MANIFEST).is_file() else None
    split = manifest.split_fractions if manifest else ""
    sources = {s.key: s for s in find_sources(source, split)} if source else None
    stored = stored_groups(output, manifest.config if manifest else {})
    marks = read_marks(output)
    part_files = _part_files(output)
    parts = {f"{path.parent.name}/{path.stem}" for path in part_files}
    mtimes = _listed_mtimes(manifest)

    def state(key: str) -> State:
        if sources is not None and key not in sources:
            return State.extra
        if key in parts:
            return State.part
        if key in marks:
            return State.damaged
        if key not in stored:
            return State.missing
        if sources and _changed(sources[key], stored[key], mtimes.get(key)):
            return State.changed
        return State.done

    keys = stored.keys() | parts | mtimes.keys() | marks.keys() | (sources or {}).keys()
    bytes_per_split, last_written = _written([*shard_files(output), *part_files])
    return Status(
        state={key: state(key) for key in sorted(keys, key=_order)},
        stored=stored,
        marks=marks,
        has_manifest=manifest is not None,
        bytes_per_split=bytes_per_split,
        last_written=last_written,
        lock=_read_lock(output),
    )


def _part_files(output: Path) -> list[Path]:
    paths: list[Path] = []
    for split in SPLITS:
        paths += (output / PARTS / split).glob("*.h5")
    return [path for path in paths if not path.name.startswith(".")]


def _listed_mtimes(manifest: Manifest | None) -> dict[str, int]:
    """Modification times of the recordings of the manifest, by split/recording."""
    if manifest is None:
        return {}
    return {f"{r.split}/{r.name}": r.source_mtime_ns for r in manifest.recordings}


def _order(key: str) -> tuple[int, str]:
    return SPLITS.index(key.split("/")[0]), key


def _changed(source: Source, stored: Stored, listed_mtime_ns: int | None) -> bool:
    """Whether the recording has another size or time, or its box file another content."""
    entry = stored.entry
    mtime_ns = listed_mtime_ns or entry.source_mtime_ns
    with source_readable():
        current = source.path.stat()
        if (current.st_size, current.st_mtime_ns) != (entry.source_bytes, mtime_ns):
            return True
        boxes_xxh3 = file_xxh3(source.boxes) if source.boxes else ""
    return boxes_xxh3 != entry.boxes_xxh3


def _written(paths: Iterable[Path]) -> tuple[dict[str, int], WrittenFile | None]:
    """(bytes per split, the newest file). Files that are gone by now do not count."""
    bytes_per_split = dict.fromkeys(SPLITS, 0)
    newest: WrittenFile | None = None
    for path in paths:
        with suppress(OSError):
            info = path.stat()
            bytes_per_split[path.parent.name] += info.st_size
            if newest is None or info.st_mtime > newest.time:
                newest = WrittenFile(path, info.st_mtime)
    return bytes_per_split, newest


def _read_lock(output: Path) -> Lock:
    """Who holds the lock on the folder, or held it until it was killed."""
    lock = Lock()
    with suppress(OSError):
        lock = _named_in_lock_file(output)
    if not lock.at_work:
        with suppress(OSError):
            shared = _holder_of_shared_lock(output)
            if shared and _replaces(shared, lock):
                lock = shared
    if lock.taken:
        lock.writing = _unfinished(output)
    return lock


def _replaces(shared: Lock, named: Lock) -> bool:
    """Whether the holder of the shared lock counts rather than the process in the lock file.

    A holder that was killed does not hide a later process of a machine where flock is enough.
    """
    process = " ".join(named.remote.split()[:4])  # process 12 on node3
    return shared.taken or not process or f"({process}" in shared.killed


def _named_in_lock_file(output: Path) -> Lock:
    """The process that the lock file names until it ends. It runs if it has the lock by flock."""
    path = output / LOCK
    text = path.read_text().strip()
    process = re.match(r"process (\d+) on (\S+)", text)
    if process is None:
        return Lock()
    if process[2] != socket.gethostname() or not LOCKS.exists():
        return Lock(remote=text)
    if _has_lock(int(process[1]), path):
        return Lock(at_work=f"{text}, since {age(path.stat().st_mtime)}")
    return Lock(killed=text)


def _holder_of_shared_lock(output: Path) -> Lock | None:
    """The holder where flock is missing or local to a machine; None where there is none."""
    holder = holder_of(output)
    if holder is None:
        return None
    text = printable(holder.describe())
    if not is_in_use(output):
        return Lock(killed=text)
    if holder.on_machine_of(Holder.current("evspan prep status")):
        return Lock(at_work=text)
    return Lock(remote=text)


def _unfinished(output: Path) -> list[str]:
    folders = [output]
    for split in SPLITS:
        folders += [output / split, output / PARTS / split]
    names: list[str] = []
    for folder in folders:
        names += [_final_name(path, output) for path in folder.glob(UNFINISHED)]
    return sorted(names)


def _final_name(temporary: Path, output: Path) -> str:
    """The file that it will be; of a part, .parts/train/.NAME.PID.writing.h5, train/NAME."""
    name = re.sub(r"^\.(.*)\.\d+\.writing", r"\1", temporary.name)
    path = temporary.relative_to(output).with_name(name)
    if path.parts[0] == PARTS:
        path = path.relative_to(PARTS).with_suffix("")
    return str(path)


def _has_lock(pid: int, path: Path) -> bool:
    inode = path.stat().st_ino
    for line in LOCKS.read_text().splitlines():
        words = line.split()
        of_file = any(word.endswith(f":{inode}") for word in words)
        if of_file and "FLOCK" in words and str(pid) in words:
            return True
    return False


def age(time_s: float) -> str:
    """Time since `time_s`, in seconds since the epoch: '42 s', '3 min', '5 h', '2 days'."""
    seconds = max(0, int(time.time() - time_s))
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
