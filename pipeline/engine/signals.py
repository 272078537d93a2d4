"""Stop signals set a flag. The training loop reads it between steps, where all ranks can save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Whether this process was asked to stop. `received` is the number of the signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None

    def request(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Sets the flag; has the signature of a signal handler."""
        self.received = number


@contextmanager
def catch_stop_signals() -> Iterator[StopFlag]:
    """While open, STOP_SIGNALS set the flag instead of ending the process.

    Python delivers signals to the main thread only. In another thread the flag stays unset.
    """
    flag = StopFlag()
    try:
        previous = {number: signal.signal(number, flag.request) for number in STOP_SIGNALS}
    except ValueError:
        previous = {}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
