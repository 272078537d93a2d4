"""The end of a rank that failed while other ranks still wait for it: at once. No torch.

Destroying an NCCL process group, or letting the interpreter do it, waits for the collectives that
the failed rank does not join. `open_world` leaves its group open then, and the command that runs
the rank ends the process with `end_process` once it has reported the error.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import NoReturn

FLUSH_S = 1.0  # a reader of the output that has stopped must not keep the process
# Functions that wait until the other ranks have read this one's status; one per group left open.
_waits: list[Callable[[], None]] = []
_threads_left: list[bool] = []  # not empty: threads may wait forever


def leave_group_open(wait: Callable[[], None]) -> None:
    """Records that this process has left a process group open.

    Args:
        wait: is called after the output is flushed, just before the process ends.
    """
    _waits.append(wait)


def leave_threads_behind() -> None:
    """Records that threads of this process may wait forever, as for a file system that hangs.

    The interpreter would wait for them at its end.
    """
    _threads_left.append(True)


def group_is_open() -> bool:
    """Whether an error has left a process group open."""
    return bool(_waits)


@contextmanager
def prompt_exit() -> Iterator[None]:
    """If the body ends while a process group is left open, ends the process as Python would.

    An exception prints its traceback and gives exit code 1; SystemExit gives its own. Neither exit
    handlers nor destructors run. Without such a group, and with no threads left behind, it does
    nothing.
    """
    try:
        yield
    except SystemExit as end:
        if not _must_end_at_once():
            raise
        end_process(_exit_code(end))
    except BaseException:
        if not _must_end_at_once():
            raise
        sys.excepthook(*sys.exc_info())
        end_process(1)


def end_process(code: int) -> NoReturn:
    """Flushes the output, waits for the other ranks if a process group is open, and ends.

    Without an open group, and with no threads left behind, it raises SystemExit.
    """
    if not _must_end_at_once():
        sys.exit(code)
    flush_output()
    for wait in _waits:
        wait()
    exit_now(code)


def _must_end_at_once() -> bool:
    return bool(_waits or _threads_left)


def exit_now(code: int) -> NoReturn:
    """Ends the process and its worker processes, whatever its threads are waiting for."""
    import multiprocessing  # half of the time that the command takes to start

    for child in multiprocessing.active_children():
        child.kill()
    flush_output()
    os._exit(code)


def flush_output() -> None:
    """Flushes standard output and standard error; gives up after FLUSH_S."""
    thread = Thread(target=_flush, name="flush", daemon=True)
    thread.start()
    thread.join(FLUSH_S)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A stream may be missing or closed, or its reader gone.
        with suppress(AttributeError, ValueError, OSError):
            stream.flush()


def _exit_code(end: SystemExit) -> int:
    """The exit code that Python gives a process that ends with `end`."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return 1
