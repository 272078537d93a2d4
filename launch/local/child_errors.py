"""The standard error of a child process that runs an evspan command."""

import subprocess
import sys
from collections.abc import Iterator

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
