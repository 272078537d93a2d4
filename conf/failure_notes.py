"""Failure notes: a process that fails writes the time and its message to a file.

The process that started it names the file. It reads the notes of all ranks to find the one that
failed first.
"""

import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import LOST_EXIT_CODE

logger = logging.getLogger(__name__)
FAILURE_FILE = "EVSPAN_FAILURE_FILE"  # environment variable: the path of this process's note


class FailureNote(NamedTuple):
    """When a process failed, and its message.

    monotonic_ns: CLOCK_MONOTONIC, comparable between processes of one machine; inf: no note.
    """

    monotonic_ns: float
    message: str


def write_failure_note(message: str) -> bool:
    """Write the note of this process. Returns False where no parent asked for one."""
    path = os.environ.get(FAILURE_FILE)
    if not path:
        return False
    # A file's modification time is only as fine as the kernel's ticks.
    Path(path).write_text(f"{time.monotonic_ns()}\n{message}")
    return True


def read_failure_note(path: Path) -> FailureNote:
    """The note at `path`. Without one the time is infinite and the message empty."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return FailureNote(float("inf"), "")
    time_text, _, message = text.partition("\n")
    return FailureNote(float(time_text or "inf"), message.strip())


def report_lost_ranks(message: str) -> int:
    """Report that other ranks are gone: in the note if there is one, else as a log record.

    Under a parent that watches all ranks, the parent prints the message once.

    Returns:
        The exit code for this process.
    """
    if not write_failure_note(message):
        logger.error("%s", message)
    return LOST_EXIT_CODE
