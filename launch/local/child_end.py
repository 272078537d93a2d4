"""How a child process that runs an evspan command has ended, and its standard error."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from evspan.conf.errors import INTERRUPTED_EXIT_CODE, STOPPED_CODES

PREFIX = "error: "


def pass_on_errors(child: "subprocess.Popen[str]") -> Iterator[str]:
    """Copies the child's standard error to ours until it ends. Yields each error message."""
    assert child.stderr is not None
    for line in child.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith(PREFIX):
            yield line.removeprefix(PREFIX).strip()


def last_error(child: "subprocess.Popen[str]") -> str:
    """Copies the child's standard error to ours until it ends. Returns its last error message."""
    message = ""
    for error in pass_on_errors(child):
        message = error
    return message


class ChildEnd(NamedTuple):
    """The end of a child process.

    Attributes:
        code: its exit code; 128 + n if signal n has ended it.
        message: its last error message, or the signal or code; empty for code 0.
    """

    code: int
    message: str

    @property
    def was_stopped(self) -> bool:
        """Whether a stop signal or Ctrl-C has ended it, after saving or before it could save."""
        return self.code in (*STOPPED_CODES, INTERRUPTED_EXIT_CODE)


def child_end(code: int, error: str) -> ChildEnd:
    """Args:
    code: of `subprocess`: -n if signal n has ended the process.
    error: its last error message, or empty.
    """
    if code < 0:
        return ChildEnd(128 - code, f"was killed by {signal.Signals(-code).name}")
    return ChildEnd(code, error or (f"exit code {code}" if code else ""))
