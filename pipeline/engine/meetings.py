"""Keeps ranks that have different amounts of work from waiting too long in one collective.

A collective that waits longer than `parallel.timeout_s` ends the run. A rank that evaluates few
recordings may be done hours before the others. So the ranks meet every few minutes, in a collective
that says whether any of them still works.
"""

import time
from collections.abc import Callable

PER_TIMEOUT = 10  # meetings within parallel.timeout_s


class Meetings:
    """The meetings of one rank. All ranks have the same number of them.

    Args:
        any_works: a collective: whether any rank passes true.
        every_s: seconds between meetings while this rank works.
    """

    def __init__(self, any_works: Callable[[bool], bool], every_s: float) -> None:
        self.any_works = any_works
        self.every_s = every_s
        self.last = time.monotonic()

    def while_working(self) -> None:
        """Meets the others if it is time. Called often, by a rank that works."""
        if time.monotonic() - self.last >= self.every_s:
            self.any_works(True)
            self.last = time.monotonic()

    def until_all_are_done(self) -> None:
        """Meets the others until none of them works. Called once, at the end of the work."""
        while self.any_works(False):
            pass
