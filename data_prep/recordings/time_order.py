"""Makes the times of a recording non-decreasing: drops spikes, raises late events.

A *spike* is a short run of events whose time is SPIKE_US or more ahead of all before, after which
the recording continues from before: usually one flipped bit. It is dropped; without that, all that
follows would be moved to its time. Exactly:

- `latest` is the greatest time so far of an event that was kept. An event is *ahead* if its time is
  at least latest + SPIKE_US. (The first event of a recording is ahead of a later one that is
  SPIKE_US or more earlier than it.)
- The *run* of an event that is ahead goes on to the first event that is below latest + SPIKE_US
  and SPIKE_US or more earlier than the run's first, at most LONGEST_SPIKE events later. Without
  such an event, the recording has a gap there: the event is kept, and `latest` is its time.
- The *return* goes on from there to the first event that is not earlier than the run's first. If
  the return has more events than the run, the run is a spike. Otherwise the return is late, and
  the event that is ahead is kept.

An event earlier than `latest` is *late*: it is kept, and its time is raised to `latest`, as RVT
does. Both depend on the sequence of events alone, not on how it is cut into blocks; what cannot be
decided yet is held back, at most 2 * LONGEST_SPIKE + 1 events.
"""

from dataclasses import dataclass

import numpy as np
from evspan.data_prep.recordings.events import Events, no_events
from numba import njit
from numpy.typing import NDArray

SPIKE_US = 10_000  # a fifth of a window; cameras and recorders reorder by less
LONGEST_SPIKE = 4096  # events
FAR_LATE_US = 1000  # a fifth of a bin of 5 ms; cameras disorder events by some 100 us
NONE_YET = int(np.iinfo(np.int64).min)

# Entries of the state: latest time; whether there is one; how many events came before; counts of
# spikes' events, late ones and those by FAR_LATE_US or more; the largest step back: microseconds,
# its event and that one's time.
LATEST, STARTED, BEFORE, SPIKES, LATE, FAR_LATE, STEP_US, STEP_EVENT, STEP_TO = range(9)


@njit(cache=True, nogil=True)
def _first_ahead(t: NDArray[np.int64], begin: int, before: int) -> int:
    """Index of the first event from `begin` on that is ahead of the one before it; N: none is.

    Args:
        before: time of the event before `begin`.
    """
    for i in range(begin, t.size):
        if t[i] - before >= SPIKE_US:
            return i
        before = t[i]
    return int(t.size)


@njit(cache=True, nogil=True)
def _steps_back(t: NDArray[np.int64]) -> NDArray[np.int32]:
    """(N,) for each event, the index of the next one that is earlier than its predecessor, or N."""
    steps = np.empty(t.size, np.int32)
    following = np.int32(t.size)
    for i in range(t.size - 1, -1, -1):
        steps[i] = following
        if i > 0 and t[i] < t[i - 1]:
            following = np.int32(i)
    return steps


@njit(cache=True, nogil=True)
def _spike(
    t: NDArray[np.int64], steps: NDArray[np.int32], i: int, threshold: int, is_last: bool
) -> int:
    """Events of the spike that begins at `i`; 0: it is none; -1: that depends on later events.

    Args:
        threshold: events below it are not of the run.
        is_last: no events follow t.
    """
    end = np.int64(steps[i])
    while end < t.size and end - i <= LONGEST_SPIKE and t[end] >= threshold:
        end = np.int64(steps[end])
    if end - i > LONGEST_SPIKE or (end == t.size and is_last):
        return 0
    if end == t.size:
        return -1
    run = end - i
    k = end
    while k < t.size and t[k] < t[i]:
        if k - end == run:
            return int(run)
        k += 1
    return 0 if k < t.size or is_last else -1


@njit(cache=True, nogil=True)
def _settle(
    t: NDArray[np.int64], state: NDArray[np.int64], is_last: bool, keep: NDArray[np.bool_]
) -> int:
    """Raises late times (N,) in place, and clears `keep` (N,) for spikes.

    Returns:
        The number of events that are settled; the others depend on later ones.
    """
    latest = state[LATEST]
    steps = np.empty(0, np.int32)
    i = 0
    while i < t.size:
        now = t[i]
        if state[STARTED] and now - latest < SPIKE_US:
            if now < latest:
                state[LATE] += 1
                state[FAR_LATE] += latest - now >= FAR_LATE_US
                if latest - now > state[STEP_US]:
                    state[STEP_US] = latest - now
                    state[STEP_EVENT] = state[BEFORE] + i
                    state[STEP_TO] = now
                t[i] = latest
            else:
                latest = now
            i += 1
            continue
        if not steps.size:
            steps = _steps_back(t)
        threshold = now - SPIKE_US + 1
        if state[STARTED]:
            threshold = min(threshold, latest + SPIKE_US)
        run = _spike(t, steps, i, threshold, is_last)
        if run < 0:
            break
        if run:
            keep[i : i + run] = False
            state[SPIKES] += run
            i += run
        else:
            latest = now
            state[STARTED] = 1
            i += 1
    state[LATEST] = latest
    return i


@dataclass(frozen=True)
class StepBack:
    """The largest step back in time: `event` at `time_us`, `by_us` earlier than one before it."""

    event: int
    time_us: int
    by_us: int


class TimeOrder:
    """Corrects the events of one recording, block by block.

    Attributes:
        latest: the greatest time of an event that was kept; the smallest int64 before the first.
        spikes: events that were dropped so far.
        late: events that were raised so far.
        far_late: those of them that were raised by FAR_LATE_US or more.
        largest_step_back: where the time ran back furthest; None where it never did.
    """

    def __init__(self) -> None:
        self.latest = NONE_YET
        self.spikes = 0
        self.late = 0
        self.far_late = 0
        self.largest_step_back: StepBack | None = None
        self.before = 0  # events that are settled
        self.held = no_events()

    def passes(self, t: NDArray[np.int64], *, is_last: bool) -> bool:
        """Takes a block that needs no correction, if it is one; `settle` takes the others.

        Args:
            t: (N,) times that do not decrease, from `latest` on.
            is_last: none follow, or none are to be held back.
        """
        size = t.size
        if self.held.t.size or self.latest == NONE_YET:
            return False
        if size and not is_last:
            begin = max(0, size - LONGEST_SPIKE)
            before = int(t[begin - 1]) if begin else self.latest
            # No spike can begin at the end.
            is_dense = t[-1] - before < SPIKE_US
            if not is_dense and _first_ahead(t, begin, before) < size:
                return False
        if size:
            self.latest = int(t[-1])
            self.before += size
        return True

    def settle(self, events: Events, *, is_last: bool = False) -> Events:
        """The events before the next undecided one, corrected.

        Args:
            events: follow those of the call before. Their arrays are not changed.
            is_last: none follow, or none are to be held back.
        """
        events = self.held.followed_by(events)
        keep = np.ones(events.t.size, np.bool_)
        times = events.t.copy()
        state = np.zeros(9, np.int64)
        state[LATEST] = self.latest
        state[STARTED] = self.latest != NONE_YET
        state[BEFORE] = self.before
        if self.largest_step_back is not None:
            state[STEP_US] = self.largest_step_back.by_us
        settled = _settle(events.t, state, is_last, keep)
        self.held = events.take(slice(settled, None))._replace(t=times[settled:])
        events = events.take(slice(0, settled))
        self.before += settled
        self.late += int(state[LATE])
        self.far_late += int(state[FAR_LATE])
        if state[STARTED]:
            self.latest = int(state[LATEST])
        if state[STEP_EVENT]:
            step = StepBack(int(state[STEP_EVENT]), int(state[STEP_TO]), int(state[STEP_US]))
            self.largest_step_back = step
        if state[SPIKES]:
            self.spikes += int(state[SPIKES])
            events = events.take(keep[:settled])
        return events
