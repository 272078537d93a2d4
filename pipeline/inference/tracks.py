"""Numbers the tracks of a recording's detections."""

import numpy as np
from evspan.data_prep.labels.box_files import NO_TRACK
from evspan.pipeline.inference.detect import Detected, WorkTimer
from evspan.pipeline.tracking import Tracker, TrackerOptions


class DetectionTracker:
    """Writes track ids into the detections of consecutive frames.

    Args:
        clock: its time counts as "tracking".
        confidence: detections from here on begin tracks.
    """

    def __init__(self, clock: WorkTimer, confidence: float) -> None:
        self.clock = clock
        low = min(TrackerOptions.low_confidence, confidence)
        self.tracker = Tracker(TrackerOptions(high_confidence=confidence, low_confidence=low))

    @property
    def tracks(self) -> int:
        """Number of tracks so far."""
        return self.tracker.tracks

    def numbered(self, item: Detected) -> Detected:
        """The frame's detections with their track_id, from 1 on; NO_TRACK without a track."""
        with self.clock("tracking"):
            numbers = self.tracker.update(item.boxes, item.end_us)
            boxes = item.boxes.copy()
            boxes["track_id"] = np.where(numbers < 0, NO_TRACK, numbers + 1)
            return item._replace(boxes=boxes)
