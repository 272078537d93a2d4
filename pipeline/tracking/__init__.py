"""Tracks of detections: the same object has the same number in all frames."""

from evspan.pipeline.tracking.tracker import NO_TRACK, Tracker, TrackerOptions

__all__ = ["NO_TRACK", "Tracker", "TrackerOptions"]
