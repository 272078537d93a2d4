"""Standard output and standard error that cannot end a run.

`open_output_streams` replaces sys.stdout and sys.stderr, so that everything that Python code of
this process writes goes through the streams of this module: print, logging, progress bars, the
output of libraries.

- Control characters, other than newlines and tabs, are escaped (`conf.text.printable_lines`). Names
  and messages may come from files of other people.
- A character that the terminal's encoding lacks is escaped too.
- Output that cannot be written (the reader has closed the pipe, the disk is full, the terminal is
  gone) raises its OSError where the output is what a command is for. A command whose results are
  files calls `drop_lost_output`, and goes on without it. What standard error cannot take is always
  dropped.
- Where the process was started without one of the streams, no other file gets its descriptor.
"""

import io
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from evspan.conf.text import printable_lines

# How tqdm starts a line, and moves between several bars. Only for a terminal.
_PROGRESS_BAR = re.compile(r"\r|\n*(?:\x1b\[A)+")
_thread = threading.local()  # copies: whether the thread's output is copied
_copy: Callable[[str], None] | None = None
_dropping = False
_warned = False
_stdout_error: OSError | None = None


def open_output_streams() -> None:
    """Replaces sys.stdout and sys.stderr, unless the caller has replaced them already."""
    _fill_closed_descriptors()
    os.environ.setdefault("PYTHON_COLORS", "0")  # of tracebacks; the streams would escape them
    if sys.stdout is sys.__stdout__:
        sys.stdout = OutputStream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = OutputStream(2, sys.stderr)


def drop_lost_output() -> None:
    """From now on, what cannot be written to standard output is dropped.

    A full disk gives one warning on standard error. For commands whose results are files.
    """
    global _dropping
    _dropping = True


def give_up_output() -> None:
    """As `drop_lost_output`, without a warning: the loss has been reported."""
    global _dropping, _warned
    _dropping = True
    _warned = True


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends what this process and its children write to standard output to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def stdout_error() -> OSError | None:
    """The error of a write to standard output that was raised; None where there was none."""
    return _stdout_error


def write_control(text: str) -> None:
    """Writes control characters for the terminal to standard output."""
    if isinstance(sys.stdout, OutputStream):
        sys.stdout.write_control(text)
    else:
        sys.stdout.write(text)


def copy_output(write: Callable[[str], None] | None) -> None:
    """From now on, what is written to both streams is also passed to `write`; None: no longer.

    Progress bars are not.
    """
    global _copy
    _copy = write


@contextmanager
def not_copied() -> Iterator[None]:
    """What this thread writes meanwhile is not copied."""
    _thread.copies = False
    try:
        yield
    finally:
        _thread.copies = True


class OutputStream(io.TextIOWrapper):
    """A text stream on descriptor 1 or 2. replaced: the stream whose settings it takes over."""

    def __init__(self, descriptor: int, replaced: TextIO | None) -> None:
        # Without a stream there is no open descriptor: -1 gives EBADF.
        raw = _Descriptor(descriptor if replaced else -1, is_stdout=descriptor == 1)
        settings = replaced if isinstance(replaced, io.TextIOWrapper) else None
        self._unbuffered = settings is not None and settings.write_through  # python -u
        self._progress_bars = descriptor == 2 and raw.isatty()
        super().__init__(
            io.BufferedWriter(raw),
            encoding=settings.encoding if settings else "utf-8",
            errors="backslashreplace",
            newline="\n",
            line_buffering=settings.line_buffering if settings else False,
        )

    def write(self, text: str) -> int:
        """Writes text with escaped control characters. Returns its number of characters."""
        start = 0
        if self._progress_bars:
            match = _PROGRESS_BAR.match(text)
            start = match.end() if match else 0
        shown = printable_lines(text[start:])
        self.write_control(text[:start] + shown)
        if _copy is not None and not start and getattr(_thread, "copies", True):
            _copy(shown)
        return len(text)

    def write_control(self, text: str) -> None:
        """Writes text as it is."""
        super().write(text)
        if self._unbuffered:
            self.flush()


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor, all of it, and leaves it open."""

    def __init__(self, descriptor: int, *, is_stdout: bool) -> None:
        self.name = "<stdout>" if is_stdout else "<stderr>"
        self._descriptor = descriptor
        self._is_stdout = is_stdout

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._descriptor >= 0 and os.isatty(self._descriptor)

    def fileno(self) -> int:
        if self._descriptor < 0:
            raise io.UnsupportedOperation(f"{self.name} is closed")
        return self._descriptor

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")  # data: any object with the buffer protocol
        written = 0
        while written < len(view):
            try:
                written += os.write(self._descriptor, view[written:])
            except BlockingIOError:  # another process has made the pipe or terminal non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                self._lose(error)
                break
        return len(view)

    def _lose(self, error: OSError) -> None:
        """Raises the error, or drops the output."""
        global _stdout_error, _warned
        if not self._is_stdout:
            return
        if not _dropping:
            _stdout_error = _stdout_error or error
            raise _stdout_error
        if not isinstance(error, BrokenPipeError) and not _warned:
            _warned = True
            reason = os.strerror(error.errno or 0)
            print(
                f"warning: standard output: {reason}; the command goes on without it",
                file=sys.stderr,
            )


def _fill_closed_descriptors() -> None:
    """Opens descriptors 0 to 2 where they are closed.

    The next file that is opened would get the number, and the output of a library or a child
    process would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY)  # reads nothing; writing fails
            os.set_inheritable(opened, True)
