"""Stop signals set a flag. The training loop reads it where all ranks can save."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from evspan.conf.errors import STOP_SIGNALS
from evspan.pipeline.parallel.rank_env import started_as_rank
from evspan.pipeline.parallel.reductions import sum_over_ranks

logger = logging.getLogger(__name__)


class StopFlag:
    """Whether this process was asked to stop. `received` is the number of the signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None

    def request(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Sets the flag; has the signature of a signal handler."""
        self.received = number

    @property
    def name(self) -> str:
        """What asked the process to stop, for a message."""
        return "Ctrl-C" if self.received == signal.SIGINT else "stop signal"

    def interrupt(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of Ctrl-C. Sets the flag; the next Ctrl-C ends the process at once."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.request(number)
        if started_as_rank(os.environ):  # the launcher reports it
            return
        # In a thread: the signal may have interrupted a write to the same stream, which cannot be
        # written to again before that write has ended.
        message = "Ctrl-C: saves at the end of this step and ends; again: ends at once"
        threading.Thread(target=logger.info, args=(message,), name="evspan-ctrl-c").start()

    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def is_set_on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, the same on all. A collective; the host waits.

        Args:
            device: of this rank.
        """
        return any_rank(self.is_set(), device, name="whether a rank was asked to stop")


def any_rank(value: bool, device: torch.device, *, name: str) -> bool:
    """Whether `value` is true on any rank. A collective; the host waits for it.

    Args:
        name: what it is for, in the diagnosis of a run that hangs.
    """
    return bool(sum_over_ranks(torch.tensor([float(value)], device=device), name=name))


@contextmanager
def catch_stop_signals() -> Iterator[StopFlag]:
    """While open, STOP_SIGNALS and the first Ctrl-C set the flag instead of ending the process.

    Python delivers signals to the main thread only. In another thread the flag stays unset.
    """
    flag = StopFlag()
    try:
        previous = {number: signal.signal(number, flag.request) for number in STOP_SIGNALS}
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, flag.interrupt)
    except ValueError:
        previous = {}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
