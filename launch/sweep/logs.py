"""Reads the logs of a run's ranks, over all its attempts."""

import os
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.launch.sweep.registry import Run, describe, find_runs, read_runs
from evspan.pipeline.metrics_log import METRICS

POLL_S = 0.5  # between two reads of a log
STATE_S = 5.0  # between two reads of the run's state
NAMES_SHOWN = 5  # runs of a sweep that an error message lists


@dataclass(frozen=True)
class LogSelection:
    """Which lines to read.

    Attributes:
        rank: rank whose log is read; None for rank 0.
        all_ranks: read the logs of all ranks; each line starts with its rank.
        follow: continue with new lines until the run has ended.
        last_lines: number of lines from the end of each existing log; None for all.
        metrics: read metrics.jsonl instead of logs.
    """

    rank: int | None = None
    all_ranks: bool = False
    follow: bool = False
    last_lines: int | None = None
    metrics: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--rank", self.rank), ("--lines", self.last_lines)):
            if value is not None and value < 0:
                raise UserError(f"{option} is {value}; give 0 or more")


class LogReader:
    """Reads the lines of a file that grows and may not exist yet.

    Args:
        prefix: precedes each line.
        replaced: another file may take its place, with some of the lines: each is read once.
    """

    def __init__(self, path: Path, prefix: str, *, replaced: bool = False) -> None:
        self.path = path
        self.prefix = prefix
        self.replaced = replaced
        self._inode = 0
        self._known: set[bytes] = set()  # lines, where the file is replaced
        self._offset = 0  # bytes read so far
        self._partial = b""  # a line whose end has not been written yet

    def lines(self, *, last: bool = False) -> Iterator[str]:
        """The lines since the previous call.

        last: there is no further call, so a line without its end is complete.
        """
        try:
            with self.path.open("rb") as file:
                if self.replaced:
                    self._notice_another(os.fstat(file.fileno()))
                file.seek(self._offset)
                for line in file:
                    self._offset += len(line)
                    self._partial += line
                    if self._partial.endswith(b"\n") and self._is_new():
                        yield self._take_line()
        except FileNotFoundError:
            pass
        if last and self._partial:
            yield self._take_line()

    def _notice_another(self, stat: os.stat_result) -> None:
        """Begins again at the start of a file that is another one, or shorter."""
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._inode = stat.st_ino
            self._offset = 0
            self._partial = b""

    def _is_new(self) -> bool:
        """Whether the line was not read before; one that was is forgotten."""
        if not self.replaced:
            return True
        if self._partial in self._known:
            self._partial = b""
            return False
        self._known.add(self._partial)
        return True

    def _take_line(self) -> str:
        line = self._partial.decode(errors="replace").rstrip("\r\n")
        self._partial = b""
        return self.prefix + line


def read_logs(path: Path, selection: LogSelection) -> Iterator[str]:
    """The lines of a run's logs.

    Args:
        path: folder of the run.

    Raises:
        UserError: `path` is not a run, or it has no such log.
    """
    run = single_run(path)
    readers = select_logs(run, selection)
    follow = selection.follow and run.active
    for reader in readers:
        lines = reader.lines(last=not follow)
        yield from lines if selection.last_lines is None else deque(lines, selection.last_lines)
    if follow:
        yield from _follow(run, readers, selection.all_ranks)
    elif selection.follow:
        yield _end_line(run)


def single_run(path: Path) -> Run:
    """The run in the folder `path`.

    Raises:
        UserError: `path` is not a run, or it is a sweep.
    """
    entries = find_runs(path)
    if len(entries) > 1 or entries[0].folder != path:
        names = ", ".join(str(entry.folder) for entry in entries[:NAMES_SHOWN])
        if len(entries) > NAMES_SHOWN:
            names += ", ..."
        raise UserError(f"{path} is a sweep of {plural(len(entries), 'run')}; name one: {names}")
    return read_runs(path).runs[0]


def select_logs(run: Run, selection: LogSelection) -> list[LogReader]:
    """Readers of the selected logs.

    Raises:
        UserError: the run has no such log, and none is to come.
    """
    if selection.metrics:
        path = run.folder / METRICS
        if not path.exists() and not (selection.follow and run.active):
            raise UserError(f"{run.folder} has no {METRICS}: it is {describe(run)}")
        return [LogReader(path, "", replaced=True)]
    existing = log_files(run.folder)
    rank = selection.rank or 0
    selected = [log for log in existing if selection.all_ranks or rank_of(log) == rank]
    if not selected and not (selection.follow and run.active):
        raise UserError(_missing_log(run, existing, rank))
    if selection.all_ranks:
        return [_reader_with_rank(log) for log in selected]
    log = selected[0] if selected else run.folder / "logs" / f"rank-{rank:02d}.log"
    return [LogReader(log, "")]


def _missing_log(run: Run, existing: list[Path], rank: int) -> str:
    if existing:
        ranks = ", ".join(str(rank_of(log)) for log in existing)
        return f"{run.folder} has no log of rank {rank}; give one of {ranks}"
    message = f"{run.folder} has no logs: it is {describe(run)}"
    if run.active:
        return f"{message}; --follow waits for them"
    return message


def _follow(run: Run, readers: list[LogReader], all_ranks: bool) -> Iterator[str]:
    """New lines until the run has ended, then a line on its end. Includes later logs."""
    state_read_at = time.monotonic()
    while run.active:
        for reader in readers:
            yield from reader.lines()
        time.sleep(POLL_S)
        if all_ranks:
            known = {reader.path for reader in readers}
            readers += [_reader_with_rank(log) for log in log_files(run.folder) if log not in known]
        if time.monotonic() - state_read_at >= STATE_S:
            run = read_runs(run.folder).runs[0]
            state_read_at = time.monotonic()
    for reader in readers:
        yield from reader.lines(last=True)
    yield _end_line(run)


def _end_line(run: Run) -> str:
    return f"{run.folder}: {describe(run)}"


def _reader_with_rank(log: Path) -> LogReader:
    return LogReader(log, f"[rank {rank_of(log)}] ")


def log_files(run: Path) -> list[Path]:
    """The ranks' logs in the run folder, by rank."""
    logs = [
        path
        for path in (run / "logs").glob("rank-*.log")
        if re.fullmatch(r"rank-\d+\.log", path.name)
    ]
    return sorted(logs, key=rank_of)


def rank_of(log: Path) -> int:
    """The rank in a log's file name."""
    return int(log.stem.split("-")[1])
