"""Online tracker with ByteTrack's association (Zhang et al., ECCV 2022).

A frame's confident detections are matched with all tracks first; the unconfident ones then continue
those that were seen in the frame before and are still without a match. Both matchings are by IoU
with the predicted place of the track, within a class, the best pairs first. What is left of the
confident ones begins new tracks. Tracks move at constant velocity, and end when they have not been
seen for some time. Times are the detections' own, so frame rates may differ and vary. An object
that moves by most of its size from its first frame to its second is not linked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from evspan.conf.errors import ConfigError, require
from evspan.pipeline.data.boxes import corners_of, pairwise_iou
from numpy.typing import NDArray

NO_TRACK = -1
VELOCITY_GAIN = 0.5  # of a new measurement of the velocity
MOST_TRACKS = 2000  # at a time; the one that was not seen for the longest time ends first


@dataclass(frozen=True)
class TrackerOptions:
    """How detections become tracks.

    Attributes:
        high_confidence: detections from here on are matched first, and begin tracks.
        low_confidence: detections below are left out.
        match_iou: lowest IoU of a confident detection with a track's predicted box.
        low_match_iou: the same of an unconfident one.
        buffer_ms: a track ends when it was not seen for longer.
    """

    high_confidence: float = 0.5
    low_confidence: float = 0.1
    match_iou: float = 0.2
    low_match_iou: float = 0.5
    buffer_ms: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("high_confidence", "low_confidence", "match_iou", "low_match_iou"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value:g}; give a number from 0 to 1")
        require(
            self.low_confidence <= self.high_confidence,
            f"low_confidence {self.low_confidence:g} is above high_confidence "
            f"{self.high_confidence:g}; give at most that",
        )
        require(
            0 <= self.buffer_ms < float("inf"),
            f"buffer_ms is {self.buffer_ms:g}; give milliseconds, 0 or more",
        )


@dataclass
class _Track:
    """A track as it was last seen.

    centre, size: x, y in pixels. velocity: pixels per microsecond. last: whether it was seen in the
    frame before.
    """

    number: int
    class_id: int
    centre: NDArray[np.float64]
    size: NDArray[np.float64]
    velocity: NDArray[np.float64]
    seen_us: int
    has_velocity: bool = False
    last: bool = True

    def corners_at(self, time_us: int) -> NDArray[np.float64]:
        """(4,) x1, y1, x2, y2 of its box, if it goes on as it went."""
        centre = self.centre + self.velocity * (time_us - self.seen_us)
        return np.concatenate((centre - self.size / 2, centre + self.size / 2))

    def update(self, corners: NDArray[np.float64], time_us: int) -> None:
        """Takes (4,) corners of its detection at a later time."""
        centre = (corners[:2] + corners[2:]) / 2
        measured = (centre - self.centre) / (time_us - self.seen_us)
        gain = VELOCITY_GAIN if self.has_velocity else 1.0
        self.velocity = self.velocity + gain * (measured - self.velocity)
        self.has_velocity = True
        self.centre = centre
        self.size = corners[2:] - corners[:2]
        self.seen_us = time_us


class Tracker:
    """Numbers the tracks of one recording, from frame to frame; deterministic."""

    def __init__(self, options: TrackerOptions | None = None) -> None:
        self.options = options or TrackerOptions()
        self._tracks: list[_Track] = []
        self._next = 0
        self._time_us: int | None = None

    @property
    def tracks(self) -> int:
        """Number of tracks so far."""
        return self._next

    def update(self, detections: NDArray[np.void], time_us: int) -> NDArray[np.int64]:
        """Assigns the detections of the next frame to tracks.

        Args:
            detections: (k,) structured: x, y (top left corner), w, h in pixels, class_id,
                class_confidence; such as RAW_BOX.
            time_us: of the frame, in microseconds; later than that of the frame before.

        Returns:
            (k,) the number of each detection's track; NO_TRACK for unconfident ones that continue
            none.

        Raises:
            ConfigError: the time is not later.
        """
        if self._time_us is not None and time_us <= self._time_us:
            raise ConfigError(
                f"a frame at {time_us} us follows one at {self._time_us} us; give the tracker "
                "frames in the order of their times, and each recording a tracker of its own"
            )
        self._time_us = time_us
        options = self.options
        buffer_us = 1000 * options.buffer_ms
        self._tracks = [t for t in self._tracks if time_us - t.seen_us <= buffer_us]
        corners = corners_of(detections)
        score = detections["class_confidence"].astype(np.float64)
        class_id = detections["class_id"].astype(np.int64)
        numbers = np.full(len(detections), NO_TRACK, np.int64)
        is_high = score >= options.high_confidence
        is_low = ~is_high & (score >= options.low_confidence)
        recent = [track for track in self._tracks if track.last]
        matched: set[int] = set()
        for mask, candidates, least in (
            (is_high, self._tracks, options.match_iou),
            (is_low, recent, options.low_match_iou),
        ):
            left = [track for track in candidates if track.number not in matched]
            rows = np.flatnonzero(mask)
            for track, row in _pairs(left, corners, class_id, rows, least, time_us):
                track.update(corners[row], time_us)
                matched.add(track.number)
                numbers[row] = track.number
        for track in self._tracks:
            track.last = track.number in matched
        for row in np.flatnonzero(is_high & (numbers == NO_TRACK)).tolist():
            numbers[row] = self._begin(corners[row], int(class_id[row]), time_us)
        return numbers

    def _begin(self, corners: NDArray[np.float64], class_id: int, time_us: int) -> int:
        if len(self._tracks) >= MOST_TRACKS:
            oldest = min(range(len(self._tracks)), key=lambda i: self._tracks[i].seen_us)
            del self._tracks[oldest]
        number = self._next
        self._next += 1
        self._tracks.append(
            _Track(
                number=number,
                class_id=class_id,
                centre=(corners[:2] + corners[2:]) / 2,
                size=corners[2:] - corners[:2],
                velocity=np.zeros(2),
                seen_us=time_us,
            )
        )
        return number


def _pairs(
    tracks: Sequence[_Track],
    corners: NDArray[np.float64],
    class_id: NDArray[np.int64],
    rows: NDArray[np.int64],
    least: float,
    time_us: int,
) -> list[tuple[_Track, int]]:
    """Pairs of a track and a detection of its class, the highest IoU first.

    Args:
        corners: (k, 4) of all detections. class_id: (k,).
        rows: the detections that take part.
        least: lowest IoU of a pair.
    """
    if not tracks or not len(rows):
        return []
    predicted = np.stack([track.corners_at(time_us) for track in tracks])
    overlaps = pairwise_iou(predicted, corners[rows])
    classes = np.array([track.class_id for track in tracks])
    overlaps[classes[:, None] != class_id[rows]] = -1.0
    pairs: list[tuple[_Track, int]] = []
    taken_tracks: set[int] = set()
    taken_rows: set[int] = set()
    # Stable: of equal overlaps the older track and the first detection.
    order = np.argsort(-overlaps, axis=None, kind="stable")
    for flat in order[: np.count_nonzero((overlaps >= least) & (overlaps > 0))]:
        track, row = divmod(int(flat), len(rows))
        if track in taken_tracks or row in taken_rows:
            continue
        taken_tracks.add(track)
        taken_rows.add(row)
        pairs.append((tracks[track], int(rows[row])))
    return pairs
