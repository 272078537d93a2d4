"""Progress bars with the remaining time, for every command. On a terminal only.

A bar is drawn on standard error, and disappears when its work has ended. Log lines appear above
it. Where standard error is no terminal, nothing is drawn: a command that runs for long logs lines
of its own. Only rank 0 draws: its launcher gives it the terminal, and the other ranks a pipe.

    for frame in progress(frames, "detecting", unit="frame"): ...

    with ProgressBar("training", total=max_steps, unit="step", done=step) as bar:
        bar.advance()
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")
KNOWN_TOTAL = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)
UNKNOWN_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_noinv_fmt}{postfix}]"
_open: list["ProgressBar"] = []  # of this process, the outermost first
_lock = threading.RLock()
_turned_off = False


def turn_off_bars() -> None:
    """This process draws none from now on: it is not rank 0, or its output is a log file."""
    global _turned_off
    _turned_off = True


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


class ProgressBar:
    """A context manager that draws the bar while it is open.

    Args:
        description: in front of the bar.
        total: units of work; None: unknown, so there is no remaining time.
        unit: of the work, in the singular.
        done: units that were done before, as in a run that is resumed.
    """

    def __init__(
        self, description: str, total: int | None, *, unit: str = "step", done: int = 0
    ) -> None:
        self.total = total
        self.done = done
        self._process = os.getpid()
        self._bar: tqdm[None] | None = None
        if _is_terminal() and not _turned_off:
            self._bar = self._draw(description, unit)

    def _draw(self, description: str, unit: str) -> "tqdm[None]":
        # Commands that draw no bar need not import it.
        from tqdm import tqdm

        # Its monitor is a thread that this process would have when it forks.
        tqdm.monitor_interval = 0
        tqdm.set_lock(_lock)
        with _lock:
            bar = tqdm(
                total=self.total,
                desc=description,
                unit=f" {unit}s",
                initial=self.done,
                leave=False,
                dynamic_ncols=True,
                bar_format=UNKNOWN_TOTAL if self.total is None else KNOWN_TOTAL,
                miniters=1,  # at most ten times a second
            )
            _open.append(self)
        return cast("tqdm[None]", bar)

    @property
    def is_drawn(self) -> bool:
        """Whether there is a bar on a terminal."""
        return self._bar is not None

    def advance(self, units: int = 1) -> None:
        """Counts further units of work as done."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)

    def note(self, text: str) -> None:
        """Shows a short text behind the bar, such as the loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Removes the bar. Later calls do nothing."""
        with _lock:
            if self in _open:
                _open.remove(self)
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def progress(
    items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "step"
) -> Iterator[Item]:
    """Yields the items with a bar. See `ProgressBar`.

    Args:
        total: number of items; None: len(items), where it has a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(description, total, unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def above_bars() -> Iterator[None]:
    """What is written meanwhile appears above the open bars. The log's handlers use it."""
    drawn = [bar for bar in _open if bar.is_drawn and bar._process == os.getpid()]
    if not drawn:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode():
        yield
