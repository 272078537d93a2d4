"""How objects move, from the tracks of their boxes. An object at rest fires no events: only memory finds it."""

from typing import NamedTuple

import numpy as np
from evspan.pipeline.evaluation.frames import LabelledFrames
from numpy.typing import NDArray

GAP_US = 1_000_000  # boxes of a track that are further apart tell nothing of what is between them


class Motion(NamedTuple):
    """Of each box (M,); nan where it is the only one of its track, or its track is in a frame twice."""

    speed: NDArray[np.float64]  # of its centre, pixels of the stored frames per second
    rest_s: NDArray[
        np.float64
    ]  # seconds that it has been slow by now, as far as its track tells; 0 while it moves

    def still(self, seconds: float) -> NDArray[np.bool_]:
        return self.rest_s >= seconds - 1e-9  # seconds are sums of microseconds

    def moving(self, seconds: float) -> NDArray[np.bool_]:
        return self.rest_s < seconds - 1e-9


def motion(frames: LabelledFrames, still_speed: float) -> Motion:
    """Speeds are between the box before and the box after, so half as high at the moment of a stop; one-sided at a track's ends.

    still_speed: slower boxes are at rest.
    """
    boxes = frames.boxes
    t, recording, track = (
        frames.end_us[frames.box_frame],
        frames.recording[frames.box_frame],
        boxes["track_id"],
    )
    order = np.lexsort((t, track, recording))
    t, recording, track = t[order], recording[order], track[order]
    centre = np.stack((boxes["x"] + boxes["w"] / 2, boxes["y"] + boxes["h"] / 2), 1).astype(
        np.float64
    )[order]
    same = (np.diff(recording) == 0) & (
        np.diff(track) == 0
    )  # (M - 1,): box i and i + 1 are of one track
    linked = same & (np.diff(t) <= GAP_US)
    before, after = np.arange(len(t)), np.arange(len(t))
    before[1:] -= linked
    after[:-1] += linked
    with np.errstate(invalid="ignore", divide="ignore"):
        speed = np.hypot(*(centre[after] - centre[before]).T) / ((t[after] - t[before]) / 1e6)
    speed[before == after] = np.nan
    number = np.cumsum(np.concatenate(([True], ~same))[: len(t)]) - 1  # of the track
    twice = np.unique(number[1:][same & (np.diff(t) == 0)])
    speed[np.isin(number, twice)] = np.nan
    slow = speed < still_speed
    begins = slow.copy()
    begins[1:] &= ~(slow[:-1] & linked)
    since = (
        np.maximum.accumulate(np.where(begins, np.arange(len(t)), 0))
        if len(t)
        else np.zeros(0, np.int64)
    )
    rest = np.where(slow, (t - t[since]) / 1e6, 0.0)
    rest[np.isnan(speed)] = np.nan
    back = np.empty(len(t), np.int64)
    back[order] = np.arange(len(t))
    return Motion(speed[back], rest[back])
