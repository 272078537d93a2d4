"""Work in a thread of its own, whose result or error is collected later."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_task(work: Callable[[], T], *, in_thread: bool, name: str = "") -> "Future[T]":
    """Starts `work`; its result or its error is in the future.

    The thread does not keep the process alive, as that of an executor would.

    Args:
        in_thread: False: does it at once.
        name: of the thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    if in_thread:
        threading.Thread(target=run, name=name, daemon=True).start()
    else:
        run()
    return future
