"""A command on a pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence

COLUMNS = 120


class Terminal:
    """Starts `command` as the foreground process group of a terminal of its own.

    output: all bytes that were written to it so far.
    """

    def __init__(self, command: Sequence[str], **options) -> None:
        self.output = b""
        self.descriptor, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        os.close(child)

    def type(self, text: bytes) -> None:
        """As keys that are pressed; b"\\x03" is Ctrl-C."""
        os.write(self.descriptor, text)

    def read_until(self, pattern: bytes, timeout_s: float = 120) -> None:
        """Reads until the output matches `pattern`."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.output):
            assert time.monotonic() < deadline, self.output.decode(errors="replace")[-3000:]
            assert self._read(), self.output.decode(errors="replace")[-3000:]

    def wait(self, timeout_s: float = 120) -> int:
        """Reads until the command has ended. Returns its exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < deadline, self.output.decode(errors="replace")[-3000:]
        return self.process.wait(timeout=120)

    def _read(self) -> bool:
        """Whether a writer is left."""
        if not select.select([self.descriptor], [], [], 1)[0]:
            return True
        try:
            self.output += os.read(self.descriptor, 1 << 16)
        except OSError:  # the last writer is gone
            return False
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.descriptor)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def screen(output: bytes) -> list[str]:
    """The lines that a terminal shows, without spaces at their ends and empty lines."""
    lines = [""]
    row = 0
    column = 0
    for text in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", output.decode()):
        if text == "\x1b[A":
            row -= 1
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]
