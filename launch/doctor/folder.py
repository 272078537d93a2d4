"""Checks of the run folder: write access, atomic replacement, clock, visibility on all nodes."""

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from evspan.conf.text import plural
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, graded

FREE_GB = 20  # a run of the base model with its checkpoints takes a few
LEAST_FREE_GB = 1
SKEW_S = 1.0  # larger differences between clocks are reported
TICK_S = 0.05  # resolution of the kernel's file times
FILE_BYTES = 1 << 18  # of the file that is replaced and read
REPLACING_S = 0.5
WAIT_S = 60.0  # until another machine's files are visible, for example over NFS
LAST_VERSION = b"\xff" * 8  # contents of the last version of that file, repeated
LEAST_VERSIONS = 10  # that are written
LEAST_SEEN = 3  # of them that a reader should see
TOKEN = "token"  # file in the work folder
OTHER_FILE_SYSTEM = "checkpoints may be lost there; name a folder on another file system: --folder"
SHARED_FOLDER = (
    "name a folder that all nodes see and can write, for example on the parallel file system: "
    "--folder"
)
SET_CLOCKS = "synchronise the clocks with NTP: times in a run's history are compared"

ReplaceFile = Callable[[Path, bytes], None]


def open_folder(folder: Path) -> tuple[Finding, Path | None]:
    """Checks that `folder` can be written.

    Returns:
        The finding, and a new work folder in `folder` with a token file (None if there is none).
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        remedy = "create it (mkdir -p), or name the folder of your runs: --folder"
        return Finding("folder", FAIL, f"{folder} {problem}", remedy), None
    try:
        work = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder.resolve()))
        replace_file(work / TOKEN, os.urandom(16).hex().encode())
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror}"
        remedy = "ask for write access, or name the folder of your runs: --folder"
        return Finding("folder", FAIL, message, remedy), None
    message = f"{work.parent} can be written; its file system is {_file_system(work)}"
    return Finding("folder", PASS, message), work


def _file_system(path: Path) -> str:
    """The type of the file system that `path` is on."""
    mount_point = ""
    file_system = "unknown"
    for partition in psutil.disk_partitions(all=True):
        longer = len(partition.mountpoint) >= len(mount_point)
        if longer and path.is_relative_to(partition.mountpoint):
            mount_point = partition.mountpoint
            file_system = partition.fstype
    return file_system


def free_space(folder: Path) -> Finding:
    """Checks the free space of the file system."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    grade = graded(free_gb, enough=FREE_GB, least=LEAST_FREE_GB)
    message = f"{free_gb:.1f} GB"
    if grade != PASS:
        message += f", less than {FREE_GB}"
    return Finding(
        "free space", grade, message, "remove old runs, or name another folder: --folder"
    )


def file_clock(work: Path) -> Finding:
    """Compares this machine's clock with the one that sets file times, such as a file server's."""
    path = work / f"clock-{socket.gethostname()}-{os.getpid()}"
    before = time.time()
    path.write_bytes(b"1")
    after = time.time()
    file_time = path.stat().st_mtime
    ahead_s = 0.0
    if file_time < before - TICK_S:
        ahead_s = before - TICK_S - file_time
    elif file_time > after + TICK_S:
        ahead_s = after + TICK_S - file_time
    message = "agrees with that of the files"
    if ahead_s > 0:
        message = f"{ahead_s:.1f} s ahead of that of the files"
    elif ahead_s < 0:
        message = f"{-ahead_s:.1f} s behind that of the files"
    grade = WARN if abs(ahead_s) > SKEW_S else PASS
    return Finding("clock", grade, message, SET_CLOCKS)


# -- atomic replacement ----------------------------------------------------------------------------
def replace_file(path: Path, data: bytes) -> None:
    """Writes a file as checkpoints are written: temporary file, fsync, os.replace."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass
class ReadCounts:
    """What a reader saw of a file that is being replaced.

    Attributes:
        versions: number of different versions.
        half_written: reads that were not one whole version.
        missing: reads that found no file. stale: reads that NFS refused (ESTALE).
        saw_last: whether the last version was read.
    """

    reads: int = 0
    versions: int = 0
    half_written: int = 0
    missing: int = 0
    stale: int = 0
    saw_last: bool = False


def atomic_replacement(
    path: Path, *, write: bool = True, replace: ReplaceFile = replace_file
) -> Finding:
    """Checks that a file that is replaced again and again is whole whenever it is read.

    Args:
        write: whether this process also replaces the file; if not, another task does.
        replace: how it is replaced.
    """
    try:
        counts = _read_while_replaced(path, replace) if write else _read_versions(path, None)
    except OSError as error:
        message = f"a file cannot be replaced: {error}"
        return Finding("rename", FAIL, message, OTHER_FILE_SYSTEM)
    return _grade_reads(counts, write)


def _read_while_replaced(path: Path, replace: ReplaceFile) -> ReadCounts:
    replace(path, bytes(FILE_BYTES))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_write_versions, path, replace)
        counts = _read_versions(path, writing)
        writing.result()
    return counts


def _grade_reads(counts: ReadCounts, write: bool) -> Finding:
    replaced = "it was replaced" if write else "task 0 replaced it"
    message = f"{plural(counts.reads, 'read')} of a file while {replaced}"
    problems = []
    if counts.half_written:
        problems.append(f"{counts.half_written} half written")
    if counts.missing:
        problems.append(f"{counts.missing} missing")
    if problems:
        return Finding("rename", FAIL, f"{message}: {', '.join(problems)}", OTHER_FILE_SYSTEM)
    if not counts.saw_last:
        message += f": the last version did not appear within {WAIT_S:g} s"
        return Finding("rename", FAIL, message, OTHER_FILE_SYSTEM)
    if counts.versions < LEAST_SEEN:
        message += f": whole, but only {counts.versions} versions were seen, which proves little"
        remedy = "run it again when the file system is less busy"
        return Finding("rename", WARN, message, remedy)
    if counts.stale:
        message += f": whole, but {counts.stale} refused as stale"
        remedy = "`evspan status` may also fail this way; run it again then"
        return Finding("rename", WARN, message, remedy)
    message += ": all whole"
    if write:
        message += ", fsync works"
    return Finding("rename", PASS, message)


def _write_versions(path: Path, replace: ReplaceFile) -> None:
    end = time.monotonic() + REPLACING_S
    version = 0
    while time.monotonic() < end or version < LEAST_VERSIONS:
        version += 1
        replace(path, version.to_bytes(8, "little") * (FILE_BYTES // 8))
    replace(path, LAST_VERSION * (FILE_BYTES // 8))


def _read_versions(path: Path, writing: Future[None] | None) -> ReadCounts:
    """Reads the file until its last version is seen.

    writing: the writer in this process; None if another task writes.
    """
    counts = ReadCounts()
    newest = b""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not _has_failed(writing):
        try:
            data = path.read_bytes()
        except OSError as error:
            _count_failed_read(counts, error)
            if writing is None and not counts.reads:  # the other task has not started
                counts = ReadCounts()
                time.sleep(0.005)
            continue
        counts.reads += 1
        if len(data) != FILE_BYTES or data != data[:8] * (FILE_BYTES // 8):
            counts.half_written += 1
        elif data[:8] != newest:
            counts.versions += 1
            newest = data[:8]
        if newest == LAST_VERSION:
            counts.saw_last = True
            break
    return counts


def _has_failed(writing: Future[None] | None) -> bool:
    return writing is not None and writing.done() and writing.exception() is not None


def _count_failed_read(counts: ReadCounts, error: OSError) -> None:
    if error.errno == errno.ENOENT:
        counts.missing += 1
    elif error.errno == errno.ESTALE:
        counts.stale += 1
    else:
        raise error


# -- between tasks ---------------------------------------------------------------------------------
def exchange_notes(
    work: Path, token: str, rank: int, size: int, note: Any
) -> tuple[Finding, dict[int, Any]]:
    """Checks that all tasks of a job see the same folder.

    Reads the token of the process that started the tasks, writes `note` (JSON) for the other tasks,
    and reads theirs.

    Returns:
        The finding, and the notes by rank.
    """
    notes: dict[int, Any] = {}
    try:
        if (work / TOKEN).read_text() != token:
            message = f"{work} contains another token than on the machine that started this task"
            return Finding("shared folder", FAIL, message, SHARED_FOLDER), notes
        replace_file(work / f"task-{rank}", json.dumps([token, note]).encode())
        _read_notes(work, size, notes)
    except OSError as error:
        message = f"{error.filename or work}: {error.strerror}"
        return Finding("shared folder", FAIL, message, SHARED_FOLDER), notes
    missing = size - len(notes)
    if missing:
        message = f"the files of {missing} of {size} tasks did not appear within {WAIT_S:g} s"
        return Finding("shared folder", FAIL, message, SHARED_FOLDER), notes
    message = f"the token and the files of all {size} tasks can be read"
    return Finding("shared folder", PASS, message), notes


def _read_notes(work: Path, size: int, notes: dict[int, Any]) -> None:
    """Adds the other tasks' notes as they appear, for at most WAIT_S."""
    end = time.monotonic() + WAIT_S
    while len(notes) < size and time.monotonic() < end:
        # NFS may answer from its cache that a file does not exist; a listing asks the server.
        names = set(os.listdir(work))
        for rank in range(size):
            if rank not in notes and f"task-{rank}" in names:
                _, notes[rank] = json.loads((work / f"task-{rank}").read_bytes())
        time.sleep(0.02)


def count_unreadable_notes(work: Path, token: str, size: int) -> int:
    """The number of tasks whose notes cannot be read on this machine."""
    return sum(not _has_note(work / f"task-{rank}", token) for rank in range(size))


def _has_note(path: Path, token: str) -> bool:
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return bool(contents[0] == token)
