"""The folder of the runs: can it be written, does a file take another's place whole, do its clock and the nodes' agree?"""

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, graded

FREE_GB, LEAST_FREE_GB = 20, 1  # a run of the base model with its checkpoints takes a few
SKEW_S = 1.0
TICK_S = 0.05  # kernels date files by their ticks
FILE_BYTES, REPLACING_S = 1 << 18, 0.5
WAIT_S = 60.0  # for what another machine has written, such as by way of NFS
LAST = b"\xff" * 8  # in the last of the files that replace one another
LEAST_VERSIONS, LEAST_SEEN = 10, 3  # of them, and that a reader is to see
TOKEN = "token"
ELSEWHERE = "checkpoints could be lost there; name a folder on another file system: --folder"
SHARED = (
    "name a folder that all nodes see and may write, such as on the parallel file system: --folder"
)
SET_CLOCKS = "have the clocks set by NTP: a run's history is told by time"


def open_folder(folder: Path) -> tuple[Finding, Path | None]:
    """Whether it can be written; a new folder in it, with a token, for the checks that follow."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        return Finding(
            "folder",
            FAIL,
            f"{folder} {what}",
            "create it (mkdir -p), or name that of your runs: --folder",
        ), None
    try:
        work = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder.resolve()))
        replace_whole(work / TOKEN, os.urandom(16).hex().encode())
    except OSError as error:
        return Finding(
            "folder",
            FAIL,
            f"{folder} cannot be written: {error.strerror}",
            "have it made writable for you, or name that of your runs: --folder",
        ), None
    return Finding(
        "folder", PASS, f"{work.parent} can be written; its file system is {_file_system(work)}"
    ), work


def _file_system(path: Path) -> str:
    """The type of the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, line.partition(" - ")[2].split()[0]
    return kind


def free_space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    grade = graded(free, enough=FREE_GB, least=LEAST_FREE_GB)
    return Finding(
        "free space",
        grade,
        f"{free:.1f} GB" + (f", less than {FREE_GB}" if grade != PASS else ""),
        "remove old runs, or name another folder: --folder",
    )


def file_clock(work: Path) -> Finding:
    """This machine's clock against the one that dates the files: the file server's, or its own."""
    path = work / f"clock-{socket.gethostname()}-{os.getpid()}"
    before = time.time()
    path.write_bytes(b"1")
    after, dated = time.time(), path.stat().st_mtime
    ahead = max(0.0, before - TICK_S - dated) + min(0.0, after + TICK_S - dated)
    how = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'}" if ahead else "agrees with"
    return Finding(
        "clock", WARN if abs(ahead) > SKEW_S else PASS, f"{how} that of the files", SET_CLOCKS
    )


# -- files that replace one another --------------------------------------------------------------------------------
def replace_whole(path: Path, data: bytes) -> None:
    """As checkpoints are written."""
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def renaming(
    path: Path, *, write: bool = True, put: Callable[[Path, bytes], None] = replace_whole
) -> Finding:
    """Read a file over and over while others of its length replace it: each reading must be one of them, whole.

    write: replace it here, by `put`; else another task does.
    """
    try:
        if write:
            put(path, bytes(FILE_BYTES))
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(_replace_many, path, put) if write else None
            seen = _read_many(path, writing)
            if writing:
                writing.result()
    except OSError as error:
        return Finding("rename", FAIL, f"a file cannot be replaced: {error}", ELSEWHERE)
    told = f"{seen['reads']} readings of a file while {'it was' if write else 'task 0 had it'} replaced"
    if bad := [f"{seen[what]} {what}" for what in ("half written", "missing") if seen[what]]:
        return Finding("rename", FAIL, f"{told}: {', '.join(bad)}", ELSEWHERE)
    if not seen["ended"]:
        return Finding(
            "rename", FAIL, f"{told}: its last version did not come within {WAIT_S:g} s", ELSEWHERE
        )
    if seen["versions"] < LEAST_SEEN:
        return Finding(
            "rename",
            WARN,
            f"{told}: whole, but only {seen['versions']} versions were seen, which proves little",
            "run it again when the file system is less busy",
        )
    if seen["stale"]:
        return Finding(
            "rename",
            WARN,
            f"{told}: whole, but {seen['stale']} refused as stale",
            "`evspan status` may meet that, too; ask again",
        )
    return Finding("rename", PASS, f"{told}: all whole{', fsync works' if write else ''}")


def _replace_many(path: Path, put: Callable[[Path, bytes], None]) -> None:
    end, version = time.monotonic() + REPLACING_S, 0
    while time.monotonic() < end or version < LEAST_VERSIONS:
        version += 1
        put(path, version.to_bytes(8, "little") * (FILE_BYTES // 8))
    put(path, LAST * (FILE_BYTES // 8))


def _read_many(path: Path, writing: Future[None] | None) -> Counter[str]:
    seen, newest, end = Counter[str](), b"", time.monotonic() + WAIT_S
    while time.monotonic() < end and not (writing and writing.done() and writing.exception()):
        try:
            data = path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            if writing or seen["reads"]:
                seen["missing" if error.errno == errno.ENOENT else "stale"] += 1
            else:
                time.sleep(0.005)
            continue
        seen["reads"] += 1
        if len(data) != FILE_BYTES or data != data[:8] * (FILE_BYTES // 8):
            seen["half written"] += 1
        elif data[:8] != newest:
            seen["versions"] += 1
            newest = data[:8]
        if newest == LAST:
            seen["ended"] = 1
            break
    return seen


# -- between tasks -------------------------------------------------------------------------------------------------
def meet(work: Path, token: str, rank: int, size: int, note: Any) -> tuple[Finding, dict[int, Any]]:
    """Read the token of whoever started the tasks, leave `note` for the others, and read theirs: rank -> note, as JSON."""
    began, notes = time.monotonic(), dict[int, Any]()
    try:
        if (work / TOKEN).read_text() != token:
            return Finding(
                "shared folder",
                FAIL,
                f"{work} holds another token than where this was started",
                SHARED,
            ), notes
        replace_whole(work / f"task-{rank}", json.dumps([token, note]).encode())
        while len(notes) < size and time.monotonic() < began + WAIT_S:
            there = set(
                os.listdir(work)
            )  # has NFS look anew, other than asking for a name that was not there
            for other in set(range(size)) - notes.keys():
                if f"task-{other}" in there:
                    notes[other] = json.loads((work / f"task-{other}").read_bytes())[1]
            time.sleep(0.02)
    except OSError as error:
        return Finding(
            "shared folder", FAIL, f"{error.filename or work}: {error.strerror}", SHARED
        ), notes
    if missing := size - len(notes):
        return Finding(
            "shared folder",
            FAIL,
            f"what {missing} of {size} tasks left has not come in {WAIT_S:g} s",
            SHARED,
        ), notes
    return Finding(
        "shared folder", PASS, f"this token and those of all {size} tasks are read"
    ), notes


def not_seen(work: Path, token: str, size: int) -> int:
    """How many tasks' notes cannot be read here."""

    def read(rank: int) -> bool:
        try:
            return json.loads((work / f"task-{rank}").read_bytes())[0] == token
        except (OSError, ValueError):
            return False

    return size - sum(map(read, range(size)))
