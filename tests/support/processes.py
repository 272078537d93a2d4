"""Waits for processes that tests start, by the pid files that they write."""

import time
from pathlib import Path


def pids(folder: Path) -> list[int]:
    return [int(p.read_text()) for p in sorted(folder.glob("pid-*"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return value


def all_ready(folder: Path, ranks: int = 2) -> list[int]:
    return eventually(
        lambda: (
            len(list(folder.glob("pid-*"))) == ranks
            and all(p.read_text() for p in folder.glob("pid-*"))
            and pids(folder)
        )
    )
