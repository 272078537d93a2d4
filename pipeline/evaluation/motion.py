"""How objects move, from the tracks of their boxes.

An object at rest fires no events: only a detector's memory finds it.
"""

from typing import NamedTuple

import numpy as np
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray

# Consecutive boxes of a track that are further apart are not linked.
GAP_US = 1_000_000


class Motion(NamedTuple):
    """Motion of each box, both (M,).

    nan where the box is the only one of its track, or where its track is in a frame twice.

    speed: of the centre, in pixels of the stored frames per second.
    rest_s: seconds that the object has been at rest by now, as far as its track shows; 0 while it
        moves.
    """

    speed: NDArray[np.float64]
    rest_s: NDArray[np.float64]

    def still(self, seconds: float) -> NDArray[np.bool_]:
        """(M,) boxes of objects at rest for `seconds` or more."""
        return self.rest_s >= seconds - 1e-9  # seconds are sums of microseconds

    def moving(self, seconds: float) -> NDArray[np.bool_]:
        """(M,) boxes of objects at rest for less than `seconds`."""
        return self.rest_s < seconds - 1e-9


def motion(frames: LabelledFrames, still_speed: float) -> Motion:
    """Computes speed and rest of all boxes.

    A speed is that between the previous and the next box of the track, so half as high at the
    moment of a stop; at a track's ends it is one-sided.

    Args:
        still_speed: slower objects are at rest, in pixels of the stored frames per second.
    """
    boxes = frames.boxes
    order = np.lexsort(
        (frames.end_us[frames.box_frame], boxes["track_id"], frames.recording[frames.box_frame])
    )
    t = frames.end_us[frames.box_frame][order]
    recording = frames.recording[frames.box_frame][order]
    track = boxes["track_id"][order]
    columns = (boxes["x"] + boxes["w"] / 2, boxes["y"] + boxes["h"] / 2)
    centre = np.stack(columns, 1).astype(np.float64)[order]
    # (M - 1,): boxes i and i + 1 belong to one track. Negative: without a track.
    same = (np.diff(recording) == 0) & (np.diff(track) == 0) & (track[1:] >= 0)
    linked = same & (np.diff(t) <= GAP_US)
    before = np.arange(len(t))
    after = np.arange(len(t))
    before[1:] -= linked
    after[:-1] += linked
    with np.errstate(invalid="ignore", divide="ignore"):
        speed = np.hypot(*(centre[after] - centre[before]).T) / ((t[after] - t[before]) / 1e6)
    speed[before == after] = np.nan
    track_number = np.cumsum(np.concatenate(([True], ~same))[: len(t)]) - 1
    twice = np.unique(track_number[1:][same & (np.diff(t) == 0)])
    speed[np.isin(track_number, twice)] = np.nan
    slow = speed < still_speed
    rest = _seconds_at_rest(t, slow, linked)
    rest[np.isnan(speed)] = np.nan
    inverse = np.empty(len(t), np.int64)
    inverse[order] = np.arange(len(t))
    return Motion(speed[inverse], rest[inverse])


def _seconds_at_rest(
    t: NDArray[np.int64], slow: NDArray[np.bool_], linked: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(M,) time since the first of the linked slow boxes before each; 0 where it is not slow.

    Args:
        t: (M,) microseconds. slow: (M,). linked: (M - 1,) box i and i + 1.
    """
    begins = slow.copy()
    begins[1:] &= ~(slow[:-1] & linked)
    since = np.zeros(0, np.int64)
    if len(t):
        since = np.maximum.accumulate(np.where(begins, np.arange(len(t)), 0))
    return np.where(slow, (t - t[since]) / 1e6, 0.0)
