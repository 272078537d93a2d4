"""Waits for processes that tests start, by the pid files that they write."""

import time
from pathlib import Path


def pids(folder: Path) -> list[int]:
    """The contents of the pid files."""
    return [int(p.read_text()) for p in sorted(folder.glob("pid-*"))]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition, seconds: float = 120):
    """Waits until a condition holds. Returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds:g} s"
        time.sleep(0.02)
    return value


def all_ready(folder: Path, ranks: int = 2) -> list[int]:
    """Waits until all ranks have written their pid files. Returns the pids."""

    def is_ready() -> bool:
        files = list(folder.glob("pid-*"))
        return len(files) == ranks and all(file.read_text() for file in files)

    eventually(is_ready)
    return pids(folder)
