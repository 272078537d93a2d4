"""Stop signals set a flag; the training loop looks at it between steps, where all ranks can save together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def set(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def hand_on(self) -> None:
        """Give the signal to whoever listened before us (a launcher's handler that requeues), after all was saved."""
        if self.received is not None and callable(previous := self.previous.get(self.received)):
            previous(self.received, None)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Listens while open. In a thread other than the main one signals cannot be caught; the flag then stays unset."""
    flag = StopFlag()
    try:
        flag.previous = {number: signal.signal(number, flag.set) for number in STOP_SIGNALS}
    except ValueError:
        pass
    try:
        yield flag
    finally:
        for number, previous in flag.previous.items():
            signal.signal(number, previous)
