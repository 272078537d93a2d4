"""Files by which the ranks of a run report what they do when the run hangs. No torch.

    RUN/hang/request.json      asks all ranks for a report; rank 0 creates it, empty, at the start
    RUN/hang/rank-00.json      a rank's newest report
    RUN/hang/rank-00.stacks    one line on the rank's process; below it, stacks that are written by
                               faulthandler's thread when no Python code of the rank can run

They are in the run's folder, which all nodes share. Whoever can write there can change them, so all
that is read is bounded and checked, and nothing is unpickled.
"""

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.atomic_files import replace_file
from evspan.conf.json_files import JsonFileError, parse_json_object, read_json_object
from evspan.conf.text import printable

FOLDER = "hang"
REQUEST = "request.json"
MOST_REQUEST_BYTES = 1 << 12
MOST_REPORT_BYTES = 4 << 20
MOST_STACKS_BYTES = 1 << 18
MOST_LINE_BYTES = 1 << 12
MOST_TEXT = 200  # characters of a name in a report
MOST_ITEMS = 1024  # of a list in a report
MOST_DIMENSIONS = 16  # of a tensor
MOST_NUMBER = 1 << 40  # no time, size or number of a collective is larger
NOT_RUNNING = ("gone", "Z", "T", "t")  # states of a process that does not report
FRESH_S = 60.0  # a report that a rank has requested is used by the others for so long
ASKED = "evspan logs --hang"  # reason of a user's request


class CollectiveState(Enum):
    """Whether a call has ended, as far as the host knows."""

    ended = "ended"
    waiting = "waiting"
    failed = "failed"


@dataclass(frozen=True)
class Collective:
    """A collective or message as one rank has called it.

    Attributes:
        group: torch's name of the process group. ranks: of the world, in it; () if unknown.
        number: among those of Evspan in its group, from 1, the same on all ranks; 0: a library
            has called it.
        name: what it is for; empty for one that a library has called.
        kind: the operation. phase: what the run did. Both may be empty.
        shape, dtype: of the rank's tensor.
        started: seconds since 1970.
        peer: rank at the other end of a message; -1: not known, or a collective.
        torch_number: among all of the group, by torch's recorder; 0: not in it.
    """

    group: str
    ranks: tuple[int, ...]
    number: int
    name: str
    kind: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    state: CollectiveState
    started: float
    peer: int = -1
    is_message: bool = False
    torch_number: int = 0


class Frame(NamedTuple):
    """A call in a stack, as in a traceback."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class ThreadStack:
    """The Python stack of a thread, outermost call first."""

    name: str
    is_main: bool
    frames: tuple[Frame, ...]


class Peer(NamedTuple):
    """What a rank knows of another one.

    Attributes:
        silent_s: seconds without a heartbeat.
        doing: what its last heartbeat reported.
        process_state: of its process, the letter in /proc/PID/stat; 'gone' if there is none; empty:
            it is on another node.
        phase, collectives: of a rank of this node that does not run, its newest ones, from its
            shared memory.
    """

    host: str
    pid: int
    silent_s: float
    doing: str
    process_state: str
    phase: str = ""
    collectives: tuple[Collective, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a rank did when it was asked.

    Attributes:
        request: the id of the request.
        reason: why the report was requested.
        time: seconds since 1970.
        phase: what the run does, such as 'backward'.
        collectives: the newest ones, oldest first.
        kernel_state: of the main thread, the letter in /proc; 'D' waits for a disk.
        peers: the other ranks, by number, as far as they are known.
    """

    request: str
    reason: str
    rank: int
    size: int
    host: str
    pid: int
    time: float
    phase: str
    collectives: tuple[Collective, ...]
    threads: tuple[ThreadStack, ...]
    kernel_state: str = ""
    peers: Mapping[int, Peer] = field(default_factory=dict)


class Request(NamedTuple):
    """Asks all ranks for a report. time: seconds since 1970. reason: one line."""

    id: str
    time: float
    reason: str


class RankProcess(NamedTuple):
    """The process of a rank: the first line of its file of stacks.

    started: seconds since 1970. ring: name of its file in shared memory (`hang_ring`), or empty.
    """

    rank: int
    host: str
    pid: int
    started: float
    ring: str = ""


# -- requests --------------------------------------------------------------------------------------
def write_request(run: Path, reason: str) -> Request:
    """Asks all ranks of a run for a report.

    Raises:
        OSError: the run's folder cannot be written to.
    """
    request = Request(secrets.token_hex(8), time.time(), reason)
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / REQUEST, json.dumps(request._asdict()))
    return request


def clear_request(run: Path) -> None:
    """Replaces the request of an earlier attempt by none.

    A shared file system shows a change of a file sooner than a new one.

    Raises:
        OSError: the run's folder cannot be written to.
    """
    replace_file(run / FOLDER / REQUEST, "{}")


def read_request(run: Path) -> Request | None:
    """The newest request; None if there is none that can be read."""
    try:
        values = read_json_object(run / FOLDER / REQUEST, most_bytes=MOST_REQUEST_BYTES)
        request = Request(values["id"], _seconds(values["time"]), _text(values["reason"]))
    except (OSError, JsonFileError, KeyError, TypeError, ValueError, OverflowError):
        return None
    is_valid = isinstance(request.id, str) and re.fullmatch("[0-9a-f]{16}", request.id)
    return request if is_valid else None


# -- reports ---------------------------------------------------------------------------------------
def report_file(run: Path, rank: int) -> Path:
    """Where a rank writes its report."""
    return run / FOLDER / f"rank-{rank:02d}.json"


def write_report(run: Path, report: Report) -> None:
    """Replaces a rank's report.

    Raises:
        OSError: it cannot be written.
    """
    values = asdict(report)
    values["collectives"] = [_plain(collective) for collective in report.collectives]
    values["peers"] = {}
    for rank, peer in report.peers.items():
        collectives = [_plain(collective) for collective in peer.collectives]
        values["peers"][str(rank)] = {**peer._asdict(), "collectives": collectives}
    path = report_file(run, report.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(values))


def _plain(collective: Collective) -> dict[str, Any]:
    """As JSON values."""
    return {**asdict(collective), "state": collective.state.value}


def read_report(run: Path, rank: int) -> Report | None:
    """A rank's newest report; None if there is none, or its file is damaged."""
    try:
        path = report_file(run, rank)
        values = read_json_object(path, most_bytes=MOST_REPORT_BYTES)
        report = _report(values)
    except (OSError, JsonFileError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return report if report.rank == rank else None


def ranks_not_running(reports: Mapping[int, Report]) -> set[int]:
    """Ranks without a report that will not answer, as ranks on their nodes report."""
    ranks = set()
    for report in reports.values():
        for rank, peer in report.peers.items():
            if rank not in reports and peer.process_state in NOT_RUNNING:
                ranks.add(rank)
    return ranks


def read_reports(run: Path, size: int, request: str | None = None) -> dict[int, Report]:
    """Reports of the ranks below `size`, by rank.

    Args:
        request: id of the request that they answer; None: the newest one that any rank answers.
    """
    reports = {}
    for rank in range(size):
        report = read_report(run, rank)
        if report is not None:
            reports[rank] = report
    if request is None and reports:
        request = max(reports.values(), key=lambda report: report.time).request
    return {rank: report for rank, report in reports.items() if report.request == request}


def _report(values: dict[str, Any]) -> Report:
    peers = {}
    for rank, peer in list(dict(values["peers"]).items())[:MOST_ITEMS]:
        peers[_whole(rank)] = Peer(
            _text(peer["host"]),
            _whole(peer["pid"]),
            _seconds(peer["silent_s"]),
            _text(peer["doing"]),
            _text(peer["process_state"]),
            _text(peer["phase"]),
            tuple(_collective(item) for item in peer["collectives"][:MOST_ITEMS]),
        )
    return Report(
        request=_text(values["request"]),
        reason=_text(values["reason"]),
        rank=_whole(values["rank"]),
        size=_whole(values["size"]),
        host=_text(values["host"]),
        pid=_whole(values["pid"]),
        time=_seconds(values["time"]),
        phase=_text(values["phase"]),
        collectives=tuple(_collective(item) for item in values["collectives"][:MOST_ITEMS]),
        threads=tuple(_thread(item) for item in values["threads"][:MOST_ITEMS]),
        kernel_state=_text(values["kernel_state"]),
        peers=peers,
    )


def _collective(values: dict[str, Any]) -> Collective:
    return Collective(
        group=_text(values["group"]),
        ranks=_numbers(values["ranks"]),
        number=_whole(values["number"]),
        name=_text(values["name"]),
        kind=_text(values["kind"]),
        phase=_text(values["phase"]),
        shape=_numbers(values["shape"])[:MOST_DIMENSIONS],
        dtype=_text(values["dtype"]),
        state=CollectiveState(values["state"]),
        started=_seconds(values["started"]),
        peer=_whole(values["peer"]),
        is_message=bool(values["is_message"]),
        torch_number=_whole(values["torch_number"]),
    )


def _thread(values: dict[str, Any]) -> ThreadStack:
    frames = []
    for file, line, function in values["frames"][:MOST_ITEMS]:
        frames.append(Frame(_text(file), _whole(line), _text(function)))
    return ThreadStack(_text(values["name"]), bool(values["is_main"]), tuple(frames))


def _text(value: object) -> str:
    """A text of bounded length, for a terminal."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    return printable(value[:MOST_TEXT])


def _numbers(values: list[Any]) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values[:MOST_ITEMS])


def _whole(value: Any) -> int:
    number = int(value)
    if abs(number) > MOST_NUMBER:
        raise ValueError(f"{number} is out of range")
    return number


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds <= MOST_NUMBER:  # nor NaN
        raise ValueError(f"{seconds} is no time")
    return seconds


# -- stacks without the interpreter ----------------------------------------------------------------
def stacks_file(run: Path, rank: int) -> Path:
    """Where faulthandler writes the stacks of a rank whose Python code cannot run."""
    return run / FOLDER / f"rank-{rank:02d}.stacks"


def open_stacks_file(run: Path, rank: int, *, ring: str = "") -> int:
    """Creates it with its first line. Returns a file descriptor that appends.

    Args:
        ring: as of `RankProcess`.

    Raises:
        OSError: the folder cannot be written to, or the file is a link.
    """
    path = stacks_file(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(path, flags, 0o644)
    process = RankProcess(rank, socket.gethostname(), os.getpid(), time.time(), ring)
    os.write(file, (json.dumps(process._asdict()) + "\n").encode())
    return file


def read_rank_process(run: Path, rank: int) -> RankProcess | None:
    """The process of a rank in its newest attempt; None if it is not known."""
    line = _bounded(stacks_file(run, rank), MOST_LINE_BYTES).partition(b"\n")[0]
    try:
        values = parse_json_object(line, "the process of a rank")
        process = RankProcess(
            _whole(values["rank"]),
            _text(values["host"]),
            _whole(values["pid"]),
            _seconds(values["started"]),
            _text(values["ring"]),
        )
    except (JsonFileError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return process if process.rank == rank else None


def read_stacks(run: Path, rank: int) -> str:
    """The stacks that faulthandler has written last, for a terminal; empty if there are none.

    The first line says why: a fatal signal, or "Timeout" if no Python code could run.
    """
    text = _bounded(stacks_file(run, rank), MOST_STACKS_BYTES).decode(errors="replace")
    lines = [printable(line) for line in text.splitlines()[1:]]
    starts = [i for i, line in enumerate(lines) if line.startswith(("Timeout (", "Fatal "))]
    return "\n".join(lines[starts[-1] :]) if starts else ""


def _bounded(path: Path, most_bytes: int) -> bytes:
    """The beginning of a file; empty if it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(file, most_bytes)
        finally:
            os.close(file)
    except OSError:
        return b""


# -- processes -------------------------------------------------------------------------------------
def process_state(host: str, pid: int) -> str:
    """As `Peer.process_state`."""
    if host != socket.gethostname() or pid <= 0:
        return ""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    return text.rpartition(")")[2].split()[0]
