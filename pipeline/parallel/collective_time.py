"""Measures which part of a step this rank spends in collectives.

Whoever issues a collective does so inside of `collective()`. What the rank does there is to move
data and to wait for the others; the rest of a step's time is its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

COLLECTIVES = (  # of an object with the interface of torch.distributed
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class CollectiveClock(Protocol):
    """Measures a step."""

    def begin_collective(self) -> None:
        """The rank issues a collective."""

    def end_collective(self) -> None:
        """The collective is complete, or, on a GPU, what follows it in the stream."""


_clock: CollectiveClock | None = None


def measure_with(clock: CollectiveClock | None) -> None:
    """Sets the clock of this process; None: collectives are not measured."""
    global _clock
    _clock = clock


@contextmanager
def collective() -> Iterator[None]:
    """Around each collective."""
    clock = _clock
    if clock is None:
        yield
        return
    clock.begin_collective()
    try:
        yield
    finally:
        clock.end_collective()


def time_collectives(backend: Any) -> None:
    """Measures the collectives that another library issues through an object of its own.

    Args:
        backend: has some of the methods COLLECTIVES; they are replaced, once.
    """
    for name in COLLECTIVES:
        call = getattr(backend, name, None)
        if call is not None and not getattr(call, "is_timed", False):
            setattr(backend, name, _timed(call))


def _timed(call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with collective():
            result = call(*args, **kwargs)
        is_pending = bool(kwargs.get("async_op")) and hasattr(result, "wait")
        return _TimedWork(result) if is_pending else result

    timed.is_timed = True  # type: ignore[attr-defined]  # an attribute of the function
    return timed


class _TimedWork:
    """A collective that was started, and whose end is waited for later."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with collective():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
